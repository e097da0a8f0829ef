"""Packed weights, kept as long as their weights live and are what they were.

Whether a weight is what it was is decided by its contents: a fingerprint of every byte is taken at each use,
at the speed of memory. Version counters and addresses would miss writes through ``.data`` and exchanged storage.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from ctypes import Structure
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import empty_channels_last
from .arguments import Norms, Weights, loaded, pixels, run_on
from .library import DTYPES, Library
from .seen import Seen


class _Packed(NamedTuple):
    weight: weakref.ref[Tensor]
    state: tuple[object, ...]  # fingerprint, shape, strides, dtype of the weight it was made from
    memory: Tensor


_packed: dict[tuple[str, torch.dtype, bool], dict[int, _Packed]] = {}
"""By instruction set, the dtype that results are rounded to, and whether as one matrix: a weight's id -> its form."""


def packed(
    library: Library, weights: list[Tensor], dtype: torch.dtype, as_matrix: bool
) -> tuple[list[Tensor], list[int]]:
    """Each weight as the kernels read it, packed now only where it has changed; and their fingerprints.

    ``as_matrix``: a weight's taps and inputs as one, in the order in which a stem meets them.
    """
    known = _packed.setdefault((library.isa, dtype, as_matrix), {})
    dense = [_dense(w) for w in weights]
    fingerprints = library.fingerprints(dense)
    states = [(mark, w.shape, w.stride(), w.dtype) for mark, w in zip(fingerprints, dense, strict=True)]
    entries = [known.get(id(w)) for w in weights]
    stale = [
        i
        for i, (entry, weight, state) in enumerate(zip(entries, weights, states, strict=True))
        if entry is None or entry.weight() is not weight or entry.state != state
    ]
    if stale:
        sources = Weights([_as_matrix(dense[i], dtype) if as_matrix else dense[i] for i in stale])
        for i, memory in zip(stale, library.pack(sources.array, dtype), strict=True):
            weight = weights[i]
            reference = weakref.ref(weight, functools.partial(_forget, known, id(weight)))
            entries[i] = known[id(weight)] = _Packed(reference, states[i], memory)
    return [entry.memory for entry in entries if entry is not None], fingerprints


def _as_matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, C, *kernel] -> [K, taps * C], row by row of taps; of even size in bfloat16, which is multiplied in pairs."""
    rows = weight.movedim(1, -1).flatten(-2)
    return F.pad(rows, (0, rows.shape[-1] % 2 if dtype == torch.bfloat16 else 0)).flatten(1)


def _forget(known: dict[int, _Packed], key: int, reference: weakref.ref[Tensor]) -> None:
    """A weight has died; its id may be another's by now."""
    if key in known and known[key].weight is reference:
        del known[key]


def _dense(weight: Tensor) -> Tensor:
    """The weight itself where its bytes are in one piece and of a dtype that C++ reads, else a copy."""
    if weight.dtype not in DTYPES:
        weight = weight.float()
    return weight if _is_dense(weight) else weight.contiguous()


def _is_dense(weight: Tensor) -> bool:
    by_pixels = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim(), torch.contiguous_format)
    return weight.is_contiguous() or weight.is_contiguous(memory_format=by_pixels)


class Prepared:
    """What a kernel at given statistics reads of a module: norms where they are, weights packed for ``dtype``.

    Args:
        changeable: whether anyone will ask if it is current.
        as_matrix: how the weights are packed.

    Attributes:
        in_dtype, out_dtype: of x as the kernel reads it, and of what it makes.
        seen: what it was made from; ``None`` where nothing could tell a change of that, or nobody asks.
    """

    kernel: str
    in_dtype: torch.dtype
    out_dtype: torch.dtype
    args: Structure

    def __init__(
        self, norms: Norms, weights: list[Tensor], dtype: torch.dtype, changeable: bool, as_matrix: bool = False
    ):
        self.library, self.norms = loaded(), norms
        self.packed, fingerprints = packed(self.library, weights, dtype, as_matrix)
        in_place = norms.are_in_place() and all(w.dtype in DTYPES and _is_dense(w) for w in weights)
        self.seen = Seen.now(self.library, norms.given, weights, fingerprints) if changeable and in_place else None

    def is_current(self) -> bool:
        """Whether another one of the same tensors, with what they contain now and where they are, would be the same."""
        return self.seen is not None and self.seen.holds()

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of x of ``shape``."""
        raise NotImplementedError

    def source(self, x: Tensor) -> Tensor:
        """x as the kernel reads it, dense."""
        return pixels(x, self.in_dtype)

    def is_planar(self, source: Tensor) -> bool:
        """Whether a source has its channels outermost."""
        return False

    def __call__(self, x: Tensor) -> Tensor:
        """From any thread."""
        source = self.source(x)
        out = empty_channels_last(self.output_shape(x.shape), self.out_dtype, x.device)
        run_on(self.library, self.kernel, self.args, source, out, self.is_planar(source))
        return out
