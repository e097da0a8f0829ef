"""Block shapes of the kernels: from a tuned file for this GPU where there is one, else defaults reasoned below.

A tuned file, ``kernels/tuned/<gpu>.json``, is written by ``make tune`` on a machine with that GPU. Nothing is ever
tuned while a model runs: no first call differs from the next, and CUDA graphs can capture any of them.

Environment variable ``FASTDENSE_TUNED``: another file, or ``off`` for the defaults.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .launch import ceil_div, multiprocessors, next_power_of_2

_MANY = 128 * 132  # pixels with which tiles of 128 rows fill the multiprocessors of a large GPU
_FEW = 64 * 66  # pixels below which even tiles of 64 rows leave most of them idle: latency counts, not traffic
_override = os.environ.get("FASTDENSE_TUNED")
_family = "hip" if torch.version.hip else "cuda"
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

    @functools.cached_property
    def arguments(self) -> dict[str, int]:
        """For a launch."""
        return {name: value for name, value in asdict(self).items() if value}


F = TypeVar("F", bound=Callable[..., Config])


def _remembered(choose: F) -> F:
    """``choose``, asked once for the same arguments, as long as what else it depends on is the same.

    A host makes hundreds of launches while a GPU makes a step: to choose must not take longer than to launch.
    """

    @functools.lru_cache(maxsize=4096)
    def known(depends_on: object, *args: Any) -> Config:
        return choose(*args)

    @functools.wraps(choose)
    def remember(*args: Any) -> Config:
        return known((_MANY, _FEW, _family, _override), *args)

    return remember  # type: ignore[return-value]


def _block(size: int, most: int) -> int:
    """The power of two that covers ``size``, within what tensor cores take and ``most``."""
    return max(16, min(most, next_power_of_2(size)))


@_remembered
def conv1x1_fwd(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """All of N in one tile, so that x is read once, and 128 rows, so that L2 delivers no more of W than of x.

    That is 64 accumulators a thread of 8 warps. Fewer rows where 128 would leave multiprocessors idle.
    """
    block_n = _block(n, 128)
    wide = Config(128 if m >= _MANY else 64, block_n, _block(k, _depth(dtype)), num_warps=8 if n > 64 else 4)
    default = wide if m >= _FEW else Config(16, _block(n, 32), _block(k, 2 * _depth(dtype)))
    return _tuned("conv1x1_fwd", key(m, n, k, dtype), device, default)


@_remembered
def conv3x3_fwd(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The few new channels in one tile, so that each tap is normalised once; 128 rows keep the halo's share low."""
    block_n = _block(n, 64)
    many = m >= _MANY
    wide = Config(128 if many else 64, block_n, _block(k, _depth(dtype)), num_warps=8 if many else 4)
    default = wide if m >= _FEW else Config(16, 16, _block(k, 2 * _depth(dtype)), num_warps=2)
    return _tuned("conv3x3_fwd", key(m, n, k, dtype), device, default)


@_remembered
def transition_fwd(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Four tiles of x make one of z, so tiles are half as deep; wide N, so that x comes from memory once."""
    block_n = _block(n, 128)
    wide = Config(64, block_n, _block(k, 32), num_warps=8 if n > 64 else 4)
    default = wide if m >= _FEW else Config(16, _block(n, 32), _block(k, 64))
    return _tuned("transition_fwd", key(m, n, k, dtype), device, default)


@_remembered
def block_infer(pixels: int, b: int, n: int, dtype: torch.dtype, device: torch.device) -> Config:
    """BLOCK_N is the bottleneck's. Both products live in one kernel: small tiles, or its registers spill."""
    default = Config(64, _block(b, 128), 32, num_warps=8, num_stages=2)
    return _tuned("block_infer", key(pixels, n, b, dtype), device, default)


@_remembered
def conv1x1_bwd(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Two products, dh and all of N, over several tiles of pixels: by twice the channels, 8 warps spill."""
    default = Config(64, _block(n, 256), _block(k, 16 if _family == "hip" else 32), num_warps=8, num_stages=2)
    return _tuned("conv1x1_bwd", key(m, n, k, dtype), device, default)


@_remembered
def conv3x3_dgrad(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """All new channels at once, dy being small; 128 bottleneck channels by 64 rows are 32 accumulators a thread."""
    block_n = _block(n, 64)
    wide = Config(64, block_n, _block(k, 128), num_warps=8, num_stages=3)
    default = wide if m >= _FEW else Config(16, block_n, _block(k, 32), num_stages=3)
    return _tuned("conv3x3_dgrad", key(m, n, k, dtype), device, default)


@_remembered
def conv3x3_wgrad(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Three taps of accumulators, [64, 32] each."""
    block_n = _block(n, 32)
    default = Config(64, block_n, _block(k, 64), num_warps=4, num_stages=2)
    return _tuned("conv3x3_wgrad", key(m, n, k, dtype), device, default)


def split(tiles: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """Tiles a program, and programs that share a sum over ``tiles``: two waves where ``blocks`` programs are fewer."""
    wanted = min(tiles, max(1, 2 * multiprocessors(device) // blocks))
    each = ceil_div(tiles, wanted)
    return each, ceil_div(tiles, each)


@_remembered
def elementwise(channels: int, device: torch.device, elements: int = 4096) -> Config:
    """Rows of at least 128 bytes: enough loads in flight with 4096 elements, and few registers."""
    block_c = _block(channels, 64)
    return Config(BLOCK_M=elements // block_c, BLOCK_C=block_c, num_warps=4, num_stages=1)


@_remembered
def merge(tiles: int) -> Config:
    """Few programs with little to do each: many partials at a time, so that their latency is paid seldom."""
    return Config(BLOCK_T=_block(tiles, 128), BLOCK_C=16, num_warps=4, num_stages=1)


@_remembered
def sums(tiles: int) -> Config:
    """The same of a norm's sums; of a weight's 16 parts at a time, 256 elements each: 32 loads a thread."""
    return replace(merge(tiles), BLOCK_M=256, BLOCK_K=16)


def _depth(dtype: torch.dtype) -> int:
    """BLOCK_K: rows of 128 bytes; half where the registers of AMD's GPUs would spill."""
    return 32 if dtype.itemsize == 4 or _family == "hip" else 64


def key(m: int, n: int, k: int, dtype: torch.dtype) -> str:
    """What changes the best answer: width and depth to a power of two, whether rows are many, the dtype."""
    rows = "many" if m >= _MANY else "few" if m >= _FEW else "tiny"
    return f"n{_block(n, 256)}-k{_block(k, 1024)}-{rows}-{8 * dtype.itemsize}bit"


def file_for(gpu: str) -> Path:
    """Where the tuned file of a GPU of that name is."""
    return _FOLDER / f"{gpu.lower().replace(' ', '-')}.json"


@contextlib.contextmanager
def assume(family: str) -> Iterator[None]:
    """Give the defaults for ``"cuda"`` or ``"hip"``, whichever torch is built for: for reports."""
    global _family
    previous, _family = _family, family
    try:
        yield
    finally:
        _family = previous


def _tuned(kernel: str, key: str, device: torch.device, default: Config) -> Config:
    """The entry of the tuned file, or the default."""
    if device.type != "cuda" or _override == "off":
        return default
    path = Path(_override) if _override else file_for(torch.cuda.get_device_name(device))
    entry = _entries(path).get(kernel, {}).get(key)
    return default if entry is None else replace(default, **entry)


@functools.cache
def _entries(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(path.read_text())["configs"] if path.exists() else {}
