"""How much memory and time a DenseNet needs, before it is run.

Memory is that of :mod:`fastdense.footprint`, time a floor of :mod:`fastdense.roofline`: what no run can beat.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from . import models, reference, roofline
from .architectures import CONFIGS
from .footprint import bytes_of, footprint
from .roofline import Ceilings, Exchange, Piece, Stage
from .verify import DTYPES


@dataclass(frozen=True)
class Plan:
    """What one training step, or one inference, needs. All sizes are bytes of the whole batch.

    Attributes:
        network: its name.
        naive: computed by stock modules.
        memory_efficient: recomputes in backward.
        batch, size: images, and their height and width.
        dtype: ``fp32``, or ``bf16`` or ``fp16`` by autocast around float32 parameters.
        train: a training step, with SGD with momentum; else inference.
        device: ``cpu`` or ``cuda``.
        parameters: how many.
        macs: multiply-adds of one image's forward.
        held: what is there before and after: by kind.
        gradients: of the parameters, part of the peak.
        saved: what the forward leaves for the backward, by part of the network; part of the peak, but for the batch.
        peak: the most that is there at a time beside what is held.
        pieces: of the least work.
        ceilings: of the device.
    """

    network: str
    naive: bool
    memory_efficient: bool
    batch: int
    size: int
    dtype: str
    train: bool
    device: str
    parameters: int
    macs: int
    held: dict[str, int]
    gradients: int
    saved: dict[str, int]
    peak: int
    pieces: tuple[Piece, ...]
    ceilings: Ceilings

    @property
    def saved_bytes(self) -> int:
        return sum(self.saved.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.held.values()) + self.peak

    @property
    def seconds(self) -> float:
        """The floor of a step, or of an inference."""
        return sum(piece.seconds(self.ceilings) for piece in self.pieces)

    def floors(self) -> dict[tuple[str, str], tuple[int, int, float]]:
        """(phase, part) -> bytes moved, operations, seconds."""
        found: dict[tuple[str, str], tuple[int, int, float]] = {}
        for piece in self.pieces:
            moved, flops, seconds = found.get((piece.phase, piece.part), (0, 0, 0.0))
            found[piece.phase, piece.part] = (
                moved + piece.bytes,
                flops + piece.flops,
                seconds + piece.seconds(self.ceilings),
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the pieces added up by phase and part."""
        floors = [
            dict(phase=phase, part=part, bytes=moved, flops=flops, seconds=seconds)
            for (phase, part), (moved, flops, seconds) in self.floors().items()
        ]
        sums = dict(saved_bytes=self.saved_bytes, total_bytes=self.total_bytes, seconds=self.seconds, floors=floors)
        return {name: value for name, value in asdict(self).items() if name != "pieces"} | sums


def plan(
    network: str | nn.Module,
    *,
    batch: int,
    size: int,
    dtype: str = "fp32",
    train: bool = True,
    memory_efficient: bool = False,
    naive: bool = False,
    device: str = "cpu",
    ceilings: Ceilings | None = None,
) -> Plan:
    """Predict memory and least time. Computes nothing; takes seconds.

    Args:
        network: a name of :data:`fastdense.architectures.CONFIGS`, or a model of this package or torchvision's,
            which stays as it is.
        batch, size: images, and their height and width in pixels.
        dtype: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` by autocast.
        train: a training step; else inference.
        memory_efficient, naive: of a network by name: recompute in backward; the stock modules instead.
        device: ``"cpu"``: the backend chosen here (:func:`fastdense.status`); ``"cuda"``: the Triton kernels'.
        ceilings: by default those of an H100, or measured for ``"cpu"``.

    Raises:
        ValueError: an argument, or a combination, that cannot be.
    """
    model = _build(network, memory_efficient, naive)
    torch_dtype = _checked(batch, dtype, device)
    stages = roofline.stages(model, size)
    needs = footprint(model, stages, batch, size, torch_dtype, train, device)
    if ceilings is None:
        on_cpu = device == "cpu"
        ceilings = roofline.measured_on_cpu(torch_dtype) if on_cpu else roofline.ceilings_of("h100", torch_dtype)
    return Plan(
        network=network if isinstance(network, str) else type(network).__name__,
        naive=not any(stage.fast for stage in stages),
        memory_efficient=any(stage.recomputes for stage in stages),
        batch=batch,
        size=size,
        dtype=dtype,
        train=train,
        device=device,
        parameters=_count(model),
        macs=roofline.macs(stages),
        held=needs.held,
        gradients=bytes_of(*model.parameters()) if train else 0,
        saved=needs.saved,
        peak=needs.peak,
        pieces=tuple(_pieces(model, stages, batch, torch_dtype, train)),
        ceilings=ceilings,
    )


