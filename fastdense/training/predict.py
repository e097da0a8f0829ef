"""A trained checkpoint at work: the classes of images from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import checkpoint


@dataclass(frozen=True)
class Prediction:
    """Of one image: the most probable classes and their probabilities, falling."""

    path: str
    classes: tuple[tuple[str, float], ...]

    def as_dict(self) -> dict[str, Any]:
        return dict(path=self.path, classes=[dict(name=name, probability=p) for name, p in self.classes])


def predict(
    content: dict[str, Any], paths: Sequence[str | Path], *, top: int = 5, device: str = "cpu", batch: int = 64
) -> list[Prediction]:
    """The ``top`` classes of each image by a checkpoint's network.

    Args:
        content: of :func:`fastdense.training.checkpoint.load`.
        paths: images that Pillow opens.

    Raises:
        FileNotFoundError: no such image.
        ValueError: a file is no image.
    """
    model, classes, preprocess = checkpoint.described(content)
    model.to(device).to(memory_format=torch.channels_last)
    found: list[Prediction] = []
    for start in range(0, len(paths), batch):
        group = paths[start : start + batch]
        x = torch.stack([preprocess(_opened(path)) for path in group])
        with torch.inference_mode():
            logits = model(x.to(device, memory_format=torch.channels_last))
        best = logits.float().softmax(1).topk(min(top, len(classes)), 1)
        for path, values, indices in zip(group, best.values.tolist(), best.indices.tolist(), strict=True):
            named = tuple((classes[i], value) for i, value in zip(indices, values, strict=True))
            found.append(Prediction(str(path), named))
    return found


def _opened(path: str | Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
        image.load()
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no image that Pillow knows") from None
    return image
