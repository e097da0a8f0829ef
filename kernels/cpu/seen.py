"""Whether tensors are what they were, as torch's C functions say: of hundreds in less time than one kernel takes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from ctypes import c_int64

from torch import Tensor

from .library import Library, SeenTensor


class Seen:
    """Tensors as they are now.

    Args:
        placed: tensors of which matters where their memory is, whatever is written to it.
        read: dense tensors of which matters what they contain, wherever that is.
        fingerprints: of what they contain.
    """

    def __init__(self, library: Library, placed: Sequence[Tensor], read: Sequence[Tensor], fingerprints: Sequence[int]):
        self.library, self.tensors = library, [*placed, *read]
        self.array = (SeenTensor * len(self.tensors))()
        for seen, tensor in zip(self.array, self.tensors, strict=True):
            seen.dim = tensor.dim()
            seen.shape = (c_int64 * (2 * tensor.dim()))(*tensor.shape, *tensor.stride())
            seen.device_type, seen.dtype = library.kind_of(tensor)
        for i, tensor in enumerate(placed):
            self.array[i].data = tensor.data_ptr()
        for i, (tensor, fingerprint) in enumerate(zip(read, fingerprints, strict=True), len(placed)):
            self.array[i].bytes, self.array[i].fingerprint = tensor.nbytes, fingerprint

    def holds(self) -> bool:
        """Whether they still are so."""
        return self.library.are_as_seen(self.tensors, self.array)

    @staticmethod
    def together(parts: Sequence[Seen]) -> Seen:
        """Several of one library, at least one, as one."""
        made = Seen(parts[0].library, [], [], [])
        made.tensors = list(itertools.chain.from_iterable(part.tensors for part in parts))
        made.array = (SeenTensor * len(made.tensors))(*itertools.chain.from_iterable(part.array for part in parts))
        return made
