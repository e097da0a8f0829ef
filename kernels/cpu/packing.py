"""Packed weights, kept as long as their weights live and are what they were.

Whether a weight is what it was is decided by its contents: a fingerprint of every byte is taken at each use,
at the speed of memory. Version counters and addresses would miss writes through ``.data`` and exchanged storage.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Sequence
from ctypes import Structure
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import empty_channels_last
from .arguments import Norms, Weights, loaded, pixels, run_on
from .library import DTYPES, Library


class _Packed(NamedTuple):
    weight: weakref.ref[Tensor]
    state: tuple[object, ...]  # fingerprint, shape, strides, dtype of the weight it was made from
    memory: Tensor


_packed: dict[tuple[str, torch.dtype], dict[int, _Packed]] = {}
"""By instruction set and the dtype that results are rounded to: a weight's id -> its packed form."""


def packed(library: Library, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each weight as the kernels read it, packed now only where it has changed."""
    known = _packed.setdefault((library.isa, dtype), {})
    dense = [_dense(w) for w in weights]
    states = [(mark, w.shape, w.stride(), w.dtype) for mark, w in zip(library.fingerprints(dense), dense, strict=True)]
    entries = [known.get(id(w)) for w in weights]
    stale = [
        i
        for i, (entry, weight, state) in enumerate(zip(entries, weights, states, strict=True))
        if entry is None or entry.weight() is not weight or entry.state != state
    ]
    if stale:
        for i, memory in zip(stale, library.pack(Weights([dense[i] for i in stale]).array, dtype), strict=True):
            weight = weights[i]
            reference = weakref.ref(weight, functools.partial(_forget, known, id(weight)))
            entries[i] = known[id(weight)] = _Packed(reference, states[i], memory)
    return [entry.memory for entry in entries if entry is not None]


def _forget(known: dict[int, _Packed], key: int, reference: weakref.ref[Tensor]) -> None:
    """A weight has died; its id may be another's by now."""
    if key in known and known[key].weight is reference:
        del known[key]


def _dense(weight: Tensor) -> Tensor:
    """The weight itself where its bytes are in one piece and of a dtype that C++ reads, else a copy."""
    if weight.dtype not in DTYPES:
        weight = weight.float()
    by_pixels = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim(), torch.contiguous_format)
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=by_pixels)
    return weight if dense else weight.contiguous()


class Prepared:
    """What a kernel at given statistics reads of a module: norms where they are, weights packed for ``dtype``.

    Attributes:
        in_dtype, out_dtype: of x as the kernel reads it, and of what it makes.
    """

    kernel: str
    in_dtype: torch.dtype
    out_dtype: torch.dtype
    args: Structure

    def __init__(self, norms: Norms, weights: list[Tensor], dtype: torch.dtype):
        self.library, self.norms, self.weights, self.dtype = loaded(), norms, weights, dtype
        self.places, self.packed = norms.places(), packed(self.library, weights, dtype)

    def is_current(self) -> bool:
        """Whether another one of the same tensors, with what they contain now and where they are, would be the same."""
        return are_current([self])

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of x of ``shape``."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """From any thread."""
        out = empty_channels_last(self.output_shape(x.shape), self.out_dtype, x.device)
        run_on(self.library, self.kernel, self.args, pixels(x, self.in_dtype), out)
        return out


def are_current(prepared: Sequence[Prepared]) -> bool:
    """Whether all are."""
    if any(each.places is None or each.norms.places() != each.places for each in prepared):
        return False
    for dtype in {each.dtype for each in prepared}:
        of_dtype = [each for each in prepared if each.dtype == dtype]
        weights = [weight for each in of_dtype for weight in each.weights]
        if not all(weight.is_cpu for weight in weights):
            return False
        kept = (memory for each in of_dtype for memory in each.packed)
        if not all(map(operator.is_, packed(of_dtype[0].library, weights, dtype), kept)):
            return False
    return True
