"""DenseNets of other libraries and of users' own files before and after ``fastdense.convert``.

``python -m fastdense.benchmarks.libraries``: both take turns, so that the drift of the machine cancels in their ratio.
Images and volumes are in channels-last memory, which is the quickest for the original too.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastdense
from fastdense.memory import saved_activation_bytes
from fastdense.text import aligned

from . import results as results_module
from . import rounds, wild
from .cases import default_device
from .results import three_digits

Row = dict[str, Any]

_FEWEST_ROUNDS = 8


class Network(NamedTuple):
    """A network as its users have it."""

    package: str | None  # that it comes from, but for users' own files
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of its input


def _monai(spatial_dims: int) -> nn.Module:
    networks = import_module("monai.networks.nets")
    return networks.DenseNet121(spatial_dims=spatial_dims, in_channels=3, out_channels=1000)


def _encoder() -> nn.Module:
    encoders = import_module("segmentation_models_pytorch.encoders")
    return encoders.get_encoder("densenet121", weights=None)


_IMAGENET = (4, 3, 224, 224)
_CIFAR = (32, 3, 32, 32)
_DENSENET121 = (6, 12, 24, 16)

NETWORKS = {
    "torchvision": Network("torchvision", lambda: import_module("torchvision.models").densenet121(), _IMAGENET),
    "timm": Network("timm", lambda: import_module("timm").create_model("densenet121"), _IMAGENET),
    "MONAI": Network("monai", lambda: _monai(2), _IMAGENET),
    "MONAI, volumes": Network("monai", lambda: _monai(3), (2, 3, 64, 64, 64)),
    "MONAI, signals": Network("monai", lambda: _monai(1), (8, 3, 4096)),
    "torchxrayvision": Network(
        "torchxrayvision", lambda: import_module("torchxrayvision.models").DenseNet(in_channels=3), _IMAGENET
    ),
    "segmentation_models_pytorch": Network("segmentation_models_pytorch", _encoder, _IMAGENET),
    "gpleiss": Network(None, lambda: wild.EfficientDenseNet(block_config=(16, 16, 16)), _CIFAR),
    "kuangliu": Network(None, lambda: wild.KuangliuDenseNet(_DENSENET121, 12), _CIFAR),
    "phlippe": Network(None, lambda: wild.PhlippeDenseNet(_DENSENET121, 12, bn_size=4), _CIFAR),
    "FC-DenseNet": Network(
        None, lambda: wild.FCDenseNet((4, 4, 4, 4, 4), 4, growth_rate=12, num_init_features=48), (2, 3, 224, 224)
    ),
}
"""By where they come from: DenseNet-121 of images, volumes and signals, an encoder, and what users' own files have for
CIFAR and for segmentation: DenseNet-BC(100, 12), DenseNet-121 of growth 12, FC-DenseNet56."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the networks whose libraries are installed, and save it beside the other results."""
    parser = argparse.ArgumentParser("python -m fastdense.benchmarks.libraries", description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--seconds", type=float, default=8.0, help="about how long each comparison takes")
    options = parser.parse_args(argv)
    installed = {name: n for name, n in NETWORKS.items() if n.package is None or find_spec(n.package)}
    rows = []
    for name, network in installed.items():
        rows.append(dict(network=name, **measured(network, options.device, options.seconds)))
        print(aligned([cells(rows[-1])]), flush=True)
    parts: Row = {part: [] for part in results_module.PARTS}
    results = parts | dict(suite="libraries", environment=results_module.environment(options.device), libraries=rows)
    path = results_module.save(results, results_module.default_folder())
    print(aligned([HEADINGS, *map(cells, rows)]))
    print(path)
    return 0


def measured(network: Network, device: str, seconds: float) -> Row:
    """A network and its conversion."""
    torch.manual_seed(0)
    stock, x = network.build().to(device), torch.randn(network.shape, device=device)
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if layout is not None:
        stock, x = stock.to(memory_format=layout), x.contiguous(memory_format=layout)
    models = {"before": stock, "after": fastdense.convert(stock)}
    row: Row = dict(shape=network.shape)
    for mode, run in (("step", _step), ("inference", _inference)):
        row[mode] = _compared(run, models, x, seconds, train=mode == "step")
    row["saved_bytes"] = {
        name: saved_activation_bytes(model, functools.partial(model.train(), x)) for name, model in models.items()
    }
    return row


def _compared(
    run: Callable[[nn.Module, Tensor], None], models: dict[str, nn.Module], x: Tensor, seconds: float, train: bool
) -> dict[str, list[float]]:
    """Seconds of each model, round by round."""
    for model in models.values():
        run(model.train(train), x)
    count = rounds.how_many(seconds, sum(_clock(run, model, x) for model in models.values()), _FEWEST_ROUNDS)
    return rounds.interleaved(list(models), count, lambda name: _clock(run, models[name], x))


HEADINGS = ("network of", "input", "training step, ms", "", "inference, ms", "", "saved, MB an image")


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table: before and after, and how many times quicker."""
    found = [row["network"], "x".join(map(str, row["shape"]))]
    for mode in ("step", "inference"):
        before, after = (rounds.quartiles(row[mode][name])[0] for name in ("before", "after"))
        ratio = rounds.quartiles([a / b for a, b in zip(row[mode]["before"], row[mode]["after"], strict=True)])[0]
        found += [f"{three_digits(1e3 * before)} -> {three_digits(1e3 * after)}", f"{ratio:.2f}x"]
    saved = [row["saved_bytes"][name] / row["shape"][0] / 1e6 for name in ("before", "after")]
    return (*found, f"{saved[0]:.1f} -> {saved[1]:.1f}")


def _step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    _last(model(x)).mean().backward()


def _inference(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def _last(out: Any) -> Tensor:
    """Of an encoder's features the last."""
    return out if isinstance(out, Tensor) else out[-1]


def _clock(run: Callable[[nn.Module, Tensor], None], model: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    run(model, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
