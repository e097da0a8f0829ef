"""The whole benchmark: parity, speed, memory, growth and a training run, then tables and plots.

``fastdense bench`` calls :func:`main`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import results as results_module
from . import rounds, training
from .cases import (
    DTYPES,
    FAST,
    NAIVE,
    SPEED_CONTENDERS,
    SUITES,
    MemoryCase,
    Suite,
    Workload,
    default_device,
    default_dtypes,
)
from .memory import Meter, meter

Row = dict[str, Any]

_NEEDED = ("pytest", "pytest_benchmark", "matplotlib", "sklearn", "PIL")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite; 0, or 1 where a case failed, or 2 where a package is missing."""
    parser = _parser()
    options = parser.parse_args(argv)
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        print(f"the benchmark needs {', '.join(missing)}: pip install 'fastdense[bench]'", file=sys.stderr)
        return 2
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: this torch sees no GPU")
    from . import plots

    suite, device = SUITES[options.suite], options.device
    dtypes = (options.dtype,) if options.dtype else default_dtypes(device)
    results: dict[str, Any] = {"suite": options.suite, "environment": results_module.environment(device)}
    with Steps(_expected_seconds(suite, device, dtypes)) as steps:
        report, passed = _time_cases(options, steps)
        results["parity"] = _unique(row["extra_info"]["parity"] for row in report)
        results["speed"] = [speed for row in report for speed in row["extra_info"]["rows"]]
        with meter(device) as bytes_meter:
            results["memory"] = _measure_memory(suite, device, dtypes, bytes_meter, steps)
            results["growth"] = _measure_growth(suite, device, dtypes[0], bytes_meter, steps)
        results["training"] = _train(suite, device, steps)
        steps.begin("saving, drawing", _DRAWING)
        path = results_module.save(results, options.output)
        pictures = plots.draw(path)
    if options.json:
        print(json.dumps(results))
    else:
        show(results, [path, *pictures])
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fastdense bench", description="Fast against naive concatenation, measured.")
    parser.add_argument(
        "--suite", choices=SUITES, default="quick", help="quick: about 5 minutes on two cores (default); full: longer"
    )
    parser.add_argument("--device", default=default_device(), help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="one dtype (default: fp32; on a GPU bf16 autocast too)")
    parser.add_argument(
        "--output",
        type=Path,
        default=results_module.default_folder(),
        metavar="DIR",
        help="where results and plots go (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else, on stdout")
    return parser


# -- parts ----------------------------------------------------------------------------------------------------

_CHECKING, _MEASURING, _GROWING, _EPOCH, _DRAWING = 1.5, 1.8, 7.0, 3.0, 6.0
"""Seconds that parts take on two cores, per case, case, point, epoch and run, for the time left."""

_GROWTH_ROUNDS = 5


def _expected_seconds(suite: Suite, device: str, dtypes: tuple[str, ...]) -> float:
    speed = sum(case.seconds + _CHECKING for case in suite.speed_cases(device, dtypes))
    memory = _MEASURING * len(suite.memory_cases(device, dtypes))
    growth = _GROWING * len(list(suite.growth_cases(device, dtypes[0])))
    return speed + memory + growth + _EPOCH * suite.epochs + _DRAWING


def _time_cases(options: argparse.Namespace, steps: Steps) -> tuple[list[Row], bool]:
    """pytest-benchmark's report of ``bench_speed.py``, and whether every case passed."""
    import pytest

    class ShowCase:
        def pytest_runtest_setup(self, item: pytest.Function) -> None:
            case: Any = item.callspec.params["case"]
            steps.begin(f"speed: {case}", case.seconds + _CHECKING)

    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        arguments = [
            str(here / "bench_speed.py"),
            f"--suite={options.suite}",
            f"--device={options.device}",
            *([f"--dtype={options.dtype}"] if options.dtype else []),
            f"--benchmark-json={report}",
            f"--rootdir={here}",
            f"--config-file={os.devnull}",  # of the project that this happens to be started in
            "--capture=no",
            "-pno:cacheprovider",
        ]
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = pytest.main(arguments, plugins=[ShowCase()])
        if code != pytest.ExitCode.OK:
            print(output.getvalue(), file=sys.stderr)
        timed = json.loads(report.read_text())["benchmarks"] if report.exists() and report.stat().st_size else []
        return timed, code == pytest.ExitCode.OK


