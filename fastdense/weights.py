"""State dicts from torchvision's weight enums, files and URLs, with the keys of today.

The first torchvision releases named a layer's children ``norm.1`` and ``conv.1``; files with such dotted
keys are still served and are translated on loading.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

_DOTTED = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


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
        return _translated(torch.hub.load_state_dict_from_url(weights, progress=progress, map_location="cpu")), None
    if isinstance(weights, str | os.PathLike) and os.path.exists(weights):
        return _translated(torch.load(weights, map_location="cpu", weights_only=True)), None
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


def _translated(checkpoint: Any) -> dict[str, Tensor]:
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"weights: expected a state dict of tensors, got {type(checkpoint).__name__}")
    return {_DOTTED.sub(r"\1\2", key.removeprefix("module.")): value for key, value in state_dict.items()}
