"""The least that a DenseNet must move and multiply, piece by piece, and the time that takes on given ceilings.

A piece is the work of one kernel. It reads what it needs once, writes what it makes once, and can be no faster than

    seconds = max(bytes / bandwidth, operations / peak)

so that the sum over the pieces is a floor: a time that these pieces cannot beat, and need not reach.

======================== ==================================================================================
naive                    one piece a stock module, as :mod:`fastdense.reference` calls them; a training
                         BatchNorm reads its input twice, its backward and ReLU's read what they need
fast, forward            a convolution with the norm and ReLU before it as its prologue and the statistics of
                         what it writes as its epilogue; nothing is concatenated or normalised in memory;
                         a transition pools before it multiplies
fast, backward           the 1x1's two gradients in one pass over the prefix of X and its gradient G; BatchNorm's
                         corrections where a gradient is consumed
======================== ==================================================================================

Weights are float32, read once a piece, and their gradients written once. Norms' vectors are not counted, nor
dropout. The letters are those of :mod:`fastdense.kernels.contract`. Source of the method: Williams, Waterman,
Patterson, "Roofline", 2009.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .kernels.portable.batch_norm import gemm_dtype
from .models import FastDenseNet
from .modules import FastDenseBlock, FastTransition

_WEIGHT_BYTES = 4
_CALLS = 20


# -- ceilings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at best: bytes per second, floating-point operations per second, and who says so."""

    bytes_per_s: float
    flops: float
    source: str


@dataclass(frozen=True)
class _Gpu:
    bytes_per_s: float
    half_flops: float
    float_flops: float
    source: str


_GPUS = {
    "a100": _Gpu(2.039e12, 312e12, 19.5e12, "NVIDIA's data sheet of the A100 80GB SXM"),
    "h100": _Gpu(3.0e12, 800e12, 67e12, "measured on an H100 SXM; float32 from NVIDIA's data sheet"),
    "h200": _Gpu(4.8e12, 989e12, 67e12, "NVIDIA's data sheet of the H200 SXM"),
}
"""Peaks in bfloat16 and float16 are those of tensor cores, in float32 those without."""

GPUS = tuple(_GPUS)


def ceilings_of(gpu: str, dtype: torch.dtype) -> Ceilings:
    """Of a GPU by its name, one of :data:`GPUS`."""
    if gpu not in _GPUS:
        raise ValueError(f"unknown GPU {gpu!r}: there are {', '.join(GPUS)}")
    found = _GPUS[gpu]
    flops = found.float_flops if dtype == torch.float32 else found.half_flops
    return Ceilings(found.bytes_per_s, flops, found.source)


@functools.cache
def measured_on_cpu(dtype: torch.dtype) -> Ceilings:
    """Of this CPU: a copy of 256 MB, and a product, of matrices or as a 1x1 convolution. Takes about two seconds.

    They are different libraries', and on another maker's CPU one may reach less than half of what the other does.
    """
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    matrix = torch.randn(1536, 1536).to(gemm_dtype(dtype, source.device))
    image = matrix.T.reshape(1, 1536, 32, 48).to(memory_format=torch.channels_last)
    with torch.no_grad():
        product = min(_best(lambda: matrix @ matrix), _best(lambda: F.conv2d(image, matrix[:, :, None, None])))
        copy = _best(lambda: target.copy_(source))
    return Ceilings(
        2 * source.nbytes / copy,
        2 * len(matrix) ** 3 / product,
        f"measured now: a copy, and a product in {matrix.dtype}".replace("torch.", ""),
    )


def _best(run: Callable[[], Any]) -> float:
    """Seconds of the quickest of some calls: a ceiling is what was reached once."""
    seconds = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# -- the network ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A dense layer: C_l channels that it reads, B of its bottleneck (0 without), k that it adds."""

    channels: int
    width: int
    growth: int


@dataclass(frozen=True)
class Stage:
    """A part of a network at one input size.

    Attributes:
        part: ``stem``, ``block 1``, ``transition 1``, ..., ``head``.
        fast: computed by fastdense's op, not by stock modules.
        pixels: of an image's input and of its output; of a stem, before and after its max pool, 0 without one.
        channels: of the input and of the output; of a stem, twice what the first convolution makes; a head's output
            are the classes.
        layers: of a block.
        recomputes: what a block's first convolutions make is made again in backward.
        image: of a stem, the values of an image and the weights of the first convolution.
    """

    part: str
    fast: bool
    pixels: tuple[int, int]
    channels: tuple[int, int]
    layers: tuple[Layer, ...] = ()
    recomputes: bool = False
    image: tuple[int, int] = (0, 0)


