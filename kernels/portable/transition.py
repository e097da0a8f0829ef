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

from ..contract import Norm, TransitionGrads, empty_channels_last
from .batch_norm import cast, gemm_dtype, laid_out_as, norm_relu, norm_relu_backward
from .chunks import Chunk
from .conv import conv, conv_backward


def transition(x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, C, H, W], [C', C, 1, 1] -> [N, C', H//2, W//2] of ``dtype``, channels-last."""
    n, _, h, w = x.shape
    compute = gemm_dtype(dtype, x.device)
    weight = cast(weight, compute)
    out = empty_channels_last((n, len(weight), h // 2, w // 2), dtype, x.device)
    for chunk, z in norm_relu(x, norm):
        out[chunk.images] = conv(cast(F.avg_pool2d(z, 2), compute), weight)
    return out


def transition_backward(
    grad_out: Tensor, x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype, need_weight: bool
) -> TransitionGrads:
    compute = gemm_dtype(dtype, x.device)
    weight_ = cast(weight, compute)
    parts: list[Tensor] = []  # the weight's gradient, by chunk

    def dz(chunk: Chunk, z: Tensor) -> Tensor:
        pooled = cast(F.avg_pool2d(z, 2), compute)
        dpooled, dweight = conv_backward(cast(grad_out[chunk.images], compute), pooled, weight_, need_weight)
        if dweight is not None:
            parts.append(cast(dweight, z.dtype))
        return torch.ops.aten.avg_pool2d_backward(cast(dpooled, z.dtype), z, [2, 2], [2, 2], [0, 0], False, True, None)

    grads = norm_relu_backward(dz, x, norm)
    dweight = laid_out_as(torch.stack(parts).sum(0), weight) if need_weight else weight.new_empty(0)
    return TransitionGrads(*grads, dweight)
