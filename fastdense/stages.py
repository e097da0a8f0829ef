"""A sequence of stages: a stem, dense blocks and transitions fused, and whatever else there is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .chain import Chain, may_run, steps
from .ends import stem, stem_tail
from .fallback import is_channels_last
from .modules import FusedBlock, FusedTransition
from .norms import BatchStats
from .served import BatchNorm, hooked


class FastSequential(nn.Sequential):
    """``nn.Sequential`` that fuses a stem and hands the statistics of a block to the transition after it."""

    def forward(self, x: Tensor) -> Tensor:
        x, _, norm, _ = through(self, x)
        if norm is None:
            return x
        volumes = isinstance(norm, nn.BatchNorm3d)  # PyTorch sums channels_last_3d less exactly
        return norm(x.contiguous() if volumes else x)


class Passed(NamedTuple):
    """What came through a sequence.

    Attributes:
        x: its output, or the input of a norm at its end, or of the pool [N, C].
        stats: of x, where they are known.
        norm: that x has not been through.
        pooled: x has been through the norm and, after it, a ReLU and the global pool.
    """

    x: Tensor
    stats: BatchStats | None
    norm: BatchNorm | None
    pooled: bool


def through(
    features: nn.Sequential,
    x: Tensor,
    visit: Callable[[str, Tensor], None] | None = None,
    may_pool: bool = False,
) -> Passed:
    """Through all stages but a norm at the end.

    Args:
        visit: is told the name and the output of every stage, of some that are fused only the last.
        may_pool: a head comes next, and may be run with the stages.
    """
    if features.training and not torch.compiler.is_compiling():
        Chain.forget(features)
    may_chain = visit is None and not features.training
    remaining = steps(features, whole_stem=visit is None)
    last = remaining[-1] if remaining and remaining[-1].is_head else None
    if last is not None and not may_pool:
        remaining.pop()
    stats: BatchStats | None = None  # of x, where known
    chain: Chain | None = None
    channels_last = is_channels_last(x)  # as the reference's features would be; ours always are
    while remaining:
        step = remaining[0]
        modules, stage = step.modules, step.modules[0]
        if may_chain and step.is_fused() and may_run(x):
            chain = chain or Chain.of(features)
            x, done = chain.run(remaining, x)
            if done:
                stats = None
                del remaining[:done]
                continue
        if step.is_head:
            break
        del remaining[0]
        if len(modules) > 1:
            x, stats = (stem if step.is_stem() else stem_tail)(modules, x), None
        elif isinstance(stage, FusedBlock) and not hooked(stage):
            x, stats = stage.forward_with_stats(x, channels_last)
        elif isinstance(stage, FusedTransition) and not hooked(stage):
            x, stats = stage.forward(x, stats, channels_last), None
        else:
            x, stats, chain = stage(x), None, None  # a stage may change others
            channels_last = is_channels_last(x)
        if visit is not None:
            visit(step.name, x)
    if last is None:
        return Passed(x, stats, None, False)
    pooled = may_pool and not remaining
    return Passed(x, stats, None if pooled else cast(BatchNorm, last.modules[0]), pooled)
