"""Read once: what a block or transition is made of is not read anew while none of it was exchanged.

Reading a block means to look at every attribute of hundreds of modules that could make its forward another one. That
they are still the very objects that were read is told in a fraction of the time. What their tensors contain, and where
their memory is, may change without that: it is the backend that looks at it.
"""

from __future__ import annotations

import itertools
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import backends, checks, ops
from .served import HOOKS, parameter

if TYPE_CHECKING:
    from .modules import Fused


class Snapshot:
    """The modules below one, their classes, attributes, parameters, buffers and children, and that they have no hooks.

    It does not see what happens inside of an attribute, such as a list.

    Attributes:
        may_be_kept: nothing lives longer for it than its modules do, and no group of processes belongs to it: there
            are no parameters for one call, as those of ``functional_call``, and no SyncBatchNorms in training.
    """

    def __init__(self, module: nn.Module):
        self._children = module._modules
        self._modules = [below for below in module.modules() if below is not module]
        self._classes = [type(below) for below in self._modules]
        states = [below.__dict__ for below in self._modules]
        contents = [state[name] for state in states for name in ("_parameters", "_buffers", "_modules")]
        self._dicts: list[dict[str, Any]] = [self._children, *states, *contents]
        self._values = list(itertools.chain.from_iterable(map(dict.values, self._dicts)))
        self._hooks = [state[name] for state in states for name in HOOKS]
        tensors = [value for value in self._values if isinstance(value, Tensor)]
        self.may_be_kept = not any(
            isinstance(below, nn.SyncBatchNorm) and below.training for below in self._modules
        ) and all(type(tensor) in (Tensor, nn.Parameter) and tensor.is_leaf for tensor in tensors)

    def holds(self, module: nn.Module) -> bool:
        """Whether every object is still in its place; of ``module`` itself, not of a copy."""
        return (
            self._children is module._modules
            and list(map(type, self._modules)) == self._classes
            and not any(self._hooks)
            and sum(map(len, self._dicts)) == len(self._values)
            and all(map(operator.is_, itertools.chain.from_iterable(map(dict.values, self._dicts)), self._values))
        )


class Ready:
    """What a module was read as, and keeps as its ``_ready``. Copied or pickled with it, it is ``None``.

    Attributes:
        reading: what ``module.read()`` said. Where that is an obstacle, it is read anew every time.
        gathered: what the module made of it, by what that depends on besides.
    """

    def __init__(self, module: Fused):
        self._snapshot = Snapshot(module)  # before the reading, which is void if anything changes meanwhile
        self.reading = module.read()
        self.gathered: dict[tuple[object, ...], Any] = {}
        self._inference: Inference | None = None

    @staticmethod
    def of(module: Fused) -> Ready:
        """The module's as it is now: the one it has, where that still stands."""
        ready = module.__dict__.get("_ready")
        if ready is None or not ready._snapshot.holds(module):
            module.__dict__.pop("_ready", None)
            ready = Ready(module)
            if ready._snapshot.may_be_kept and not isinstance(ready.reading, str):
                module.__dict__["_ready"] = ready
        return ready

    def inference(self, module: Fused) -> Inference:
        """Of the module that this is of."""
        if self._inference is None:
            self._inference = Inference(module)
        return self._inference

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


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
        plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in self._tensors)
        if not plain or len({tensor.device for tensor in self._tensors}) > 1:
            self.arguments = None
        if self.arguments is not None:
            self.first = module.first_parts()
            self.channels = parameter(self.first[1], "weight").shape[1]
        self._prepared: dict[tuple[object, ...], Any] = {}

    def needs_grad(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in self._tensors))

    def run(self, x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
        """What the op makes of x."""
        assert self.arguments is not None
        prepare = backends.preparation(backend, self._op)
        if prepare is None or ops.are_observed():
            return getattr(ops, self._op)(x, *self.arguments, dtype=dtype, backend=backend)
        key = x.dtype, dtype, backend
        prepared = self._prepared.get(key)
        if prepared is None or not prepared.is_current():
            checks.check(self._op, x, *self.arguments)
            prepared = self._prepared[key] = prepare(*self.arguments, x_dtype=x.dtype, dtype=dtype)
        return prepared(x)