def _measure_memory(suite: Suite, device: str, dtypes: tuple[str, ...], meter: Meter, steps: Steps) -> list[Row]:
    rows = []
    for case in suite.memory_cases(device, dtypes):
        steps.begin(f"memory: {case}", _MEASURING)
        rows.append(_memory_row(case, meter))
    return rows


def _measure_growth(suite: Suite, device: str, dtype: str, meter: Meter, steps: Steps) -> list[Row]:
    rows = []
    for variable, value, cases in suite.growth_cases(device, dtype):
        steps.begin(f"growth with {variable}: {value}", _GROWING)
        for case, milliseconds in zip(cases, _step_times(cases), strict=True):
            rows.append({"variable": variable, "value": value, **_memory_row(case, meter), **milliseconds})
    return rows


def _step_times(cases: list[MemoryCase]) -> list[Row]:
    """A training step's milliseconds, of each case, in interleaved rounds."""
    workloads = {
        case.contender.name: Workload(case.subject, case.contender, case.batch, case.device, case.dtype)
        for case in cases
    }

    def clock(name: str) -> float:
        arguments = workloads[name].prepare("step")
        start = time.perf_counter()
        workloads[name].run(*arguments)
        return 1000 * (time.perf_counter() - start)

    for name in workloads:
        clock(name)
    times = rounds.interleaved(list(workloads), _GROWTH_ROUNDS, clock)
    return [rounds.spread("step_ms", times[name]) for name in workloads]


def _memory_row(case: MemoryCase, meter: Meter) -> Row:
    return {
        "subject": case.subject.name,
        "arguments": case.subject.arguments,
        "title": case.subject.title,
        "size": case.subject.size,
        "batch": case.batch,
        "dtype": case.dtype_name,
        "contender": case.contender.name,
        **{f"{name}_bytes" if name != "note" else name: value for name, value in asdict(meter.measure(case)).items()},
    }


def _train(suite: Suite, device: str, steps: Steps) -> Row:
    steps.begin("training on handwritten digits", 0)
    share = _EPOCH * suite.epochs / training.steps(suite.epochs)
    return training.compare(suite.epochs, device, on_step=lambda: steps.advance(share))


def _unique(rows: Any) -> list[Row]:
    return list({(row["subject"], row["dtype"]): row for row in rows}.values())


# -- showing --------------------------------------------------------------------------------------------------


class Steps:
    """What is being measured and the time left, on stderr: a bar on a terminal, a line a step elsewhere."""

    def __init__(self, seconds: float) -> None:
        console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,  # by a thread that would disturb the timings
            speed_estimate_period=600,
            disable=not console.is_terminal,
        )
        self._console, self._total = console, seconds
        self._done = self._current = 0.0

    def __enter__(self) -> Steps:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.update(self._task, completed=self._total, description="done", refresh=True)
        self._bar.stop()

    def begin(self, what: str, seconds: float) -> None:
        """The step before this one, if any, is over; this one takes about ``seconds``."""
        self.advance(self._current)
        self._current = seconds
        if self._console.is_terminal:
            self._bar.update(self._task, description=what, refresh=True)
        else:
            self._console.print(f"{self._done / self._total:4.0%}  {what}", highlight=False, soft_wrap=True)

    def advance(self, seconds: float) -> None:
        self._done += seconds
        self._bar.update(self._task, completed=self._done, refresh=True)


