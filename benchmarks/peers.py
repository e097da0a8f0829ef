"""fastdense beside the other ways of running a DenseNet on this CPU: ``make bench-peers``.

Inference, or the training step with ``--mode training``. The contenders are those of
:mod:`~fastdense.benchmarks.runtimes`, in one process, with the same weights and images.

- Weights are random, running statistics those of photographs, so that activations are like a trained network's.
- Parity first: logits are compared with the naive network in float64, in training also every gradient, on small
  images. Nothing is timed where fastdense exceeds its budget of :mod:`fastdense.parity`, about twice stock PyTorch's
  error; what the peers make is only reported.
- A round times every contender once, in an order that rotates. So each finds caches full of another's weights.
- A contender's first call is timed together with what builds it: conversion, export, compilation without caches.

A contender that cannot run is a row too, which says why.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastdense import images, parity
from fastdense.architectures import CONFIGS

from . import results as results_module
from . import rounds
from .cases import CIFAR_NETWORKS, DENSENET121, DTYPES, NAIVE, PARITY_BATCHES, Network, parity_rows
from .run import Steps, empty_table
from .runtimes import CHANNELS_LAST, EAGER, FASTDENSE, PEER_MODES, RUNTIMES, Run, Runtime

Row = dict[str, Any]
_STOCK = (EAGER, CHANNELS_LAST)
_INDISPENSABLE = (*_STOCK, FASTDENSE)
"""Whose failure ends the benchmark; another's is said in its row."""

_DEFAULTS: dict[str, tuple[tuple[Network, int], ...]] = {
    "inference": ((DENSENET121, 1), (DENSENET121, 16)),
    "training": ((DENSENET121, 8), (CIFAR_NETWORKS[0], 64)),
}
"""Networks and batches."""

_NEEDED = ("matplotlib", "sklearn", "PIL")
_CALIBRATION_IMAGES, _CALIBRATION_BATCH = 32, 8
_PARITY_SECONDS = 4.0
_SETTLE = 0.1
"""Seconds before each timed call, in which worker threads of the contender before it stop spinning; ONNX Runtime's
were seen to slow whatever came 20 ms later by up to 1.6 times."""


# -- measuring ------------------------------------------------------------------------------------------------


class ParityError(Exception):
    """fastdense's logits are further from float64 than their budget."""


@dataclass(frozen=True)
class Case:
    """What every contender is timed at."""

    network: Network
    batch: int
    dtype_name: str
    mode: str = "inference"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def runtimes(self) -> list[Runtime]:
        return [runtime for runtime in RUNTIMES if self.mode in runtime.modes]

    def __str__(self) -> str:
        return f"{self.mode}, {self.network.title}, batch {self.batch}, {self.dtype_name}"

    def row(self, runtime: Runtime) -> Row:
        return {
            "subject": self.network.name,
            "title": self.network.title,
            "batch": self.batch,
            "dtype": self.dtype_name,
            "contender": runtime.name,
        }


def measure(case: Case, seconds: float, repeats: int | None, begin: Callable[[str, float], None]) -> list[Row]:
    """A row a contender.

    Args:
        case: what is measured.
        seconds: about how long the rounds may take.
        repeats: how many rounds, if ``seconds`` is not to decide.
        begin: told of each part, and about how many seconds it takes.

    Raises:
        ParityError: fastdense computes something else.
    """
    if case.mode == "training":
        begin(f"{case}: parity of every gradient", _PARITY_SECONDS)
        for failure in parity.failures(parity_rows(case.network, "cpu", case.dtype)):
            raise ParityError(f"{case}: {failure}")
    model, batches, truths = _truth(case.network, case.batch, case.mode)
    rows, runs, inputs, errors = [], {}, {}, {}
    for runtime in case.runtimes:
        begin(f"{case}: first call of {runtime.name}", runtime.first_call_s)
        row = case.row(runtime) | {"note": runtime.why_not(case.dtype_name)}
        rows.append(row)
        if row["note"] is not None:
            continue
        own_model, own = copy.deepcopy(model), [x.contiguous(memory_format=runtime.memory_format) for x in batches]
        try:
            start = time.perf_counter()
            run = runtime.build(own_model, own[0], case.dtype)
            run(own[0])
            row["first_call_s"] = time.perf_counter() - start
        except Exception as error:
            if runtime in _INDISPENSABLE:
                raise
            row["note"] = f"failed with {type(error).__name__}: {str(error)[:200]}"
            continue
        runs[runtime.name], inputs[runtime.name] = run, own[0]
        errors[runtime.name] = [
            parity.relative_error(torch.as_tensor(run(x)), truth) for x, truth in zip(own, truths, strict=True)
        ]
        row["error"] = statistics.median(errors[runtime.name])

    allowed = _check(case, errors)
    begin(str(case), seconds)
    times = _times(runs, inputs, seconds, repeats)
    for row in rows:
        if row["note"] is None:
            row |= _timing(times[row["contender"]], times[FASTDENSE.name], case.batch) | {"allowed_error": allowed}
    return rows


def _check(case: Case, errors: dict[str, list[float]]) -> float:
    """The error that fastdense may make, unless it makes a larger one."""
    stock = max(max(errors[runtime.name]) for runtime in _STOCK)
    allowed = parity.BUDGETS[case.dtype].allows(stock)
    row = parity.Row("fastdense's logits", statistics.median(errors[FASTDENSE.name]), stock, allowed)
    for failure in parity.failures([row]):
        raise ParityError(f"{case}: {failure}")
    return allowed


