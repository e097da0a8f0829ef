"""Stages of a network in evaluation, one after another: looked at all together, then run with nothing in between.

A kernel leaves the caches full of what it computed with. Python that looks at a stage after it takes several times as
long as Python that looks at all of them before the first, and for one image that is a good part of the time. The way
through the stages that was found once is gone again, as long as nothing that it depended on has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.pooling import _MaxPoolNd

from . import backends, ops
from .backends import Prepared
from .ends import prepared_head, prepared_stem, prepared_stem_tail
from .fallback import autocast_dtype, is_transformed
from .frozen import Frozen
from .modules import Fused
from .ready import Kept, Ready
from .served import CONVS, BatchNorm, carries_relu, global_hooks, hooked


class Step(NamedTuple):
    """What is run at once of a sequence of modules: a stem, or its tail, or a single one.

    ``is_head``: of the last, a norm, with the ReLU and the pool that come after the sequence.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    is_head: bool = False

    @property
    def name(self) -> str:
        """Of the last, which stands for all."""
        return self.names[-1]

    def is_stem(self) -> bool:
        """Whether it begins with a convolution."""
        return len(self.modules) > 1 and not isinstance(self.modules[0], BatchNorm)

    def is_fused(self) -> bool:
        """Whether it may be an op."""
        return self.is_head or len(self.modules) > 1 or isinstance(self.modules[0], Fused | Frozen)

    def prepared(self, x: Tensor) -> Prepared | None:
        """What makes its output of x, and of tensors like it; ``None`` where a backend has nothing ready."""
        if len(self.modules) > 1:
            prepare = prepared_stem if self.is_stem() else prepared_stem_tail
            return prepare(self.modules, x)
        (stage,) = self.modules
        if self.is_head:
            return prepared_head(cast(BatchNorm, stage), x)
        return stage.prepared(x) if isinstance(stage, Fused | Frozen) and not hooked(stage) else None


def steps(features: nn.Module, whole_stem: bool = True) -> list[Step]:
    """The stages of a sequence, the modules of a stem together, or those of its tail; a norm at its end is a head."""
    stages, found = list(features.named_children()), []
    while stages:
        size = _stem_tail_size(stages) or 1
        if whole_stem and type(stages[0][1]) in CONVS:
            size += _stem_tail_size(stages[1:])
        is_head = size == len(stages) == 1 and isinstance(stages[0][1], BatchNorm)
        names, modules = zip(*stages[:size], strict=True)
        found.append(Step(names, modules, is_head))
        del stages[:size]
    return found


def _stem_tail_size(stages: Sequence[tuple[str, nn.Module]]) -> int:
    """How many from the first are the tail of a stem: a norm, a ReLU unless the norm carries it, a max pool. Or 0."""
    kinds = [type(module) for _, module in stages[:3]]
    if not kinds or not issubclass(kinds[0], BatchNorm):
        return 0
    pools = [issubclass(kind, _MaxPoolNd) for kind in kinds]
    if kinds[1:2] == [nn.ReLU] and pools[2:] == [True]:
        return 3
    return 2 if carries_relu(stages[0][1]) and pools[1:2] == [True] else 0


class Chain(Kept):
    """The ways through the stages of a sequence, by what they depend on besides the stages."""

    def __init__(self, features: nn.Module):
        fused = [step for step in steps(features) if step.is_fused()]
        self._unread = [step.modules[0] for step in fused if _is_read_anew(step.modules[0])]
        self._steps = [step for step in fused if step.modules[0] not in self._unread]
        super().__init__(features, [module for step in self._steps for module in step.modules])
        self._ways: dict[tuple[object, ...], tuple[Prepared | None, int]] = {}

    def holds(self, module: nn.Module) -> bool:
        return super().holds(module) and not any("_ready" in stage.__dict__ for stage in self._unread)

    def run(self, remaining: Sequence[Step], x: Tensor) -> tuple[Tensor, int]:
        """x through the first of the remaining steps, as far as they are ready, and how many these are."""
        backend = _backend(x)
        key = len(remaining), remaining[0].name, x.device, x.dtype, x.dim(), x.shape[1], autocast_dtype(x), backend
        way, length = self._ways.get(key, (None, 0))
        if way is None or not way.is_current():
            way, length = self._ways[key] = self._way(remaining, x, backend)
        if way is None or min(way.output_shape(x.shape)) < 1:
            return x, 0
        return way(x), length

    def _way(self, remaining: Sequence[Step], x: Tensor, backend: str) -> tuple[Prepared | None, int]:
        """Of tensors like x, whatever their size, through the first of the remaining steps, and how many these are."""
        calls: list[Prepared] = []
        changeable: list[Prepared] = []
        size = max(2 ** len(remaining), *x.shape[2:])  # too small for none
        shape: Sequence[int] = (1, x.shape[1], *[size] * (x.dim() - 2))
        dtype = x.dtype
        for step in remaining:
            like_x = x.new_empty(1, dtype=dtype).expand(shape)  # without memory for its values
            call = step.prepared(like_x) if step in self._steps else None
            if call is None:
                break
            calls.append(call)
            if not isinstance(step.modules[0], Frozen):
                changeable.append(call)
            shape, dtype = call.output_shape(shape), call.out_dtype
        prepare = backends.preparation(backend, backends.CHAIN)
        return (prepare(calls, changeable) if calls and prepare is not None else None), len(calls)


def _is_read_anew(stage: nn.Module) -> bool:
    """Whether it is a block or transition that is read in every forward. What it is read as else, it keeps."""
    return isinstance(stage, Fused) and not Ready.of(stage).may_be_kept()


def _backend(x: Tensor) -> str:
    return backends.select(x.device, x.dtype, x.dim() - 2)


def may_run(x: Tensor) -> bool:
    """Whether a backend has chains, and nothing could tell one from its modules: no tracer, transform or gradient."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.dim() in (3, 4, 5)
        and x.numel() > 0
        and not global_hooks()
        and not ops.are_observed()
        and not is_transformed()
        and backends.preparation(_backend(x), backends.CHAIN) is not None
    )
