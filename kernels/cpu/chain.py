"""Stages of a network at inference, one after another in one call."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import empty_channels_last
from .arguments import spatial
from .library import ChainArgs, StageArgs
from .packing import Prepared
from .seen import Seen

_KINDS = {name: kind for kind, name in enumerate(("stem", "stem_tail", "dense_block", "transition", "head"))}
"""Of kernels, as ``StageKind`` of ``src/abi.h``."""


ROOM = 16 << 20
"""Bytes that what the stages make for one another should take, so that it stays in a cache."""


class Room(NamedTuple):
    """Bytes of an image between two stages: of those after the first, third, ... stage, and after the others."""

    even: int
    odd: int

    @staticmethod
    def between(out_bytes: Sequence[int]) -> Room:
        """``out_bytes``: what each stage makes of an image."""
        return Room(max(out_bytes[:-1:2], default=0), max(out_bytes[1:-1:2], default=0))

    def group(self, images: int) -> int:
        """How many images go through all stages together: as many a thread, at least one."""
        threads = torch.get_num_threads()
        return min(images, max(1, ROOM // max(1, sum(self)) // threads) * threads)


class _Bound(NamedTuple):
    """All stages' arguments for images of one shape."""

    shape: tuple[int, ...]  # [C, *spatial]
    planar: bool
    out_shape: tuple[int, ...]  # of the last
    room: Room
    stages: ctypes.Array[StageArgs]
    args: list[Any]  # that the stages point to


class PreparedChain:
    """Stages, ready to be called with what the first takes: each runs on what the one before makes.

    Args:
        stages: at least one.
        changeable: those of them whose weights may change.
    """

    def __init__(self, stages: Sequence[Prepared], changeable: Sequence[Prepared]):
        self._stages = list(stages)
        seen = [stage.seen for stage in changeable if stage.seen is not None]
        self._never_current = len(seen) < len(changeable)
        self._seen = Seen.together(seen) if seen else None
        self.out_dtype = stages[-1].out_dtype
        self._fit = all(one.out_dtype == other.in_dtype for one, other in pairwise(stages))
        self._bound: _Bound | None = None  # of the last call

    def is_current(self) -> bool:
        """Whether all that may change are."""
        return not self._never_current and (self._seen is None or self._seen.holds())

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of x of ``shape``."""
        for stage in self._stages:
            shape = stage.output_shape(shape)
        return tuple(shape)

    def __call__(self, x: Tensor) -> Tensor:
        """From any thread."""
        if not self._fit:
            for stage in self._stages:
                x = stage(x)
            return x
        first = self._stages[0]
        source = first.source(x)
        planar, bound = first.is_planar(source), self._bound
        if bound is None or bound.shape != x.shape[1:] or bound.planar != planar:
            bound = self._bound = self._bind(tuple(x.shape[1:]), planar)
        out = empty_channels_last((len(x), *bound.out_shape), self.out_dtype, x.device)
        args = ChainArgs(
            images=len(x),
            group=bound.room.group(len(x)),
            even=bound.room.even,
            odd=bound.room.odd,
            stages=len(bound.stages),
            x_bytes=source[0].nbytes,
            x=source.data_ptr(),
            out=out.data_ptr(),
            stage=bound.stages,
        )
        first.library.run("chain", args)
        return out

    def _bind(self, shape: tuple[int, ...], planar: bool) -> _Bound:
        stages, kept, out_shape = (StageArgs * len(self._stages))(), [], shape
        for target, stage in zip(stages, self._stages, strict=True):
            args = type(stage.args).from_buffer_copy(stage.args)
            for field, size in spatial(out_shape[1:]).items():
                setattr(args, field, size)
            kept.append(args)
            out_shape = stage.output_shape((1, *out_shape))[1:]
            target.kind, target.args = _KINDS[stage.kernel], ctypes.addressof(args)
            target.out_bytes = math.prod(out_shape) * stage.out_dtype.itemsize
        if planar:
            kept[0].planar = planar
        return _Bound(shape, planar, out_shape, Room.between([stage.out_bytes for stage in stages]), stages, kept)
