"""Stem tail: BatchNorm, ReLU and the 3x3 max pool of stride 2 after the first convolution.

::

    a = gamma * xhat + beta        out = maxpool3x3/2(relu(a)) = relu(maxpool3x3/2(a))

ReLU keeps order, so it comes last, on a quarter of the values: where the maximum of a window is not positive nothing
flows back, whichever of its values that was. Nothing but x is kept: the backward makes a again, and where its maxima
are.
"""

from __future__ import annotations

from torch import Tensor

from ..contract import Norm, NormGrads, empty_channels_last
from .batch_norm import cast, mask_by_relu, normed, normed_backward
from .chunks import Chunk
from .pool import max_pool, max_pool_backward


def stem_tail(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, *spatial] -> [N, C, *ceil(size / 2)], of x's dtype."""
    n, c, *spatial = x.shape
    out = empty_channels_last((n, c, *((size + 1) // 2 for size in spatial)), x.dtype, x.device)
    for chunk, a in normed(x, norm):
        chunk.of(out).copy_(max_pool(a)[0].relu_())
    return out


def stem_tail_backward(grad_out: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    """Gradients from that of the output."""

    def write_da(chunk: Chunk, a: Tensor, da: Tensor) -> None:
        maxima, argmax = max_pool(a)
        dmaxima = empty_channels_last(maxima.shape, a.dtype, a.device)
        mask_by_relu(cast(chunk.of(grad_out), a.dtype), maxima, out=dmaxima)
        max_pool_backward(dmaxima, a, argmax, out=da)

    return normed_backward(write_da, x, norm)
