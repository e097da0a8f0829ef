"""DenseNet-121 of other libraries before and after ``fastdense.convert``: ``python -m fastdense.benchmarks.libraries``.

Both take turns, so that the drift of the machine cancels in their ratio. Everything is in channels-last memory, which
is the quickest for the original too.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import fastdense
from fastdense.memory import saved_activation_bytes
from fastdense.text import aligned

from . import results as results_module
from . import rounds
from .cases import default_device
from .results import three_digits

Row = dict[str, Any]

_FEWEST_ROUNDS = 8


def _monai() -> nn.Module:
    return import_module("monai.networks.nets").DenseNet121(spatial_dims=2, in_channels=3, out_channels=1000)


def _encoder() -> nn.Module:
    encoders = import_module("segmentation_models_pytorch.encoders")
    return encoders.get_encoder("densenet121", weights=None)


LIBRARIES: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: import_module("torchvision.models").densenet121(),
    "timm": lambda: import_module("timm").create_model("densenet121"),
    "monai": _monai,
    "torchxrayvision": lambda: import_module("torchxrayvision.models").DenseNet(in_channels=3),
    "segmentation_models_pytorch": _encoder,
}
"""By package: DenseNet-121, or the encoder of that name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the libraries that are installed, and save it beside the other results."""
    parser = argparse.ArgumentParser("python -m fastdense.benchmarks.libraries", description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--seconds", type=float, default=8.0, help="about how long each comparison takes")
    options = parser.parse_args(argv)
    rows = []
    for library in filter(find_spec, LIBRARIES):
        rows.append(measured(library, options.batch, options.size, options.device, options.seconds))
    parts: Row = {part: [] for part in results_module.PARTS}
    results = parts | dict(suite="libraries", environment=results_module.environment(options.device), libraries=rows)
    path = results_module.save(results, results_module.default_folder())
    print(aligned([HEADINGS, *map(cells, rows)]))
    print(path)
    return 0


def measured(library: str, batch: int, size: int, device: str, seconds: float) -> Row:
    """A network of one library, and its conversion."""
    torch.manual_seed(0)
    stock = LIBRARIES[library]().to(device).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size).to(device, memory_format=torch.channels_last)
    models = {"before": stock, "after": fastdense.convert(stock)}
    row: Row = dict(library=library, batch=batch, size=size)
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


HEADINGS = ("DenseNet-121 of", "training step, ms", "", "inference, ms", "", "saved, MB an image")


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table: before and after, and how many times quicker."""
    found = [row["library"]]
    for mode in ("step", "inference"):
        before, after = (rounds.quartiles(row[mode][name])[0] for name in ("before", "after"))
        ratio = rounds.quartiles([a / b for a, b in zip(row[mode]["before"], row[mode]["after"], strict=True)])[0]
        found += [f"{three_digits(1e3 * before)} -> {three_digits(1e3 * after)}", f"{ratio:.2f}x"]
    saved = [row["saved_bytes"][name] / row["batch"] / 1e6 for name in ("before", "after")]
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
