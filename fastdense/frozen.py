"""A stage of a network for inference alone, whose tensors nobody else has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import backends, ops
from .backends import Prepared
from .fallback import autocast_dtype


class Frozen(nn.Module):
    """A dense block, transition, stem or stem's tail at its running statistics, as its weights were when it was frozen.

    Its tensors are buffers that no state_dict has: they follow ``to``, are copied and pickled, and nothing else.

    Args:
        op: of :mod:`fastdense.ops`, that computes it.
        arguments: the op's, after x; their tensors are copied.
        weight: of its first convolution, of its norm where it has none.
        dims: of x.
        dtype: what it convolves in, by default that of ``weight``; autocast's goes before.
        new_channels: how many each layer of a block adds, by the layers' names.

    Shapes: as of the op.
    """

    def __init__(
        self,
        op: str,
        arguments: tuple[Any, ...],
        weight: Tensor,
        dims: int,
        dtype: torch.dtype | None = None,
        new_channels: dict[str, int] | None = None,
    ):
        super().__init__()
        self.op, self.new_channels = op, new_channels or {}
        self._convolves, self._dims, self._dtype = weight.dim() > 1, dims, dtype
        self._channels = weight.shape[1 if self._convolves else 0]
        leaves, self._structure = pytree.tree_flatten(arguments)
        self._plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self.register_buffer(f"tensor{i}", leaf.detach().clone(), persistent=False)
        self._weight = f"tensor{next(i for i, leaf in enumerate(leaves) if leaf is weight)}"
        self._found: dict[tuple[object, ...], tuple[Prepared | None, dict[str, Any]]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """What the op makes of x.

        Raises:
            ValueError: x has other dimensions or channels.
            TypeError: it is of another dtype, or on another device, than the tensors.
            RuntimeError: a gradient would be needed, or the reference is asked for.
        """
        prepared, options = self._found_for(x)
        if prepared is None or ops.are_observed():
            return getattr(ops, self.op)(x, *self._arguments(), **options)
        return prepared(x)

    def prepared(self, x: Tensor) -> Prepared | None:
        """What makes the output of x and of tensors like it, in a backend that has it more ready than its op is."""
        return self._found_for(x)[0]

    def _found_for(self, x: Tensor) -> tuple[Prepared | None, dict[str, Any]]:
        """The same, and the op's options, for tensors like x."""
        if x.dim() != self._dims or x.shape[1] != self._channels:
            wanted = ", ".join(["N", str(self._channels), *"DHW"[5 - self._dims :]])
            raise ValueError(f"this frozen stage takes [{wanted}], got {list(x.shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a frozen stage has no backward: train the model that it was made from")
        cast_to, backend = autocast_dtype(x) or self._dtype, backends.select(x.device, x.dtype, x.dim() - 2)
        key = x.dtype, x.device, cast_to, backend
        if torch.compiler.is_compiling():
            return None, self._options(x, cast_to, backend)
        if key not in self._found:
            options = self._options(x, cast_to, backend)
            prepare = backends.preparation(backend, self.op, changeable=False)
            dtypes = dict(x_dtype=x.dtype) | ({"dtype": options["dtype"]} if self._convolves else {})
            self._found[key] = prepare and prepare(*self._arguments(), **dtypes), options
        return self._found[key]

    def extra_repr(self) -> str:
        return f"{self.op}, {self._channels}"

    def _options(self, x: Tensor, cast_to: torch.dtype | None, backend: str) -> dict[str, Any]:
        """The op's, for tensors like x."""
        weight = cast(Tensor, self._buffers[self._weight])
        devices = " and ".join(sorted({str(cast(Tensor, tensor).device) for tensor in self._buffers.values()}))
        if devices != str(x.device) or (self._convolves and not cast_to and weight.dtype != x.dtype):
            raise TypeError(f"this frozen stage takes {weight.dtype} on {devices}, got {x.dtype} on {x.device}")
        if backend == backends.REFERENCE:
            raise RuntimeError("a frozen stage has no reference: run the model that it was made from")
        return dict(backend=backend) | (dict(dtype=cast_to or weight.dtype) if self._convolves else {})

    def _arguments(self) -> tuple[Any, ...]:
        leaves = [self._buffers.get(f"tensor{i}", leaf) for i, leaf in enumerate(self._plain)]
        return pytree.tree_unflatten(leaves, self._structure)

    def train(self, mode: bool = True) -> Frozen:
        if mode:
            raise RuntimeError("a frozen stage cannot be trained: train the model that it was made from")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        self._found = {}  # they point to the tensors of before
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": {}}
