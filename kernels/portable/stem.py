"""Stem tail: BatchNorm, ReLU and the 3x3 max pool of stride 2 after the first convolution.

::

    z = relu(gamma * xhat + beta)        out = maxpool3x3/2(z)

Nothing but x is kept: the backward recomputes z and where its maxima are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Norm, NormGrads
from .batch_norm import channels_last, norm_relu, norm_relu_backward


def stem_tail(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)], of x's dtype."""
    out = F.max_pool2d(norm_relu(x, norm), 3, stride=2, padding=1).to(x.dtype)
    return out.contiguous(memory_format=torch.channels_last)


def stem_tail_backward(grad_out: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    z = norm_relu(x, norm)
    _, argmax = torch.ops.aten.max_pool2d_with_indices(z, [3, 3], [2, 2], [1, 1])
    dz = torch.ops.aten.max_pool2d_with_indices_backward(
        channels_last(grad_out).to(z.dtype), z, [3, 3], [2, 2], [1, 1], [1, 1], False, argmax
    )
    return norm_relu_backward(dz, z, x, norm)
