"""How many bytes a forward leaves behind for its backward, and what becomes of a CPU's memory when it is freed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_activation_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps alive after a forward, parameters and buffers of ``model`` not counted.

    Every storage counts once, whole, however many tensors look into it.

    Args:
        model: whose parameters and buffers do not count.
        run: does the forward and returns what keeps its graph alive.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = run()  # a storage freed before the end would let another take its address
    del alive
    return sum(saved.values())


def keep_freed_memory() -> bool:
    """Have this process's ``malloc`` keep memory that is freed, and not return it to the system.

    A training step on a CPU frees its activations in the backward and allocates them again in the next forward. What
    was returned meanwhile comes back as fresh pages, and to clear those takes a few percent of the step. The process
    stays as large as it once was. Call it before the training; it cannot be taken back.

    Returns:
        Whether there was a glibc to tell; with another ``malloc`` nothing changes.

    Source: mallopt(3), where -1 disables trimming.
    """
    trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of the process itself
        return False
    return bool(mallopt(mmap_threshold, largest) and mallopt(trim_threshold, -1))
