"""A sequence of stages: a stem's tail, dense blocks and transitions fused, and whatever else there is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.modules.pooling import _MaxPoolNd

from .modules import FusedBlock, FusedTransition, is_channels_last, stem_tail
from .norms import BatchStats
from .served import BatchNorm, carries_relu, hooked


class FastSequential(nn.Sequential):
    """``nn.Sequential`` that fuses a stem's tail and hands the statistics of a block to the transition after it."""

    def forward(self, x: Tensor) -> Tensor:
        x, _, norm = through(self, x)
        if norm is None:
            return x
        volumes = isinstance(norm, nn.BatchNorm3d)  # PyTorch sums channels_last_3d less exactly
        return norm(x.contiguous() if volumes else x)


def stem_tail_size(stages: Sequence[tuple[str, nn.Module]]) -> int:
    """How many from the first are the tail of a stem: a norm, a ReLU unless the norm carries it, a max pool. Or 0."""
    kinds = [type(module) for _, module in stages[:3]]
    if not kinds or not issubclass(kinds[0], BatchNorm):
        return 0
    pools = [issubclass(kind, _MaxPoolNd) for kind in kinds]
    if kinds[1:2] == [nn.ReLU] and pools[2:] == [True]:
        return 3
    return 2 if carries_relu(stages[0][1]) and pools[1:2] == [True] else 0


def through(
    features: nn.Sequential, x: Tensor, visit: Callable[[str, Tensor], None] | None = None
) -> tuple[Tensor, BatchStats | None, BatchNorm | None]:
    """Through all stages but a norm at the end, which comes back with its input and the statistics of that.

    ``visit`` is told the name and the output of every stage, of some that are fused only the last.
    """
    stages = list(features.named_children())
    stats: BatchStats | None = None  # of x, where known
    channels_last = is_channels_last(x)  # as the reference's features would be; ours always are
    while stages:
        stage = stages[0][1]
        if isinstance(stage, BatchNorm) and len(stages) == 1:
            return x, stats, stage
        size = stem_tail_size(stages) or 1
        names, fused = zip(*stages[:size], strict=True)
        name = names[-1]
        del stages[:size]
        if size > 1:
            x, stats = stem_tail(fused[0], fused[1] if size == 3 else None, fused[-1], x), None
        elif isinstance(stage, FusedBlock) and not hooked(stage):
            x, stats = stage.forward_with_stats(x, channels_last)
        elif isinstance(stage, FusedTransition) and not hooked(stage):
            x, stats = stage.forward(x, stats, channels_last), None
        else:
            x, stats = stage(x), None
            channels_last = is_channels_last(x)
        if visit is not None:
            visit(name, x)
    return x, stats, None
