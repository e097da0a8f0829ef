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

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .conv1x1 import precision
from .statistics import Partials, Vectors
from .tile_math import affine_relu, split_pixels, store_tile_stats


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
        kept = tl.load(keep_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask, other=0) != 0
        y = tl.where(kept, y.to(tl.float32) * keep_scale, 0.0).to(w_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    if STATS:
        part = pid_m.to(tl.int64) * N
        count = tl.minimum(M - pid_m.to(tl.int64) * BLOCK_M, BLOCK_M).to(tl.float32)
        store_tile_stats(y.to(tl.float32), mask_m, count, part_mean_ptr + part, part_m2_ptr + part, offs_n, mask_n)


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
    (m, k), n = x.shape, len(weight)
    config = tuning.conv3x3_fwd(m, n, k, weight.dtype, x.device)
    parts = stats.begin(m, n, config.BLOCK_M) if stats is not None else None
    none = (weight, weight)
    _bn_relu_conv3x3_fwd_kernel[(triton.cdiv(m, config.BLOCK_M), triton.cdiv(n, config.BLOCK_N))](
        x, *(norm or none), weight, y, weight if keep is None else keep, *(parts or none),
        m, *size, k, n, x.stride(0), y.stride(0), keep_scale,
        NORM=norm is not None, DROP=keep is not None, STATS=parts is not None, PRECISION=precision(weight.dtype),
        **config.arguments(),
    )  # fmt: skip
