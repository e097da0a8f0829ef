"""``fastdense train``, ``fastdense evaluate`` and ``fastdense predict``."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, cast

from . import config
from .config import Config

_NOT_THE_RUN = ("device", "threads", "workers", "root", "download")
"""Options that change nothing of what is computed: a run may be resumed with others."""


def add_commands(commands: Any) -> None:
    """Add the three to argparse's subcommands."""
    command = commands.add_parser(
        "train",
        help="train a DenseNet by the paper's recipe: on digits at once, on CIFAR, SVHN or a folder of images",
        description="Train a DenseNet. Without options: DenseNet-BC on scikit-learn's digits. Under torchrun, on all "
        "its processes. Defaults are the paper's recipe for the data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    files = command.add_mutually_exclusive_group()
    files.add_argument("--output", type=Path, help="a new folder for checkpoints, metrics, curves", default=None)
    files.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder", default=None)
    command.add_argument("--config", type=Path, metavar="FILE", help="options from a JSON or TOML file", default=None)
    command.add_argument("--quiet", action="store_true", help="print nothing but the result")
    for each in fields(Config):
        _add_option(command, each)
    command.set_defaults(run=_train)

    command = commands.add_parser("evaluate", help="loss and accuracy of a checkpoint on its data set's test images")
    command.add_argument("checkpoint", type=Path, help="such as runs/digits/best.pt")
    for name in ("data", "root", "device", "amp", "backend", "workers", "eval_batch"):
        _add_option(command, Config.__dataclass_fields__[name])
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("predict", help="the most probable classes of images by a checkpoint")
    command.add_argument("checkpoint", type=Path, help="such as runs/digits/best.pt")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    command.add_argument("--top", type=int, default=5, help="classes of an image (default: %(default)s)")
    command.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_predict)


def _add_option(command: argparse.ArgumentParser, option: Field[Any]) -> None:
    name, default, about = option.name, option.default, option.metadata
    kind, several, optional = config.type_of(name)
    varies = sorted({recipe[name] for recipe in config.RECIPES.values() if name in recipe}, key=str)
    text = about["help"]
    if varies:
        text += " (default: the data set's)"
    elif not optional:
        text += f" (default: {' '.join(map(str, cast(Any, default))) if several else default})"
    more: dict[str, Any] = dict(dest=name, default=argparse.SUPPRESS, help=text)
    if kind is bool:
        more["action"] = argparse.BooleanOptionalAction
    else:
        more |= dict(type=kind, choices=about.get("choices"), nargs="+" if several else None)
        if "choices" not in about:
            more["metavar"] = name.upper().rpartition("_")[2]
    command.add_argument(f"--{name.replace('_', '-')}", **more)


def _train(arguments: argparse.Namespace, _: list[str]) -> int:
    from ..memory import keep_freed_memory
    from . import checkpoint, loop
    from .ranks import ranks

    given = _given(arguments)
    if arguments.resume:
        fixed = sorted(set(given) - set(_NOT_THE_RUN))
        if fixed or arguments.config:
            raise ValueError(
                f"--resume goes on with the options the run began with; drop {', '.join(fixed) or '--config'}"
            )
        chosen = Config.of(checkpoint.load(arguments.resume / loop.LAST)["config"], given)
    else:
        chosen = Config.of(config.load(arguments.config) if arguments.config else {}, given)
    with ranks(chosen.device) as group:
        folder = arguments.resume or Path(group.agree(str(arguments.output or _new_folder(chosen))))
        if group.is_first and not arguments.resume:
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(f"{folder} is not empty; give another --output, or --resume {folder}")
            checkpoint.write_whole(folder / "config.json", lambda file: file.write(_json(chosen.as_dict()).encode()))
        if group.device.type == "cpu":
            keep_freed_memory()
        try:
            row = loop.train(chosen, group, folder, resume=bool(arguments.resume), quiet=arguments.quiet)
        except KeyboardInterrupt:
            print(f"interrupted; fastdense train --resume {folder} goes on", file=sys.stderr)
            return 130
        if group.is_first:
            print(f"{row['eval_accuracy']:.2%} after {row['epoch'] + 1} epochs, at best {row['best_accuracy']:.2%}")
            print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    return {each.name: getattr(arguments, each.name) for each in fields(Config) if hasattr(arguments, each.name)}


def _new_folder(chosen: Config) -> Path:
    """``runs/DATA-ARCH``, with a number where that is taken."""
    first = Path("runs", f"{chosen.data}-{chosen.arch}")
    names = itertools.chain([first], (first.with_name(f"{first.name}-{number}") for number in itertools.count(2)))
    return next(folder for folder in names if not folder.exists())


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _evaluate(arguments: argparse.Namespace, _: list[str]) -> int:
    import torch

    from .. import backends
    from . import checkpoint, data, loop
    from .ranks import ranks

    content = checkpoint.load(arguments.checkpoint)
    chosen = Config.of(content["config"], _given(arguments))
    model, classes, _preprocess = checkpoint.described(content)
    with ranks(chosen.device) as group, backends.use_backend(chosen.backend):
        found = data.load(chosen)
        if found.classes != classes:
            raise ValueError(f"the checkpoint knows the classes {classes}, but {chosen.data} has {found.classes}")
        result = loop.evaluate(
            model.to(group.device), found.test, torch.arange(len(found.test)), group,
            batch=chosen.eval_batch, amp=chosen.amp, channels_last=chosen.channels_last,
        )  # fmt: skip
        if group.is_first:
            result = dict(images=len(found.test)) | result
            print(_json(result) if arguments.json else _sentence(result))
    return 0


def _sentence(result: dict[str, Any]) -> str:
    return (
        f"{result['accuracy']:.2%} of {result['images']} images right, {result['top5_accuracy']:.2%} among the five "
        f"most probable, cross entropy {result['loss']:.4f}"
    )


def _predict(arguments: argparse.Namespace, _: list[str]) -> int:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from . import checkpoint
    from .predict import predict

    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    content = checkpoint.load(arguments.checkpoint)
    found = predict(content, arguments.images, top=arguments.top, device=arguments.device)
    if arguments.json:
        print(json.dumps([each.as_dict() for each in found], indent=2))
        return 0
    table = Table("image", "class", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("probability", justify="right")
    for each in found:
        for i, (name, probability) in enumerate(each.classes):
            table.add_row("" if i else each.path, name, f"{probability:.2%}", end_section=i + 1 == len(each.classes))
    Console().print(table)
    return 0
