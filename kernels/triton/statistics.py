"""Batch statistics of channels: partial ones per tile, merged in a fixed order, and the vectors of the next norm.

A kernel that stores a tile of n_t rows also stores their mean_t and m2_t. The merge, over the tiles in order::

    mean = sum_t n_t * mean_t / M        var = sum_t (m2_t + n_t * (mean_t - mean)^2) / M

There are no atomics, so that two runs give the same bits. The merge also makes the vectors of the norm that
reads next, ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean * scale``, over all channels it reads:
those of older slices from statistics merged before.

Source: Chan, Golub and LeVeque 1979.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import ChannelStats, Norm
from ..group import Group
from . import tuning
from .launch import ceil_div, on_device
from .tile_math import store_tile_stats


class Vectors(NamedTuple):
    """A norm with its statistics, ``scale * x + shift``; float32, the first [C] of each."""

    scale: Tensor
    shift: Tensor

    @staticmethod
    def empty(channels: int, device: torch.device) -> Vectors:
        """Room for those of up to so many channels."""
        return Vectors(*torch.empty((2, channels), dtype=torch.float32, device=device))


class Partials:
    """Room for partial statistics: the mean and m2 [tiles, C] that one kernel writes and one merge reads.

    Attributes:
        memory: of mean and m2, with what was begun last at its beginning.
    """

    def __init__(self, device: torch.device):
        self.rows = self.channels = self.block = self.tiles = 0
        nothing = torch.empty(0, dtype=torch.float32, device=device)
        self.memory = nothing, nothing

    def begin(self, rows: int, channels: int, block: int) -> tuple[Tensor, Tensor]:
        """The memory, for tiles of ``block`` of the ``rows``; what was there is given up."""
        self.rows, self.channels, self.block, self.tiles = rows, channels, block, ceil_div(rows, block)
        size = self.tiles * channels
        mean, m2 = self.memory
        if size > mean.numel():
            self.memory = mean.new_empty(size), m2.new_empty(size)
        return self.memory


@triton.jit
def _copy_stats_fwd_kernel(
    x_ptr, y_ptr, part_mean_ptr, part_m2_ptr,
    M, HW, W, C, stride_xn, stride_xc, stride_xh, stride_xw, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, COPY: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Partial statistics of x [N, C, H, W] of any strides, and its copy into the rows y [M, C]."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    pixel = offs_m % HW
    rows = offs_m // HW * stride_xn + pixel // W * stride_xh + pixel % W * stride_xw
    mask = mask_m[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + rows[:, None] + offs_c.to(tl.int64)[None, :] * stride_xc, mask=mask, other=0.0)
    if COPY:
        tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_c[None, :], x.to(y_ptr.dtype.element_ty), mask=mask)
    if STATS:
        store_tile_stats(x, pid_m, mask_m, M, part_mean_ptr, part_m2_ptr, offs_c, mask_c, C, BLOCK_M)


def copy_stats_fwd(x: Tensor, y: Tensor | None, stats: Partials | None) -> None:
    """Copy x [N, C, H, W] into the rows y [M, C] if given, and leave partial statistics if asked for."""
    n, c, h, w = x.shape
    m = n * h * w
    config = tuning.elementwise(c, x.device)
    parts = stats.begin(m, c, config.BLOCK_M) if stats is not None else None
    _copy_stats_fwd_kernel[(ceil_div(m, config.BLOCK_M), ceil_div(c, config.BLOCK_C))](
        x, x if y is None else y, *(parts or (x, x)),
        m, h * w, w, c, *x.stride(), 0 if y is None else y.stride(0),
        COPY=y is not None, STATS=parts is not None, **config.arguments,
    )  # fmt: skip


@triton.jit
def _finalise_kernel(
    part_mean_ptr, part_m2_ptr, mean_ptr, var_ptr,
    source_mean_ptr, source_var_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    M, TILES, TILE_M, FIRST, C_NEW, C_NORM, eps,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, MERGE: tl.constexpr, NORM: tl.constexpr, RUNNING: tl.constexpr,
):  # fmt: skip
    """Merge the partials of channels FIRST and on into mean and var [C]; make the next norm's vectors [C_NORM]."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    var = tl.zeros((BLOCK_C,), tl.float32)
    is_new = (offs_c >= FIRST) & (offs_c < FIRST + C_NEW)
    if MERGE and (tl.program_id(0) + 1) * BLOCK_C > FIRST:
        offs_new = offs_c - FIRST
        near = tl.load(part_mean_ptr + offs_new, mask=is_new, other=0.0)  # the first tile's: sums stay small beside it
        for start in range(0, TILES, BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T)
            mask = (offs_t < TILES)[:, None] & is_new[None, :]
            offs = offs_t[:, None].to(tl.int64) * C_NEW + offs_new[None, :]
            count = tl.minimum(M - offs_t * TILE_M, TILE_M).to(tl.float32)
            part = tl.load(part_mean_ptr + offs, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_C]
            mean += tl.sum(tl.where(mask, (part - near[None, :]) * (count / M)[:, None], 0.0), 0)
        mean += near
        for start in range(0, TILES, BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T)
            mask = (offs_t < TILES)[:, None] & is_new[None, :]
            offs = offs_t[:, None].to(tl.int64) * C_NEW + offs_new[None, :]
            count = tl.minimum(M - offs_t * TILE_M, TILE_M).to(tl.float32)
            off = tl.load(part_mean_ptr + offs, mask=mask, other=0.0) - mean[None, :]
            m2 = tl.load(part_m2_ptr + offs, mask=mask, other=0.0)
            var += tl.sum(tl.where(mask, (m2 + count[:, None] * off * off) / M, 0.0), 0)
        tl.store(mean_ptr + offs_c, mean, mask=is_new)
        tl.store(var_ptr + offs_c, var, mask=is_new)
    if NORM:
        mask_c = offs_c < C_NORM
        known = mask_c & ((not MERGE) | RUNNING | ~is_new)
        mean = tl.where(known, tl.load(source_mean_ptr + offs_c, mask=known, other=0.0).to(tl.float32), mean)
        var = tl.where(known, tl.load(source_var_ptr + offs_c, mask=known, other=1.0).to(tl.float32), var)
        weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        scale = weight / tl.sqrt_rn(var + eps)
        tl.store(scale_ptr + offs_c, scale, mask=mask_c)
        tl.store(shift_ptr + offs_c, bias - mean * scale, mask=mask_c)


