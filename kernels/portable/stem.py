"""Stem tail: BatchNorm, ReLU and the 3x3 max pool of stride 2 after the first convolution.

::

    z = relu(gamma * xhat + beta)        out = maxpool3x3/2(z)

Nothing but x is kept: the backward recomputes z and where its maxima are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Norm, NormGrads, empty_channels_last
from .batch_norm import norm_relu, norm_relu_backward
from .chunks import Chunk


def stem_tail(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)], of x's dtype."""
    n, c, h, w = x.shape
    out = empty_channels_last((n, c, (h + 1) // 2, (w + 1) // 2), x.dtype, x.device)
    for chunk, z in norm_relu(x, norm):
        out[chunk.images] = F.max_pool2d(z, 3, stride=2, padding=1)
    return out


def stem_tail_backward(grad_out: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    def dz(chunk: Chunk, z: Tensor) -> Tensor:
        _, argmax = torch.ops.aten.max_pool2d_with_indices(z, [3, 3], [2, 2], [1, 1])
        dout = grad_out[chunk.images].to(z.dtype)
        return torch.ops.aten.max_pool2d_with_indices_backward(
            dout.contiguous(memory_format=torch.channels_last), z, [3, 3], [2, 2], [1, 1], [1, 1], False, argmax
        )

    return norm_relu_backward(dz, x, norm)
