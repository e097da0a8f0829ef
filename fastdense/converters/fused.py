"""The same module, fused: classes made of one of ours and one of an implementation's.

The class of a converted module is made when first needed: before the implementation's class, whose forward stays as
the fallback and whose other methods stay as they are, goes :class:`~fastdense.modules.FusedBlock` or
:class:`~fastdense.modules.FusedTransition`.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import nn

from ..layouts import BlockLayout, TransitionLayout
from ..modules import Fused, FusedBlock, FusedTransition
from ..served import serve_norm_act
from .structure import Unread

Layout = BlockLayout | TransitionLayout


class Converted(nn.Module):
    """What all such classes share: they are pickled by what they are made of."""

    _original: type[nn.Module]
    _layout: Layout

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = cast(tuple[Any, ...], super().__reduce_ex__(max(2, protocol)))[2:]
        return (_empty, (self._original, self._layout), *state)


_classes: dict[tuple[type[nn.Module], Layout], type[Converted]] = {}


def fused_class(original: type[nn.Module], layout: Layout) -> type[Converted]:
    """The class of a module of the class ``original`` that computes by our ops what ``layout`` says."""
    if (original, layout) not in _classes:
        know_timm()
        base = FusedBlock if isinstance(layout, BlockLayout) else FusedTransition
        members = dict(_original=original, _layout=layout, __module__=original.__module__, __doc__=original.__doc__)
        made = type(f"Fused{original.__name__.lstrip('_')}", (Converted, base, original), members)
        _classes[original, layout] = cast(type[Converted], made)
    return _classes[original, layout]


def make_fused(module: nn.Module, layout: Layout) -> None:
    """In place.

    Raises:
        Unread: the module has something of a name that our classes need.
    """
    base = FusedBlock if isinstance(layout, BlockLayout) else FusedTransition
    kinds = (Converted, Fused, base)
    ours = {name for kind in kinds for name in vars(kind) if not name.startswith("__")} - {"forward"}
    for name in sorted(ours):
        if hasattr(module, name):
            raise Unread(f"it has a {name} of its own")
    module.__class__ = fused_class(type(module), layout)


def _empty(original: type[nn.Module], layout: Layout) -> nn.Module:
    """Without a state: unpickling and copying give it theirs."""
    kind = fused_class(original, layout)
    return kind.__new__(kind)


def know_timm() -> None:
    """Have the ops serve timm's norms, if any module can have them."""
    timm: Any = sys.modules.get("timm.layers.norm_act")
    if timm is not None:
        serve_norm_act(timm.BatchNormAct2d)
        serve_norm_act(timm.SyncBatchNormAct)
