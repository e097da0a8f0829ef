"""What is measured: networks and dense blocks; and the proof that fast and naive compute the same."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastdense
from fastdense import images, parity, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By their short names. A narrow one means autocast around float32 parameters."""

PARITY_BATCHES = 3
"""Over which the errors of a parity check are medians."""

_CALIBRATION_IMAGES = 32


@dataclass(frozen=True)
class Network:
    """A network by the name of its constructor, which the package and the reference share."""

    constructor: str
    size: int
    batch_cpu: int = 4
    batch_gpu: int = 64
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return self.constructor

    @property
    def title(self) -> str:
        return f"{self.constructor}, {self.size}x{self.size}"

    def naive(self, **options: Any) -> nn.Module:
        return getattr(reference, self.constructor)(**self.arguments, **options)

    def fast(self, **options: Any) -> nn.Module:
        return getattr(fastdense, self.constructor)(**self.arguments, **options)

    def inputs(self, batch: int, dtype: torch.dtype) -> list[Tensor]:
        """Batches of photographs, float32 in any dtype, as a network under autocast sees its images."""
        return list(images.photographs(self.size, PARITY_BATCHES * batch).chunk(PARITY_BATCHES))

    def parity_inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Small, but not so small that the last maps of an ImageNet network are one pixel: their norms, of two values
        each, would have gradients that are nothing but rounding."""
        return list(images.photographs(min(self.size, 64), 2 * PARITY_BATCHES).chunk(PARITY_BATCHES))

    def calibration(self) -> Tensor:
        return images.photographs(self.size, _CALIBRATION_IMAGES)


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

    def naive(self, **options: Any) -> nn.Module:
        return reference.DenseBlock(self.num_layers, self.num_input_features, **options)

    def fast(self, **options: Any) -> nn.Module:
        return fastdense.FastDenseBlock(self.num_layers, self.num_input_features, **options)

    def inputs(self, batch: int, dtype: torch.dtype) -> list[Tensor]:
        """Batches of features, of which the block makes a gradient too, as inside a network."""
        features = self._features(PARITY_BATCHES * batch).to(dtype)
        return [x.clone().requires_grad_() for x in features.chunk(PARITY_BATCHES)]

    def parity_inputs(self, dtype: torch.dtype) -> list[Tensor]:
        return list(self._features(PARITY_BATCHES).to(dtype).chunk(PARITY_BATCHES))

    def calibration(self) -> Tensor:
        return self._features(PARITY_BATCHES)

    def _features(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, self.num_input_features, self.size, self.size, generator=generator)


Subject = Network | Block

DENSENET121_BLOCKS = (
    Block("denseblock1", 56, 64, 6),
    Block("denseblock2", 28, 128, 12),
    Block("denseblock3", 14, 256, 24),
    Block("denseblock4", 7, 512, 16),
)
DENSENET121 = Network("densenet121", 224)
CIFAR_NETWORKS = (
    Network("densenet_bc_100_12", 32, batch_cpu=8, batch_gpu=256),
    Network("densenet_40_12", 32, batch_cpu=8, batch_gpu=256),
)
SUBJECTS: tuple[Subject, ...] = (*DENSENET121_BLOCKS, DENSENET121, *CIFAR_NETWORKS)


def deep_densenet(depth: int) -> Network:
    """A DenseNet-BC of growth rate 12, in which parameters stay few enough for activations to be what grows."""
    return Network("densenet_cifar", 32, arguments=dict(depth=depth, growth_rate=12))


@functools.lru_cache(maxsize=1)  # the cases of a subject come one after another
def calibrated(subject: Subject) -> nn.Module:
    """The naive one, of random weights, in evaluation.

    Its running statistics are those of real images, so that activations are like a trained network's.
    """
    torch.manual_seed(0)
    model = subject.naive()
    norms = {module: module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    for norm in norms:
        norm.momentum = None  # running statistics are averages over what follows
    with torch.no_grad():
        for few in subject.calibration().split(8):
            model(few)
    for norm, momentum in norms.items():
        norm.momentum = momentum
    return model.eval()


@functools.cache
def parity_rows(subject: Subject, device: str, dtype: torch.dtype) -> list[parity.Row]:
    """Fast against naive on small batches: training with every gradient, and inference."""
    torch.manual_seed(0)
    stock = subject.naive().to(device)
    batches = [x.detach().to(device) for x in subject.parity_inputs(dtype)]
    with torch.no_grad():
        stock(batches[0].float())  # for running statistics that are not those of a new BatchNorm
    fast = subject.fast().to(device)
    fast.load_state_dict(stock.state_dict())
    options: dict[str, Any] = dict(dtype=dtype, autocast=dtype != torch.float32)
    trained = parity.check(fast, stock, batches, **options)
    inferred = parity.check(fast.eval(), stock.eval(), batches, backward=False, **options)
    return trained + inferred
