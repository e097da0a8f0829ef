"""Stem tail: BatchNorm, ReLU and the 3x3 max pool of stride 2, in one pass.

::

    z = relu(scale * x + shift)        out[p] = max over the window of p of z, window 3x3 around 2*p
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..contract import Norm, empty_channels_last
from . import tuning
from .launch import on_device
from .statistics import norm_vectors
from .tile_math import affine_relu


@triton.jit
def _bn_relu_maxpool_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr,
    M, H, W, H_OUT, W_OUT, C, stride_xn, stride_xc, stride_xh, stride_xw,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [M, C], rows of pixels, from x [N, C, H, W] of any strides."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0)
    image, pixel = offs_m // (H_OUT * W_OUT), offs_m % (H_OUT * W_OUT)
    top, left = pixel // W_OUT * 2 - 1, pixel % W_OUT * 2 - 1
    channels = offs_c.to(tl.int64) * stride_xc
    best = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)  # z is not negative, and every window has a pixel
    for tap in range(9):
        y, x = top + tap // 3, left + tap % 3
        inside = mask_m & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        rows = image * stride_xn + y * stride_xh + x * stride_xw
        mask = inside[:, None] & mask_c[None, :]
        tile = tl.load(x_ptr + rows[:, None] + channels[None, :], mask=mask, other=0.0)
        z = tl.where(mask, affine_relu(tile, scale, shift), 0.0)
        best = tl.where((z > best) | (z != z), z, best)  # NaN wins and stays
    mask = mask_m[:, None] & mask_c[None, :]
    tl.store(out_ptr + offs_m[:, None] * C + offs_c[None, :], best.to(out_ptr.dtype.element_ty), mask=mask)


@on_device
def stem_tail(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)], of x's dtype."""
    n, c, h, w = x.shape
    out = empty_channels_last((n, c, (h + 1) // 2, (w + 1) // 2), x.dtype, x.device)
    vectors = norm_vectors(norm)
    m = n * out.shape[2] * out.shape[3]
    config = tuning.elementwise(c, x.device)
    _bn_relu_maxpool_fwd_kernel[(triton.cdiv(m, config.BLOCK_M), triton.cdiv(c, config.BLOCK_C))](
        x, *vectors, out, m, h, w, *out.shape[2:], c, *x.stride(), **config.arguments()
    )
    return out
