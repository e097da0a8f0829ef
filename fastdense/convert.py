"""Convert the DenseNets people have, and back.

Conversion changes how a module computes, not what it holds: recognised modules change their class in place, so
parameters, buffers, hooks, optimizers' references and state_dict keys stay as they are. A module is converted
only if its structure is that of a dense block, a transition or a DenseNet (:mod:`.converters`), its children are the
stock modules that the ops reproduce, and a copy of it in float64 gives the same numbers before and after, in eval and
in train mode. All else is left alone, and :func:`explain` says why.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .converters import probe, stock
from .converters.fused import Converted, Layout, know_timm, make_fused
from .converters.stock import FAST_CLASS, kind_of
from .converters.structure import Unread, block_layouts, transition_layout
from .frozen import Frozen
from .models import FastDenseNet
from .modules import FusedBlock, FusedTransition
from .stages import FastSequential
from .text import aligned


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

    Recognised are torchvision's, timm's, MONAI's, torchxrayvision's, segmentation_models_pytorch's and others of their
    structure, at any depth. Parameters, buffers, mode and state_dict stay the same, and :func:`to_reference` goes back.

    Args:
        model: any module; may itself be a DenseNet.
        inplace: convert ``model`` itself instead of a deep copy.

    Returns:
        The converted model, with everything that was not recognised as it was.
    """
    if not inplace:
        model = copy.deepcopy(model)
    for module, _, conversion in _examine(model):
        if conversion is not None:
            conversion.make_fast(module)
    return model


def explain(model: nn.Module) -> Explanation:
    """What :func:`convert` would do to ``model``, or did, module by module, and why not where it does not."""
    return Explanation(tuple(finding for _, finding, _ in _examine(model))[::-1])


def to_reference(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Back to the classes before :func:`convert`, or to :mod:`fastdense.reference`'s if the model was built fast.

    For export, quantisation, or whatever else must see ordinary modules. Parameters and state_dict are the same.

    Args:
        model: a converted or natively built model.
        inplace: convert ``model`` itself instead of a deep copy.

    Raises:
        ValueError: parts of it are frozen, and have no modules to go back to.
    """
    frozen = [name for name, module in model.named_modules() if isinstance(module, Frozen)]
    if frozen:
        raise ValueError(f"{', '.join(frozen)} are frozen: go back from the model that they were made from")
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        for ours in ("_ready", "_warned_of_fallback"):
            vars(module).pop(ours, None)
        if isinstance(module, Converted):
            module.__class__ = module._original  # type: ignore[assignment]
        else:
            stock.make_reference(module)
    return model


class _Conversion(NamedTuple):
    """How a module is made fast, in place."""

    make_fast: Callable[[nn.Module], None]
    is_stage: bool  # a block or a transition


_DECLINED = {
    "timm.models.rdnet": "RDNet's layers are 7x7 depthwise convolutions, LayerNorm and GELU",
}
"""Python modules whose networks are DenseNets by name, and why not ours."""


def _examine(model: nn.Module) -> Iterator[tuple[nn.Module, Finding, _Conversion | None]]:
    """Every module of interest, after what it contains; it may be converted before the next is asked for."""
    know_timm()
    stages: set[nn.Module] = set()  # blocks and transitions that are fast or can be made so
    for path, module in reversed(list(model.named_modules())):
        kind = kind_of(module)
        if isinstance(module, FusedBlock | FusedTransition | FastDenseNet | FastSequential | Frozen):
            if isinstance(module, FusedBlock | FusedTransition):
                stages.add(module)
            yield module, Finding(path, kind, "fast", _obstacle(module) or ""), None
            continue
        try:
            conversion = _conversion(module, stages)
        except Unread as reason:
            yield module, Finding(path, kind, "left alone", str(reason)), None
            continue
        if conversion is not None:
            if conversion.is_stage:
                stages.add(module)
            yield module, Finding(path, kind, "convertible"), conversion


def _conversion(module: nn.Module, stages: set[nn.Module]) -> _Conversion | None:
    """How ``module`` is made fast, or ``None`` if it is nothing of interest; ``stages`` has its parts that can be.

    Raises:
        Unread: it looks like a part of a DenseNet and is left alone; why.
    """
    kind = kind_of(module)
    if kind in FAST_CLASS:
        return _proved(module, [_Conversion(stock.make_fast, FAST_CLASS[kind] is not FastDenseNet)])
    if type(module) is nn.Sequential and not stages.isdisjoint(module.children()):
        return _Conversion(_make_sequential, False)
    if _is_named(module, "denseblock", "densenet", "transition", "rdnet"):
        if type(module).__module__ in _DECLINED:
            raise Unread(_DECLINED[type(module).__module__])
        if not stages.isdisjoint(module.modules()):
            raise Unread("its forward is its own, and calls what is converted")
        if not module._modules or _is_named(module, "densenet"):
            raise Unread("this class is not known and may compute anything")
        return _proved(module, _readings(module))
    if type(module).forward is nn.Module.forward:  # a container
        return None
    try:
        readings = _readings(module)
    except Unread:
        return None
    try:
        return _proved(module, readings)
    except Unread:
        if len(readings) > 1 and len(module._modules) > 1:
            raise  # layers of a growing number of channels
        return None


def _is_named(module: nn.Module, *words: str) -> bool:
    """Whether one of the words is in the name of its class, or of one that it derives from."""
    return any(word in base.__name__.lower() for base in type(module).__mro__ for word in words)


def _readings(module: nn.Module) -> list[_Conversion]:
    """What the structure of ``module`` allows it to be.

    Raises:
        Unread: neither a block nor a transition.
    """
    layouts: list[Layout]
    has_pool = any(isinstance(child, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d) for child in module.children())
    if _is_named(module, "transition") or has_pool:
        layouts = [transition_layout(module)]
    else:
        layouts = list(block_layouts(module, kind_of(module)))
    return [_Conversion(functools.partial(make_fused, layout=layout), True) for layout in layouts]


def _proved(module: nn.Module, ways: list[_Conversion]) -> _Conversion:
    """The first of ``ways`` that makes of a copy of ``module`` something fast that computes the same.

    Raises:
        Unread: none does, and why the first does not.
    """
    try:
        original = probe.exact_copy(module)
    except Exception as error:  # whatever a user's tensors and hooks may raise
        raise Unread(f"it cannot be copied to be checked: {error}") from error
    if "forward" in vars(module):
        raise Unread("its forward was replaced")
    if len(ways) > 1 and probe.on_meta(module):
        raise Unread("without values it cannot be told what it computes")
    reasons = []
    for way in ways:
        fast = copy.deepcopy(original)
        way.make_fast(fast)
        reason = _obstacle(fast)
        if reason is None and not probe.on_meta(module):
            reason = probe.difference(copy.deepcopy(original), fast)
        if reason is None:
            return way
        reasons.append(reason)
    raise Unread(min(reasons, key=lambda reason: "in eval mode" in reason))  # the others were read rightly


def _make_sequential(module: nn.Module) -> None:
    module.__class__ = FastSequential


def _obstacle(module: nn.Module) -> str | None:
    if isinstance(module, FastDenseNet):
        names = list(module._modules)
        return None if names == ["features", "classifier"] else f"its children are {', '.join(names)}"
    return module.obstacle() if isinstance(module, FusedBlock | FusedTransition) else None
