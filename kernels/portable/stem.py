"""Stem tail: BatchNorm, ReLU and the 3x3 max pool of stride 2 after the first convolution.

::

    z = relu(gamma * xhat + beta)        out = maxpool3x3/2(z)

Nothing but x is kept: the backward recomputes z and where its maxima are.
"""

from __future__ import annotations

from torch import Tensor

from ..contract import Norm, NormGrads, empty_channels_last
from .batch_norm import images, norm_relu, norm_relu_backward, rows
from .chunks import Chunk
from .pool import max_pool, max_pool_backward


def stem_tail(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, *spatial] -> [N, C, *ceil(size / 2)], of x's dtype."""
    n, c, *spatial = x.shape
    out = empty_channels_last((n, c, *((size + 1) // 2 for size in spatial)), x.dtype, x.device)
    for chunk, z in norm_relu(x, norm):
        out[chunk.images] = max_pool(z)[0]
    return out


def stem_tail_backward(grad_out: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    def dz(chunk: Chunk, z: Tensor) -> Tensor:
        _, argmax = max_pool(z)
        dout = grad_out[chunk.images].to(z.dtype)
        return max_pool_backward(images(rows(dout).contiguous(), (len(dout), *dout.shape[2:])), z, argmax)

    return norm_relu_backward(dz, x, norm)
