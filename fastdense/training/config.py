"""Every choice of a training run. The recipe of the paper (sections 4.2 and 4.3) is the default of each data set."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..architectures import config_of
from ..backends import names

_CIFAR = dict(arch="densenet_bc_100_12", epochs=300, batch=64, size=32)

RECIPES: dict[str, dict[str, Any]] = {
    "digits": dict(arch="densenet_bc_22_24", epochs=60, batch=64, size=8),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "svhn": _CIFAR | dict(epochs=40, augment=False),
    "imagefolder": dict(
        arch="densenet121", epochs=90, batch=256, size=224, milestones=(1 / 3, 2 / 3), workers=4, eval_batch=256
    ),
}
"""What each data set has instead of the defaults of :class:`Config`."""

_DROP_RATE = 0.2  # where nothing is augmented (section 4.2)


def _choice(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata=dict(help=help, **more))


@dataclass(frozen=True)
class Config:
    """A run. ``batch`` counts the images of an optimizer step, over all ranks and parts: they change no result.

    Raises:
        ValueError: a value that cannot be, by its name.
    """

    data: str = _choice("digits", "data set", choices=tuple(RECIPES))
    root: str = _choice("data", "folder where the data set lies; digits come with scikit-learn")
    download: bool = _choice(False, "fetch CIFAR or SVHN into the folder if it is not there")
    arch: str = _choice(
        "densenet_bc_100_12", "a named network, or any densenet_bc_DEPTH_GROWTH or densenet_DEPTH_GROWTH"
    )
    size: int = _choice(32, "height and width of the images", least=1)
    weights: str | None = _choice(None, "begin with these: torchvision's name (DEFAULT), a file, a URL, a checkpoint")
    freeze: int = _choice(0, "keep the stem and the first FREEZE - 1 blocks as they are, BatchNorm included", least=0)
    drop_rate: float | None = _choice(
        None, "dropout; 0.2 without augmentation, as in the paper, and else 0", least=0, below=1
    )
    memory_efficient: bool = _choice(False, "recompute the bottlenecks in backward")

    epochs: int = _choice(300, "passes over the training images", least=1)
    batch: int = _choice(64, "images of an optimizer step, over all processes", least=1)
    lr: float = _choice(0.1, "learning rate", least=0)
    momentum: float = _choice(0.9, "of SGD", least=0, below=1)
    nesterov: bool = _choice(True, "Nesterov's momentum")
    weight_decay: float = _choice(1e-4, "of all parameters", least=0)
    decay_norms: bool = _choice(True, "weight decay of BatchNorm's parameters and of biases, too")
    schedule: str = _choice("step", "of the learning rate", choices=("step", "cosine"))
    milestones: tuple[float, ...] = _choice((0.5, 0.75), "shares of the run after which the learning rate falls")
    gamma: float = _choice(0.1, "what it is multiplied by there", least=0)
    warmup: float = _choice(0.0, "epochs over which it rises from zero", least=0)
    label_smoothing: float = _choice(0.0, "of the cross entropy", least=0, below=1)
    augment: bool = _choice(True, "shift and, where it means the same, mirror the training images")
    holdout: int = _choice(0, "training images held out to choose the best checkpoint by, not the test images", least=0)
    ema: float = _choice(0.0, "evaluate an exponential moving average of the weights, of this decay", least=0, below=1)
    seed: int = _choice(0, "of weights, order, augmentation and dropout")

    backend: str = _choice("auto", "which kernels; reference: the naive definition", choices=names())
    device: str | None = _choice(None, "such as cpu or cuda (default: cuda where there is one)")
    amp: str = _choice("off", "autocast, with a gradient scaler for fp16", choices=("off", "bf16", "fp16"))
    channels_last: bool = _choice(True, "images and weights in channels-last memory")
    compile: str = _choice(
        "off",
        "torch.compile; reduce-overhead uses CUDA graphs",
        choices=("off", "default", "reduce-overhead", "max-autotune"),
    )
    accumulate: int = _choice(1, "parts that a process runs its share of a batch in", least=1)
    sync_bn: bool = _choice(False, "statistics of the whole batch over all processes")
    fsdp: bool = _choice(False, "shard parameters, gradients and optimizer over the processes (FSDP2)")
    deterministic: bool = _choice(False, "only deterministic algorithms; CPU runs are reproducible without")
    threads: int | None = _choice(None, "of the CPU (default: PyTorch's choice)", least=1)
    workers: int = _choice(0, "processes that decode images", least=0)
    eval_batch: int = _choice(500, "images of a batch in evaluation, of one process", least=1)
    log_every: int = _choice(10, "steps between looks at the loss", least=1)

    def __post_init__(self) -> None:
        for each in fields(self):
            value, allowed = getattr(self, each.name), each.metadata
            if "choices" in allowed and value not in allowed["choices"]:
                raise ValueError(f"{each.name} must be one of {', '.join(allowed['choices'])}, got {value!r}")
            if value is not None and "least" in allowed and not value >= allowed["least"]:
                raise ValueError(f"{each.name} must be at least {allowed['least']}, got {value}")
            if value is not None and "below" in allowed and not value < allowed["below"]:
                raise ValueError(f"{each.name} must be less than {allowed['below']}, got {value}")
        config_of(self.arch)
        if not all(0 < share < 1 for share in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones must be shares of the run in order, such as 0.5 0.75, got {self.milestones}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum; give --no-nesterov")
        if self.fsdp and self.ema:
            raise ValueError("ema and fsdp do not go together")

    @classmethod
    def of(cls, *given: Mapping[str, Any]) -> Config:
        """What is given, the later before the earlier, before the recipe of the data set, before the defaults.

        Raises:
            ValueError: a name or a type that is none of these fields'.
        """
        chosen: dict[str, Any] = {}
        for each in given:
            chosen |= each
        unknown = sorted(set(chosen) - {each.name for each in fields(cls)})
        if unknown:
            raise ValueError(f"no such option: {', '.join(unknown)}")
        chosen = {name: _typed(name, value) for name, value in chosen.items()}
        data = chosen.get("data", cls.data)
        return cls(**RECIPES.get(data, {}) | chosen)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as a file holds them."""
        return asdict(self) | {"milestones": list(self.milestones)}

    def drops(self) -> float:
        """The rate of dropout: as given, or the paper's."""
        if self.drop_rate is not None:
            return self.drop_rate
        return 0.0 if self.augment else _DROP_RATE

    def learning_rate(self, epoch: float) -> float:
        """At ``epoch`` of ``epochs``, with fractions."""
        rate = self.lr * min(1.0, epoch / self.warmup) if self.warmup else self.lr
        done = epoch / self.epochs
        if self.schedule == "cosine":
            return rate * (1 + math.cos(math.pi * done)) / 2
        return rate * self.gamma ** sum(done >= share - 1e-9 for share in self.milestones)


