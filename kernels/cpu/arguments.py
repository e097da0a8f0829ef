"""Tensors as the C++ takes them: dense pixels, BatchNorms, weights, with what keeps their memory alive."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from ctypes import Array, Structure, addressof, c_float, c_void_p, sizeof
from typing import Any

import torch
from torch import Tensor

from ..contract import ChannelStats, Norm, in_channels_last
from ..group import Group
from . import library
from .library import DTYPES, Library, NormArgs, Share, WeightArgs


def loaded() -> Library:
    """The library, or an error that says why there is none."""
    found = library.load()
    if isinstance(found, str):
        raise RuntimeError(f"backend 'cpu' cannot run: {found}")
    return found


def pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [N, C, *spatial] in dense channels-last memory, of ``dtype``; itself where it is so already."""
    return in_channels_last(x.detach().to(dtype))


def extents(x: Tensor) -> dict[str, int]:
    """Of [N, C, *spatial], what all structs of arguments begin with."""
    return {"images": len(x), **spatial(x.shape[2:])}


def spatial(sizes: Sequence[int]) -> dict[str, int]:
    """The same of an image."""
    return dict(zip(("depth", "height", "width"), in_three_dimensions(sizes), strict=True))


def run_on(library: Library, name: str, args: Structure, x: Tensor, out: Tensor, planar: bool = False) -> None:
    """A kernel that makes ``out`` of x, dense pixels. ``args`` has the rest and stays as it is, for other threads.

    ``planar``: x has its channels outermost, for a kernel that takes such.
    """
    args = type(args).from_buffer_copy(args)
    for field, value in extents(x).items():
        setattr(args, field, value)
    if planar:
        args.planar = planar  # type: ignore[attr-defined]
    args.x, args.out = x.data_ptr(), out.data_ptr()  # type: ignore[attr-defined]
    library.run(name, args)


def taps(weight: Tensor) -> tuple[int, int, int]:
    """Of [K, C, *kernel]: how many in depth, height and width."""
    depth, height, width = in_three_dimensions(weight.shape[2:])
    return depth, height, width


def in_three_dimensions(values: Sequence[int], flat: int = 1) -> list[int]:
    """Of depth, height and width, where there may be only the last of them: ``flat`` for the others."""
    return [flat] * (3 - len(values)) + list(values)


def pointers(tensors: Sequence[Tensor]) -> Array[c_void_p] | None:
    """Where tensors are; ``None`` for no tensors."""
    return (c_void_p * len(tensors))(*[t.data_ptr() for t in tensors]) if tensors else None


class Norms:
    """BatchNorms; keeps alive what the pointers point to.

    Attributes:
        given: all vectors.
        array: one entry a norm.
        dtype: the number of the dtype of all their vectors: their own where it is common to all, else float32.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        eps: Sequence[float],
        dtype: torch.dtype | None = None,
    ):
        columns = [weights, biases, means, variances]
        if dtype is None:
            dtypes = {vector.dtype for vectors in columns for vector in vectors}
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        if dtype not in DTYPES:
            dtype = torch.float32
        self.given = list(itertools.chain.from_iterable(columns))
        self._columns = [
            [v if v.dtype == dtype and v.is_contiguous() else v.to(dtype).contiguous() for v in vectors]
            for vectors in columns
        ]
        self.dtype = DTYPES[dtype]
        addresses = [[vector.data_ptr() for vector in vectors] for vectors in self._columns]
        self.array = (NormArgs * len(eps))(*map(NormArgs, *addresses, eps))

    def are_in_place(self) -> bool:
        """Whether the pointers point to the given vectors, not to copies."""
        return all(map(operator.is_, self.given, itertools.chain.from_iterable(self._columns)))

    @staticmethod
    def of(norms: Sequence[Norm], dtype: torch.dtype | None = None) -> Norms:
        """Of the contract's norms."""
        weights, biases, means, variances = (
            [getattr(norm, name) for norm in norms] for name in ("weight", "bias", "mean", "var")
        )
        return Norms(weights, biases, means, variances, [norm.eps for norm in norms], dtype)

    def array_from(self, start: int) -> Array[NormArgs] | None:
        """The norms from ``start`` on; ``None`` where there are none."""
        count = len(self.array) - start
        return (NormArgs * count).from_buffer(self.array, start * sizeof(NormArgs)) if count else None


class Weights:
    """Convolution weights [K, C, *kernel] of any strides; keeps alive what the pointers point to."""

    def __init__(self, weights: Sequence[Tensor]):
        self._weights = [w if w.dtype in DTYPES else w.float() for w in weights]
        self.array = (WeightArgs * len(weights))()
        for arg, w in zip(self.array, self._weights, strict=True):
            arg.data, arg.dtype = w.data_ptr(), DTYPES[w.dtype]
            arg.out, arg.in_, *_ = w.shape
            arg.depth, arg.height, arg.width = taps(w)
            arg.stride_out, arg.stride_in, *strides = w.stride()
            arg.stride_d, arg.stride_h, arg.stride_w = in_three_dimensions(strides)


class Shares:
    """A group as kernels call it, from the thread that called them.

    Attributes:
        merge, add_up: the group's; null for a process on its own.
    """

    def __init__(self, group: Group | None):
        self._error: BaseException | None = None
        self.merge = self.add_up = Share()
        if group is not None:
            self.merge = self._callback(lambda mean, var: group.merge(ChannelStats(mean, var)))
            self.add_up = self._callback(group.add_up)

    def check(self) -> None:
        """Raise what a call raised, which cannot pass through C++."""
        if self._error is not None:
            raise self._error

    def _callback(self, function: Callable[[Tensor, Tensor], None]) -> Any:
        def call(first: Any, second: Any, channels: int) -> None:
            if self._error is None:
                try:
                    function(_floats(first, channels), _floats(second, channels))
                except BaseException as error:
                    self._error = error

        return Share(call)


def _floats(pointer: Any, count: int) -> Tensor:
    """[count], float32, in memory of the kernel's."""
    return torch.frombuffer((c_float * count).from_address(addressof(pointer.contents)), dtype=torch.float32)
