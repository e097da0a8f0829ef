"""Which contenders meet at what: the cases of speed and memory, and the suites that they make up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .contenders import (
    ALL,
    FAST,
    FAST_FROZEN,
    MAX_AUTOTUNE,
    MEMORY_CONTENDERS,
    NAIVE,
    NAIVE_AND_FAST,
    OPENVINO,
    Contender,
)
from .subjects import CIFAR_NETWORKS, DENSENET121, DTYPES, SUBJECTS, Network, Subject, deep_densenet
from .training import Program

TRAINING, INFERENCE, STEP = ("forward", "backward", "step"), ("inference",), ("step",)


@dataclass(frozen=True)
class SpeedCase:
    """Contenders that take turns at one input, in one or several modes."""

    subject: Subject
    modes: tuple[str, ...]
    batch: int
    device: str
    dtype_name: str
    contenders: tuple[Contender, ...]
    seconds: float
    """About how long the rounds of a mode may take."""
    fewest_rounds: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def entrants(self) -> list[Contender]:
        return [c for c in self.contenders if c.enters(self.subject, self.modes, self.device)]

    @property
    def expected_seconds(self) -> float:
        return sum(c.first_call_s for c in self.entrants) + len(self.modes) * self.seconds

    def __str__(self) -> str:
        return f"{self.subject.title}, batch {self.batch}, {self.dtype_name}"


@dataclass(frozen=True)
class MemoryCase:
    """One contender's bytes at one shape: of a training step, or of inference."""

    subject: Subject
    contender: Contender
    batch: int
    device: str
    dtype_name: str
    mode: str = "step"
    peak: bool = True
    """Whether to run it, or only a training forward."""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def __str__(self) -> str:
        return f"{self.subject.title}, batch {self.batch}, {self.dtype_name}, {self.contender.name}"


@dataclass(frozen=True)
class Meeting:
    """Contenders and a subject, in some modes and batches."""

    subject: Subject
    modes: tuple[str, ...]
    contenders: tuple[Contender, ...] = NAIVE_AND_FAST
    batches: tuple[int, ...] = ()
    """Instead of the subject's usual one."""

    def batches_on(self, device: str) -> tuple[int, ...]:
        usual = self.subject.batch_gpu if device.startswith("cuda") else self.subject.batch_cpu
        return self.batches or (usual,)


@dataclass(frozen=True)
class Suite:
    """How much is measured."""

    meetings: tuple[Meeting, ...] = ()
    seconds: float = 2.5
    """About how long the rounds of a mode may take."""
    fewest_rounds: int = 8
    """However long they take: with fewer, a comparison of two runs could not prove a difference among so many cases."""
    memory: tuple[tuple[Network, int], ...] = ()
    """Networks and batches, of which training's memory is measured."""
    memory_of_meetings: bool = False
    """Whether the contenders' peaks in :attr:`meetings` are measured too, at the largest batch; those of compiled ones
    are not, as they would have to be compiled again."""
    depths: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    roofline: tuple[tuple[Network, int], ...] = ()
    programs: tuple[Program, ...] = ()
    """What is trained by naive and by fast."""

    def speed_cases(self, device: str, dtypes: tuple[str, ...]) -> list[SpeedCase]:
        return [
            SpeedCase(m.subject, m.modes, batch, device, dtype, m.contenders, self.seconds, self.fewest_rounds)
            for m in self.meetings
            for batch in m.batches_on(device)
            for dtype in dtypes
        ]

    def memory_cases(self, device: str, dtypes: tuple[str, ...]) -> list[MemoryCase]:
        """In ``dtypes``, and the forward under bfloat16 autocast in any case: bytes need no fast CPU."""
        cases = []
        for network, batch in self.memory:
            for dtype in dict.fromkeys((*dtypes, "bf16")):
                peak = dtype in dtypes
                cases += [MemoryCase(network, c, batch, device, dtype, peak=peak) for c in MEMORY_CONTENDERS]
        if self.memory_of_meetings:
            largest = [replace(m, batches=m.batches_on(device)[-1:]) for m in self.meetings]
            for case in replace(self, meetings=tuple(largest)).speed_cases(device, dtypes):
                mode = "inference" if case.modes == INFERENCE else "step"
                for contender in case.entrants:
                    if contender.why_not(case.dtype_name) is None and contender.compile_mode is None:
                        cases.append(MemoryCase(case.subject, contender, case.batch, device, case.dtype_name, mode))
        return cases

    def growth_cases(self, device: str, dtype: str) -> Iterator[tuple[str, int, list[MemoryCase]]]:
        """(what grows, its value, a case a contender): depth of DenseNet-BC, batch, resolution."""
        points = [("depth", depth, deep_densenet(depth), 4) for depth in self.depths]
        points += [("batch", batch, CIFAR_NETWORKS[0], batch) for batch in self.batches]
        points += [("resolution", size, Network("densenet121", size), 1) for size in self.sizes]
        for variable, value, network, batch in points:
            yield variable, value, [MemoryCase(network, c, batch, device, dtype) for c in (NAIVE, FAST)]


