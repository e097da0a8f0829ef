"""Transition: BatchNorm, ReLU, 1x1 convolution and the average pool of 2 in every dimension.

A 1x1 convolution and an average pool commute exactly, so the pool comes first and the multiply has a half, a quarter
or an eighth of the rows::

    z = relu(gamma * xhat + beta)        out = avgpool2(z) @ W

The backward keeps x alone and recomputes z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Norm, TransitionGrads, accumulator_dtype, empty_channels_last, in_channels_last
from .batch_norm import cast, gemm_dtype, laid_out_as, mask_by_relu, normed, normed_backward
from .chunks import Chunk
from .conv import conv, conv_backward
from .pool import avg_pool, avg_pool_backward


def transition(x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, C, *spatial], [C', C, 1, ...] -> [N, C', *(size // 2)] of ``dtype``, channels-last."""
    n, _, *spatial = x.shape
    compute = gemm_dtype(dtype, x.device)
    weight = cast(weight, compute)
    out = empty_channels_last((n, len(weight), *(size // 2 for size in spatial)), dtype, x.device)
    for chunk, a in normed(x, norm):
        chunk.of(out).copy_(conv(cast(avg_pool(a.relu_()), compute), weight)())
    return out


def transition_backward(
    grad_out: Tensor, x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype, need_weight: bool
) -> TransitionGrads:
    """Gradients from that of the output, of ``dtype``."""
    compute = gemm_dtype(dtype, x.device)
    weight_ = cast(weight, compute)
    parts: list[Tensor] = []  # the weight's gradient, by chunk

    def write_da(chunk: Chunk, a: Tensor, da: Tensor) -> None:
        dy, z = in_channels_last(cast(chunk.of(grad_out), compute)), a.relu_()
        dpooled, dweight = conv_backward(cast(avg_pool(z), compute), weight_, need_weight)(dy)
        if dweight is not None:
            parts.append(cast(dweight, accumulator_dtype(z.dtype)))
        avg_pool_backward(cast(dpooled, z.dtype), z, out=da)
        mask_by_relu(da, z, out=da)

    grads = normed_backward(write_da, x, norm)
    dweight = laid_out_as(torch.stack(parts).sum(0), weight) if need_weight else weight.new_empty(0)
    return TransitionGrads(*grads, dweight)
