"""Gradients of norms: sums of tiles merged, corrections deferred, and the true gradient where one is consumed.

With ``da`` the gradient after the norm's ReLU, over M pixels::

    s1 = sum(da) = dbeta        s2 = sum(da * xhat) = dgamma
    dx = scale * da + p + q * (x - mean)        p = -scale * s1 / M        q = -scale * rstd * s2 / M

The correction ``p + q * (x - mean)`` is of the channel: norms that share its statistics add up their p and q, and
one pass applies them all. p = q = 0 where a norm uses running statistics. The launch that merges a norm's sums adds up
the gradient of the convolution that reads it too, whose parts are of some pixels each.

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Norm, NormGrads, empty_channels_last
from ..group import join
from ..portable.batch_norm import Affine
from . import tuning
from .launch import ceil_div
from .statistics import Partials
from .tile_math import affine_relu, drop, mask_by_relu, split_pixels, store_tile_sums


@triton.jit
def _true_gradient_kernel(
    g_ptr, x_ptr, mean_ptr, p_ptr, q_ptr, keep_ptr, out_ptr,
    M, C, stride_gm, stride_xm, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """out [M, C] = g + p + q * (x - mean), through the dropout that x came out of."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    g = tl.load(g_ptr + offs_m[:, None] * stride_gm + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    p = tl.load(p_ptr + offs_c, mask=mask_c, other=0.0)
    q = tl.load(q_ptr + offs_c, mask=mask_c, other=0.0)
    out = g + (p[None, :] + q[None, :] * (x - mean[None, :]))
    offs = offs_m[:, None] * C + offs_c[None, :]
    if DROP:
        out = drop(out, keep_ptr + offs, mask, keep_scale)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def true_gradient(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    correction: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
) -> None:
    """Fill the dense out [M, C] from g, raw, and x [M, C] of dense channels; vectors are [C], float32."""
    m, c = g.shape
    config = tuning.elementwise(c, x.device)
    _true_gradient_kernel[(ceil_div(m, config.BLOCK_M), ceil_div(c, config.BLOCK_C))](
        g, x, mean, *correction, x if keep is None else keep, out,
        m, c, g.stride(0), x.stride(0), keep_scale,
        DROP=keep is not None, **config.arguments,
    )  # fmt: skip


