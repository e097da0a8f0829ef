"""Head: the last BatchNorm, ReLU and the global average pool, in one pass; its backward in two.

::

    out[n] = mean over the pixels p of image n of relu(scale * x[n, p] + shift)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Norm, NormGrads
from ..portable.batch_norm import affine
from . import tuning
from .gradients import average_backward
from .launch import ceil_div, on_device
from .statistics import norm_vectors
from .tile_math import affine_relu


@triton.jit
def _bn_relu_mean_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr,
    HW, W, C, stride_xn, stride_xc, stride_xh, stride_xw,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [N, C] from x [N, C, H, W] of any strides: a program has some channels of one image."""
    image = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0)
    x_ptrs = x_ptr + image * stride_xn + offs_c.to(tl.int64)[None, :] * stride_xc
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, HW, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (offs_m < HW)[:, None] & mask_c[None, :]
        pixels = offs_m // W * stride_xh + offs_m % W * stride_xw
        x = tl.load(x_ptrs + pixels[:, None], mask=mask, other=0.0)
        total += tl.sum(tl.where(mask, affine_relu(x, scale, shift), 0.0), 0)
    tl.store(out_ptr + image * C + offs_c, (total / HW).to(out_ptr.dtype.element_ty), mask=mask_c)


@on_device
def head(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, H, W] -> [N, C], of x's dtype."""
    n, c, h, w = x.shape
    out = x.new_empty((n, c))
    vectors = norm_vectors(norm)
    config = tuning.elementwise(c, x.device)
    _bn_relu_mean_fwd_kernel[(n, ceil_div(c, config.BLOCK_C))](
        x, *vectors, out, h * w, w, c, *x.stride(), **config.arguments
    )
    return out


@on_device
def head_backward(grad_out: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    return average_backward(
        grad_out.contiguous(), x, norm, affine(norm, torch.float32), (1, 1), (x.shape[2], x.shape[3])
    )
