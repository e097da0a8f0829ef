"""State dicts from torchvision's weight enums, files and URLs, and from one implementation's keys to another's.

Every implementation of DenseNet has the same tensors under nearly the same keys; torchvision's and timm's of today
are the canonical ones here:

=================== =======================================================================================
torchvision's first ``denselayer1.norm.1.weight``, as files that are still served have it
MONAI               ``denselayer1.layers.norm1.weight``, ``class_layers.out.weight``
gpleiss             ``norm_final.weight``
torchxrayvision     canonical, and a buffer ``op_threshs`` of its labels' operating points
wrappers            ``module.``, ``model.``, ``_orig_mod.`` before every key
=================== =======================================================================================
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

_RENAMED = (
    (re.compile(r"^(?:module\.|model\.|_orig_mod\.)+"), ""),
    (re.compile(r"(denselayer\d+)\.layers\."), r"\1."),
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"^class_layers\.out\."), "classifier."),
    (re.compile(r"^features\.norm_final\."), "features.norm5."),
)
_NOT_WEIGHTS = ("op_threshs",)
_MAY_BE_ABSENT = ("num_batches_tracked", *_NOT_WEIGHTS)
_CONTAINERS = ("state_dict", "ema", "model")  # of a checkpoint, in this order


@dataclass(frozen=True)
class Loaded:
    """What :func:`load_weights` did; ``str()`` is a sentence.

    Attributes:
        tensors: how many were loaded.
        renamed: how many of them have another key in the source, as (source's, model's).
        ignored: keys of the source that are no weights.
        kept: counts of batches that old files lack, which the model keeps.
    """

    tensors: int
    renamed: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.tensors} tensors loaded"]
        if self.renamed:
            parts.append(f"{len(self.renamed)} of other names, such as {' as '.join(self.renamed[0])}")
        if self.ignored:
            parts.append(f"ignored {', '.join(self.ignored)}")
        if self.kept:
            parts.append(f"{len(self.kept)} counts of batches kept")
        return "; ".join(parts)


def load_weights(model: nn.Module, source: Mapping[str, Any] | str | os.PathLike[str]) -> Loaded:
    """Load the weights of any implementation of a DenseNet into any other, all of them or none.

    Args:
        model: fastdense's, torchvision's, timm's, MONAI's, gpleiss's or torchxrayvision's, converted or not.
        source: a state dict, a checkpoint that holds one, or a file of either, ``.safetensors`` too.

    Raises:
        ValueError: the tensors are not those of the model; which are missing, left over, or of another shape. The model
            is unchanged.
        FileNotFoundError: no such file.
        ImportError: a ``.safetensors`` file, and safetensors is not installed.
    """
    state_dict = state_dict_of(source) if isinstance(source, Mapping) else read(source)
    ours = model.state_dict()
    by_name = {canonical(key): key for key in ours}
    theirs: dict[str, str] = {}
    for key in state_dict:
        name = canonical(key)
        if name in theirs:
            raise ValueError(f"weights: {theirs[name]} and {key} are the same tensor, {name}")
        theirs[name] = key
    left = theirs.keys() - by_name.keys()
    absent = by_name.keys() - theirs.keys()
    ignored = [key for name, key in theirs.items() if name in left and name in _NOT_WEIGHTS]
    kept = [key for name, key in by_name.items() if name in absent and name.endswith(_MAY_BE_ABSENT)]
    wrong = [f"missing: {key}" for name, key in by_name.items() if name in absent and key not in kept]
    wrong += [f"left over: {key}" for name, key in theirs.items() if name in left and key not in ignored]
    pairs = {by_name[name]: key for name, key in theirs.items() if name in by_name}
    wrong += [
        f"{key} is {list(state_dict[theirs_key].shape)}, and the model's {list(ours[key].shape)}"
        for key, theirs_key in pairs.items()
        if state_dict[theirs_key].shape != ours[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ValueError(f"weights do not fit {type(model).__name__}: {'; '.join(wrong[:6])}{more}")
    model.load_state_dict({key: ours[key] for key in kept} | {key: state_dict[name] for key, name in pairs.items()})
    renamed = tuple((theirs_key, key) for key, theirs_key in pairs.items() if key != theirs_key)
    return Loaded(len(pairs), renamed, tuple(ignored), tuple(kept))


def canonical(key: str) -> str:
    """The key that torchvision of today has for a tensor."""
    for pattern, name in _RENAMED:
        key = pattern.sub(name, key)
    return key


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file, with its keys as they are.

    Raises:
        FileNotFoundError: there is none.
        ImportError: it is a ``.safetensors`` file, and safetensors is not installed.
        ValueError: it holds something else.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"weights: no such file: {path}")
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{path} needs safetensors: pip install safetensors") from error
        return load_file(path)
    return state_dict_of(torch.load(path, map_location="cpu", weights_only=True))


def state_dict_of(checkpoint: Any) -> dict[str, Tensor]:
    """A state dict out of what files hold.

    Raises:
        ValueError: there is none.
    """
    if isinstance(checkpoint, Mapping):
        inner = (checkpoint[name] for name in _CONTAINERS if isinstance(checkpoint.get(name), Mapping))
        checkpoint = next(inner, checkpoint)
    if not isinstance(checkpoint, Mapping) or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError(f"weights: expected a state dict of tensors, got {type(checkpoint).__name__}")
    return dict(checkpoint)


def fetch(weights: Any, architecture: str, progress: bool = True) -> tuple[dict[str, Tensor], int | None]:
    """Load a state dict.

    Args:
        weights: a torchvision weight enum of this architecture, its name, a path or a URL.
        architecture: such as ``"densenet121"``.
        progress: show a progress bar while downloading.

    Returns:
        The state dict with today's keys, and the number of classes if the source names it.

    Raises:
        ValueError: the weights belong to another network, or no such name, file or URL is known.
    """
    if isinstance(weights, str) and urlparse(weights).scheme in ("http", "https", "file"):
        found = torch.hub.load_state_dict_from_url(weights, progress=progress, map_location="cpu")
        return _translated(state_dict_of(found)), None
    if isinstance(weights, str | os.PathLike) and os.path.exists(weights):
        return _translated(read(weights)), None
    if isinstance(weights, os.PathLike) or (isinstance(weights, str) and os.sep in weights):
        raise ValueError(f"weights: no such file: {os.fspath(weights)}")
    entry = _torchvision_entry(weights, architecture)
    state_dict = entry.get_state_dict(progress=progress, check_hash=True)
    return _translated(state_dict), len(entry.meta["categories"])


def _torchvision_entry(weights: Any, architecture: str) -> Any:
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ValueError(
            f"weights={weights!r} is neither an existing file nor a URL, and torchvision, "
            "which knows weights by name, is not installed"
        ) from error
    try:
        known = get_model_weights(architecture)
    except ValueError:
        raise ValueError(f"torchvision has no weights for {architecture}; give a path or a URL") from None
    if isinstance(weights, known):
        return weights
    name = weights.rpartition(".")[2] if isinstance(weights, str) else None
    if name in known.__members__:
        return known[name]
    raise ValueError(
        f"weights for {architecture} must be one of {', '.join(f'{known.__name__}.{m}' for m in known.__members__)}, "
        f"a path or a URL, got {weights!r}"
    )


def _translated(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {canonical(key): value for key, value in state_dict.items() if canonical(key) not in _NOT_WEIGHTS}
