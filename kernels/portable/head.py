"""Head: the last BatchNorm, ReLU and the global average pool.

::

    z = relu(gamma * xhat + beta)        out = mean over the pixels of z
"""

from __future__ import annotations

from torch import Tensor

from ..contract import Norm, NormGrads
from .batch_norm import cast, mask_by_relu, normed, normed_backward
from .chunks import Chunk


def head(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, *spatial] -> [N, C], of x's dtype."""
    out = x.new_empty(x.shape[:2])
    for chunk, a in normed(x, norm):
        chunk.of(out).copy_(a.relu_().flatten(2).mean(2))
    return out


def head_backward(grad_out: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    """Gradients from that of the output."""

    def write_da(chunk: Chunk, a: Tensor, da: Tensor) -> None:
        dout = cast(chunk.of(grad_out), a.dtype) / a[0, 0].numel()
        mask_by_relu(dout.view(*dout.shape, *[1] * (a.dim() - 2)).expand_as(a), a, out=da)

    return normed_backward(write_da, x, norm)
