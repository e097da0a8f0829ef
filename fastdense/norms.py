"""BatchNorms as the ops take them: parameters, statistics, and what a training norm does with its batch's.

Statistics belong to channels, and are made once: by the op that makes the channels, or here where none did. A norm
of several processes (``SyncBatchNorm``) has those of all their batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from .kernels.contract import Norm
from .served import BatchNorm, parameter


class BatchStats(NamedTuple):
    """Statistics of a batch, on their way from where they were made to the norms that use them."""

    mean: Tensor  # [C]
    var: Tensor  # [C], biased
    pixels: int | Tensor  # values of a channel
    group: str  # of the processes whose batches they are of, "" for this one alone


def uses_batch_stats(norm: BatchNorm) -> bool:
    return norm.training or norm._buffers["running_mean"] is None


def group_of(norm: BatchNorm) -> str:
    """The name of the process group over whose batches a norm takes its statistics; "" for this process's alone."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return ""
    group = cast(dist.ProcessGroup, norm.process_group or dist.group.WORLD)
    return group.group_name if dist.get_world_size(group) > 1 else ""


def groups(norms: Sequence[BatchNorm]) -> set[str]:
    """Of all norms that use the statistics of a batch."""
    return {group_of(norm) for norm in norms if uses_batch_stats(norm)}


def _affine(norm: BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = parameter(norm, "weight"), parameter(norm, "bias")
    return (
        x.new_ones(norm.num_features) if weight is None else weight,
        x.new_zeros(norm.num_features) if bias is None else bias,
    )


def norm_lists(norms: list[BatchNorm], x: Tensor) -> tuple[list[Tensor], ...]:
    """Weights, biases, running means, running variances; the latter two empty where the batch's are used."""
    unread = x.new_empty(0)
    vectors = [
        (*_affine(norm, x), *((unread, unread) if uses_batch_stats(norm) else _running_stats(norm))) for norm in norms
    ]
    return tuple([list(column) for column in zip(*vectors, strict=True)]) if vectors else ([], [], [], [])


def norm_for(norm: BatchNorm, x: Tensor, stats: BatchStats | None, backend: str) -> Norm:
    """The norm as an op takes it; its running statistics are updated if it is training."""
    if not uses_batch_stats(norm):
        return _running(norm, x)
    group = group_of(norm)
    if stats is None or stats.group != group:
        count = count_of(x, group)
        mean, var = ops.channel_stats(x, backend=backend, group=group)
        stats = BatchStats(mean, var, count, group)
    update_running_stats([norm], [stats.mean], [unbiased(stats.var, stats.pixels)])
    return Norm(*_affine(norm, x), stats.mean, stats.var, norm.eps, True, group)


def running_norm(norm: BatchNorm) -> Norm | None:
    """A norm in evaluation as an op takes it, ``None`` where it uses the statistics of its batch even there."""
    return None if uses_batch_stats(norm) else _running(norm, _buffer(norm, "running_mean"))


def _running(norm: BatchNorm, like: Tensor) -> Norm:
    return Norm(*_affine(norm, like), *_running_stats(norm), norm.eps, False)


def count_of(x: Tensor, group: str) -> int | Tensor:
    """Values of a channel in a batch, or in those of a group's processes: then float64, on x's device."""
    count = x.numel() // x.shape[1]
    if group:
        from torch.distributed import _functional_collectives as functional  # not every build has it

        own = torch.tensor(float(count), dtype=torch.float64, device=x.device)
        return functional.all_reduce(own, "sum", group)  # type: ignore[arg-type]  # a name
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    return count


def unbiased(var: Tensor, count: int | Tensor) -> Tensor:
    """The variance that a norm remembers of a batch with ``count`` values per channel."""
    return var * (count / (count - 1))


@torch.no_grad()
def update_running_stats(norms: Sequence[BatchNorm], means: Sequence[Tensor], variances: Sequence[Tensor]) -> None:
    """What each training BatchNorm does with the mean and the unbiased variance of its batch.

    Nothing when a checkpoint runs the forward again inside a backward: they were updated the first time.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return
    by_momentum: dict[float | None, list[tuple[dict[str, Tensor | None], Tensor, Tensor]]] = defaultdict(list)
    for norm, mean, var in zip(norms, means, variances, strict=True):
        buffers = norm._buffers
        if norm.training and norm.track_running_stats and buffers["running_mean"] is not None:
            by_momentum[norm.momentum].append((buffers, mean, var))
    for momentum, group in by_momentum.items():
        count, running_means, running_vars = (
            [cast(Tensor, buffers[name]) for buffers, _, _ in group]
            for name in ("num_batches_tracked", "running_mean", "running_var")
        )
        targets = running_means + running_vars
        values = [mean for _, mean, _ in group] + [var for _, _, var in group]
        values = [
            value if value.dtype == target.dtype else value.to(target.dtype)
            for value, target in zip(values, targets, strict=True)
        ]
        torch._foreach_add_(count, 1)
        if momentum is None:  # the average of all batches so far
            shares = [batches.double().reciprocal() for batches in count] * 2
            for target, value, share in zip(targets, values, shares, strict=True):
                target.lerp_(value, share.to(target.dtype))
        else:
            torch._foreach_lerp_(targets, values, momentum)


def _running_stats(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    return _buffer(norm, "running_mean"), _buffer(norm, "running_var")


def _buffer(norm: BatchNorm, name: str) -> Tensor:
    return cast(Tensor, norm._buffers[name])