@functools.lru_cache(maxsize=1)  # the dtypes of a network and batch come one after another
def _truth(network: Network, batch: int, mode: str) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """The naive network, batches of photographs, and its logits of them in float64."""
    torch.manual_seed(0)
    model = network.build(NAIVE)
    norms = {module: module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    for norm in norms:
        norm.momentum = None  # running statistics are averages over what follows
    batches = images.photographs(network.size, PARITY_BATCHES * batch).chunk(PARITY_BATCHES)
    with torch.no_grad():
        for few in images.photographs(network.size, _CALIBRATION_IMAGES).split(_CALIBRATION_BATCH):
            model(few)
        for norm, momentum in norms.items():
            norm.momentum = momentum
        exact = copy.deepcopy(model.train(mode == "training")).double()
        return model, list(batches), [exact(x.double()) for x in batches]


def _times(
    runs: dict[str, Run], inputs: dict[str, Tensor], seconds: float, repeats: int | None
) -> dict[str, list[float]]:
    """Each contender's seconds, round by round."""

    def clock(name: str) -> float:
        time.sleep(_SETTLE)
        start = time.perf_counter()
        runs[name](inputs[name])
        return time.perf_counter() - start

    warm = sum(_SETTLE + clock(name) for name in runs)
    return rounds.interleaved(list(runs), repeats or rounds.how_many(seconds, warm), clock)


def _timing(seconds: list[float], fast: list[float], batch: int) -> Row:
    """A contender's columns; its ratio is the median of the rounds' ratios to fastdense."""
    milliseconds = rounds.spread("ms", [1000 * s for s in seconds])
    return {
        "rounds": len(seconds),
        **milliseconds,
        "ms_per_image": milliseconds["ms"] / batch,
        **rounds.spread("ratio", [own / other for own, other in zip(seconds, fast, strict=True)]),
        "all_ms": [round(1000 * s, 4) for s in seconds],
    }


# -- the run --------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, save, draw and show; 0, or 1 where fastdense is not exact, or 2 where a package is missing."""
    options = _parser().parse_args(argv)
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        print(f"the benchmark needs {', '.join(missing)}: pip install 'fastdense[peers]'", file=sys.stderr)
        return 2
    from . import plots

    cases = list(_cases(options))
    results: Row = {"environment": results_module.environment("cpu"), "mode": options.mode, "peers": []}
    expected = len(cases) * (sum(runtime.first_call_s for runtime in cases[0].runtimes) + options.seconds)
    try:
        with Steps(expected) as steps:
            for case in cases:
                results["peers"] += measure(case, options.seconds, options.repeats, steps.begin)
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    folder = results_module.default_folder() / "peers"
    path = results_module.write(results, options.json) if options.json else results_module.save(results, folder)
    show(results, [path, *plots.draw(path)])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m fastdense.benchmarks.peers", description="On this CPU: fastdense beside its peers."
    )
    torch_names = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    several: Row = {"nargs": "+"}
    parser.add_argument("--mode", choices=PEER_MODES, default="inference", help="default: %(default)s")
    parser.add_argument("--arch", choices=CONFIGS, metavar="NETWORK", help="default: densenet121", **several)
    parser.add_argument("--size", type=int, help="default: 224", **several)
    parser.add_argument("--batch", type=int, help="default: 1 and 16, or 8 in training", **several)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=list(DTYPES),
        type=lambda name: torch_names.get(name, name),
        help="default: %(default)s",
        **several,
    )
    parser.add_argument("--repeats", type=int, help="rounds of a case (default: as many as --seconds allows)")
    parser.add_argument(
        "--seconds", type=float, default=20, help="about how long the rounds of a case take (default: %(default)s)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="where the rows go, and their plot beside them (default: peers/<device>-<date>.json of the results)",
    )
    return parser


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    chosen = _DEFAULTS[options.mode]
    if options.arch or options.size or options.batch:
        networks = itertools.product(options.arch or ["densenet121"], options.size or [224])
        batches = options.batch or [batch for network, batch in chosen if network is DENSENET121]
        chosen = tuple((Network(*network), batch) for network, batch in itertools.product(networks, batches))
    for (network, batch), dtype in itertools.product(chosen, options.dtype):
        yield Case(network, batch, dtype, options.mode)


def show(results: Row, paths: Sequence[Path]) -> None:
    """Print the table of one run, and where it was saved."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    environment = results["environment"]
    console.print(
        f"\n[bold]{environment['device']}[/], {', '.join((environment['isa'], *environment['bf16_isa']))}, "
        f"{environment['threads']} threads, torch {environment['torch']}, backend {environment['backend']}\n",
        highlight=False,
    )
    console.print(_table(results["mode"], results["peers"]))
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)


def _table(mode: str, rows: list[Row]) -> Table:
    table = empty_table(f"{PEER_MODES[mode]}, ms: medians of interleaved rounds", "network", "contender")
    for column in ("ms", "quartiles", "per image", "over fastdense", "first call, s", "error"):
        table.add_column(column, justify="right")
    for _, case in itertools.groupby(rows, key=lambda row: [row[key] for key in ("title", "batch", "dtype")]):
        for i, row in enumerate(case):
            where = {0: row["title"], 1: f"batch {row['batch']}, {row['dtype']}"}.get(i, "")
            if row["note"] is None:
                table.add_row(where, row["contender"], *_numbers(row))
            else:
                table.add_row(where, f"{row['contender']}: {row['note']}")
        table.add_section()
    return table


def _numbers(row: Row) -> list[str]:
    colour = "green" if row["ratio_q1"] > 1 else "red" if row["ratio_q3"] < 1 else "default"
    return [
        f"{row['ms']:.1f}",
        f"{row['ms_q1']:.1f}-{row['ms_q3']:.1f}",
        f"{row['ms_per_image']:.2f}",
        f"[{colour}]{row['ratio']:.2f}x[/]",
        f"{row['first_call_s']:.1f}",
        f"{row['error']:.1e}",
    ]


if __name__ == "__main__":
    sys.exit(main())
