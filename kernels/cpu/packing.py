"""Packed weights, kept as long as their weights live and are what they were.

Whether a weight is what it was is decided by its contents: a fingerprint of every byte is taken at each use,
at the speed of memory. Version counters and addresses would miss writes through ``.data`` and exchanged storage.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .library import DTYPES, Library


class _Packed(NamedTuple):
    fingerprint: int
    layout: tuple[object, ...]
    memory: Tensor


_packed: dict[tuple[str, torch.dtype], WeakIdKeyDictionary] = {}
"""By instruction set and the dtype that results are rounded to: weight -> its packed form."""


def packed(library: Library, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each weight as the kernels read it, packed now only where it has changed."""
    known = _packed.setdefault((library.isa, dtype), WeakIdKeyDictionary())
    dense = [_dense(w) for w in weights]
    prints = library.fingerprints(dense)
    layouts = [(w.shape, w.stride(), w.dtype) for w in dense]
    result = []
    for weight, fingerprint, layout in zip(weights, prints, layouts, strict=True):
        old = known.get(weight)
        result.append(old.memory if old is not None and old[:2] == (fingerprint, layout) else None)
    stale = [i for i, memory in enumerate(result) if memory is None]
    if stale:
        for i, memory in zip(stale, library.pack([dense[i] for i in stale], dtype), strict=True):
            known[weights[i]] = _Packed(prints[i], layouts[i], memory)
            result[i] = memory
    return result


def _dense(weight: Tensor) -> Tensor:
    """The weight itself where its bytes are in one piece and of a dtype that C++ reads, else a copy."""
    weight = weight.detach()
    if weight.dtype not in DTYPES:
        weight = weight.float()
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return weight if dense else weight.contiguous()
