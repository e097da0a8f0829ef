"""How many bytes a forward leaves behind for its backward."""

from __future__ import annotations

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
