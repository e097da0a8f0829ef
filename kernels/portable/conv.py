"""The convolutions of a DenseNet, 1x1 and padded 3x3 without bias, in whichever stock form is the quickest.

Their kernels have 1, 2 or 3 dimensions; a sequence is convolved as an image of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch_norm import images, rows

_FEW = 1024  # pixels for which a CPU's matrix product is quicker than a 1x1 convolution's preparations


def conv(z: Tensor, weight: Tensor, shape: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """Dense [M, C] of images of ``shape`` (N, *spatial), [K, C, 1 or 3, ...] -> [M, K]."""
    if _is_product(z, weight):
        columns = weight.flatten(1).t()
        return z @ columns if bias is None else torch.addmm(bias, z, columns)
    z, weight = _planes(images(z, shape)), _planes(weight)
    padding = [size // 2 for size in weight.shape[2:]]
    ones, zeros = [1] * len(padding), [0] * len(padding)
    return rows(torch.convolution(z, weight, bias, ones, padding, ones, False, zeros, 1))


def conv_backward(
    dy: Tensor, z: Tensor, weight: Tensor, shape: Sequence[int], need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """dz [M, C] and the weight's gradient, from dense dy [M, K] and z."""
    if _is_product(z, weight):
        return dy @ weight.flatten(1), (dy.t() @ z).view(weight.shape) if need_weight else None
    planes = _planes(weight)
    padding = [size // 2 for size in planes.shape[2:]]
    ones, zeros = [1] * len(padding), [0] * len(padding)
    dy, z = _planes(images(dy, shape)), _planes(images(z, shape))
    dz, dweight, _ = torch.ops.aten.convolution_backward(
        dy, z, planes, None, ones, padding, ones, False, zeros, 1, [True, need_weight, False]
    )
    return rows(dz), dweight.view(weight.shape) if need_weight else None


def _is_product(z: Tensor, weight: Tensor) -> bool:
    return weight.shape[-1] == 1 and z.device.type == "cpu" and len(z) <= _FEW


def _planes(x: Tensor) -> Tensor:
    """[N, C, L] as [N, C, 1, L]; images and volumes as they are."""
    return x.unsqueeze(2) if x.dim() == 3 else x
