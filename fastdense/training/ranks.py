"""The processes of a run, as torchrun starts them, and the model that they share: DDP or FSDP2.

A process on its own is a group of one: nothing else in the run asks how many there are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models import FastDenseNet
from ..modules import FastDenseBlock, FastTransition

# Seconds in which Gloo's threads let go of the tensors of what they did last, for which they take Python's lock: one
# that asks for it when the interpreter has begun to end aborts the process (pytorch/pytorch#190489). Leaving the group
# does not wait for them where torch itself holds on to it, as DTensor's caches and torch.distributed.nn do.
_GLOO_REST = 0.2


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank: its number, of ``world``.
        device: where it computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    def share_model(self, model: FastDenseNet, fsdp: bool, sync_bn: bool) -> nn.Module:
        """The module to call in training; its parameters are ``model``'s, whose norms become SyncBatchNorms."""
        if self.world == 1:
            return model
        if fsdp:
            from torch.distributed.fsdp import fully_shard

            if sync_bn:  # before FSDP takes hold of the norms
                nn.SyncBatchNorm.convert_sync_batchnorm(model)
            mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.world,))
            for stage in model.features.children():
                if isinstance(stage, FastDenseBlock | FastTransition):
                    with suppress(ValueError):  # torch 2.11 takes no ModuleDict: it is sharded with the rest
                        fully_shard(stage, mesh=mesh)
            return fully_shard(model, mesh=mesh)  # type: ignore[return-value]
        devices = [self.device] if self.device.type == "cuda" else None
        shared = nn.parallel.DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=not sync_bn
        )
        if sync_bn:  # DDP takes hold of tensors, and refuses stock SyncBatchNorms on CPUs, where they do not run
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return shared

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def agree_on_buffers(self, model: nn.Module) -> None:
        """Have the first rank's running statistics on all: without SyncBatchNorm, each has those of its images."""
        if self.world > 1:
            for tensor in model.buffers():
                dist.broadcast(tensor, 0)

    def agree(self, value: str) -> str:
        """The first rank's value on all."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a forward and backward: gradients are exchanged in the ``last`` part of a step alone."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        cast(Any, model).set_requires_gradient_sync(last)
    return nullcontext()


@contextmanager
def ranks(device: str | None) -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did, and leave them in the end.

    Raises:
        RuntimeError: the device is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {device}: this torch sees no GPU")
    if "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1, torch.device(device))
        return
    chosen = torch.device(device)
    if kind == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        if kind == "cpu":
            time.sleep(_GLOO_REST)
        dist.destroy_process_group()
