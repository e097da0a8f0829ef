"""Processes whose batches count as one: SyncBatchNorm over shared statistics.

Each process makes statistics and sums of its own pixels; with M_r of them on rank r and M in all,

    mean = sum_r M_r/M * mean_r        var = sum_r M_r/M * (var_r + (mean_r - mean)^2)
    p = sum_r M_r/M * p_r              q = sum_r M_r/M * q_r

where p and q, the corrections of :mod:`.portable.batch_norm`, are sums divided by M_r. A channel's statistics are
exchanged once, when it is written, and its corrections once, when its gradient is consumed; a SyncBatchNorm of its own
in every norm exchanges both at every layer that reads the channel. The gradients of weights stay those of a process.

Source: merging of statistics, Chan et al. 1979.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .contract import ChannelStats


class Group:
    """This process among those of a process group, for one op; made by :func:`join`."""

    def __init__(self, name: str, pixels: int, device: torch.device):
        self._group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
        counts = self._gathered(torch.tensor([float(pixels)], dtype=torch.float64, device=device)).flatten()
        self._shares = counts / counts.sum()
        self._share = self._shares[dist.get_rank(self._group)]

    def merge(self, stats: ChannelStats) -> None:
        """Turn the statistics of this process's pixels into everyone's, in place."""
        means, variances = self._gathered(torch.stack(stats)).double().unbind(1)  # [world, C]
        shares = self._shares.unsqueeze(1)
        mean = (means * shares).sum(0)
        stats.mean.copy_(mean)
        stats.var.copy_(((variances + (means - mean).square_()) * shares).sum(0))

    def add_up(self, p: Tensor, q: Tensor) -> None:
        """Turn what this process's norms let through to their input into what everyone's do, in place."""
        both = torch.stack([p, q]) * self._share.to(p.dtype)
        dist.all_reduce(both, group=self._group)
        p.copy_(both[0])
        q.copy_(both[1])

    def _gathered(self, values: Tensor) -> Tensor:
        """[world, *shape], in the order of the ranks."""
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, values, group=self._group)
        return torch.stack(parts)


def join(name: str, pixels: int, device: torch.device) -> Group | None:
    """The group of that name, for an op on ``pixels`` of this process; ``None`` for no name: the process is alone."""
    return Group(name, pixels, device) if name else None
