"""Convert the DenseNets people have, and back.

Conversion changes how a module computes, not what it holds: recognised modules change their class in place, so
parameters, buffers, hooks, optimizers' references and state_dict keys stay as they are. A module is converted
only if its class is known, its children are the stock modules that the ops reproduce, and a copy of it in
float64 gives the same numbers before and after, in eval and in train mode. All else is left alone, and
:func:`explain` says why.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import reference
from .models import FastDenseNet
from .modules import FallbackWarning, FastDenseBlock, FastTransition
from .parity import BUDGETS, relative_error
from .text import aligned

_TORCHVISION = "torchvision.models.densenet"

_FAST_CLASS: dict[str, type[nn.Module]] = {
    f"{_TORCHVISION}._DenseBlock": FastDenseBlock,
    f"{_TORCHVISION}._Transition": FastTransition,
    f"{_TORCHVISION}.DenseNet": FastDenseNet,
    f"{reference.__name__}.DenseBlock": FastDenseBlock,
    f"{reference.__name__}.Transition": FastTransition,
    f"{reference.__name__}.DenseNet": FastDenseNet,
}
"""What each known class becomes. Classes are known by their exact name: a subclass may compute anything."""

_REFERENCE_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    FastDenseBlock: reference.DenseBlock,
    FastTransition: reference.Transition,
    FastDenseNet: reference.DenseNet,
}


@dataclass(frozen=True)
class Finding:
    """What became, or would become, of one module.

    Attributes:
        path: its name in the model, ``""`` for the model itself.
        kind: its class.
        verdict: ``"fast"``, ``"convertible"`` or ``"left alone"``.
        reason: why it is left alone or, though fast, runs the reference.
    """

    path: str
    kind: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """The findings of :func:`explain`; ``str()`` is a table."""

    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        if not self.findings:
            return "nothing in this model looks like a dense block, a transition or a DenseNet"
        rows = [("module", "class", "verdict", "reason")]
        rows += [(f.path or "(model)", f.kind, f.verdict, f.reason) for f in self.findings]
        return aligned(rows)


def convert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Have every dense block, transition and DenseNet in ``model`` that can be recognised run fused.

    Recognised are torchvision's and :mod:`fastdense.reference`'s, at any depth. Parameters, buffers, mode and
    state_dict stay the same, and :func:`to_reference` goes back.

    Args:
        model: any module; may itself be a DenseNet.
        inplace: convert ``model`` itself instead of a deep copy.

    Returns:
        The converted model, with everything that was not recognised as it was.
    """
    if not inplace:
        model = copy.deepcopy(model)
    for module, finding in _examine(model):
        if finding.verdict == "convertible":
            _make_fast(module)
    return model


def explain(model: nn.Module) -> Explanation:
    """What :func:`convert` would do to ``model``, or did, module by module, and why not where it does not."""
    return Explanation(tuple(finding for _, finding in _examine(model)))


def to_reference(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Back to stock ``nn`` modules (:mod:`fastdense.reference`), same parameters and state_dict.

    For export, quantisation, or whatever else must see ordinary modules.

    Args:
        model: a converted or natively built model.
        inplace: convert ``model`` itself instead of a deep copy.
    """
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) in _REFERENCE_CLASS:
            module.__class__ = _REFERENCE_CLASS[type(module)]
            module.__dict__.pop("_warned_of_fallback", None)
    return model


def _examine(model: nn.Module) -> Iterator[tuple[nn.Module, Finding]]:
    """Every module of interest; each may be converted before the next is asked for."""
    for path, module in model.named_modules():
        kind = _kind(module)
        if type(module) in _REFERENCE_CLASS:
            yield module, Finding(path, kind, "fast", _obstacle(module) or "")
        elif kind in _FAST_CLASS:
            reason = _refusal(module)
            yield module, Finding(path, kind, "left alone" if reason else "convertible", reason or "")
        elif _looks_dense(module):
            yield module, Finding(path, kind, "left alone", "this class is not known and may compute anything")


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _looks_dense(module: nn.Module) -> bool:
    names = [base.__name__.lower() for base in type(module).__mro__]
    return any("denseblock" in name or "densenet" in name for name in names)


def _refusal(module: nn.Module) -> str | None:
    """Why ``module``, of a known class, must not be converted, or ``None``."""
    try:
        original = copy.deepcopy(module)
        if not any(p.is_meta for p in module.parameters()):
            original = original.cpu().double()
        for part in original.modules():
            if type(part) is nn.SyncBatchNorm:
                part.__class__ = nn.BatchNorm2d  # type: ignore[assignment]  # no other process runs the probe
    except Exception as error:  # whatever a user's tensors and hooks may raise
        return f"it cannot be copied to be checked: {error}"
    fast = copy.deepcopy(original)
    for part in fast.modules():
        if _kind(part) in _FAST_CLASS:
            _make_fast(part)
    reason = "its forward was replaced" if "forward" in module.__dict__ else _obstacle(fast)
    if reason or any(p.is_meta for p in module.parameters()):
        return reason
    return _difference(original, fast)


def _make_fast(module: nn.Module) -> nn.Module:
    fast_class = _FAST_CLASS[_kind(module)]
    if fast_class is FastDenseBlock:
        for layer in module.children():
            if type(layer).__module__ == _TORCHVISION and type(layer).__name__ == "_DenseLayer":
                layer.__class__ = reference.DenseLayer
                layer.__dict__.update(has_bottleneck=True, drop_every_conv=False)
    module.__class__ = fast_class
    return module


def _obstacle(module: nn.Module) -> str | None:
    if isinstance(module, FastDenseNet):
        names = list(module._modules)
        return None if names == ["features", "classifier"] else f"its children are {', '.join(names)}"
    return module._obstacle() if isinstance(module, FastDenseBlock | FastTransition) else None


def _difference(original: nn.Module, fast: nn.Module) -> str | None:
    """How two copies differ on a probe, in eval mode and then in train mode, or ``None``. Changes their state."""
    try:
        probe = _probe(original)
        for train in (False, True):
            seen = []
            for module in (original, fast):
                module.train(train)
                with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore", FallbackWarning)
                    torch.manual_seed(0)
                    seen.append([type(module).forward(module, probe), *module.buffers()])
            error = max(map(relative_error, *seen))
            if error > _SAME:
                return f"on a probe in {'train' if train else 'eval'} mode it differs by {error:.2g}"
    except Exception as error:  # whatever a user's modules may raise
        return f"it cannot be run on a probe: {error}"
    return None


_SAME = BUDGETS[torch.float64].floor
"""Difference of two float64 evaluations in another order; a wrong algorithm differs by about one."""


def _probe(module: nn.Module) -> Tensor:
    """A small input for ``module``: its first convolution or norm knows the channels."""
    channels_of: dict[type[nn.Module], Callable[..., int]] = {
        nn.Conv2d: lambda m: m.in_channels,
        nn.BatchNorm2d: lambda m: m.num_features,
    }
    first = next(m for m in module.modules() if type(m) in channels_of)
    size = 64 if isinstance(module, reference.DenseNet) or type(module).__name__ == "DenseNet" else 6
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels_of[type(first)](first), size, size + 2, generator=generator, dtype=torch.float64)
