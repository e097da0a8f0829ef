"""The numbers of ``docs/scaling.md``, each by its key: all from :mod:`fastdense.plan`, none measured."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fastdense import plan, roofline
from fastdense.plan import Scaling
from fastdense.roofline import Exchange

_GPUS, _CLUSTER = 8, 64
_KINDS, _BATCHES = ("naive", "fast"), (32, 256)
_EPOCHS = 90
_WAIT_S = 15e-6
"""That one reduction of a few kB takes among the GPUs of a node: an assumption."""


@functools.cache
def _node(kind: str, batch: int) -> Scaling:
    return plan.scaling(batch=batch, gpus=_GPUS, naive=kind == "naive")


@functools.cache
def _cluster(batch: int) -> Scaling:
    return plan.scaling(batch=batch, gpus=_CLUSTER, link_bytes_per_s=plan.NETWORK_BYTES_PER_S)


def _fast() -> Scaling:
    return _node("fast", 32)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.{2 if seconds < 10e-3 else 1}f} ms"


def _ceilings() -> str:
    found = roofline.ceilings_of("h100", torch.bfloat16)
    return f"{found.bytes_per_s / 1e12:g} TB/s and {found.flops / 1e12:g} TFLOP/s"


def _memory(kind: str) -> str:
    naive = kind == "naive"
    found = plan.plan("densenet121", batch=_BATCHES[-1], size=224, dtype="bf16", naive=naive, device="cuda")
    return f"{found.total_bytes / 1e9:.1f} GB"


def _exchanged(found: Exchange) -> str:
    return f"{(found.forward_bytes + found.backward_bytes) / 1e3:.0f} kB"


def _of_node(show: Callable[[Scaling], str], kind: str, batch: int) -> str:
    return show(_node(kind, batch))


_BY_BATCH: dict[str, Callable[[Scaling], str]] = {
    "step": lambda s: _ms(s.step_seconds),
    "backward": lambda s: _ms(s.backward_seconds),
    "share": lambda s: f"{100 * s.reduction_seconds / s.step_seconds:.1f}%",
    "images": lambda s: f"{s.images_per_s / _GPUS:,.0f}",
}

_BY_KIND: dict[str, Callable[[Scaling], str]] = {
    "files": lambda s: f"{s.file_bytes_per_s / _GPUS / 1e9:.1f} GB/s",
    "files-of-node": lambda s: f"{s.file_bytes_per_s / 1e9:.1f} GB/s",
    "cores": lambda s: f"{s.decoding_cores / _GPUS:.0f}",
    "cores-of-node": lambda s: f"{s.decoding_cores:.0f}",
    "imagenet": lambda s: f"{s.imagenet_seconds(_EPOCHS) / 60:.0f} minutes",
}

NUMBERS: dict[str, Callable[[], str]] = {
    "scaling:ceilings": _ceilings,
    "scaling:nvlink": lambda: f"{plan.NVLINK_BYTES_PER_S / 1e9:.0f} GB/s",
    "scaling:network": lambda: f"{plan.NETWORK_BYTES_PER_S / 1e9:.0f} GB/s",
    "scaling:gradients": lambda: f"{_fast().gradient_bytes / 1e6:.1f} MB",
    "scaling:reduction": lambda: _ms(_fast().reduction_seconds),
    "scaling:reduction-of-cluster": lambda: _ms(_cluster(32).reduction_seconds),
    "scaling:imagenet-of-cluster": lambda: f"{_cluster(256).imagenet_seconds(_EPOCHS) / 60:.1f} minutes",
    "scaling:reductions-by-norm": lambda: f"{_fast().statistics.reductions}",
    "scaling:reductions-by-slice": lambda: f"{_fast().shared_statistics.reductions}",
    "scaling:channels-by-norm": lambda: f"{_fast().statistics.channels:,}",
    "scaling:channels-by-slice": lambda: f"{_fast().shared_statistics.channels:,}",
    "scaling:bytes-by-norm": lambda: _exchanged(_fast().statistics),
    "scaling:bytes-by-slice": lambda: _exchanged(_fast().shared_statistics),
    "scaling:wait": lambda: f"{_WAIT_S * 1e6:.0f} us",
    "scaling:waits": lambda: _ms(2 * _fast().statistics.reductions * _WAIT_S),
    "scaling:decoded": lambda: f"{plan.DECODED_PER_S}",
    "scaling:file": lambda: f"{plan.IMAGENET_BYTES / plan.IMAGENET_IMAGES / 1e3:.0f} kB",
    **{f"scaling:memory:{kind}": functools.partial(_memory, kind) for kind in _KINDS},
    **{
        f"scaling:{name}:{kind}:{batch}": functools.partial(_of_node, show, kind, batch)
        for name, show in _BY_BATCH.items()
        for kind in _KINDS
        for batch in _BATCHES
    },
    **{
        f"scaling:{name}:{kind}": functools.partial(_of_node, show, kind, _BATCHES[-1])
        for name, show in _BY_KIND.items()
        for kind in _KINDS
    },
}
"""Key -> what gives its value. Of a kind without a batch, that is the larger one."""