@triton.jit
def _norm_sums_kernel(
    part_s1_ptr, part_s2_ptr, scale_ptr, rstd_ptr, dbias_ptr, dweight_ptr, p_ptr, q_ptr, part_dw_ptr, dw_ptr,
    M, TILES, C, PARTS, N, K, stride_wn, stride_wk, stride_wh, stride_ww,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BATCH: tl.constexpr, ADD: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """dbias = s1, dweight = s2 and the correction, from tiles' sums of da and of da * (x - mean), in their order.

    Programs after those of the norm add up the parts of the gradient of the convolution that reads it, with SIDE taps
    in a row.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    if pid < blocks:
        offs_c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        s1 = _sum_over(part_s1_ptr, TILES, C, offs_c, mask_c, BLOCK_T, BLOCK_C)
        s2 = _sum_over(part_s2_ptr, TILES, C, offs_c, mask_c, BLOCK_T, BLOCK_C)
        rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)
        s2 *= rstd
        tl.store(dbias_ptr + offs_c, s1.to(dbias_ptr.dtype.element_ty), mask=mask_c)
        tl.store(dweight_ptr + offs_c, s2.to(dweight_ptr.dtype.element_ty), mask=mask_c)
        if BATCH:
            share = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0) / -M
            p, q = share * s1, share * rstd * s2
            if ADD:
                p += tl.load(p_ptr + offs_c, mask=mask_c, other=0.0)
                q += tl.load(q_ptr + offs_c, mask=mask_c, other=0.0)
            tl.store(p_ptr + offs_c, p, mask=mask_c)
            tl.store(q_ptr + offs_c, q, mask=mask_c)
    elif SIDE > 0:
        size = N * SIDE * SIDE * K
        offs = (pid - blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = offs < size
        dw = _sum_over(part_dw_ptr, PARTS, size, offs, mask, BLOCK_K, BLOCK_M)
        k, tap, n = offs % K, offs // K % (SIDE * SIDE), offs // (K * SIDE * SIDE)
        dw_ptrs = dw_ptr + n * stride_wn + k * stride_wk + tap // SIDE * stride_wh + tap % SIDE * stride_ww
        tl.store(dw_ptrs, dw.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_over(part_ptr, PARTS, SIZE, offs, mask, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """Elements ``offs`` [BLOCK] of the sum over [PARTS, SIZE], BLOCK_T parts at a time."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PARTS, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        there = offs_t[:, None].to(tl.int64) * SIZE + offs[None, :]
        total += tl.sum(tl.load(part_ptr + there, mask=(offs_t < PARTS)[:, None] & mask[None, :], other=0.0), 0)
    return total


def norm_sums(
    partials: Partials,
    count: int,
    scale: Tensor,
    rstd: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    correction: tuple[Tensor, Tensor],
    *,
    batch: bool,
    add: bool,
    conv: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill a norm's gradients [C], and set or add to the correction p and q [C] of its input of ``count`` pixels.

    Args:
        partials: s1 and, before its factor rstd, s2 of each tile.
        batch: the norm uses its batch's statistics; p and q are left alone otherwise.
        conv: of the convolution that reads the norm, float32 parts of its gradient, [parts, N, taps, K], and what their
            sum fills, [N, K, side, side] of any dtype and strides.
    """
    (c,) = scale.shape
    config = tuning.sums(partials.tiles)
    parts, dw = conv or (scale, scale)
    n, k, side, _ = dw.shape if conv else (0, 0, 0, 0)
    extents = (parts.shape[0], n, k, *dw.stride()) if conv else (0,) * 7
    blocks = ceil_div(c, config.BLOCK_C) + ceil_div(n * k * side * side, config.BLOCK_M)
    _norm_sums_kernel[(blocks,)](
        *partials.memory, scale, rstd, dbias, dweight, *correction, parts, dw,
        count, partials.tiles, c, *extents,
        BATCH=batch, ADD=add, SIDE=side, **config.arguments,
    )  # fmt: skip


@triton.jit
def input_gradient(da, x, scale, mean, p_ptr, q_ptr, offs_c, mask_c):
    """scale * da + p + q * (x - mean) of a tile [M, C]."""
    p = tl.load(p_ptr + offs_c, mask=mask_c, other=0.0)
    q = tl.load(q_ptr + offs_c, mask=mask_c, other=0.0)
    return scale[None, :] * da + (p[None, :] + q[None, :] * (x - mean[None, :]))


def two_pass_backward(
    kernel: Any, x: Tensor, norm: Norm, vectors: Affine, config: tuning.Config, operands: list[Tensor], sizes: list[int]
) -> NormGrads:
    """Gradients through a norm and what follows it in one module: its correction is known after a first pass over x.

    Args:
        kernel: stores its tiles' sums with SUMS and dx without; it takes x, scale, shift, mean, the ``operands``, p, q,
            dx, the sums, M, H, W, C, the ``sizes`` and the strides of x.
        x: [N, C, H, W] of any strides.
    """
    n, c, h, w = x.shape
    m = n * h * w
    dx = empty_channels_last((n, c, h, w), x.dtype, x.device)
    dweight, dbias = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
    p, q = torch.zeros((2, c), dtype=torch.float32, device=x.device)
    sums = Partials(x.device)
    parts = sums.begin(m, c, config.BLOCK_M)

    def launch(with_sums: bool) -> None:
        kernel[(sums.tiles, ceil_div(c, config.BLOCK_C))](
            x, vectors.scale, vectors.shift, vectors.mean, *operands, p, q, dx, *parts,
            m, h, w, c, *sizes, *x.stride(), SUMS=with_sums, **config.arguments,
        )  # fmt: skip

    launch(True)
    norm_sums(sums, m, vectors.scale, vectors.rstd, dweight, dbias, (p, q), batch=norm.batch_stats, add=False)
    group = join(norm.group, m, x.device)
    if group is not None:
        group.add_up(p, q)
    launch(False)
    return NormGrads(dx, dweight, dbias)


@triton.jit
def _spread_kernel(
    x_ptr, scale_ptr, shift_ptr, mean_ptr, dout_ptr, p_ptr, q_ptr, dx_ptr, part_s1_ptr, part_s2_ptr,
    M, H, W, C, H_OUT, W_OUT, WINDOW_H, WINDOW_W, stride_xn, stride_xc, stride_xh, stride_xw,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Gradient through an average over windows, the ReLU and, in a second launch, the norm before them::

        da = dout[window of the pixel] / pixels of a window * 1[scale * x + shift > 0], 0 outside the windows
        SUMS: tiles' sum(da) and sum(da * (x - mean))        then: dx = scale * da + p + q * (x - mean)

    x is [N, C, H, W] of any strides; dout [N * H_OUT * W_OUT, C] and dx [M, C] are dense.
    """
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    image = offs_m // (H * W)
    row, column = split_pixels(offs_m, H, W)
    rows = image * stride_xn + row * stride_xh + column * stride_xw
    x_ptrs = x_ptr + rows[:, None] + offs_c.to(tl.int64)[None, :] * stride_xc
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    down, right = row // WINDOW_H, column // WINDOW_W
    window = (image * H_OUT + down) * W_OUT + right
    inside = (mask_m & (down < H_OUT) & (right < W_OUT))[:, None] & mask_c[None, :]
    dout = tl.load(dout_ptr + window[:, None] * C + offs_c[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    da = mask_by_relu(dout / (WINDOW_H * WINDOW_W), affine_relu(x, scale, shift))
    if SUMS:
        store_tile_sums(da, x, mean, pid_m, part_s1_ptr, part_s2_ptr, offs_c, mask_c, C)
    else:
        dx = input_gradient(da, x, scale, mean, p_ptr, q_ptr, offs_c, mask_c)
        tl.store(dx_ptr + offs_m[:, None] * C + offs_c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def average_backward(
    dout: Tensor, x: Tensor, norm: Norm, vectors: Affine, windows: tuple[int, int], size: tuple[int, int]
) -> NormGrads:
    """Gradients of the average of ``relu(norm(x))`` over windows of ``size``, of which ``windows`` fit into an image.

    Args:
        dout: [N * windows, C], dense; x: [N, C, H, W] of any strides; vectors: those of the norm.
    """
    config = tuning.elementwise(x.shape[1], x.device)
    return two_pass_backward(_spread_kernel, x, norm, vectors, config, [dout], [*windows, *size])
