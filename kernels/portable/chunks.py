"""Cutting the work into whole images, so that what one pass makes is still in cache in the next."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of a chunk's widest float32 temporary, on CPUs: a pass does better with few calls, a block with warm caches.
OF_A_PASS = 16 << 20
OF_A_BLOCK = 8 << 20
_ROWS = 2048  # pixels that a chunk has at least, where the batch does: matrix products need them


class Chunk(NamedTuple):
    """Whole images of the batch: which, their rows in [M, C], and their shape."""

    images: slice
    rows: slice
    pixels: int
    shape: tuple[int, ...]  # n, *spatial

    @property
    def is_of_images(self) -> bool:
        return len(self.shape) == 3

    def of(self, x: Tensor) -> Tensor:
        """Its rows of [M, C]; those of all images without a slice, which in a deep network adds up."""
        return x if self.pixels == x.shape[0] else x[self.rows]


@functools.lru_cache(1024)  # a network has few shapes, and asks for each in every step
def chunks(shape: tuple[int, ...], device: torch.device, size: int = OF_A_PASS) -> Sequence[Chunk]:
    """Of work whose widest temporary is [N, C, *spatial]: as equal as can be on CPUs, one elsewhere."""
    n, channels, *spatial = shape
    pixels = math.prod(spatial)
    most = max(1, size // (4 * pixels * channels), _ROWS // pixels) if device.type == "cpu" else n
    parts = max(1, -(-n // most))
    bounds = [(i * n // parts, (i + 1) * n // parts) for i in range(parts)]
    return tuple(
        Chunk(slice(a, b), slice(a * pixels, b * pixels), (b - a) * pixels, (b - a, *spatial)) for a, b in bounds
    )


class Scratch:
    """Temporaries that one pass after another writes again, so that they stay in cache; by name."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self._device = dtype, device
        self._memory: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, channels: int) -> Tensor:
        """[rows, channels], uninitialised, good until the next call with this name."""
        memory = self._memory.get(name)
        if memory is None or memory.numel() < rows * channels:
            memory = torch.empty(rows * channels, dtype=self.dtype, device=self._device)
            self._memory[name] = memory
        return memory.as_strided((rows, channels), (channels, 1))
