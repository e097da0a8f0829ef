"""The convolutions of a DenseNet, 1x1 and padded 3x3 without bias, in whichever stock form is the quickest."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .batch_norm import images, rows
from .chunks import Scratch

_FEW = 1024  # pixels for which a CPU's matrix products are quicker than a 1x1 convolution's preparations


def conv(z: Tensor, weight: Tensor, shape: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """Dense [M, C] of images of ``shape`` (N, *spatial), [K, C, 1 or 3, ...] -> [M, K]."""
    if _is_product(z, weight):
        columns = weight.flatten(1).t()
        return torch.mm(z, columns) if bias is None else torch.addmm(bias, z, columns)
    weight, shape = _planar(weight, shape)
    ones, zeros, padding = _geometry(weight.shape[2:])
    return rows(torch.convolution(images(z, shape), weight, bias, ones, padding, ones, False, zeros, 1))


def conv_backward(
    dy: Tensor, z: Tensor, weight: Tensor, shape: Sequence[int], need_weight: bool, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor | None]:
    """dz [M, C], in ``scratch`` where that serves, and the weight's gradient, from dense dy [M, K] and z."""
    if _is_product(z, weight):
        out = scratch("dz", *z.shape) if scratch is not None and scratch.dtype == z.dtype else None
        dz = torch.mm(dy, weight.flatten(1), out=out)  # and z.t() @ dy is quicker than dy.t() @ z, turned and all
        return dz, torch.mm(z.t(), dy).t().view(weight.shape) if need_weight else None
    kernel, shape = _planar(weight, shape)
    ones, zeros, padding = _geometry(kernel.shape[2:])
    dz, dweight, _ = torch.ops.aten.convolution_backward(
        images(dy, shape),
        images(z, shape),
        kernel,
        None,
        ones,
        padding,
        ones,
        False,
        zeros,
        1,
        [True, need_weight, False],
    )
    return rows(dz), dweight.view(weight.shape) if need_weight else None


def _is_product(z: Tensor, weight: Tensor) -> bool:
    return weight.shape[-1] == 1 and z.shape[0] <= _FEW and z.device.type == "cpu"


def _planar(weight: Tensor, shape: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
    """A kernel and the shape of its input as those of images, where that changes nothing.

    A sequence is an image of one row. A 1x1 convolution does not know its pixels' neighbours, and as one of volumes it
    takes PyTorch twice as long.
    """
    dims = weight.dim()
    if dims == 4 or (dims == 5 and weight.shape[-1] != 1):
        return weight, shape
    weight = weight.unsqueeze(2) if dims == 3 else weight.squeeze(2)
    n, *spatial = shape
    return weight, (n, math.prod(spatial[:-1]), spatial[-1])


@functools.cache
def _geometry(kernel: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Ones, zeros and the padding, for each spatial dimension of a kernel."""
    return [1] * len(kernel), [0] * len(kernel), [size // 2 for size in kernel]
