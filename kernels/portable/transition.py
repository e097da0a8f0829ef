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

from ..contract import Norm, TransitionGrads, accumulator_dtype, empty_channels_last
from .batch_norm import cast, gemm_dtype, images, laid_out_as, norm_relu, norm_relu_backward, rows
from .chunks import Chunk


def transition(x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, C, H, W], [C', C, 1, 1] -> [N, C', H//2, W//2] of ``dtype``, channels-last."""
    n, _, h, w = x.shape
    compute = gemm_dtype(dtype, x.device)
    weight = cast(weight, compute)
    out = empty_channels_last((n, len(weight), h // 2, w // 2), dtype, x.device)
    for chunk, z in norm_relu(x, norm):
        out[chunk.images] = torch.conv2d(cast(F.avg_pool2d(z, 2), compute), weight)
    return out


def transition_backward(
    grad_out: Tensor, x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype, need_weight: bool
) -> TransitionGrads:
    compute = gemm_dtype(dtype, x.device)
    matrix = cast(weight.flatten(1), compute)  # [C', C]
    dmatrix = torch.zeros_like(matrix, dtype=accumulator_dtype(compute)) if need_weight else None

    def dz(chunk: Chunk, z: Tensor) -> Tensor:
        dout = cast(rows(grad_out[chunk.images]), compute)  # [rows/4, C']
        if dmatrix is not None:
            dmatrix.add_(dout.t() @ cast(rows(F.avg_pool2d(z, 2)), compute))
        n, h, w = chunk.shape
        dpooled = images(cast(dout @ matrix, z.dtype), n, h // 2, w // 2)
        return torch.ops.aten.avg_pool2d_backward(dpooled, z, [2, 2], [2, 2], [0, 0], False, True, None)

    grads = norm_relu_backward(dz, x, norm)
    dweight = weight.new_empty(0) if dmatrix is None else laid_out_as(dmatrix.view(weight.shape), weight)
    return TransitionGrads(*grads, dweight)