def stages(model: nn.Module, size: int) -> list[Stage]:
    """The parts of a DenseNet on square images of ``size`` pixels a side.

    Args:
        model: of this package, or torchvision's.

    Raises:
        ValueError: the images are too small, or the model has not the parts of a DenseNet.
    """
    try:
        found = _stages(model, size)
        if found is None:
            least = next(side for side in itertools.count(size + 1) if _stages(model, side))
            raise ValueError(f"images of {size}x{size} are too small for this network: {least}x{least} is the least")
    except (AttributeError, KeyError, StopIteration) as error:
        raise ValueError(f"{type(model).__name__} has not the parts of torchvision's DenseNet: {error}") from error
    return found


def _stages(model: Any, size: int) -> list[Stage] | None:
    """``None`` where a transition would have nothing left to pool."""
    modules = dict(model.features.named_children())
    conv0, norm5 = modules["conv0"], modules["norm5"]
    classifier = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    fast = isinstance(model, FastDenseNet)
    side = (size + 2 * conv0.padding[0] - conv0.kernel_size[0]) // conv0.stride[0] + 1
    pooled = (side + 1) // 2 if "pool0" in modules else 0
    image = conv0.in_channels * size**2, conv0.weight.numel()
    found = [Stage("stem", fast, (side**2, pooled**2), (conv0.out_channels,) * 2, image=image)]
    side = pooled or side
    for name, module in modules.items():
        if name.startswith("denseblock"):
            part = name.replace("denseblock", "block ")
            dense_layers = list(module.children())
            layers = tuple(map(_layer, dense_layers))
            channels = layers[0].channels, layers[-1].channels + layers[-1].growth
            is_fast = isinstance(module, FastDenseBlock)
            recomputes = bool(dense_layers[0].memory_efficient)
            found.append(Stage(part, is_fast, (side**2, side**2), channels, layers, recomputes))
        elif name.startswith("transition"):
            part = name.replace("transition", "transition ")
            channels = module.conv.in_channels, module.conv.out_channels
            found.append(Stage(part, isinstance(module, FastTransition), (side**2, (side // 2) ** 2), channels))
            side //= 2
    found.append(Stage("head", fast, (side**2, 1), (norm5.num_features, classifier.out_features)))
    return found if side > 0 else None


def _layer(module: Any) -> Layer:
    first, second = module.conv1, getattr(module, "conv2", None)
    if second is None:
        return Layer(first.in_channels, 0, first.out_channels)
    return Layer(first.in_channels, first.out_channels, second.out_channels)


# -- its pieces ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """The work of one kernel for the whole batch.

    Attributes:
        phase: ``forward``, ``backward`` or ``optimizer``.
        part: of the network, see :class:`Stage`.
        name: what it does.
        bytes: read and written.
        flops: two a multiply-add.
    """

    phase: str
    part: str
    name: str
    bytes: int
    flops: int

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.bytes / ceilings.bytes_per_s, self.flops / ceilings.flops)


@dataclass(frozen=True)
class _Work:
    """A piece for one image: values moved, of the dtype; multiply-adds; passes over weights; further bytes."""

    name: str
    values: float
    macs: float = 0
    weights: int = 0
    more: int = 0


def pieces(stages: list[Stage], batch: int, dtype: torch.dtype, *, train: bool) -> list[Piece]:
    """Of a training step, or of inference. Backwards come in the order of the forward."""
    found = []
    for stage in stages:
        kind = _KINDS[stage.part.split()[0]]
        for phase, work in kind(stage, train):
            if phase == "backward" and not train:
                continue
            moved = batch * (work.values * dtype.itemsize + work.more) + work.weights * _WEIGHT_BYTES
            found.append(Piece(phase, stage.part, work.name, int(moved), int(2 * batch * work.macs)))
    return found


def optimizer_piece(parameters: int) -> Piece:
    """SGD with momentum: parameter, gradient and momentum are read, the first and last written."""
    return Piece("optimizer", "optimizer", "SGD", 5 * parameters * _WEIGHT_BYTES, 4 * parameters)


def macs(stages: list[Stage]) -> int:
    """Multiply-adds of one image's forward by the definition, which multiplies before it pools."""
    stock = [replace(stage, fast=False) for stage in stages]
    return sum(piece.flops for piece in pieces(stock, 1, torch.float32, train=False)) // 2


_Works = Iterator[tuple[str, _Work]]


def _stem(stage: Stage, train: bool) -> _Works:
    (wide, narrow), channels, (image, weights) = stage.pixels, stage.channels[0], stage.image
    conv, out = wide * channels, narrow * channels
    products = wide * weights
    if not narrow:  # the stem of small images, a convolution alone
        yield "forward", _Work("conv0", image + conv, products, weights)
        yield "backward", _Work("conv0 wgrad", image + conv, products, weights)
    elif stage.fast:
        if train:
            yield "forward", _Work("conv0", image + conv, products, weights)
            yield "forward", _Work("norm0, pool0", conv + out)
        else:
            yield "forward", _Work("conv0, pool0", image + out, products, weights)
        yield "backward", _Work("norm0, pool0", conv + 2 * out)
        yield "backward", _Work("conv0 wgrad", image + conv + 2 * out, products, weights)
    else:
        indices = 8 * out if train else 0
        yield "forward", _Work("conv0", image + conv, products, weights)
        yield "forward", _Work("norm0", _norm_passes(train) * conv)
        yield "forward", _Work("relu0", 2 * conv)
        yield "forward", _Work("pool0", conv + out, more=indices)
        yield "backward", _Work("pool0", conv + out, more=indices)
        yield from _norm_relu_backward(conv)
        yield "backward", _Work("conv0 wgrad", image + conv, products, weights)


def _block(stage: Stage, train: bool) -> _Works:
    for layer in stage.layers:
        yield from (_fast_layer if stage.fast else _naive_layer)(stage.pixels[0], layer, stage.recomputes, train)


def _fast_layer(pixels: int, layer: Layer, recomputes: bool, train: bool) -> _Works:
    prefix, hidden, new = pixels * layer.channels, pixels * layer.width, pixels * layer.growth
    if not layer.width:
        weights = 9 * layer.channels * layer.growth
        products = pixels * weights
        yield "forward", _Work("conv3x3", prefix + new, products, weights)
        yield "backward", _Work("conv3x3 dgrad", 2 * new + 3 * prefix, products, weights)
        yield "backward", _Work("conv3x3 wgrad", 2 * new + prefix, products, weights)
        return
    first, second = layer.channels * layer.width, 9 * layer.width * layer.growth
    yield "forward", _Work("conv1x1", prefix + hidden, pixels * first, first)
    yield "forward", _Work("conv3x3", hidden + new, pixels * second, second)
    if recomputes:
        yield "backward", _Work("conv1x1 again", prefix + hidden, pixels * first, first)
    yield "backward", _Work("conv3x3 dgrad", 2 * new + 2 * hidden, pixels * second, second)
    yield "backward", _Work("conv3x3 wgrad", 2 * new + hidden, pixels * second, second)
    yield "backward", _Work("conv1x1 dgrad, wgrad", 2 * hidden + 3 * prefix, 2 * pixels * first, 2 * first)


def _naive_layer(pixels: int, layer: Layer, recomputes: bool, train: bool) -> _Works:
    prefix, hidden, new = pixels * layer.channels, pixels * layer.width, pixels * layer.growth
    if layer.width:
        first = [("conv1x1", prefix, hidden, layer.channels * layer.width)]
        second = [("conv3x3", hidden, new, 9 * layer.width * layer.growth)]
    else:
        first, second = [("conv3x3", prefix, new, 9 * layer.channels * layer.growth)], []

    def forward(convs: list[tuple[str, int, int, int]]) -> Iterator[_Work]:
        for name, before, after, weights in convs:
            yield _Work("norm", _norm_passes(train) * before)
            yield _Work("relu", 2 * before)
            yield _Work(name, before + after, pixels * weights, weights)

    concatenation = _Work("concatenation", 2 * prefix)
    for work in (concatenation, *forward(first), *forward(second)):
        yield "forward", work
    if recomputes:
        for work in (concatenation, *forward(first)):
            yield "backward", work
    yield "backward", _Work("gradient of a slice", 2 * new)
    for name, before, after, weights in second + first:
        yield "backward", _Work(f"{name} dgrad", before + after, pixels * weights, weights)
        yield "backward", _Work(f"{name} wgrad", before + after, pixels * weights, weights)
        yield from _norm_relu_backward(before)
    yield "backward", _Work("accumulation", 3 * prefix)


def _transition(stage: Stage, train: bool) -> _Works:
    (before, after), (channels, kept) = stage.pixels, stage.channels
    x, out, weights = before * channels, after * kept, channels * kept
    if stage.fast:
        yield "forward", _Work("pool, conv1x1", x + out, after * weights, weights)
        yield "backward", _Work("conv1x1 dgrad, wgrad", 2 * out + 2 * x, 2 * after * weights, 2 * weights)
        return
    wide = before * kept
    yield "forward", _Work("concatenation", 2 * x)
    yield "forward", _Work("norm", _norm_passes(train) * x)
    yield "forward", _Work("relu", 2 * x)
    yield "forward", _Work("conv1x1", x + wide, before * weights, weights)
    yield "forward", _Work("pool", wide + out)
    yield "backward", _Work("pool", wide + out)
    yield "backward", _Work("conv1x1 dgrad", x + wide, before * weights, weights)
    yield "backward", _Work("conv1x1 wgrad", x + wide, before * weights, weights)
    yield from _norm_relu_backward(x)


def _head(stage: Stage, train: bool) -> _Works:
    channels, classes = stage.channels
    x, vectors, weights = stage.pixels[0] * channels, channels + classes, channels * classes
    if stage.fast:
        yield "forward", _Work("norm5, pool", x)
        yield "backward", _Work("norm5, pool", 2 * x)
    else:
        yield "forward", _Work("concatenation", 2 * x)
        yield "forward", _Work("norm5", _norm_passes(train) * x)
        yield "forward", _Work("relu", 2 * x)
        yield "forward", _Work("pool", x)
        yield "backward", _Work("pool", x)
        yield from _norm_relu_backward(x)
    yield "forward", _Work("classifier", vectors, weights, weights)
    yield "backward", _Work("classifier dgrad, wgrad", 2 * vectors, 2 * weights, 2 * weights)


def _norm_passes(train: bool) -> int:
    """Over its input, once more for its statistics, and over its output."""
    return 3 if train else 2


def _norm_relu_backward(values: int) -> _Works:
    """ReLU's reads its output and both gradients' places; BatchNorm's reads x and the gradient, twice."""
    yield "backward", _Work("relu", 3 * values)
    yield "backward", _Work("norm", 5 * values)


_KINDS = {"stem": _stem, "block": _block, "transition": _transition, "head": _head}


# -- statistics across devices -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """What devices exchange in one training step for common batch statistics.

    Attributes:
        reductions: in forward and again in backward; each waits for the one before.
        channels: that they are about, in all.
        forward_bytes: that a device contributes: mean, variance, count.
        backward_bytes: the two sums of BatchNorm's backward.
    """

    reductions: int
    channels: int

    @property
    def forward_bytes(self) -> int:
        return 4 * (2 * self.channels + self.reductions)

    @property
    def backward_bytes(self) -> int:
        return 4 * 2 * self.channels


def exchange(stages: list[Stage], *, shared: bool) -> Exchange:
    """For a norm after another, as ``nn.SyncBatchNorm``; or, with ``shared``, for each channel of X once.

    Backward with ``shared``: a device adds up P and Q of all norms that read a channel, and they are exchanged when
    the channel's own layer begins, as they are consumed then and are linear in the devices' sums.
    """
    sizes = []  # channels of each reduction
    for stage in stages:
        kind = stage.part.split()[0]
        if kind == "stem":
            sizes += [stage.channels[1]] if stage.pixels[1] else []
        elif kind == "block":
            sizes += [stage.channels[0]] if shared else []
            for layer in stage.layers:
                sizes += [layer.growth if shared else layer.channels] + ([layer.width] if layer.width else [])
        elif not shared:
            sizes.append(stage.channels[0])
    return Exchange(len(sizes), sum(sizes))