def largest_batch(
    network: str | nn.Module,
    memory: float,
    *,
    size: int,
    dtype: str = "fp32",
    train: bool = True,
    memory_efficient: bool = False,
    naive: bool = False,
    device: str = "cpu",
) -> int:
    """The most images whose :attr:`Plan.total_bytes` are at most ``memory`` bytes; arguments as :func:`plan`'s.

    Raises:
        ValueError: the least batch does not fit either.
    """
    model = _build(network, memory_efficient, naive)
    torch_dtype = _checked(1, dtype, device)
    stages = roofline.stages(model, size)

    def total(batch: int) -> int:
        return footprint(model, stages, batch, size, torch_dtype, train, device).total_bytes

    fits = least = 2 if train and stages[-1].pixels[0] == 1 else 1  # a batch norm wants more than one value
    needed = total(least)
    if needed > memory:
        raise ValueError(
            f"{memory / 1e6:.1f} MB are too few: a batch of {least} image{'s'[: least - 1]} of {size}x{size} "
            f"needs {needed / 1e6:.1f} MB"
        )
    # The need grows by as much an image or more, the more images there are: so what the last images needed is taken
    # for the next, and once that is too many, a straight line between the two is never too low.
    each = max(1.0, needed / least)
    too_many: int | None = None
    while too_many is None or too_many - fits > 1:
        guess = fits + max(1, int((memory - needed) / each))
        if too_many is not None:
            guess = min(guess, too_many - 1)
        found = total(guess)
        each = max(1.0, (found - needed) / (guess - fits))
        if found <= memory:
            fits, needed = guess, found
        else:
            too_many = guess
    return fits


IMAGENET_IMAGES, IMAGENET_BYTES = 1_281_167, 147_897_477_120
"""Of the training set of ILSVRC 2012, the bytes being those of its archive."""

DECODED_PER_S = 200
"""Photographs that a CPU core decodes, crops and resizes in a second: an assumption."""

NVLINK_BYTES_PER_S, NETWORK_BYTES_PER_S = 450e9, 50e9
"""That a GPU sends while it receives as many: half of the 900 GB/s of an H100's data sheet; a port of 400 Gb/s each."""


@dataclass(frozen=True)
class Scaling:
    """Data-parallel training by as many GPUs, on paper: floors and bytes, nothing measured.

    Attributes:
        gpus: that train together, each on its part of the batch.
        step_seconds, backward_seconds: floors of one GPU's step, and of its backward alone.
        gradient_bytes: of all parameters, float32.
        reduction_seconds: of a ring's all-reduce of them.
        images_per_s: of all GPUs, where the reduction hides behind the backward.
        statistics, shared_statistics: exchanged by a SyncBatchNorm for each norm, and by one for each channel.
    """

    gpus: int
    step_seconds: float
    backward_seconds: float
    gradient_bytes: int
    reduction_seconds: float
    images_per_s: float
    statistics: Exchange
    shared_statistics: Exchange

    @property
    def file_bytes_per_s(self) -> float:
        """That all GPUs together consume of ImageNet's JPEGs."""
        return self.images_per_s * IMAGENET_BYTES / IMAGENET_IMAGES

    @property
    def decoding_cores(self) -> float:
        """CPU cores that decode, crop and resize as fast as all GPUs together train."""
        return self.images_per_s / DECODED_PER_S

    def imagenet_seconds(self, epochs: int) -> float:
        """To train on ImageNet."""
        return epochs * IMAGENET_IMAGES / self.images_per_s


def scaling(
    network: str | nn.Module = "densenet121",
    *,
    batch: int,
    gpus: int = 8,
    size: int = 224,
    dtype: str = "bf16",
    memory_efficient: bool = False,
    naive: bool = False,
    ceilings: Ceilings | None = None,
    link_bytes_per_s: float = NVLINK_BYTES_PER_S,
) -> Scaling:
    """Predict data-parallel training on GPUs.

    Args:
        batch: images of each GPU.
        gpus: how many.
        ceilings: of each; by default an H100's.
        link_bytes_per_s: that each sends while it receives as many; by default an H100's NVLink.
        network, size, dtype, memory_efficient, naive: as for :func:`plan`.

    Source of the ring: Patarasuk and Yuan 2009; each GPU sends 2 (n-1) / n of the bytes.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    model = _build(network, memory_efficient, naive)
    torch_dtype = _checked(batch, dtype, "cuda")
    stages = roofline.stages(model, size)
    ceilings = ceilings or roofline.ceilings_of("h100", torch_dtype)
    step = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
    for piece in _pieces(model, stages, batch, torch_dtype, train=True):
        step[piece.phase] += piece.seconds(ceilings)
    seconds, gradients = sum(step.values()), _count(model) * 4
    reduction = 2 * (gpus - 1) / gpus * gradients / link_bytes_per_s
    return Scaling(
        gpus=gpus,
        step_seconds=seconds,
        backward_seconds=step["backward"],
        gradient_bytes=gradients,
        reduction_seconds=reduction,
        images_per_s=gpus * batch / (seconds + max(0.0, reduction - step["backward"])),
        statistics=roofline.exchange(stages, shared=False),
        shared_statistics=roofline.exchange(stages, shared=True),
    )


# -- what both share -----------------------------------------------------------------------------------------


def _build(network: str | nn.Module, memory_efficient: bool, naive: bool) -> nn.Module:
    """The model, without values where it is built here."""
    if isinstance(network, nn.Module):
        if memory_efficient or naive:
            raise ValueError("memory_efficient and naive are of a network by name; a model is planned as it is")
        return network
    if network not in CONFIGS:
        raise ValueError(f"unknown network {network!r}: there are {', '.join(CONFIGS)}")
    with torch.device("meta"):
        return getattr(reference if naive else models, network)(memory_efficient=memory_efficient)


def _checked(batch: int, dtype: str, device: str) -> torch.dtype:
    """The dtype of that name."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    return DTYPES[dtype]


def _pieces(model: nn.Module, stages: list[Stage], batch: int, dtype: torch.dtype, train: bool) -> list[Piece]:
    found = roofline.pieces(stages, batch, dtype, train=train)
    return [*found, roofline.optimizer_piece(_count(model))] if train else found


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
