"""Read once: what a block or transition is made of is not read anew while none of it was exchanged.

Reading a block means to look at every attribute of hundreds of modules that could make its forward another one. That
they are still the very objects that were read is told in a fraction of the time. What their tensors contain, and where
their memory is, may change without that: it is the backend that looks at it.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import backends, checks, ops
from .kernels.cpu import library as cpu_library
from .served import HOOKS, parameter

if TYPE_CHECKING:
    from .backends import Prepared
    from .modules import Fused


class Snapshot:
    """Children of a module and what is below: classes, attributes, parameters, buffers, and where there are hooks.

    It does not see what happens inside of an attribute, such as a list.

    Args:
        module: whose own attributes do not matter, but which children it has.
        children: those that do.

    Attributes:
        may_be_kept: nothing lives longer for it than its modules do, and no group of processes belongs to it: there
            are no parameters for one call, as those of ``functional_call``, and no SyncBatchNorms in training.
    """

    def __init__(self, module: nn.Module, children: Iterable[nn.Module]):
        self._children = module._modules
        self._modules = [below for child in children for below in child.modules()]
        self._classes = [type(below) for below in self._modules]
        states = [below.__dict__ for below in self._modules]
        contents = [state[name] for state in states for name in ("_parameters", "_buffers", "_modules")]
        hooks = [state[name] for state in states for name in HOOKS]
        self._hooked = [each for each in hooks if each]
        dicts: list[dict[str, Any]] = [self._children, *states, *contents, *(each for each in hooks if not each)]
        self._values = list(itertools.chain.from_iterable(map(dict.values, dicts)))
        self._are_same = _watch(dicts, self._values)
        tensors = [value for value in self._values if isinstance(value, Tensor)]
        self.may_be_kept = (
            not any(isinstance(below, nn.SyncBatchNorm) and below.training for below in self._modules)
            and ops.are_plain(tensors)
            and all(tensor.is_leaf for tensor in tensors)
        )

    def holds(self, module: nn.Module) -> bool:
        """Whether every object is still in its place; of ``module`` itself, not of a copy."""
        return (
            self._children is module._modules
            and list(map(type, self._modules)) == self._classes
            and all(self._hooked)
            and self._are_same()
        )


def _watch(dicts: list[dict[str, Any]], values: list[Any]) -> Callable[[], bool]:
    """Whether the dicts still have, in order, the very ``values`` that they have now, which the caller keeps alive."""
    library = cpu_library.load()
    if not isinstance(library, str) and _HAS_LOCK:
        return library.watch(dicts)  # the same, several times as fast: it looks at no value
    sizes = list(map(len, dicts))

    def are_same() -> bool:
        now = itertools.chain.from_iterable(map(dict.values, dicts))
        return list(map(len, dicts)) == sizes and all(map(operator.is_, now, values))

    return are_same


_HAS_LOCK = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether a function that holds Python's lock is alone with its dicts."""


class Kept:
    """What is known of a module, and kept as its ``_ready``. Copied or pickled with it, it is ``None``."""

    def __init__(self, module: nn.Module, children: Iterable[nn.Module]):
        self._snapshot = Snapshot(module, children)

    @classmethod
    def of(cls: type[K], module: nn.Module) -> K:
        """The module's as it is now: the one it has, where that still stands."""
        kept = module.__dict__.get("_ready")
        if kept is None or not kept.holds(module):
            cls.forget(module)
            kept = cls(module)  # type: ignore[call-arg]
            if kept.may_be_kept():
                module.__dict__["_ready"] = kept
        return kept

    @staticmethod
    def forget(module: nn.Module) -> None:
        module.__dict__.pop("_ready", None)

    def holds(self, module: nn.Module) -> bool:
        return self._snapshot.holds(module)

    def may_be_kept(self) -> bool:
        return self._snapshot.may_be_kept

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


K = TypeVar("K", bound=Kept)


class Ready(Kept):
    """What a block or transition was read as.

    Attributes:
        reading: what ``module.read()`` said. Where that is an obstacle, it is read anew every time.
        gathered: what the module made of it, by what that depends on besides.
    """

    def __init__(self, module: Fused):
        super().__init__(module, module.children())  # before the reading, which is void if anything changes meanwhile
        self.reading = module.read()
        self.gathered: dict[tuple[object, ...], Any] = {}
        self._inference: Inference | None = None

    def may_be_kept(self) -> bool:
        return super().may_be_kept() and not isinstance(self.reading, str)

    def inference(self, module: Fused) -> Inference:
        """Of the module that this is of."""
        if self._inference is None:
            self._inference = Inference(module)
        return self._inference


class Inference:
    """What a module in evaluation computes with.

    Attributes:
        arguments: the op's, after x; ``None`` where the output depends on more, or on tensors not of PyTorch itself or
            on several devices.
        channels: of x.
        first: the first norm and convolution, for what stock PyTorch would say of an input.
    """

    def __init__(self, module: Fused):
        self._op, self.arguments = module.inference_op, module.inference_arguments()
        self._tensors = [leaf for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, Tensor)]
        if not ops.are_plain(self._tensors) or len({tensor.device for tensor in self._tensors}) > 1:
            self.arguments = None
        if self.arguments is not None:
            self.first = module.first_parts()
            self.channels = parameter(self.first[1], "weight").shape[1]
        self._prepared: dict[tuple[object, ...], Prepared] = {}

    def needs_grad(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in self._tensors))

    def run(self, x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
        """What the op makes of x."""
        prepared = self.prepared(x, dtype, backend)
        if prepared is None:
            assert self.arguments is not None
            return getattr(ops, self._op)(x, *self.arguments, dtype=dtype, backend=backend)
        return prepared(x)

    def prepared(self, x: Tensor, dtype: torch.dtype, backend: str) -> Prepared | None:
        """What makes of tensors like x what the op does, in a backend that has it more ready than its op is."""
        assert self.arguments is not None
        prepare = backends.preparation(backend, self._op)
        if prepare is None or ops.are_observed():
            return None
        key = x.dtype, dtype, backend
        prepared = self._prepared.get(key)
        if prepared is None or not prepared.is_current():
            checks.check(self._op, x, *self.arguments)
            prepared = self._prepared[key] = prepare(*self.arguments, x_dtype=x.dtype, dtype=dtype)
        return prepared
