"""Block shapes of the kernels: from a tuned file for this GPU where there is one, else defaults reasoned below.

A tuned file, ``kernels/tuned/<gpu>.json``, is written by ``make tune`` on a machine with that GPU. Nothing is ever
tuned while a model runs: no first call differs from the next, and CUDA graphs can capture any of them.

Environment variable ``FASTDENSE_TUNED``: another file, or ``off`` for the defaults.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

_FOLDER = Path(__file__).parent.parent / "tuned"


@dataclass(frozen=True)
class Config:
    """The constexpr blocks that a kernel takes (0 for those it does not), its warps and pipeline stages."""

    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    BLOCK_C: int = 0
    BLOCK_T: int = 0
    num_warps: int = 4
    num_stages: int = 3

    def arguments(self) -> dict[str, int]:
        """For a launch."""
        return {name: value for name, value in asdict(self).items() if value}


def _block(size: int, most: int, least: int = 16) -> int:
    """The power of two that covers ``size``, within what tensor cores take and ``most``."""
    return max(least, min(most, triton.next_power_of_2(size)))


def conv1x1_fwd(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """All of N in one tile, so that x is read once: 128 rows by 128 channels are 64 accumulators a thread of 8 warps.

    Fewer rows where 128 would leave multiprocessors idle. float32 tiles are twice as large: half the depth.
    """
    block_n = _block(n, 128)
    block_m = 128 if m >= 128 * 132 else 64
    block_k = _block(k, 64 if dtype.itemsize == 2 else 32)
    default = Config(block_m, block_n, block_k, num_warps=8 if block_m * block_n >= 128 * 128 else 4, num_stages=3)
    return _tuned("conv1x1_fwd", f"n{block_n}-k{_block(k, 1024)}-{_rows(m)}", dtype, device, default)


def conv3x3_fwd(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The few new channels in one tile, so that each tap is normalised once; 128 rows keep the halo's share low."""
    block_n = _block(n, 64)
    block_m = 128 if m >= 128 * 132 else 64
    block_k = _block(k, 128 if dtype.itemsize == 2 else 32)
    default = Config(block_m, block_n, block_k, num_warps=8 if block_m == 128 else 4, num_stages=3)
    return _tuned("conv3x3_fwd", f"n{block_n}-k{_block(k, 1024)}-{_rows(m)}", dtype, device, default)


def transition_fwd(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """x is four times the rows: wide N, so that it is read from memory once and from L2 seldom."""
    block_n = _block(n, 128)
    block_k = _block(k, 32)
    default = Config(64, block_n, block_k, num_warps=4, num_stages=3)
    return _tuned("transition_fwd", f"n{block_n}-k{_block(k, 1024)}-{_rows(m)}", dtype, device, default)


def block_infer(hw: int, b: int, n: int, dtype: torch.dtype, device: torch.device) -> Config:
    """One image a program: all its pixels in one tile where they fit, as its loads are latency-bound otherwise."""
    block_m = _block(hw, 128)
    default = Config(block_m, _block(b, 128), 64 if dtype.itemsize == 2 else 32, num_warps=8, num_stages=3)
    return _tuned("block_infer", f"m{block_m}-b{_block(b, 128)}-n{_block(n, 64)}", dtype, device, default)


def elementwise(channels: int, device: torch.device) -> Config:
    """Rows of at least 128 bytes, 4096 elements: enough loads in flight, few registers."""
    block_c = _block(channels, 64)
    return Config(BLOCK_M=4096 // block_c, BLOCK_C=block_c, num_warps=4, num_stages=1)


def merge(tiles: int) -> Config:
    """Few programs with little to do each: many partials at a time, so that their latency is paid seldom."""
    return Config(BLOCK_T=_block(tiles, 256), BLOCK_C=16, num_warps=4, num_stages=1)


def _rows(m: int) -> str:
    """Whether one wave of 128-row tiles fills a large GPU: what changes the best answer."""
    return "many" if m >= 128 * 132 else "few"


def _tuned(kernel: str, key: str, dtype: torch.dtype, device: torch.device, default: Config) -> Config:
    """The entry of the tuned file, or the default."""
    if device.type != "cuda":
        return default
    entry = _entries(_path(torch.cuda.get_device_name(device))).get(kernel, {}).get(f"{key}-{8 * dtype.itemsize}bit")
    return default if entry is None else replace(default, **entry)


def _path(gpu: str) -> Path | None:
    override = os.environ.get("FASTDENSE_TUNED")
    if override == "off":
        return None
    return Path(override) if override else _FOLDER / f"{gpu.lower().replace(' ', '-')}.json"


@functools.cache
def _entries(path: Path | None) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(path.read_text())["configs"] if path is not None and path.exists() else {}
