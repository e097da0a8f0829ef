"""The convolutions of a DenseNet, 1x1 and padded 3x3 without bias, in whichever stock form is the quickest.

Each is prepared for tensors whose values come later, then called: what needs no values is done when it is prepared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from .batch_norm import images, rows

# Pixels for which a CPU's matrix products are quicker than a 1x1 convolution's preparations, in both directions.
_FEW, _FEW_BACKWARD = 512, 64
_convolution_backward = torch.ops.aten.convolution_backward.default
_ALL, _INPUT = [True, True, False], [True, False, False]  # the gradients that it is asked for


def conv(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Callable[[], Tensor]:
    """Of z [N, C, *spatial] in channels-last memory with [K, C, 1 or 3, ...]: what returns y [N, K, *spatial]."""
    if _is_product(z, weight, _FEW):
        pixels, columns, shape = rows(z), weight.flatten(1).t(), (len(z), *z.shape[2:])
        if bias is None:
            return lambda: images(torch.mm(pixels, columns), shape)
        return lambda: images(torch.addmm(bias, pixels, columns), shape)
    planar, kernel = _planar(z, weight), _planar_kernel(weight)
    one, zero, padding = _geometry(kernel.shape[2:])
    y = partial(torch.convolution, planar, kernel, bias, one, padding, one, False, zero, 1)
    return y if planar is z else lambda: y().reshape(len(z), -1, *z.shape[2:])


def conv_backward(z: Tensor, weight: Tensor, need_weight: bool) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """Of the same: what takes dense dy [N, K, *spatial] and returns dz and the weight's gradient."""
    if _is_product(z, weight, _FEW_BACKWARD):
        columns, matrix, shape = rows(z).t(), weight.flatten(1), (len(z), *z.shape[2:])

        def product_backward(dy: Tensor) -> tuple[Tensor, Tensor | None]:
            dy = rows(dy)  # whose transpose times z is slower than to turn the product of this
            dweight = torch.mm(columns, dy).t().view(weight.shape) if need_weight else None
            return images(torch.mm(dy, matrix), shape), dweight

        return product_backward

    planar, kernel = _planar(z, weight), _planar_kernel(weight)
    one, zero, padding = _geometry(kernel.shape[2:])
    rest = (planar, kernel, None, one, padding, one, False, zero, 1, _ALL if need_weight else _INPUT)
    if planar is z:
        return lambda dy: _convolution_backward(dy, *rest)[:2]

    def planar_backward(dy: Tensor) -> tuple[Tensor, Tensor | None]:
        dz, dweight, _ = _convolution_backward(_planar(dy, weight), *rest)
        return dz.reshape(z.shape), dweight.view(weight.shape) if need_weight else None

    return planar_backward


def _is_product(z: Tensor, weight: Tensor, few: int) -> bool:
    return weight.shape[-1] == 1 and z.device.type == "cpu" and z.numel() <= few * z.shape[1]


def _planar(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution's input or output as that of images, where that changes nothing.

    A sequence is an image of one row. A 1x1 convolution does not know its pixels' neighbours, and as one of volumes it
    takes PyTorch twice as long.
    """
    if x.dim() == 3:
        return x.unsqueeze(2)
    return x.flatten(2, 3) if x.dim() == 5 and weight.shape[-1] == 1 else x


def _planar_kernel(weight: Tensor) -> Tensor:
    """[K, C, 1 or 3, ...], likewise."""
    if weight.dim() == 3:
        return weight.unsqueeze(2)
    return weight.squeeze(2) if weight.dim() == 5 and weight.shape[-1] == 1 else weight


@cache
def _geometry(kernel: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Ones, zeros and the padding, for each spatial dimension of a kernel."""
    return [1] * len(kernel), [0] * len(kernel), [size // 2 for size in kernel]
