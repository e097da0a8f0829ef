"""Checkpoints: files that are whole or not there, and hold all that a run needs to go on, or a prediction.

They are dictionaries of tensors and plain values, so ``torch.load(path, weights_only=True)`` reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..models import FastDenseNet
from .data import Preprocess

FORMAT = 1


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that ``path`` holds the old one or the new one, whatever happens."""
    write_whole(path, lambda file: torch.save({"format": FORMAT} | content, file))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have ``write(file)`` fill a file beside ``path``, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not one of ``fastdense train``'s.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint {os.fspath(path)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of another kind of file
        raise ValueError(f"{os.fspath(path)} is not a checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)} is not a checkpoint of fastdense train, of format {FORMAT}")
    return content


def description(network: dict[str, Any], classes: list[str], preprocess: Preprocess) -> dict[str, Any]:
    """What makes a checkpoint usable by itself."""
    return dict(network=network, classes=classes, preprocess=asdict(preprocess))


def described(content: dict[str, Any]) -> tuple[FastDenseNet, list[str], Preprocess]:
    """A checkpoint's network for inference, with averaged weights where it has them; classes; preprocessing."""
    model = FastDenseNet(**content["network"])
    model.load_state_dict(content.get("ema") or content["model"])
    return model.eval(), content["classes"], Preprocess(**content["preprocess"])
