"""What the ops serve: the stock modules that they reproduce, and why another module is none of them.

Looked at in every forward, so by the modules' dicts: a network has hundreds of modules.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.modules import module as nn_module

from .layouts import BlockLayout, TransitionLayout

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
"""The norms that the ops compute."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module has those of its forward."""

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
"""The convolutions that they compute."""


def parameter(module: nn.Module, name: str) -> Any:
    """By the dict, which is quick; the replicas that ``DataParallel`` makes of a module have it empty."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def hooked(module: nn.Module) -> str | None:
    """What would be bypassed if the module's forward were not called through ``__call__``."""
    return own_hooks(module) or global_hooks()


def own_hooks(module: nn.Module) -> str | None:
    """The same, of the module itself."""
    # As attributes, of which Dynamo guards that there are none: as entries of its dict torch 2.13 overlooks later ones.
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    state = module.__dict__
    if "forward" in state:
        return "its forward was replaced"
    if state.get("_compiled_call_impl") is not None:
        return "it is compiled by itself"
    return None


def obstacle_in(module: nn.Module, layout: BlockLayout | TransitionLayout) -> str | None:
    """Why the children of ``module`` are not exactly the stock modules of its layout, or ``None``."""
    if tuple(module._modules) != layout.parts:
        return f"its children are {', '.join(module._modules)} instead of {', '.join(layout.parts)}"
    served = layout.conv1 if isinstance(layout, BlockLayout) and not layout.conv2 else ""  # with a bias too
    for name, child in cast(dict[str, nn.Module], module._modules).items():
        reason = _unlike_stock(child)
        if reason is None and carries_relu(child) != layout.norms_activate and isinstance(child, BatchNorm):
            reason = "it has no ReLU" if layout.norms_activate else "it has a ReLU of its own"
        if reason is None and type(child) in CONVS and parameter(child, "bias") is not None and name != served:
            reason = "it has a bias"
        if reason:
            return f"{name}: {reason}"
    if len({DIMS[kind] for kind in map(type, module._modules.values()) if kind in DIMS}) > 1:
        return "its children have different spatial dimensions"
    return global_hooks()


def unusual(module: nn.Module) -> str | None:
    """Why the ops would not reproduce a stock module of a DenseNet, or ``None``."""
    return _unlike_stock(module) or global_hooks()


def _unlike_stock(module: nn.Module) -> str | None:
    """The same, of the module itself."""
    kind = type(module)
    if kind not in _STOCK:
        return f"it is a {kind.__name__}"
    state = module.__dict__
    for attribute, expected in _STOCK[kind].items():
        if state[attribute] not in expected:
            return f"its {attribute} is {state[attribute]}"
    if kind in CONVS and state["padding"][0] != state["kernel_size"][0] // 2:
        return f"its padding is {state['padding']}"
    if kind in _NORM_ACTS:
        act, drop = state["_modules"].get("act"), state["_modules"].get("drop")
        if type(act) is not nn.ReLU or type(drop) is not nn.Identity:
            return f"it has the activation {type(act).__name__}, and {type(drop).__name__}"
        return own_hooks(module) or own_hooks(act) or own_hooks(drop)
    return own_hooks(module)


def unusual_stem(conv: nn.Module) -> str | None:
    """Why the ops would not reproduce the first convolution of a network, of any kernel, or ``None``."""
    if type(conv) not in CONVS:
        return f"it is a {type(conv).__name__}"
    state = conv.__dict__
    if state["groups"] != 1 or set(state["dilation"]) != {1} or isinstance(state["padding"], str):
        return "it has groups, a dilation or a padding by name"
    if state["padding_mode"] != "zeros":
        return f"its padding_mode is {state['padding_mode']}"
    return "it has a bias" if parameter(conv, "bias") is not None else hooked(conv)


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = ((nn.AvgPool1d, nn.MaxPool1d), (nn.AvgPool2d, nn.MaxPool2d), (nn.AvgPool3d, nn.MaxPool3d))
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DIMS: dict[type[nn.Module], int] = {
    kind: dims
    for dims, kinds in enumerate(zip(CONVS, _NORMS, *zip(*_POOLS, strict=True), strict=True), start=3)
    for kind in kinds
}
"""Dimensions of what goes through a module; those that are not here, such as SyncBatchNorm, take any."""


def _stock(dims: int) -> dict[type[nn.Module], dict[str, tuple[Any, ...]]]:
    """The modules of ``dims`` spatial dimensions that the ops reproduce, with the settings they do it for."""

    def alike(size: int) -> tuple[Any, ...]:
        return size, (size,) * dims

    zero, one, two, three = map(alike, range(4))
    avg_pool, max_pool = _POOLS[dims - 1]
    conv = dict(
        kernel_size=(one[1], three[1]),
        stride=(one[1],),
        padding=(zero[1], one[1]),
        dilation=(one[1],),
        groups=(1,),
        padding_mode=("zeros",),
    )
    average = dict(kernel_size=two, stride=two, padding=zero, ceil_mode=(False,))
    average |= dict(divisor_override=(None,)) if dims > 1 else {}
    maximum = dict(
        kernel_size=three, stride=two, padding=one, dilation=one, ceil_mode=(False,), return_indices=(False,)
    )
    return {CONVS[dims - 1]: conv, avg_pool: average, max_pool: maximum}


_STOCK: dict[type[nn.Module], dict[str, tuple[Any, ...]]] = {
    **{kind: {} for kind in (*_NORMS, nn.SyncBatchNorm, nn.ReLU)},
    **{kind: {} for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)},
    **_stock(1),
    **_stock(2),
    **_stock(3),
}
"""The modules that the ops reproduce, with the settings they do it for."""

_NORM_ACTS: set[type[nn.Module]] = set()
"""Those of them that are norms with a ReLU of their own, a child ``act``."""


def serve_norm_act(kind: type[nn.Module]) -> None:
    """Have the ops serve a class of norms that carry their activation as a child ``act``, and a dropout ``drop``."""
    _STOCK.setdefault(kind, {})
    _NORM_ACTS.add(kind)


def is_served(module: nn.Module) -> bool:
    """Whether the ops reproduce modules of its class, at least with some settings."""
    return type(module) in _STOCK


def carries_relu(norm: nn.Module) -> bool:
    """Whether a norm is of these."""
    return type(norm) in _NORM_ACTS


def global_hooks() -> str | None:
    """What would be bypassed of every module."""
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "modules have global hooks"
    return None
