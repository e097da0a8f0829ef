"""A sequence of stages: a stem's tail, dense blocks and transitions fused, and whatever else there is called."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .chain import Chain, may_run, steps
from .modules import FusedBlock, FusedTransition, is_channels_last, stem_tail
from .norms import BatchStats
from .served import BatchNorm, hooked


class FastSequential(nn.Sequential):
    """``nn.Sequential`` that fuses a stem's tail and hands the statistics of a block to the transition after it."""

    def forward(self, x: Tensor) -> Tensor:
        x, _, norm = through(self, x)
        if norm is None:
            return x
        volumes = isinstance(norm, nn.BatchNorm3d)  # PyTorch sums channels_last_3d less exactly
        return norm(x.contiguous() if volumes else x)


def through(
    features: nn.Sequential, x: Tensor, visit: Callable[[str, Tensor], None] | None = None
) -> tuple[Tensor, BatchStats | None, BatchNorm | None]:
    """Through all stages but a norm at the end, which comes back with its input and the statistics of that.

    ``visit`` is told the name and the output of every stage, of some that are fused only the last.
    """
    if features.training and not torch.compiler.is_compiling():
        Chain.forget(features)
    may_chain = visit is None and not features.training
    remaining = steps(features)
    stats: BatchStats | None = None  # of x, where known
    chain: Chain | None = None
    channels_last = is_channels_last(x)  # as the reference's features would be; ours always are
    while remaining:
        step = remaining[0]
        modules, stage = step.modules, step.modules[0]
        if isinstance(stage, BatchNorm) and len(remaining) == len(modules) == 1:
            return x, stats, stage
        if may_chain and step.is_fused() and may_run(x):
            chain = chain or Chain.of(features)
            x, done = chain.run(remaining, x)
            if done:
                stats = None
                del remaining[:done]
                continue
        del remaining[0]
        if len(modules) > 1:
            x, stats = stem_tail(modules, x), None
        elif isinstance(stage, FusedBlock) and not hooked(stage):
            x, stats = stage.forward_with_stats(x, channels_last)
        elif isinstance(stage, FusedTransition) and not hooked(stage):
            x, stats = stage.forward(x, stats, channels_last), None
        else:
            x, stats, chain = stage(x), None, None  # a stage may change others
            channels_last = is_channels_last(x)
        if visit is not None:
            visit(step.name, x)
    return x, stats, None
