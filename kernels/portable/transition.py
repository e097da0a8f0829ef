"""Transition: BatchNorm, ReLU, 1x1 convolution and the 2x2 average pool.

A 1x1 convolution and an average pool commute exactly, so the pool comes first and the multiply has a
quarter of the rows::

    z = relu(gamma * xhat + beta)        out = avgpool2x2(z) @ W

The backward keeps x alone and recomputes z.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Norm, TransitionGrads
from .batch_norm import gemm_dtype, images, laid_out_as, norm_relu, norm_relu_backward, rows


def transition(x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, C, H, W], [C', C, 1, 1] -> [N, C', H//2, W//2] of ``dtype``, channels-last."""
    compute = gemm_dtype(dtype, x.device)
    pooled = F.avg_pool2d(norm_relu(x, norm), 2).to(compute)
    out = torch.conv2d(pooled, weight.to(compute)).to(dtype)
    return out.contiguous(memory_format=torch.channels_last)


def transition_backward(
    grad_out: Tensor, x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype, need_weight: bool
) -> TransitionGrads:
    compute = gemm_dtype(dtype, x.device)
    dout = rows(grad_out).to(compute)  # [M/4, C']
    z = norm_relu(x, norm)
    if need_weight:
        pooled = rows(F.avg_pool2d(z, 2)).to(compute)  # [M/4, C]
        dweight = laid_out_as((dout.t() @ pooled).view(weight.shape), weight)
    else:
        dweight = weight.new_empty(0)
    dpooled = images((dout @ weight.flatten(1).to(compute)).to(z.dtype), x.shape[0], x.shape[2] // 2, x.shape[3] // 2)
    dz = torch.ops.aten.avg_pool2d_backward(dpooled, z, [2, 2], [2, 2], [0, 0], False, True, None)
    return TransitionGrads(*norm_relu_backward(dz, z, x, norm), dweight)
