"""The convolutions of a DenseNet, 1x1 and padded 3x3 without bias, in whichever stock form is the quickest."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch_norm import images, rows

_FEW = 1024  # pixels for which a CPU's matrix product is quicker than a 1x1 convolution's preparations


def _is_product(z: Tensor, weight: Tensor) -> bool:
    n, _, h, w = z.shape
    return weight.shape[-1] == 1 and z.device.type == "cpu" and n * h * w <= _FEW


def conv(z: Tensor, weight: Tensor) -> Tensor:
    """[N, C, H, W] in channels-last memory, [K, C, 1, 1] or [K, C, 3, 3] -> [N, K, H, W]."""
    if not _is_product(z, weight):
        return torch.conv2d(z, weight, padding=weight.shape[-1] // 2)
    n, _, h, w = z.shape
    return images(rows(z) @ weight.flatten(1).t(), n, h, w)


def conv_backward(dy: Tensor, z: Tensor, weight: Tensor, need_weight: bool) -> tuple[Tensor, Tensor | None]:
    """dz and the weight's gradient, from dy [N, K, H, W] and z in channels-last memory."""
    if not _is_product(z, weight):
        padding = weight.shape[-1] // 2
        dz, dweight, _ = torch.ops.aten.convolution_backward(
            dy, z, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, [True, need_weight, False]
        )
        return dz, dweight
    n, _, h, w = z.shape
    gradient = rows(dy)
    dweight = (gradient.t() @ rows(z)).view(weight.shape) if need_weight else None
    return images(gradient @ weight.flatten(1), n, h, w), dweight
