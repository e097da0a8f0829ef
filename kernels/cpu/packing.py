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
    state: tuple[object, ...]  # fingerprint, shape, strides, dtype of the weight it was made from
    memory: Tensor


_packed: dict[tuple[str, torch.dtype], WeakIdKeyDictionary] = {}
"""By instruction set and the dtype that results are rounded to: weight -> its packed form."""


def packed(library: Library, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each weight as the kernels read it, packed now only where it has changed."""
    known = _packed.setdefault((library.isa, dtype), WeakIdKeyDictionary())
    dense = [_dense(w) for w in weights]
    states = [(mark, w.shape, w.stride(), w.dtype) for mark, w in zip(library.fingerprints(dense), dense, strict=True)]
    result = [known.get(w) for w in weights]
    stale = [i for i, old in enumerate(result) if old is None or old.state != states[i]]
    if stale:
        for i, memory in zip(stale, library.pack([dense[i] for i in stale], dtype), strict=True):
            result[i] = known[weights[i]] = _Packed(states[i], memory)
    return [entry.memory for entry in result]


def _dense(weight: Tensor) -> Tensor:
    """The weight itself where its bytes are in one piece and of a dtype that C++ reads, else a copy."""
    weight = weight.detach()
    if weight.dtype not in DTYPES:
        weight = weight.float()
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return weight if dense else weight.contiguous()