_TINY = Network("densenet_cifar", 16, arguments=dict(depth=10))

_PEER_CONTENDERS = tuple(contender for contender in ALL if contender is not MAX_AUTOTUNE)
_PEERS = (
    Meeting(DENSENET121, INFERENCE, _PEER_CONTENDERS, (1, 16)),
    Meeting(DENSENET121, STEP, _PEER_CONTENDERS, (8,)),
)
_OTHER_SIZES = (
    *(Network("densenet121", size) for size in (160, 299, 512)),
    *(Network(name, 224) for name in ("densenet169", "densenet201")),
)

_PROGRAMS = (
    Program("densenet_bc_22_24", epochs=60, seeds=3),
    Program("densenet_bc_100_12", epochs=14, seeds=8, epoch_s=3),
    Program("densenet121", epochs=14, seeds=5, epoch_s=6),
)
"""``fastdense train`` as it is without options; and 322 steps each of the two programs for CIFAR-10."""

SUITES = {
    "quick": Suite(
        meetings=tuple(Meeting(subject, modes) for subject in SUBJECTS for modes in (TRAINING, INFERENCE)),
        seconds=1.5,
        fewest_rounds=7,
        memory=((DENSENET121, 8),),
        depths=(40, 70, 100, 160),
        batches=(1, 2, 4, 8),
        sizes=(64, 96, 128, 192),
        roofline=((DENSENET121, 4),),
        programs=(Program("densenet_bc_22_24", epochs=4, seeds=1),),
    ),
    "peers": Suite(meetings=_PEERS, seconds=10, fewest_rounds=6, memory_of_meetings=True),
    "sizes": Suite(
        meetings=tuple(
            Meeting(network, INFERENCE, (NAIVE, OPENVINO, FAST_FROZEN, FAST), (4,)) for network in _OTHER_SIZES
        ),
        seconds=15,
        fewest_rounds=6,
    ),
    "scaling": Suite(
        depths=(40, 70, 100, 148, 190, 250, 298),
        batches=(1, 2, 4, 8, 16, 32, 64),
        sizes=(32, 64, 128, 192, 256, 320, 384, 448, 512),
    ),
    "training": Suite(programs=_PROGRAMS),
    "full": Suite(
        meetings=(
            *(Meeting(s, m, batches=tuple(max(1, int(s.batch_cpu * f)) for f in (0.25, 1, 4)))
              for s in SUBJECTS for m in (TRAINING, INFERENCE)),
            *_PEERS,
            *(Meeting(network, INFERENCE, ALL, (4,)) for network in _OTHER_SIZES),
            Meeting(CIFAR_NETWORKS[0], STEP, ALL, (64,)),
        ),
        seconds=20,
        memory=((DENSENET121, 8), (Network("densenet201", 224), 8), *((network, 64) for network in CIFAR_NETWORKS)),
        memory_of_meetings=True,
        depths=(40, 70, 100, 148, 190, 250, 298),
        batches=(4, 8, 16, 32, 64, 128),
        sizes=(64, 128, 192, 256, 320, 384, 448, 512),
        roofline=((DENSENET121, 1), (DENSENET121, 16), (CIFAR_NETWORKS[0], 64)),
        programs=_PROGRAMS,
    ),
    "smoke": Suite(
        meetings=(
            Meeting(SUBJECTS[3], TRAINING, batches=(1,)),
            Meeting(_TINY, INFERENCE, (NAIVE, OPENVINO, FAST), (2,)),
        ),
        seconds=0.1,
        memory=((_TINY, 2),),
        memory_of_meetings=True,
        depths=(10,),
        batches=(1,),
        sizes=(64,),
        roofline=((_TINY, 2),),
        programs=(Program("densenet_bc_10_4", epochs=1, seeds=2),),
    ),
}  # fmt: skip
"""``quick`` takes about five minutes on two cores, ``sizes`` too, ``peers`` fifteen, ``training`` half an hour and
``full`` hours; ``smoke`` only shows that all parts run."""


def default_dtypes(device: str) -> tuple[str, ...]:
    """What a suite measures unless asked: of a CPU what every one multiplies."""
    return tuple(DTYPES) if device.startswith("cuda") else ("fp32",)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
