"""Reading the layout of a dense block or a transition off its modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from ..layouts import BlockLayout, TransitionLayout
from ..served import carries_relu, is_served

APPEND = {
    "timm.models.densenet.DenseBlock",
    "monai.networks.nets.densenet._DenseBlock",
    "torchxrayvision.models._DenseBlock",
    "torchvision.models.densenet._DenseBlock",
}
"""Blocks known by name: they put new features last."""

_LAYER = re.compile(r"nr?c(nr?c)?r?d?")
_TRANSITION = re.compile(r"nr?cp?")
_ROLES: dict[str, Any] = dict(
    n=_BatchNorm, r=nn.ReLU, c=_ConvNd, d=_DropoutNd, p=nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d
)

_DROP_RATE = "drop_rate"
_RECOMPUTE = ("memory_efficient", "grad_checkpointing", "efficient")
_ONLY_NEW = "upsample"
_OF_MODULES = {*vars(nn.Module()), "_is_full_backward_hook", "_warned_of_fallback"}


class Unread(Exception):
    """Why a module is not what was looked for."""


def block_layouts(block: nn.Module, kind: str) -> Iterator[BlockLayout]:
    """The layouts that the structure of ``block``, a class called ``kind``, allows, the likeliest first.

    Raises:
        Unread: it allows none.
    """
    name, layers = _layers_of(block)
    first = next(iter(layers.values()))
    holder, parts = _parts_of(first)
    roles = ""
    for layer_name, layer in layers.items():
        there, its_parts = _parts_of(layer)
        if type(layer) is not type(first):
            raise Unread(f"{layer_name} is a {type(layer).__name__}")
        if there != holder or list(its_parts) != list(parts):
            raise Unread(f"{layer_name}: its children are {', '.join(its_parts)} instead of {', '.join(parts)}")
        try:
            its_roles = _roles(its_parts)
        except Unread as reason:
            raise Unread(f"{layer_name}: {reason}") from None
        if not _LAYER.fullmatch(its_roles) or (roles and its_roles != roles):
            raise Unread(f"{layer_name}: its children are {', '.join(its_parts)}")
        roles = its_roles
    norms, convs, dropouts = (_having(parts, roles, role) for role in "ncd")
    _check_growth([_parts_of(layer)[1] for layer in layers.values()], norms[0], convs)
    if kind not in APPEND:
        _check_attributes(first, (_DROP_RATE, *_RECOMPUTE))
        _check_attributes(block, (_DROP_RATE, *_RECOMPUTE, _ONLY_NEW))
    layout = BlockLayout(
        type(first),
        tuple(parts),
        norms[0],
        convs[0],
        norm2="".join(norms[1:]),
        conv2="".join(convs[1:]),
        dropout="".join(dropouts),
        drop_rate="" if dropouts else _DROP_RATE * (_DROP_RATE in vars(first)),
        recompute=next((name for name in _RECOMPUTE if name in vars(first)), ""),
        layers=name,
        holder=holder,
        norms_activate=carries_relu(cast(nn.Module, parts[norms[0]])),
        only_new=_ONLY_NEW * (_ONLY_NEW in vars(block)),
    )
    yield layout
    if kind not in APPEND:
        yield layout._replace(new_first=True)


def transition_layout(module: nn.Module) -> TransitionLayout:
    """The layout of ``module`` as a transition.

    Raises:
        Unread: it is none.
    """
    parts = cast(dict[str, nn.Module], module._modules)
    roles = _roles(parts)
    if not _TRANSITION.fullmatch(roles):
        raise Unread(f"its children are {', '.join(parts) or 'none'}")
    (norm,), (conv,) = _having(parts, roles, "n"), _having(parts, roles, "c")
    if set(cast(Any, parts[conv]).kernel_size) != {1}:
        raise Unread(f"{conv}: its kernel_size is {parts[conv].kernel_size}")
    return TransitionLayout(tuple(parts), norm, conv, norms_activate=carries_relu(parts[norm]))


def _layers_of(block: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """Name of the child that holds the layers, ``""`` for the block itself, and the layers."""
    children = cast(dict[str, nn.Module], block._modules)
    name = ""
    if len(children) == 1 and type(next(iter(children.values()))) is nn.ModuleList:
        name = next(iter(children))
        children = cast(dict[str, nn.Module], children[name]._modules)
    if not children:
        raise Unread("it has no layers")
    for child, layer in children.items():
        if type(layer).__module__.startswith("torch.nn."):
            raise Unread(f"{child} is a {type(layer).__name__}")
    return name, children


def _parts_of(layer: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """Name of the child that holds the parts, ``""`` for the layer itself, and the parts."""
    children = cast(dict[str, nn.Module], layer._modules)
    if len(children) == 1 and type(next(iter(children.values()))) is nn.Sequential:
        name = next(iter(children))
        return name, cast(dict[str, nn.Module], children[name]._modules)
    return "", children


def _roles(parts: dict[str, nn.Module]) -> str:
    """A letter a part: norm, relu, conv, dropout, pool."""
    return "".join(_role(name, part) for name, part in parts.items())


def _role(name: str, part: nn.Module) -> str:
    if is_served(part):
        for role, kinds in _ROLES.items():
            if isinstance(part, kinds):
                return role
    raise Unread(f"{name}: it is a {type(part).__name__}")


def _having(parts: dict[str, nn.Module], roles: str, role: str) -> list[str]:
    return [name for name, letter in zip(parts, roles, strict=True) if letter == role]


def _check_growth(layers: list[dict[str, Any]], norm1: str, convs: list[str]) -> None:
    """Every layer reads what the one before read and made; the last convolution is 3x3, one before it 1x1."""
    for here, after in pairwise(layers):
        read, growth = here[norm1].num_features, here[convs[-1]].out_channels
        if after[norm1].num_features != read + growth:
            raise Unread(f"a layer reads {after[norm1].num_features} channels after {read} and {growth}")
    for layer in layers:
        for conv, size in zip(reversed(convs), (3, 1), strict=False):
            if set(layer[conv].kernel_size) != {size}:
                raise Unread(f"{conv}: its kernel_size is {layer[conv].kernel_size}")


def _check_attributes(module: nn.Module, known: tuple[str, ...]) -> None:
    """Of a class that is not known: a setting of its own may change what it computes, now or later."""
    for name, value in vars(module).items():
        if name not in _OF_MODULES and name not in known and type(value) is not int:
            raise Unread(f"it has a setting of unknown meaning, {name}")
