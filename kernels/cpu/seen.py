"""Whether tensors are what they were, as torch's C functions say: of hundreds in less time than one kernel takes."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Sequence
from ctypes import c_int64

import torch
from torch import Tensor

from .library import Library, SeenTensor

_pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Seen:
    """Tensors as they are now, which it keeps alive.

    Args:
        placed: tensors of which matters where their memory is, whatever is written to it.
        read: dense tensors of which matters what they contain, wherever that is.
        fingerprints: of what they contain.
    """

    def __init__(self, library: Library, placed: Sequence[Tensor], read: Sequence[Tensor], fingerprints: Sequence[int]):
        tensors = [*placed, *read]
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
        weakref.finalize(self, torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs, handles)
        self.library = library
        self.array = (SeenTensor * len(tensors))()
        for seen, tensor, handle in zip(self.array, tensors, handles, strict=True):
            seen.tensor, seen.dim = _pointer_in(handle, None), tensor.dim()
            seen.shape = (c_int64 * (2 * tensor.dim()))(*tensor.shape, *tensor.stride())
            seen.device_type, seen.dtype = library.kind_of(seen.tensor)
        for i, tensor in enumerate(placed):
            self.array[i].data = tensor.data_ptr()
        for i, (tensor, fingerprint) in enumerate(zip(read, fingerprints, strict=True), len(placed)):
            self.array[i].bytes, self.array[i].fingerprint = tensor.nbytes, fingerprint

    def holds(self) -> bool:
        """Whether they still are so."""
        return self.library.are_as_seen(self.array)


class SeenTogether:
    """Several of one library, asked at once."""

    def __init__(self, parts: Sequence[Seen]):
        self._parts = list(parts)
        tensors = list(itertools.chain.from_iterable(part.array for part in parts))
        self._array = (SeenTensor * len(tensors))(*tensors)

    def holds(self) -> bool:
        """Whether all do."""
        return not self._parts or self._parts[0].library.are_as_seen(self._array)