_TYPES = typing.get_type_hints(Config)


def type_of(name: str) -> tuple[type, bool, bool]:
    """The type of a field's values, whether it takes several, and whether it may be ``None``."""
    hint = _TYPES[name]
    optional = typing.get_origin(hint) is types.UnionType
    if optional:
        (hint,) = (each for each in typing.get_args(hint) if each is not type(None))
    several = typing.get_origin(hint) is tuple
    return (typing.get_args(hint)[0] if several else hint), several, optional


def _typed(name: str, value: Any) -> Any:
    kind, several, optional = type_of(name)
    if value is None and optional:
        return None
    values = list(value) if several and isinstance(value, list | tuple) else [value]
    for each in values:
        fits = isinstance(each, kind) or (kind is float and isinstance(each, int))
        if not fits or (isinstance(each, bool) and kind is not bool):
            raise ValueError(f"{name} must be {'several ' if several else ''}{kind.__name__}, got {value!r}")
    return tuple(map(kind, values)) if several else kind(value)


def load(path: str | Path) -> dict[str, Any]:
    """The choices in a JSON or TOML file.

    Raises:
        ValueError: the file is neither, or not a table of options.
        OSError: it cannot be read.
    """
    path = Path(path)
    text = path.read_text()
    try:
        if path.suffix == ".toml":
            import tomllib  # since Python 3.11

            chosen = tomllib.loads(text)
        else:
            chosen = json.loads(text)
    except ImportError as error:
        raise ValueError(f"{path}: TOML needs Python 3.11; give the options as JSON") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(chosen, dict):
        raise ValueError(f"{path}: expected a table of options, got {type(chosen).__name__}")
    return chosen
