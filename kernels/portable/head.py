"""Head: the last BatchNorm, ReLU and the global average pool.

::

    z = relu(gamma * xhat + beta)        out = mean over the pixels of z
"""

from __future__ import annotations

from torch import Tensor

from ..contract import Norm, NormGrads
from .batch_norm import norm_relu, norm_relu_backward
from .chunks import Chunk


def head(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, *spatial] -> [N, C], of x's dtype."""
    out = x.new_empty(x.shape[:2])
    for chunk, z in norm_relu(x, norm):
        out[chunk.images] = z.flatten(2).mean(2)
    return out


def head_backward(grad_out: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    def dz(chunk: Chunk, z: Tensor) -> Tensor:
        dout = grad_out[chunk.images].to(z.dtype) / z[0, 0].numel()
        return dout.view(*dout.shape, *[1] * (z.dim() - 2)).expand_as(z)

    return norm_relu_backward(dz, x, norm)
