"""BN-ReLU-conv3x3, padded by one: from the bottleneck, or straight from the prefix, into a slice of the shared buffer.

::

    u[p] = relu(scale * x[p] + shift)                         0 outside the image, after the ReLU
    y[p] = sum over taps t of u[p + offset_t] @ W_t^T         x: [M, K]; y: [M, N], a slice of rows of stride_ym

An implicit GEMM over nine taps: each re-reads its shifted rows from L1 or L2 and normalises them again in
registers. (One GEMM of all taps, N = 9k, would normalise once, but needs whole images in a tile: its halo of
two rows and two columns is most of a tile of 56x56. In inference the 1x1 has done norm2, and the taps only load.)

Source: DenseNet (arXiv 1608.06993), section 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..portable.batch_norm import Affine
from . import tuning
from .conv1x1 import precision
from .launch import ceil_div
from .statistics import Partials, Vectors
from .tile_math import affine_relu, drop, mask_by_relu, split_pixels, store_tile_stats, store_tile_sums


@triton.jit
def _bn_relu_conv3x3_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, w_ptr, y_ptr, keep_ptr, part_mean_ptr, part_m2_ptr,
    M, H, W, K, N, stride_xm, stride_ym, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, DROP: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M, N] from x [M, K] and W [N, 9, K]; with STATS the tile's partial statistics of y as stored."""
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    row, column = split_pixels(offs_m, H, W)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * (9 * K) + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(K, BLOCK_K)
    for step in range(0, 9 * steps):
        tap, k = step // steps, step % steps * BLOCK_K
        down, right = tap // 3 - 1, tap % 3 - 1
        mask_k = offs_k < K - k
        inside = (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W) & mask_m
        offset = (down * W + right) * stride_xm + k
        x = tl.load(x_ptrs + offset, mask=inside[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs + tap * K + k, mask=mask_n[None, :] & mask_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        if NORM:
            scale = tl.load(scale_ptr + k + offs_k, mask=mask_k, other=0.0)
            shift = tl.load(shift_ptr + k + offs_k, mask=mask_k, other=0.0)
            x = tl.where(inside[:, None], affine_relu(x, scale, shift), 0.0)
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)

    mask = mask_m[:, None] & mask_n[None, :]
    y = acc.to(w_ptr.dtype.element_ty)
    if DROP:
        y = drop(y, keep_ptr + offs_m[:, None] * N + offs_n[None, :], mask, keep_scale)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    if STATS:
        store_tile_stats(y, pid_m, mask_m, M, part_mean_ptr, part_m2_ptr, offs_n, mask_n, N, BLOCK_M)


def bn_relu_conv3x3_fwd(
    x: Tensor,
    norm: Vectors | None,
    weight: Tensor,
    y: Tensor,
    size: tuple[int, int],
    *,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
    stats: Partials | None = None,
) -> None:
    """Fill the slice y [M, N] from x [M, K], both of dense channels, M the pixels of images of ``size``.

    Args:
        norm: normalises x before its ReLU; ``None`` where x is activated already.
        weight: [N, 3, 3, K], dense, of the dtype to multiply in and to round y to.
        keep: [M, N], where dropout keeps a value; those are multiplied by ``keep_scale``.
        stats: receives the partial statistics of y.
    """
    (m, k), n = x.shape, weight.shape[0]
    config = tuning.conv3x3_fwd(m, n, k, weight.dtype, x.device)
    parts = stats.begin(m, n, config.BLOCK_M) if stats is not None else None
    none = (weight, weight)
    _bn_relu_conv3x3_fwd_kernel[(ceil_div(m, config.BLOCK_M), ceil_div(n, config.BLOCK_N))](
        x, *(norm or none), weight, y, weight if keep is None else keep, *(parts or none),
        m, *size, k, n, x.stride(0), y.stride(0), keep_scale,
        NORM=norm is not None, DROP=keep is not None, STATS=parts is not None, PRECISION=precision(weight.dtype),
        **config.arguments,
    )  # fmt: skip


@triton.jit
def _conv3x3_dgrad_kernel(
    dy_ptr, w_ptr, x_ptr, scale_ptr, shift_ptr, mean_ptr, arriving_ptr, out_ptr, part_s1_ptr, part_s2_ptr,
    M, H, W, K, N, stride_xm, stride_am, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From dy [M, N] the norm's da [M, K] and its tiles' sums::

        da[p] = sum over taps t of dy[p - offset_t] @ W_t * 1[scale * x + shift > 0]

    With ADD it is G = arriving + scale * da that is stored, the raw gradient of x, otherwise da.
    """
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_k = offs_m < M, offs_k < K
    row, column = split_pixels(offs_m, H, W)
    dy_ptrs = dy_ptr + offs_m[:, None] * N + offs_n[None, :]
    w_ptrs = w_ptr + offs_n[:, None] * (9 * K) + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    steps = tl.cdiv(N, BLOCK_N)
    for step in range(0, 9 * steps):
        tap, n = step // steps, step % steps * BLOCK_N
        down, right = tap // 3 - 1, tap % 3 - 1
        mask_n = offs_n < N - n
        inside = (row - down >= 0) & (row - down < H) & (column - right >= 0) & (column - right < W) & mask_m
        offset = n - (down * W + right) * N
        dy = tl.load(dy_ptrs + offset, mask=inside[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        w = tl.load(w_ptrs + n * 9 * K + tap * K, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)

    mask = mask_m[:, None] & mask_k[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + offs_k, mask=mask_k, other=0.0)
    shift = tl.load(shift_ptr + offs_k, mask=mask_k, other=0.0)
    mean = tl.load(mean_ptr + offs_k, mask=mask_k, other=0.0)
    da = mask_by_relu(acc, affine_relu(x, scale, shift))  # 0 in rows beyond M: their dy is
    store_tile_sums(da, x, mean, pid_m, part_s1_ptr, part_s2_ptr, offs_k, mask_k, K)
    if ADD:
        arriving = tl.load(arriving_ptr + offs_m[:, None] * stride_am + offs_k[None, :], mask=mask, other=0.0)
        da = arriving.to(tl.float32) + scale[None, :] * da
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_k[None, :], da.to(out_ptr.dtype.element_ty), mask=mask)


def conv3x3_dgrad(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    norm: Affine,
    out: Tensor,
    size: tuple[int, int],
    sums: Partials,
    arriving: Tensor | None = None,
) -> None:
    """Fill out [M, K] with the norm's da or, where something is ``arriving`` [M, K], with the raw gradient of x.

    Args:
        dy: [M, N], dense; weight: [N, 3, 3, K], dense, of dy's dtype; x: [M, K] of dense channels.
        sums: receives the norm's s1 and s2 by tile.
        arriving: of that gradient, what there is so far: out itself, or elsewhere.
    """
    (m, n), k = dy.shape, x.shape[1]
    so_far = out if arriving is None else arriving
    config = tuning.conv3x3_dgrad(m, n, k, weight.dtype, x.device)
    parts = sums.begin(m, k, config.BLOCK_M)
    _conv3x3_dgrad_kernel[(ceil_div(m, config.BLOCK_M), ceil_div(k, config.BLOCK_K))](
        dy, weight, x, norm.scale, norm.shift, norm.mean, so_far, out, *parts,
        m, *size, k, n, x.stride(0), so_far.stride(0), out.stride(0),
        ADD=arriving is not None, PRECISION=precision(weight.dtype), **config.arguments,
    )  # fmt: skip


@triton.jit
def _bn_relu_conv3x3_wgrad_kernel(
    dy_ptr, x_ptr, scale_ptr, shift_ptr, part_dw_ptr,
    M, H, W, K, N, TILES, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW [N, 9, K] over TILES tiles of pixels::

        dW_t = sum over pixels p of dy[p]^T @ u[p + offset_t]        u = relu(scale * x + shift), 0 outside

    A program has the three taps of one row of the window.
    """
    pid_k, pid_n, pid_s = tl.program_id(0) // 3, tl.program_id(1), tl.program_id(2)
    window_row = tl.program_id(0) % 3
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_k, mask_n = offs_k < K, offs_n < N
    scale = tl.load(scale_ptr + offs_k, mask=mask_k, other=0.0)
    shift = tl.load(shift_ptr + offs_k, mask=mask_k, other=0.0)
    left = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    centre = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    right = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for tile in range(TILES):
        offs_m = (pid_s.to(tl.int64) * TILES + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        row, column = split_pixels(offs_m, H, W)
        inside = (offs_m < M) & (row + window_row >= 1) & (row + window_row <= H)
        dy_ptrs = dy_ptr + offs_m[:, None] * N + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=(offs_m < M)[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        x_ptrs = x_ptr + (offs_m + (window_row - 1) * W)[:, None] * stride_xm + offs_k[None, :]
        u = _activated(x_ptrs - stride_xm, inside & (column >= 1), mask_k, scale, shift, dy.dtype)
        left = tl.dot(tl.trans(u), dy, left, input_precision=PRECISION)
        u = _activated(x_ptrs, inside, mask_k, scale, shift, dy.dtype)
        centre = tl.dot(tl.trans(u), dy, centre, input_precision=PRECISION)
        u = _activated(x_ptrs + stride_xm, inside & (column + 1 < W), mask_k, scale, shift, dy.dtype)
        right = tl.dot(tl.trans(u), dy, right, input_precision=PRECISION)
    offs = (pid_s.to(tl.int64) * N + offs_n[None, :]) * (9 * K) + 3 * window_row * K + offs_k[:, None]
    mask = mask_k[:, None] & mask_n[None, :]
    tl.store(part_dw_ptr + offs, left, mask=mask)
    tl.store(part_dw_ptr + offs + K, centre, mask=mask)
    tl.store(part_dw_ptr + offs + 2 * K, right, mask=mask)


@triton.jit
def _activated(x_ptrs, inside, mask_k, scale, shift, dtype):
    """u [BLOCK_M, BLOCK_K] at the pixels ``inside`` the image, 0 at the others."""
    x = tl.load(x_ptrs, mask=inside[:, None] & mask_k[None, :], other=0.0)
    return tl.where(inside[:, None], affine_relu(x, scale, shift), 0.0).to(dtype)


def bn_relu_conv3x3_wgrad(dy: Tensor, x: Tensor, norm: Affine, size: tuple[int, int]) -> Tensor:
    """Parts of dW, [parts, N, 9, K], float32, from dy [M, N], dense, and x [M, K] of dense channels."""
    (m, n), k = dy.shape, x.shape[1]
    config = tuning.conv3x3_wgrad(m, n, k, dy.dtype, x.device)
    blocks_k, blocks_n = 3 * ceil_div(k, config.BLOCK_K), ceil_div(n, config.BLOCK_N)
    tiles, splits = tuning.split(ceil_div(m, config.BLOCK_M), blocks_k * blocks_n, x.device)
    dw = torch.empty((splits, n, 9, k), dtype=torch.float32, device=x.device)
    _bn_relu_conv3x3_wgrad_kernel[(blocks_k, blocks_n, splits)](
        dy, x, norm.scale, norm.shift, dw, m, *size, k, n, tiles, x.stride(0),
        PRECISION=precision(dy.dtype), **config.arguments,
    )  # fmt: skip
    return dw
