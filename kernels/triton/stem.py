"""Stem tail: BatchNorm, ReLU and the 3x3 max pool of stride 2, in one pass; its backward in three.

::

    z = relu(scale * x + shift)        out[p] = max over the window of p of z, window 3x3 around 2*p

Backward finds again where in its window each maximum is, the first of equal ones as PyTorch; a pixel gathers from
the up to four windows it is in. The norm's gradient takes two passes, its correction being known after the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Norm, NormGrads, empty_channels_last, in_channels_last
from ..portable.batch_norm import affine, rows
from . import tuning
from .gradients import input_gradient, two_pass_backward
from .launch import ceil_div, on_device
from .prepared import PreparedNorm
from .tile_math import affine_relu, mask_by_relu, split_pixels, store_tile_sums


@triton.jit
def _bn_relu_maxpool_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr,
    M, H, W, H_OUT, W_OUT, C, stride_xn, stride_xc, stride_xh, stride_xw,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ARGMAX: tl.constexpr,
):  # fmt: skip
    """out [M, C], rows of pixels, from x [N, C, H, W] of any strides: the maximum, or with ARGMAX its tap."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0)
    image, pixel = offs_m // (H_OUT * W_OUT), offs_m % (H_OUT * W_OUT)
    top, left = pixel // W_OUT * 2 - 1, pixel % W_OUT * 2 - 1
    channels = offs_c.to(tl.int64) * stride_xc
    best = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)  # z is not negative, and every window has a pixel
    where = tl.full((BLOCK_M, BLOCK_C), 9, tl.int32)  # no tap: all are 0, and let no gradient through
    for tap in range(9):
        y, x = top + tap // 3, left + tap % 3
        inside = mask_m & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        rows = image * stride_xn + y * stride_xh + x * stride_xw
        mask = inside[:, None] & mask_c[None, :]
        tile = tl.load(x_ptr + rows[:, None] + channels[None, :], mask=mask, other=0.0)
        z = tl.where(mask, affine_relu(tile, scale, shift), 0.0)
        better = (z > best) | (z != z)  # NaN wins and stays
        best = tl.where(better, z, best)
        where = tl.where(better, tap, where)
    if ARGMAX:
        best = where
    mask = mask_m[:, None] & mask_c[None, :]
    tl.store(out_ptr + offs_m[:, None] * C + offs_c[None, :], best.to(out_ptr.dtype.element_ty), mask=mask)


def bn_relu_maxpool_fwd(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, *, argmax: bool) -> None:
    """Fill out [N, C, H', W'], channels-last, with the maxima or the taps, 0 to 8, of their pixels."""
    n, c, h, w = x.shape
    m = n * out.shape[2] * out.shape[3]
    config = tuning.elementwise(c, x.device)
    _bn_relu_maxpool_fwd_kernel[(ceil_div(m, config.BLOCK_M), ceil_div(c, config.BLOCK_C))](
        x, scale, shift, out, m, h, w, *out.shape[2:], c, *x.stride(), ARGMAX=argmax, **config.arguments
    )


class PreparedStemTail(PreparedNorm):
    """A stem's tail at given statistics: its vectors made."""

    def run(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        out = empty_channels_last((n, c, (h + 1) // 2, (w + 1) // 2), x.dtype, x.device)
        bn_relu_maxpool_fwd(x, *self.vectors, out, argmax=False)
        return out


class PreparedStem(PreparedStemTail):
    """A stem at given statistics: the vendor library's convolution, and the tail."""

    def __init__(
        self,
        norm: Norm,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        x_dtype: torch.dtype,
        dtype: torch.dtype,
    ):
        super().__init__(norm, x_dtype)
        self._weight, self._window = weight.to(dtype), (stride, padding)

    def run(self, x: Tensor) -> Tensor:
        x = torch.convolution(x.to(self._weight.dtype), self._weight, None, *self._window, [1, 1], False, [0, 0], 1)
        return super().run(in_channels_last(x))


def stem_tail(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)], of x's dtype."""
    return PreparedStemTail(norm, x.dtype)(x)


@triton.jit
def _bn_relu_maxpool_bwd_kernel(
    x_ptr, scale_ptr, shift_ptr, mean_ptr, dout_ptr, tap_ptr, p_ptr, q_ptr, dx_ptr, part_s1_ptr, part_s2_ptr,
    M, H, W, C, H_OUT, W_OUT, stride_xn, stride_xc, stride_xh, stride_xw,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Tiles' sums of da and da * (x - mean), or with those known dx [M, C]::

        da[p] = sum over the windows of p whose maximum is at p of dout * 1[scale * x + shift > 0]

    dout and the maxima's taps are [N * H_OUT * W_OUT, C], dense; x is [N, C, H, W] of any strides.
    """
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    image = offs_m // (H * W)
    row, column = split_pixels(offs_m, H, W)
    dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for corner in range(4):
        down, right = corner // 2, corner % 2
        # an odd row lies in the windows before and after it, an even one in its own alone
        y, x = (row + down) // 2, (column + right) // 2
        once = ((down == 0) | (row % 2 == 1)) & ((right == 0) | (column % 2 == 1))
        tap = 3 * (row - 2 * y + 1) + column - 2 * x + 1
        inside = (mask_m & once & (y < H_OUT) & (x < W_OUT))[:, None] & mask_c[None, :]
        offs = ((image * H_OUT + y) * W_OUT + x)[:, None] * C + offs_c[None, :]
        best = tl.load(tap_ptr + offs, mask=inside, other=9).to(tl.int32)
        dout = tl.load(dout_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        dz += tl.where(inside & (best == tap[:, None]), dout, 0.0)
    mask = mask_m[:, None] & mask_c[None, :]
    rows = image * stride_xn + row * stride_xh + column * stride_xw
    x_ptrs = x_ptr + rows[:, None] + offs_c.to(tl.int64)[None, :] * stride_xc
    tile = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    da = mask_by_relu(dz, affine_relu(tile, scale, shift))
    if SUMS:
        store_tile_sums(da, tile, mean, pid_m, part_s1_ptr, part_s2_ptr, offs_c, mask_c, C)
    else:
        dx = input_gradient(da, tile, scale, mean, p_ptr, q_ptr, offs_c, mask_c)
        tl.store(dx_ptr + offs_m[:, None] * C + offs_c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@on_device
def stem_tail_backward(grad_out: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    n, c = x.shape[:2]
    h_out, w_out = grad_out.shape[2:]
    vectors = affine(norm, torch.float32)
    taps = empty_channels_last((n, c, h_out, w_out), torch.uint8, x.device)
    bn_relu_maxpool_fwd(x, vectors.scale, vectors.shift, taps, argmax=True)
    config = tuning.elementwise(c, x.device, 2048)  # it gathers from four windows
    operands = [rows(grad_out).contiguous(), taps]
    return two_pass_backward(_bn_relu_maxpool_bwd_kernel, x, norm, vectors, config, operands, [h_out, w_out])
