"""What the ops ask of their arguments before anything is computed: that shapes and devices fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.contract import DenseLayers, Norm, conv_sizes


def check(op: str, x: Tensor, *arguments: Any) -> None:
    """That the arguments of a block's or transition's op fit each other, as it checks them itself.

    Raises:
        ValueError: they do not.
    """
    if op == "transition":
        check_transition(x, *arguments)
    else:
        check_layers(op, x, *arguments)


def require(condition: bool, message: str, *shapes: torch.Size) -> None:
    if not condition:
        raise ValueError(message % tuple(list(shape) for shape in shapes))


def check_spatial(op: str, x: Tensor) -> None:
    require(x.dim() in (3, 4, 5), f"{op}: x must be [N, C, H, W], [N, C, L] or [N, C, D, H, W], got shape %s", x.shape)


def check_norm(op: str, x: Tensor, norm: Norm) -> None:
    check_spatial(op, x)
    _check_vectors(op, norm, x.shape[1], f"the channels of x {list(x.shape)}")


def _check_vectors(op: str, norm: Norm, channels: int, what: str) -> None:
    for name, vector in zip(Norm._fields, norm[:4], strict=False):
        require(
            vector.shape == (channels,),
            f"{op}: norm {name} must be [{channels}] like {what}, got shape %s",
            vector.shape,
        )


def check_transition(x: Tensor, norm: Norm, conv_weight: Tensor) -> None:
    check_norm("transition", x, norm)
    kernel = (x.shape[1], *[1] * (x.dim() - 2))
    require(
        conv_weight.shape[1:] == kernel,
        f"transition: conv_weight must be [C', {', '.join(map(str, kernel))}], got shape %s",
        conv_weight.shape,
    )
    require(min(x.shape[2:]) > 1, "transition: spatial dimensions must be at least 2, got shape %s", x.shape)


def check_stem(x: Tensor, norm: Norm, conv_weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> None:
    op = "stem_inference"
    check_spatial(op, x)
    require(
        conv_weight.dim() == x.dim() and conv_weight.shape[1] == x.shape[1],
        f"{op}: conv_weight must be [C', {x.shape[1]}, *kernel] for x %s, got shape %s",
        x.shape,
        conv_weight.shape,
    )
    for name, values in (("stride", stride), ("padding", padding)):
        require(len(values) == x.dim() - 2, f"{op}: {name} must have {x.dim() - 2} values, got {list(values)}")
    _check_vectors(op, norm, len(conv_weight), f"the outputs of conv_weight {list(conv_weight.shape)}")
    sizes = conv_sizes(x.shape[2:], conv_weight.shape[2:], stride, padding)
    require(min(sizes) > 0, f"{op}: x %s is smaller than the kernel %s", x.shape, conv_weight.shape[2:])


def check_layers(op: str, x: Tensor, layers: DenseLayers) -> None:
    check_spatial(op, x)
    require(layers.num_layers > 0, f"{op}: needs at least one layer")
    k, width, channels = layers.growth_rate, layers.bottleneck_channels, x.shape[1]
    _check_devices(op, x, layers)
    ones, threes = ([size] * (x.dim() - 2) for size in (1, 3))
    for i, (weight, bias, conv1) in enumerate(
        zip(layers.norm1_weight, layers.norm1_bias, layers.conv1_weight, strict=True)
    ):
        first = (width, channels, *ones) if layers.has_bottleneck else (k, channels, *threes)
        _check_layer(op, x, i, ("norm1_weight", weight, (channels,)), ("norm1_bias", bias, (channels,)))
        _check_layer(op, x, i, ("conv1_weight", conv1, first))
        channels += k
    for i, (weight, bias, conv2) in enumerate(
        zip(layers.norm2_weight, layers.norm2_bias, layers.conv2_weight, strict=True)
    ):
        _check_layer(op, x, i, ("norm2_weight", weight, (width,)), ("norm2_bias", bias, (width,)))
        _check_layer(op, x, i, ("conv2_weight", conv2, (k, width, *threes)))


def _check_layer(op: str, x: Tensor, layer: int, *expected: tuple[str, Tensor, tuple[int, ...]]) -> None:
    for field, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: layer {layer}: {field} must be {list(shape)} for x {list(x.shape)}, got {list(tensor.shape)}"
            )


def _check_devices(op: str, x: Tensor, layers: DenseLayers) -> None:
    for field, tensors in zip(DenseLayers._fields, layers[:12], strict=False):
        for i, tensor in enumerate(tensors):
            if tensor.device != x.device:
                raise ValueError(f"{op}: layer {i}: {field} must be on {x.device} as x is, got {tensor.device}")
