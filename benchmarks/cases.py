"""What is measured: blocks and networks, contenders, modes; and the proof that the contenders compute the same.

A *subject* is a network or a dense block, a *contender* one implementation of it, a *mode* what is done with
it, and a *workload* a contender with its input on a device, ready to run in any mode.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastdense
from fastdense import images, parity, reference

MODES = ("forward", "backward", "step", "inference")
"""Training forward; its backward; forward, backward and SGD; forward in evaluation without autograd."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By their short names. A narrow one means autocast around float32 parameters."""

PARITY_BATCHES = 3
"""Over which the errors of a parity check are medians."""


@dataclass(frozen=True)
class Contender:
    """One implementation of every subject."""

    name: str
    fast: bool
    memory_format: torch.memory_format = torch.channels_last
    memory_efficient: bool = False


NAIVE_CONTIGUOUS = Contender("naive contiguous", fast=False, memory_format=torch.contiguous_format)
NAIVE = Contender("naive", fast=False)
NAIVE_RECOMPUTING = Contender("naive, memory_efficient", fast=False, memory_efficient=True)
FAST = Contender("fast", fast=True)
FAST_RECOMPUTING = Contender("fast, memory_efficient", fast=True, memory_efficient=True)

SPEED_CONTENDERS = (NAIVE_CONTIGUOUS, NAIVE, FAST)
MEMORY_CONTENDERS = (NAIVE, NAIVE_RECOMPUTING, FAST, FAST_RECOMPUTING)


