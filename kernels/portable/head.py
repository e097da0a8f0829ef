"""Head: the last BatchNorm, ReLU and the global average pool.

::

    z = relu(gamma * xhat + beta)        out = mean over the pixels of z
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Norm, NormGrads
from .batch_norm import norm_relu, norm_relu_backward


def head(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, H, W] -> [N, C], of x's dtype."""
    return norm_relu(x, norm).mean((2, 3)).to(x.dtype)


def head_backward(grad_out: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    z = norm_relu(x, norm)
    dz = torch.empty_like(z).copy_(grad_out[:, :, None, None]).div_(x.shape[2] * x.shape[3])
    return norm_relu_backward(dz, z, x, norm)