def show(results: Row, paths: Sequence[Path]) -> None:
    """Print tables of one run, and where it was saved."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    environment = results["environment"]
    console.print()
    console.print(
        f"[bold]{environment['device']}[/], {environment['isa']}, {environment['threads']} threads, "
        f"torch {environment['torch']}, backend {environment['backend']}, {results['suite']} suite",
        highlight=False,
    )
    for table in (_parity_table(results), _speed_table(results), _memory_table(results), _growth_table(results)):
        console.print()
        console.print(table)
    console.print()
    for name, run in results["training"]["runs"].items():
        console.print(
            f"{results['training']['epochs']} epochs of digits, {name}: loss {run['loss'][0]:.3f} to "
            f"{run['loss'][-1]:.3f}, test accuracy {run['test_accuracy'][-1]:.1%}",
            highlight=False,
        )
    console.print()
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)


def _parity_table(results: Row) -> Table:
    table = empty_table(
        "Parity with naive, before timing: output, every gradient, running statistics", "subject", "dtype"
    )
    for column in ("tensors", "worst use of its budget"):
        table.add_column(column, justify="right")
    table.add_column("of")
    for row in results["parity"]:
        worst = f"{row['worst_use_of_budget']:.0%}"
        table.add_row(row["subject"], row["dtype"], str(row["tensors"]), worst, row["worst_tensor"])
    return table


def _speed_table(results: Row) -> Table:
    table = empty_table("Time, ms: medians of interleaved rounds", "subject", "mode")
    for column in ("rounds", *(contender.name for contender in SPEED_CONTENDERS), "fast over naive", "quartiles"):
        table.add_column(column, justify="right")
    for _, subject in groupby(results["speed"], key=lambda row: [row[key] for key in ("title", "batch", "dtype")]):
        for i, (mode, contenders) in enumerate(groupby(subject, key=lambda row: row["mode"])):
            rows = {row["contender"]: row for row in contenders}
            fast = rows[FAST.name]
            colour = "green" if fast["speedup_q1"] > 1 else "red" if fast["speedup_q3"] < 1 else "default"
            table.add_row(
                {0: fast["title"], 1: f"batch {fast['batch']}, {fast['dtype']}"}.get(i, ""),
                mode,
                str(fast["rounds"]),
                *(f"{rows[contender.name]['ms']:.1f}" for contender in SPEED_CONTENDERS),
                f"[{colour}]{fast['speedup']:.2f}x[/]",
                f"{fast['speedup_q1']:.2f}-{fast['speedup_q3']:.2f}",
            )
        table.add_section()
    return table


def _memory_table(results: Row) -> Table:
    table = empty_table("Memory of training, MB", "network", "batch", "dtype", "contender")
    for column in ("saved per image", "less", "peak of a step", "less"):
        table.add_column(column, justify="right")
    for _, group in groupby(results["memory"], key=lambda row: [row[key] for key in ("title", "batch", "dtype")]):
        rows = list(group)
        naive = next(row for row in rows if row["contender"] == NAIVE.name)
        for row in rows:
            table.add_row(
                *([row["title"], str(row["batch"]), row["dtype"]] if row is rows[0] else ["", "", ""]),
                row["contender"],
                *_bytes_and_factor(row["saved_bytes"], naive["saved_bytes"], row["batch"]),
                *_bytes_and_factor(row["peak_bytes"], naive["peak_bytes"], 1),
            )
        table.add_section()
    return table


def _bytes_and_factor(value: int | None, naive: int | None, images: int) -> tuple[str, str]:
    if value is None:
        return "-", ""
    return f"{value / images / 1e6:.1f}", f"{naive / value:.1f}x" if naive else ""


def _growth_table(results: Row) -> Table:
    table = empty_table("Growth of a training step", "with", "from", "to", "contender")
    for column in ("peak, MB", "grows", "time, ms", "grows"):
        table.add_column(column, justify="right")
    for (variable, contender), group in groupby(
        sorted(results["growth"], key=lambda row: (row["variable"], row["contender"])),
        key=lambda row: (row["variable"], row["contender"]),
    ):
        points = list(group)
        first, last = points[0], points[-1]
        peak = _growth([row["peak_bytes"] / 1e6 for row in points if row["peak_bytes"] is not None])
        times = _growth([row["step_ms"] for row in points])
        table.add_row(variable, str(first["value"]), str(last["value"]), contender, *peak, *times)
    return table


def _growth(values: list[float]) -> tuple[str, str]:
    if len(values) < 2:
        return "-", ""
    return f"{values[0]:.1f} to {values[-1]:.1f}", f"{values[-1] / values[0]:.1f}x"


def empty_table(title: str, *columns: str) -> Table:
    """An empty one in the style of the reports."""
    return Table(*columns, title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)


if __name__ == "__main__":
    sys.exit(main())
