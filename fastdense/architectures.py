"""The named DenseNets: their configurations, and the constructors that the reference and the package share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from . import weights as _weights

if TYPE_CHECKING:
    from .reference import DenseNet

Model = TypeVar("Model", bound="DenseNet")


def cifar_config(
    depth: int,
    growth_rate: int,
    bottleneck: bool = True,
    compression: float = 0.5,
    num_init_features: int | None = None,
) -> dict[str, Any]:
    """Arguments of a three-block CIFAR DenseNet of the paper (section 4.2).

    ``depth`` counts the convolutions and the classifier: three blocks of equal length, a stem, two
    transitions. The stem has 2k channels for DenseNet-BC and 16 otherwise, unless given.
    """
    convs_per_layer = 2 if bottleneck else 1
    num_layers, rest = divmod(depth - 4, 3 * convs_per_layer)
    if num_layers < 1 or rest:
        kind = "with bottlenecks" if bottleneck else "without bottlenecks"
        raise ValueError(f"depth {kind} must be {3 * convs_per_layer}*n + 4 with n >= 1, got {depth}")
    if num_init_features is None:
        num_init_features = 2 * growth_rate if bottleneck and compression < 1 else 16
    return dict(
        growth_rate=growth_rate,
        block_config=(num_layers,) * 3,
        num_init_features=num_init_features,
        bn_size=4 if bottleneck else None,
        compression=compression,
        small_inputs=True,
        drop_every_conv=True,
        init="fan_out",
        num_classes=10,
    )


CONFIGS: dict[str, dict[str, Any]] = {
    "densenet121": dict(growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64),
    "densenet161": dict(growth_rate=48, block_config=(6, 12, 36, 24), num_init_features=96),
    "densenet169": dict(growth_rate=32, block_config=(6, 12, 32, 32), num_init_features=64),
    "densenet201": dict(growth_rate=32, block_config=(6, 12, 48, 32), num_init_features=64),
    "densenet264": dict(growth_rate=32, block_config=(6, 12, 64, 48), num_init_features=64),
    "densenet_40_12": cifar_config(40, 12, bottleneck=False, compression=1.0),
    "densenet_100_12": cifar_config(100, 12, bottleneck=False, compression=1.0),
    "densenet_100_24": cifar_config(100, 24, bottleneck=False, compression=1.0),
    "densenet_bc_100_12": cifar_config(100, 12),
    "densenet_bc_250_24": cifar_config(250, 24),
    "densenet_bc_190_40": cifar_config(190, 40),
}
"""Arguments of every named network: table 1 (ImageNet) and table 2 (CIFAR) of the paper."""

_OF_THIS_DEPTH = re.compile(r"densenet_(bc_)?(\d+)_(\d+)")


def config_of(name: str) -> dict[str, Any]:
    """Arguments of a named network, or of any ``densenet_bc_DEPTH_GROWTH`` and ``densenet_DEPTH_GROWTH`` for CIFAR.

    Raises:
        ValueError: no network has that name.
    """
    if name in CONFIGS:
        return CONFIGS[name]
    found = _OF_THIS_DEPTH.fullmatch(name)
    if found is None:
        raise ValueError(
            f"no network is called {name!r}; there are {', '.join(CONFIGS)}, and densenet_bc_DEPTH_GROWTH and "
            "densenet_DEPTH_GROWTH of any depth and growth rate"
        )
    is_bc = bool(found[1])
    return cifar_config(int(found[2]), int(found[3]), bottleneck=is_bc, compression=0.5 if is_bc else 1.0)


def image_size(name: str) -> int:
    """Height and width of the images that the paper gives a named network: 224 of ImageNet, 32 of CIFAR."""
    return 32 if config_of(name).get("small_inputs") else 224


def constructor(cls: Callable[..., Model], name: str) -> Callable[..., Model]:
    """The function ``name(*, weights=None, progress=True, **kwargs)`` that builds ``cls``."""

    def build(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> Model:
        if weights is None:
            return cls(**CONFIGS[name] | kwargs)
        state_dict, num_classes = _weights.fetch(weights, name, progress)
        if num_classes is not None and kwargs.setdefault("num_classes", num_classes) != num_classes:
            raise ValueError(f"weights are for num_classes={num_classes}, got num_classes={kwargs['num_classes']}")
        model = cls(**CONFIGS[name] | kwargs)
        model.load_state_dict(state_dict)
        return model

    build.__name__ = build.__qualname__ = name
    build.__module__ = cls.__module__
    build.__doc__ = f"""{name} of the paper: {_describe(CONFIGS[name])}.

    Args:
        weights: ``None``; one of torchvision's weight enums or its name, such as ``"DEFAULT"`` (only for the
            networks that torchvision has); a path; or a URL.
        progress: show a progress bar while downloading.
        **kwargs: arguments of :class:`{cls.__name__}` that replace the configuration's.

    Raises:
        ValueError: the weights do not belong to this network or to ``num_classes``.
    """
    return build


def _describe(config: dict[str, Any]) -> str:
    kind = "bottlenecks" if config.get("bn_size", 4) else "no bottlenecks"
    return f"blocks of {config['block_config']} layers, growth rate {config['growth_rate']}, {kind}"
