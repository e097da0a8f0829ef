"""Cutting the work into whole images, so that what one pass makes is still in cache in the next."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of a chunk's widest float32 temporary, on CPUs: a pass does better with few calls, a block with warm caches.
OF_A_PASS = 16 << 20
OF_A_BLOCK = 8 << 20
_ROWS = 2048  # pixels that a chunk has at least, where the batch does: matrix products need them


class Chunk(NamedTuple):
    """Some images of the batch: which, how many, and how many pixels they have."""

    images: slice
    size: int
    pixels: int

    def of(self, x: Tensor) -> Tensor:
        """Its part of [N, ...]; all of it without a slice, which in a deep network adds up."""
        return x if self.size == x.shape[0] else x[self.images]


@functools.lru_cache(1024)  # a network has few shapes, and asks for each in every step
def chunks(shape: tuple[int, ...], device: torch.device, size: int = OF_A_PASS) -> Sequence[Chunk]:
    """Of work whose widest temporary is [N, C, *spatial]: as equal as can be on CPUs, one elsewhere."""
    n, channels, *spatial = shape
    pixels = math.prod(spatial)
    most = max(1, size // (4 * pixels * channels), _ROWS // pixels) if device.type == "cpu" else n
    parts = max(1, -(-n // most))
    bounds = [(i * n // parts, (i + 1) * n // parts) for i in range(parts)]
    return tuple(Chunk(slice(a, b), b - a, (b - a) * pixels) for a, b in bounds)


class Scratch:
    """Temporaries that one pass after another writes again, so that they stay in cache; by name."""

    def __init__(self, dtype: torch.dtype, device: torch.device, numel: int = 0):
        """``numel``: of the largest that will be asked for, where views are to share one memory."""
        self.dtype, self._device, self._numel = dtype, device, numel
        self._memory: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        """[N, C, *spatial] in channels-last memory, uninitialised, good until the next call with this name."""
        memory, numel = self._memory.get(name), math.prod(shape)
        if memory is None or memory.numel() < numel:
            memory = torch.empty(max(numel, self._numel), dtype=self.dtype, device=self._device)
            self._memory[name] = memory
        return memory.as_strided(shape, _channels_last_strides(tuple(shape)))


@functools.lru_cache(1024)
def _channels_last_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    _, channels, *spatial = shape
    pixels = list(itertools.accumulate([channels, *reversed(spatial)], operator.mul))
    return (pixels[-1], 1, *reversed(pixels[:-1]))
