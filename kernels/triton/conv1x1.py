"""BN-ReLU-conv1x1 over a channel prefix of the shared buffer, and its backward in one pass over that prefix.

::

    z = relu(scale1 * x + shift1)            x: [M, K], a prefix of rows of stride_xm
    h = z @ W^T                              [M, N], W: [N, K]
    FOLD:   h = relu(scale2 * h + shift2)    inference: norm2 and its ReLU, whose statistics are known

x is read once if BLOCK_N covers N, as it does for up to 128 bottleneck channels. Nothing normalised is stored:
the prologue works in registers between the load and the tensor cores.

Source: DenseNet (arXiv 1608.06993), section 3, "composite function" and "bottleneck layers".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..portable.batch_norm import Affine
from . import tuning
from .launch import ceil_div
from .statistics import Partials, Vectors
from .tile_math import affine_relu, drop, mask_by_relu, relu, store_tile_stats


@triton.jit
def _bn_relu_conv1x1_fwd_kernel(
    x_ptr, scale1_ptr, shift1_ptr, w_ptr, scale2_ptr, shift2_ptr, h_ptr, keep_ptr, part_mean_ptr, part_m2_ptr,
    M, K, N, stride_xm, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FOLD: tl.constexpr, DROP: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h [M, N] from x [M, K]; with STATS the tile's partial statistics of h as stored."""
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * K + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs + k, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs + k, mask=mask_n[None, :] & mask_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        scale = tl.load(scale1_ptr + k + offs_k, mask=mask_k, other=0.0)
        shift = tl.load(shift1_ptr + k + offs_k, mask=mask_k, other=0.0)
        z = affine_relu(x, scale, shift)
        acc = tl.dot(z.to(w.dtype), w, acc, input_precision=PRECISION)

    mask = mask_m[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    if FOLD:
        scale2 = tl.load(scale2_ptr + offs_n, mask=mask_n, other=0.0)
        shift2 = tl.load(shift2_ptr + offs_n, mask=mask_n, other=0.0)
        acc = relu(acc * scale2[None, :] + shift2[None, :])
    h = acc.to(h_ptr.dtype.element_ty)
    if DROP:
        h = drop(h, keep_ptr + offs, mask, keep_scale)
    tl.store(h_ptr + offs, h, mask=mask)
    if STATS:
        store_tile_stats(h, pid_m, mask_m, M, part_mean_ptr, part_m2_ptr, offs_n, mask_n, N, BLOCK_M)


def bn_relu_conv1x1_fwd(
    x: Tensor,
    norm1: Vectors,
    weight: Tensor,
    h: Tensor,
    *,
    fold: Vectors | None = None,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
    stats: Partials | None = None,
) -> None:
    """Fill h [M, N] from the prefix x [M, K] of dense channels.

    Args:
        weight: [N, K], dense, of the dtype to multiply in.
        fold: norm2, applied with its ReLU before the store.
        keep: [M, N], where dropout keeps a value; those are multiplied by ``keep_scale``.
        stats: receives the partial statistics of h.
    """
    (m, k), (n, _) = x.shape, weight.shape
    config = tuning.conv1x1_fwd(m, n, k, weight.dtype, x.device)
    parts = stats.begin(m, n, config.BLOCK_M) if stats is not None else None
    none = norm1.scale
    _bn_relu_conv1x1_fwd_kernel[(ceil_div(m, config.BLOCK_M), ceil_div(n, config.BLOCK_N))](
        x, norm1.scale, norm1.shift, weight, *(fold or norm1), h, none if keep is None else keep, *(parts or norm1),
        m, k, n, x.stride(0), keep_scale,
        FOLD=fold is not None, DROP=keep is not None, STATS=parts is not None, PRECISION=precision(weight.dtype),
        **config.arguments,
    )  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch's convolutions are told to."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"


@triton.jit
def _bn_relu_conv1x1_bwd_kernel(
    x_ptr, scale1_ptr, shift1_ptr, mean1_ptr, w_ptr, h_ptr, da2_ptr, scale2_ptr, mean2_ptr, p2_ptr, q2_ptr, keep_ptr,
    arriving_ptr, g_ptr, part_dw_ptr, part_s1_ptr, part_s2_ptr,
    M, K, N, TILES, stride_xm, stride_am, stride_gm, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DROP: tl.constexpr, WGRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dgrad and wgrad in one pass over x::

        dh = scale2 * da2 + p2 + q2 * (h - mean2)
        z = relu(scale1 * x + shift1)        da = (dh @ W) * 1[z > 0]        G = arriving + scale1 * da
        dW += dh^T @ z        s1 += sum(da)        s2 += sum(da * (x - mean1))

    A program has BLOCK_K channels, and TILES tiles of pixels.
    """
    pid_k, pid_s = tl.program_id(0), tl.program_id(1)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    mask_k, mask_n = offs_k < K, offs_n < N
    mask_w = mask_n[:, None] & mask_k[None, :]
    w = tl.load(w_ptr + offs_n[:, None] * K + offs_k[None, :], mask=mask_w, other=0.0)  # [BLOCK_N, BLOCK_K]
    scale1 = tl.load(scale1_ptr + offs_k, mask=mask_k, other=0.0)
    shift1 = tl.load(shift1_ptr + offs_k, mask=mask_k, other=0.0)
    mean1 = tl.load(mean1_ptr + offs_k, mask=mask_k, other=0.0)
    scale2 = tl.load(scale2_ptr + offs_n, mask=mask_n, other=0.0)
    mean2 = tl.load(mean2_ptr + offs_n, mask=mask_n, other=0.0)
    p2 = tl.load(p2_ptr + offs_n, mask=mask_n, other=0.0)
    q2 = tl.load(q2_ptr + offs_n, mask=mask_n, other=0.0)
    dw = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    s1 = tl.zeros((BLOCK_K,), tl.float32)
    s2 = tl.zeros((BLOCK_K,), tl.float32)
    for tile in range(TILES):
        offs_m = (pid_s.to(tl.int64) * TILES + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask_h, offs_h = mask_m[:, None] & mask_n[None, :], offs_m[:, None] * N + offs_n[None, :]
        da2 = tl.load(da2_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        dh = scale2[None, :] * da2 + (p2[None, :] + q2[None, :] * (h - mean2[None, :]))
        if DROP:
            mask_h = mask_h & (tl.load(keep_ptr + offs_h, mask=mask_h, other=0) != 0)
            dh *= keep_scale
        dh = tl.where(mask_h, dh, 0.0).to(w.dtype)  # [BLOCK_M, BLOCK_N]
        mask = mask_m[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        z = affine_relu(x, scale1, shift1)  # [BLOCK_M, BLOCK_K]
        da = mask_by_relu(tl.dot(dh, w, input_precision=PRECISION), z)
        s1 += tl.sum(da, 0)
        s2 += tl.sum(da * (x - mean1[None, :]), 0)
        arriving = tl.load(arriving_ptr + offs_m[:, None] * stride_am + offs_k[None, :], mask=mask, other=0.0)
        g = arriving.to(tl.float32) + scale1[None, :] * da
        tl.store(g_ptr + offs_m[:, None] * stride_gm + offs_k[None, :], g.to(g_ptr.dtype.element_ty), mask=mask)
        if WGRAD:
            dw = tl.dot(tl.trans(dh), z.to(dh.dtype), dw, input_precision=PRECISION)
    part = pid_s.to(tl.int64) * K + offs_k
    tl.store(part_s1_ptr + part, s1, mask=mask_k)
    tl.store(part_s2_ptr + part, s2, mask=mask_k)
    if WGRAD:
        offs = (pid_s.to(tl.int64) * N + offs_n[:, None]) * K + offs_k[None, :]
        tl.store(part_dw_ptr + offs, dw, mask=mask_w)


def bn_relu_conv1x1_bwd(
    x: Tensor,
    norm1: Affine,
    weight: Tensor,
    h: Tensor,
    da2: Tensor,
    norm2: Affine,
    correction2: tuple[Tensor, Tensor],
    arriving: Tensor,
    g: Tensor,
    sums: Partials,
    *,
    need_weight: bool,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
) -> Tensor | None:
    """Fill the prefix g [M, K] of the gradient buffer; parts of the weight's, [parts, N, K], float32, if needed.

    Args:
        x: [M, K], the prefix of the shared buffer.
        weight: [N, K], dense, of the dtype to multiply in; N at most 256.
        h, da2: [M, N], dense: the bottleneck, and the gradient after norm2's ReLU.
        correction2: norm2's p and q.
        arriving: [M, K], what of g there is so far: g itself, or elsewhere.
        sums: receives norm1's s1 and s2 by tile.
        keep: [M, N], where dropout kept a value of h; those were multiplied by ``keep_scale``.
    """
    (m, k), (n, _) = x.shape, weight.shape
    config = tuning.conv1x1_bwd(m, n, k, weight.dtype, x.device)
    blocks = ceil_div(k, config.BLOCK_K)
    tiles, splits = tuning.split(ceil_div(m, config.BLOCK_M), blocks, x.device)
    parts = sums.begin(m, k, config.BLOCK_M * tiles)
    dw = torch.empty((splits, n, k), dtype=torch.float32, device=x.device) if need_weight else x
    _bn_relu_conv1x1_bwd_kernel[(blocks, splits)](
        x, norm1.scale, norm1.shift, norm1.mean, weight, h, da2, norm2.scale, norm2.mean, *correction2,
        h if keep is None else keep, arriving, g, dw, *parts,
        m, k, n, tiles, x.stride(0), arriving.stride(0), g.stride(0), keep_scale,
        DROP=keep is not None, WGRAD=need_weight, PRECISION=precision(weight.dtype), **config.arguments,
    )  # fmt: skip
    return dw if need_weight else None
