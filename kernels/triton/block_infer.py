"""Inference of a whole dense block in one launch: each program has an image, and no other needs what it makes.

For each layer, over tiles of the image's pixels::

    u = relu(scale2 * (relu(scale1 * X[:, :C_l] + shift1) @ W1^T) + shift2)        into the program's scratch, L2
    X[:, C_l : C_l+k] = conv3x3(u, W2)

with a barrier of the program's threads between the two: what a layer reads, the same program wrote.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .conv1x1 import precision
from .launch import multiprocessors, next_power_of_2
from .statistics import Vectors
from .tile_math import affine_relu, relu


@triton.jit
def _block_infer_kernel(
    x_ptr, scale1_ptr, shift1_ptr, w1_ptr, scale2_ptr, shift2_ptr, w3_ptr, u_ptr,
    H, W, C0, B, GROWTH, LAYERS, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill channels C0 and on of one image's rows of X; the layers' vectors and weights follow each other."""
    image = tl.program_id(0).to(tl.int64)
    HW = H * W
    x_ptr += image * HW * stride_xm
    u_ptr += image * HW * B
    offs_b, offs_n, offs_k = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_b, mask_n = offs_b < B, offs_n < GROWTH
    C = C0
    for _ in range(LAYERS):
        scale2 = tl.load(scale2_ptr + offs_b, mask=mask_b, other=0.0)
        shift2 = tl.load(shift2_ptr + offs_b, mask=mask_b, other=0.0)
        for start in range(0, HW, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            mask_m = offs_m < HW
            x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
            w_ptrs = w1_ptr + offs_b[None, :] * C + offs_k[:, None]
            acc = tl.zeros((BLOCK_M, BLOCK_B), tl.float32)
            for k in range(0, C, BLOCK_K):
                mask_k = offs_k < C - k
                x = tl.load(x_ptrs + k, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
                w = tl.load(w_ptrs + k, mask=mask_b[None, :] & mask_k[:, None], other=0.0)
                scale = tl.load(scale1_ptr + k + offs_k, mask=mask_k, other=0.0)
                shift = tl.load(shift1_ptr + k + offs_k, mask=mask_k, other=0.0)
                acc = tl.dot(affine_relu(x, scale, shift).to(w.dtype), w, acc, input_precision=PRECISION)
            u = relu(acc * scale2[None, :] + shift2[None, :])
            mask = mask_m[:, None] & mask_b[None, :]
            tl.store(u_ptr + offs_m[:, None] * B + offs_b[None, :], u.to(u_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()
        for start in range(0, HW, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            mask_m = offs_m < HW
            row, column = offs_m // W, offs_m % W
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for tap in range(9):
                down, right = tap // 3 - 1, tap % 3 - 1
                inside = (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W) & mask_m
                u_ptrs = u_ptr + (offs_m + down * W + right)[:, None] * B + offs_b[None, :]
                w_ptrs = w3_ptr + offs_n[None, :] * (9 * B) + tap * B + offs_b[:, None]
                u = tl.load(u_ptrs, mask=inside[:, None] & mask_b[None, :], other=0.0)  # [BLOCK_M, BLOCK_B]
                w = tl.load(w_ptrs, mask=mask_n[None, :] & mask_b[:, None], other=0.0)  # [BLOCK_B, BLOCK_N]
                acc = tl.dot(u.to(w.dtype), w, acc, input_precision=PRECISION)
            y = acc.to(w3_ptr.dtype.element_ty).to(x_ptr.dtype.element_ty)
            mask = mask_m[:, None] & mask_n[None, :]
            tl.store(x_ptr + offs_m[:, None] * stride_xm + C + offs_n[None, :], y, mask=mask)
        tl.debug_barrier()
        scale1_ptr += C
        shift1_ptr += C
        w1_ptr += B * C
        scale2_ptr += B
        shift2_ptr += B
        w3_ptr += 9 * B * GROWTH
        C += GROWTH


def fits(images: int, pixels: int, width: int, growth: int, device: torch.device) -> bool:
    """Whether a program an image is the quicker way: images for every multiprocessor, of few pixels."""
    if width > 128 or growth > 64 or pixels > 256:
        return False
    return images >= multiprocessors(device)


class Together(NamedTuple):
    """The layers' vectors and weights, each after the one before it."""

    scale1: Tensor
    shift1: Tensor
    weight1: Tensor
    scale2: Tensor
    shift2: Tensor
    weight3: Tensor
    layers: int
    width: int  # of a bottleneck
    growth: int

    @staticmethod
    def of(norms1: list[Vectors], weights1: list[Tensor], norms2: list[Vectors], weights3: list[Tensor]) -> Together:
        """Weights as in the layers' own kernels."""
        (scale1, shift1), (scale2, shift2) = (
            [torch.cat(vectors) for vectors in zip(*norms, strict=True)] for norms in (norms1, norms2)
        )
        weight1, weight3 = (torch.cat([weight.view(-1) for weight in weights]) for weights in (weights1, weights3))
        sizes = len(weights1), len(weights1[0]), len(weights3[0])
        return Together(scale1, shift1, weight1, scale2, shift2, weight3, *sizes)


def block_infer(shared: Tensor, layers: Together, c0: int, size: tuple[int, int]) -> None:
    """Fill the channels c0 and on of X [M, C_L] from those before."""
    width, growth, dtype = layers.width, layers.growth, layers.weight1.dtype
    pixels = size[0] * size[1]
    u = torch.empty((len(shared), width), dtype=dtype, device=shared.device)
    config = tuning.block_infer(pixels, width, growth, dtype, shared.device)
    _block_infer_kernel[(len(shared) // pixels,)](
        shared, layers.scale1, layers.shift1, layers.weight1, layers.scale2, layers.shift2, layers.weight3, u,
        *size, c0, width, growth, layers.layers, shared.stride(0),
        BLOCK_M=config.BLOCK_M, BLOCK_B=config.BLOCK_N, BLOCK_N=next_power_of_2(max(16, growth)),
        BLOCK_K=config.BLOCK_K, PRECISION=precision(dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
