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
def store_tile_stats(y, mask_m, count, mean_ptr, m2_ptr, offs_n, mask_n):
    """Mean and m2 [N] of the ``count`` rows of y [M, N] inside ``mask_m``: never E[y^2] - E[y]^2."""
    mean = tl.sum(tl.where(mask_m[:, None], y, 0.0), 0) / count
    deviation = tl.where(mask_m[:, None], y - mean[None, :], 0.0)
    tl.store(mean_ptr + offs_n, mean, mask=mask_n)
    tl.store(m2_ptr + offs_n, tl.sum(deviation * deviation, 0), mask=mask_n)


@triton.jit
def mask_by_relu(dz, z):
    """da = dz * 1[z > 0]; a NaN in z lets dz through, as PyTorch does."""
    return tl.where(z <= 0, 0.0, dz)
