"""What each of two processes does in test_distributed.py: torchrun runs this file with a case and a folder for results.

Every case trains one step on unequal shares of a batch and saves what this rank saw of it.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sources import SOURCES
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional

import fastdense
from fastdense.modules import FusedBlock, FusedTransition
from fastdense.training.ranks import ranks

IMAGES, FIRST_SHARE = 5, 3


def network(name: str) -> fastdense.FastDenseNet:
    """The networks of the cases, of the same weights in every process."""
    torch.manual_seed(0)
    if name == "densenet121":
        return fastdense.densenet121(num_classes=5)
    arguments: dict[str, Any] = dict(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=5)
    if name == "plain":
        arguments |= dict(bn_size=None, small_inputs=True)
    if name == "memory_efficient":
        arguments |= dict(memory_efficient=True)
    return fastdense.FastDenseNet(**arguments)


def batch(size: int) -> tuple[Tensor, Tensor]:
    """All images [5, 3, size, size] and the gradients of their outputs [5, 5]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(IMAGES, 3, size, size, generator=generator) * torch.linspace(0.5, 2, IMAGES).view(-1, 1, 1, 1)
    return x, torch.randn(IMAGES, 5, generator=generator)


def share(values: Tensor, rank: int) -> Tensor:
    """One rank's part: three images, two images."""
    return values[:FIRST_SHARE] if rank == 0 else values[FIRST_SHARE:]


class Traffic:
    """Bytes that this process hands to collectives."""

    def __init__(self) -> None:
        self.bytes = 0
        for module, name in ((dist, "all_gather"), (dist, "all_reduce"), (functional, "all_reduce")):
            setattr(module, name, self._counting(getattr(module, name), 1 if "gather" in name else 0))

    def _counting(self, function: Any, position: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.bytes += args[position].nbytes
            return function(*args, **kwargs)

        return call


TRAFFIC = Traffic()


def sync(folder: str, name: str, backend: str, size: int, dtype: str, rank: int) -> dict[str, Any]:
    """SyncBatchNorm over both processes, of a network whose state lies in the folder."""
    model = network(name)
    model.load_state_dict(torch.load(Path(folder, f"{name}-{size}.pt")))
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    TRAFFIC.bytes = 0
    x, grad = (share(values, rank) for values in batch(size))
    x = x.clone().requires_grad_()
    with fastdense.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        out = model(x)
        out.backward(grad.to(out.dtype))
    grads = {key: parameter.grad for key, parameter in model.named_parameters()}
    sent = TRAFFIC.bytes
    for each in grads.values():
        dist.all_reduce(each)
    buffers = dict(model.named_buffers())
    return dict(out=out.detach(), x=x.grad, grads=grads, buffers=buffers, bytes=sent)


def converted(name: str) -> nn.Module:
    """A network of another library, converted; of 32x32 images and five classes."""
    return fastdense.convert(SOURCES[name].build().double())


def ddp(rank: int, name: str) -> dict[str, Any]:
    """A converted network under DDP with synchronised norms, each library's in its way."""
    model = converted(name)
    shared = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    synchronised = import_module("timm.layers") if name == "timm" else nn.SyncBatchNorm
    model.features.norm5.eval()  # PyTorch's own synchronised norms run on GPUs only
    for child, stage in list(model.features.named_children()):
        if child != "norm5":
            model.features.add_module(child, synchronised.convert_sync_batchnorm(stage))
    x, grad = (share(values.double(), rank) for values in batch(32))
    out = shared(x)
    out.backward(grad)
    grads = {key: parameter.grad * 2 for key, parameter in model.named_parameters()}
    return dict(out=out.detach(), grads=grads, buffers=dict(model.named_buffers()))


def empty(rank: int) -> dict[str, Any]:
    """A share without images is refused on its rank, before anything is sent."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network("small"))
    try:
        model.features.denseblock1(torch.zeros(0, 16, 8, 8)) if rank else None
    except ValueError as error:
        return dict(error=str(error))
    return {}


def fsdp(rank: int, name: str) -> dict[str, Any]:
    """A step of sharded parameters, beside the same step of whole ones: of our network, or of a converted one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, whole = (network(name) if name == "small" else converted(name) for _ in range(2))
    mesh = init_device_mesh("cpu", (2,))
    for stage in list(model.modules()):
        if isinstance(stage, FusedBlock | FusedTransition):
            with suppress(ValueError):  # torch 2.11 takes no ModuleDict
                fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)
    dtype = next(model.parameters()).dtype
    x, grad = (share(values, rank).to(dtype) for values in batch(32))
    model(x).backward(grad)
    whole(x).backward(grad)
    sharded = {key: parameter.grad.full_tensor() for key, parameter in model.named_parameters()}
    for parameter in whole.parameters():
        dist.all_reduce(parameter.grad)
    mean = {key: parameter.grad / 2 for key, parameter in whole.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    return dict(sharded=sharded, whole=mean, finite=bool(model(x).isfinite().all()))


def main() -> None:
    case, folder, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    with ranks("cpu") as group:
        if case == "sync":
            for each in arguments:
                name, backend, size, dtype = each.split(",")
                found = sync(folder, name, backend, int(size), dtype, group.rank)
                torch.save(found, Path(folder, f"{each}-{group.rank}.pt"))
        else:
            for name in arguments or [""]:
                found = {"empty": empty, "fsdp": fsdp, "ddp": ddp}[case](group.rank, *filter(None, [name]))
                torch.save(found, Path(folder, f"{case}{name}-{group.rank}.pt"))


if __name__ == "__main__":
    main()
