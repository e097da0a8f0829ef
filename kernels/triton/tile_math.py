"""What the kernels do with a tile in registers: affine and ReLU before a multiply, statistics after it.

::

    z    = relu(scale * x + shift)                            scale = gamma * rstd, shift = beta - mean * scale
    mean = sum(y) / n        m2 = sum((y - mean)^2)           per channel, over the n rows that a tile has

Tiles are [rows, channels]; vectors are of the channels and float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu(x):
    """max(x, 0) that leaves NaN, as PyTorch does; ``tl.maximum`` would turn it into 0."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def affine_relu(x, scale, shift):
    """relu(scale * x + shift) of a tile [M, C] in float32."""
    return relu(x.to(tl.float32) * scale[None, :] + shift[None, :])


@triton.jit
def split_pixels(offs_m, H, W):
    """Row and column in the image of pixels [M]."""
    pixel = offs_m % (H * W)
    return pixel // W, pixel % W


@triton.jit
def drop(y, keep_ptrs, mask, keep_scale):
    """y * keep_scale where a value is kept, else 0, in y's dtype."""
    kept = tl.load(keep_ptrs, mask=mask, other=0) != 0
    return tl.where(kept, y.to(tl.float32) * keep_scale, 0.0).to(y.dtype)


@triton.jit
def store_tile_stats(y, pid_m, mask_m, M, mean_ptr, m2_ptr, offs_n, mask_n, N, BLOCK_M: tl.constexpr):
    """Mean and m2 [tiles, N] of tile ``pid_m`` of the M rows, y [BLOCK_M, N]: never E[y^2] - E[y]^2."""
    y, pid_m = y.to(tl.float32), pid_m.to(tl.int64)
    count = tl.minimum(M - pid_m * BLOCK_M, BLOCK_M).to(tl.float32)
    mean = tl.sum(tl.where(mask_m[:, None], y, 0.0), 0) / count
    deviation = tl.where(mask_m[:, None], y - mean[None, :], 0.0)
    tl.store(mean_ptr + pid_m * N + offs_n, mean, mask=mask_n)
    tl.store(m2_ptr + pid_m * N + offs_n, tl.sum(deviation * deviation, 0), mask=mask_n)


@triton.jit
def mask_by_relu(dz, z):
    """da = dz * 1[z > 0]; a NaN in z lets dz through, as PyTorch does."""
    return tl.where(z <= 0, 0.0, dz)


@triton.jit
def store_tile_sums(da, x, mean, pid_m, s1_ptr, s2_ptr, offs_c, mask_c, C):
    """sum(da) and sum(da * (x - mean)) [tiles, C] of tile ``pid_m``."""
    part = pid_m.to(tl.int64) * C + offs_c
    tl.store(s1_ptr + part, tl.sum(da, 0), mask=mask_c)
    tl.store(s2_ptr + part, tl.sum(da * (x - mean[None, :]), 0), mask=mask_c)