@dataclass(frozen=True)
class Network:
    """A network by the name of its constructor, which the package and the reference share."""

    constructor: str
    size: int
    batch_cpu: int = 4
    batch_gpu: int = 64
    parity_size: int = 32
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return self.constructor

    @property
    def title(self) -> str:
        return f"{self.constructor}, {self.size}x{self.size}"

    def build(self, contender: Contender) -> nn.Module:
        library = fastdense if contender.fast else reference
        return getattr(library, self.constructor)(memory_efficient=contender.memory_efficient, **self.arguments)

    def inputs(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Noise; float32 in any dtype, as a network under autocast sees its images."""
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def parity_inputs(self, dtype: torch.dtype) -> Tensor:
        return images.photographs(self.parity_size, 2 * PARITY_BATCHES)


@dataclass(frozen=True)
class Block:
    """A dense block by its geometry."""

    name: str
    size: int
    num_input_features: int
    num_layers: int
    batch_cpu: int = 4
    batch_gpu: int = 64

    @property
    def title(self) -> str:
        return f"{self.name}, {self.size}x{self.size}, {self.num_layers} layers"

    def build(self, contender: Contender) -> nn.Module:
        kind = fastdense.FastDenseBlock if contender.fast else reference.DenseBlock
        return kind(self.num_layers, self.num_input_features, memory_efficient=contender.memory_efficient)

    def inputs(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Features, of which the block makes a gradient too, as inside a network."""
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(batch, self.num_input_features, self.size, self.size, generator=generator)
        return features.to(dtype).requires_grad_()

    def parity_inputs(self, dtype: torch.dtype) -> Tensor:
        return self.inputs(PARITY_BATCHES, dtype)


Subject = Network | Block

DENSENET121_BLOCKS = (
    Block("denseblock1", 56, 64, 6),
    Block("denseblock2", 28, 128, 12),
    Block("denseblock3", 14, 256, 24),
    Block("denseblock4", 7, 512, 16),
)
DENSENET121 = Network("densenet121", 224, parity_size=64)
CIFAR_NETWORKS = (
    Network("densenet_bc_100_12", 32, batch_cpu=16, batch_gpu=256),
    Network("densenet_40_12", 32, batch_cpu=16, batch_gpu=256),
)
SUBJECTS: tuple[Subject, ...] = (*DENSENET121_BLOCKS, DENSENET121, *CIFAR_NETWORKS)


class Workload:
    """A contender with its input, ready to run in any mode. Nothing it does changes the parameters."""

    def __init__(self, subject: Subject, contender: Contender, batch: int, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = subject.build(contender).to(device).to(memory_format=contender.memory_format)
        inputs = subject.inputs(batch, dtype)
        self.x = inputs.detach().to(device=device, memory_format=contender.memory_format)
        self.x.requires_grad_(inputs.requires_grad)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)  # the work of SGD, the weights of round 1
        self.device, self.dtype = torch.device(device), dtype
        self._gradient: Tensor | None = None

    def prepare(self, mode: str) -> tuple[Any, ...]:
        """What precedes ``mode`` and is not timed; the arguments of :meth:`run`."""
        self.model.train(mode != "inference")
        self._zero_grad()
        arguments = (self.forward(),) if mode == "backward" else ()
        self._synchronize()
        return (mode, *arguments)

    def run(self, mode: str, *arguments: Any) -> Any:
        """What is timed: one of :data:`MODES`, to its end on the device."""
        result = getattr(self, mode)(*arguments)
        self._synchronize()
        return result

    def forward(self) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(self.x)

    def backward(self, out: Tensor) -> None:
        if self._gradient is None:
            self._gradient = torch.randn_like(out)
        out.backward(self._gradient)

    def step(self) -> None:
        self._zero_grad()
        self.backward(self.forward())
        self.optimizer.step()

    def inference(self) -> Tensor:
        with torch.inference_mode():
            return self.forward()

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.x.grad = None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@functools.lru_cache(maxsize=1)  # the modes of a subject come one after another
def workloads(subject: Subject, batch: int, device: str, dtype: torch.dtype) -> dict[str, Workload]:
    """One workload per contender of the speed benchmark, by name."""
    return {c.name: Workload(subject, c, batch, device, dtype) for c in SPEED_CONTENDERS}


@functools.cache
def parity_rows(subject: Subject, device: str, dtype: torch.dtype) -> list[parity.Row]:
    """Fast against naive on small batches: training with every gradient, and inference."""
    torch.manual_seed(0)
    stock = subject.build(NAIVE).to(device)
    batches = subject.parity_inputs(dtype).detach().to(device).chunk(PARITY_BATCHES)
    with torch.no_grad():
        stock(batches[0].float())  # for running statistics that are not those of a new BatchNorm
    fast = subject.build(FAST).to(device)
    fast.load_state_dict(stock.state_dict())
    options: dict[str, Any] = dict(dtype=dtype, autocast=dtype != torch.float32)
    trained = parity.check(fast, stock, batches, **options)
    inferred = parity.check(fast.eval(), stock.eval(), batches, backward=False, **options)
    return trained + inferred


# -- suites ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeedCase:
    """One row of the speed table: every contender is timed at it."""

    subject: Subject
    mode: str
    batch: int
    device: str
    dtype_name: str
    seconds: float
    """About how long the timing may take."""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def __str__(self) -> str:
        return f"{self.subject.name}-{self.mode}-batch{self.batch}-{self.dtype_name}"


@dataclass(frozen=True)
class MemoryCase:
    """One contender's bytes at one shape."""

    subject: Network
    contender: Contender
    batch: int
    device: str
    dtype_name: str
    peak: bool = True
    """Whether to run a training step too, and not only its forward."""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def __str__(self) -> str:
        return f"{self.subject.title}, batch {self.batch}, {self.dtype_name}, {self.contender.name}"


@dataclass(frozen=True)
class Suite:
    """How much is measured."""

    subjects: tuple[Subject, ...]
    batch_factors: tuple[float, ...]
    """Multiples of each subject's usual batch."""
    seconds: float
    """About how long the timing of one case may take."""
    memory: tuple[tuple[Network, int], ...]
    """Networks and batches."""
    depths: tuple[int, ...]
    batches: tuple[int, ...]
    sizes: tuple[int, ...]
    epochs: int

    def speed_cases(self, device: str, dtypes: tuple[str, ...]) -> list[SpeedCase]:
        cases = []
        for subject in self.subjects:
            usual = subject.batch_gpu if device.startswith("cuda") else subject.batch_cpu
            for dtype in dtypes:
                for factor in self.batch_factors:
                    batch = max(1, int(usual * factor))
                    cases += [SpeedCase(subject, mode, batch, device, dtype, self.seconds) for mode in MODES]
        return cases

    def memory_cases(self, device: str, dtypes: tuple[str, ...]) -> list[MemoryCase]:
        """In ``dtypes``, and the forward under bfloat16 autocast in any case: bytes need no fast CPU."""
        cases = []
        for network, batch in self.memory:
            for dtype in dict.fromkeys((*dtypes, "bf16")):
                peak = dtype in dtypes
                cases += [MemoryCase(network, c, batch, device, dtype, peak) for c in MEMORY_CONTENDERS]
        return cases

    def growth_cases(self, device: str, dtype: str) -> Iterator[tuple[str, int, list[MemoryCase]]]:
        """(what grows, its value, a case a contender): depth of DenseNet-BC, batch, resolution."""
        points = [("depth", depth, deep_densenet(depth), 4) for depth in self.depths]
        points += [("batch", batch, CIFAR_NETWORKS[0], batch) for batch in self.batches]
        points += [("resolution", size, Network("densenet121", size), 1) for size in self.sizes]
        for variable, value, network, batch in points:
            yield variable, value, [MemoryCase(network, c, batch, device, dtype) for c in (NAIVE, FAST)]


def deep_densenet(depth: int) -> Network:
    """A DenseNet-BC of growth rate 12, in which parameters stay few enough for activations to be what grows."""
    return Network("densenet_cifar", 32, arguments=dict(depth=depth, growth_rate=12))


SUITES = {
    "quick": Suite(
        subjects=SUBJECTS,
        batch_factors=(1,),
        seconds=2.5,
        memory=((DENSENET121, 8),),
        depths=(40, 100, 148, 190, 250),
        batches=(4, 8, 16, 24),
        sizes=(64, 128, 192, 256),
        epochs=5,
    ),
    "full": Suite(
        subjects=SUBJECTS,
        batch_factors=(0.25, 1, 4),
        seconds=20,
        memory=((DENSENET121, 8), (Network("densenet201", 224), 8), *((network, 64) for network in CIFAR_NETWORKS)),
        depths=(40, 70, 100, 148, 190, 250, 298),
        batches=(4, 8, 16, 32, 64, 128),
        sizes=(64, 128, 192, 256, 320, 384, 448, 512),
        epochs=20,
    ),
    "smoke": Suite(
        subjects=(DENSENET121_BLOCKS[3],),
        batch_factors=(0.25,),
        seconds=0.1,
        memory=((Network("densenet_cifar", 16, arguments=dict(depth=10)), 2),),
        depths=(10, 16),
        batches=(1, 2),
        sizes=(64, 96),
        epochs=1,
    ),
}
"""``quick`` takes about five minutes on two cores, ``full`` half an hour; ``smoke`` only shows that all parts run."""


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtypes(device: str) -> tuple[str, ...]:
    """On a GPU both; few CPUs are fast in bfloat16, and all in float32."""
    return tuple(DTYPES) if device.startswith("cuda") else ("fp32",)
