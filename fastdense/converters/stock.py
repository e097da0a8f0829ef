"""torchvision's networks and :mod:`fastdense.reference`'s become fastdense's own classes, and back."""

from __future__ import annotations

from torch import nn

from .. import reference
from ..models import FastDenseNet
from ..modules import FastDenseBlock, FastTransition
from ..stages import FastSequential

_TORCHVISION = "torchvision.models.densenet"

FAST_CLASS: dict[str, type[nn.Module]] = {
    f"{_TORCHVISION}._DenseBlock": FastDenseBlock,
    f"{_TORCHVISION}._Transition": FastTransition,
    f"{_TORCHVISION}.DenseNet": FastDenseNet,
    f"{reference.__name__}.DenseBlock": FastDenseBlock,
    f"{reference.__name__}.Transition": FastTransition,
    f"{reference.__name__}.DenseNet": FastDenseNet,
}
"""What each class becomes. They are known by their exact names: a subclass may compute anything."""

_REFERENCE_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    FastDenseBlock: reference.DenseBlock,
    FastTransition: reference.Transition,
    FastDenseNet: reference.DenseNet,
    FastSequential: nn.Sequential,
}
"""What those become that were not converted."""

_ORIGINAL = "_converted_from"
_LAYERS_OWN = dict(has_bottleneck=True, drop_every_conv=False)
"""What our layers know of themselves and torchvision's do not."""


def make_fast(module: nn.Module) -> None:
    """Of a class in :data:`FAST_CLASS`."""
    fast_class = FAST_CLASS[kind_of(module)]
    if fast_class is FastDenseBlock:
        for layer in module.children():
            if kind_of(layer) == f"{_TORCHVISION}._DenseLayer":
                _change(layer, reference.DenseLayer)
                vars(layer).update(_LAYERS_OWN)
    _change(module, fast_class)


def make_reference(module: nn.Module) -> None:
    """Back to what it was converted from; to the reference's class if it was built fast."""
    if _ORIGINAL in vars(module):
        if isinstance(module, reference.DenseLayer):
            for name in _LAYERS_OWN:
                del vars(module)[name]
        module.__class__ = vars(module).pop(_ORIGINAL)
    elif type(module) in _REFERENCE_CLASS:
        module.__class__ = _REFERENCE_CLASS[type(module)]


def kind_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _change(module: nn.Module, kind: type[nn.Module]) -> None:
    if not type(module).__module__.startswith(reference.__name__):
        vars(module)[_ORIGINAL] = type(module)
    module.__class__ = kind