def merge(stats: ChannelStats, partials: Partials, first: int = 0, group: Group | None = None) -> None:
    """Merge what ``partials`` hold, and the group's processes, into channels ``first`` and on of ``stats``."""
    _finalise(stats, partials, first, None)
    if group is not None:
        new = slice(first, first + partials.channels)
        group.merge(ChannelStats(stats.mean[new], stats.var[new]))


def norm_vectors(norm: Norm) -> Vectors:
    """The vectors of a norm whose statistics are known."""
    vectors = Vectors.empty(norm.weight.shape[0], norm.weight.device)
    merge_for(norm, vectors, ChannelStats(norm.mean, norm.var), None)
    return vectors


def merge_for(
    norm: Norm,
    vectors: Vectors,
    stats: ChannelStats,
    partials: Partials | None,
    first: int = 0,
    group: Group | None = None,
) -> None:
    """:func:`merge`, where there are ``partials``, and fill the vectors of the norm that reads next.

    Args:
        norm: as :class:`fastdense.kernels.contract.DenseLayers` gives it: its statistics lie in ``stats``, or
            are its running ones.
    """
    if partials is not None and group is not None:
        merge(stats, partials, first, group)
        partials = None
    _finalise(stats, partials, first, (norm, vectors))


def _finalise(stats: ChannelStats, partials: Partials | None, first: int, norm: tuple[Norm, Vectors] | None) -> None:
    merged = (1, 0, 1, 0) if partials is None else (partials.rows, partials.tiles, partials.block, partials.channels)
    parts = stats if partials is None else partials.memory
    if norm is None:
        norm_mean, norm_var, weight, bias = *stats, *stats
        vectors, channels, eps, running = Vectors(*stats), 0, 0.0, False
    else:
        (weight, bias, norm_mean, norm_var, eps, use_batch, _), vectors = norm
        channels, running = weight.shape[0], not use_batch
    rows, tiles, block, new = merged
    config = tuning.merge(tiles)
    reach = max(channels, first + new if new else 0)
    _finalise_kernel[(ceil_div(reach, config.BLOCK_C),)](
        *parts, *stats, norm_mean, norm_var, weight, bias, *vectors,
        rows, tiles, block, first, new, channels, eps,
        MERGE=partials is not None, NORM=norm is not None, RUNNING=running, **config.arguments,
    )  # fmt: skip


@on_device
def channel_stats(x: Tensor) -> ChannelStats:
    """Mean and biased variance of each channel of [N, C, H, W], float32."""
    stats = ChannelStats(*(torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2)))
    partials = Partials(x.device)
    copy_stats_fwd(x, None, partials)
    merge(stats, partials)
    return stats
