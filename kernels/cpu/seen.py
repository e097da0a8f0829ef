"""Whether tensors are what they were, as torch's C functions say: of hundreds in less time than one kernel takes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from ctypes import Array, c_int64

from torch import Tensor

from .library import Library, SeenTensor


class Seen:
    """Tensors as they were, and what of them matters."""

    def __init__(self, library: Library, tensors: list[Tensor], array: Array[SeenTensor]):
        self._library, self._tensors, self._array = library, tensors, array

    @staticmethod
    def now(library: Library, placed: Sequence[Tensor], read: Sequence[Tensor], fingerprints: Sequence[int]) -> Seen:
        """Tensors as they are now.

        Args:
            placed: those of which matters where their memory is, whatever is written to it.
            read: dense ones of which matters what they contain, wherever that is.
            fingerprints: of what they contain.
        """
        tensors = [*placed, *read]
        array = (SeenTensor * len(tensors))()
        for seen, tensor in zip(array, tensors, strict=True):
            seen.dim = tensor.dim()
            seen.shape = (c_int64 * (2 * tensor.dim()))(*tensor.shape, *tensor.stride())
            seen.device_type, seen.dtype = library.kind_of(tensor)
        for i, tensor in enumerate(placed):
            array[i].data = tensor.data_ptr()
        for i, (tensor, fingerprint) in enumerate(zip(read, fingerprints, strict=True), len(placed)):
            array[i].bytes, array[i].fingerprint = tensor.nbytes, fingerprint
        return Seen(library, tensors, array)

    @staticmethod
    def together(parts: Sequence[Seen]) -> Seen:
        """Several of one library, at least one, as one."""
        tensors = list(itertools.chain.from_iterable(part._tensors for part in parts))
        array = (SeenTensor * len(tensors))(*itertools.chain.from_iterable(part._array for part in parts))
        return Seen(parts[0]._library, tensors, array)

    def holds(self) -> bool:
        """Whether they still are so."""
        return self._library.are_as_seen(self._tensors, self._array)
