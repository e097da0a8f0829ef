"""``fastdense bench``: parity, speed, memory, growth, roofline and a training run; then tables, plots and a report.

The suites differ in what they measure (:mod:`~fastdense.benchmarks.cases`). ``--arch``, ``--size``, ``--batch`` and
``--mode`` time networks of one's own choice instead. ``--compare`` judges the run against an earlier one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastdense.architectures import CONFIGS, image_size
from fastdense.cli import positive

from . import parts, rounds, timing, training
from . import results as results_module
from .cases import INFERENCE, SUITES, TRAINING, Meeting, MemoryCase, Suite, default_device, default_dtypes
from .contenders import MODES, NAIVE_AND_FAST, Workload
from .memory import Meter, meter
from .subjects import DTYPES, Network

Row = dict[str, Any]

_NEEDED = ("matplotlib", "sklearn", "PIL")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite; 0, or 1 where fast is not exact or slower than before, or 2 where a package is missing."""
    parser = _parser()
    options = parser.parse_args(argv)
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        print(f"the benchmark needs {', '.join(missing)}: pip install 'fastdense[bench]'", file=sys.stderr)
        return 2
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: this torch sees no GPU")
    from . import compare, plots, report, tables

    try:
        earlier = results_module.load(options.compare) if options.compare else None
    except (OSError, ValueError) as error:
        parser.error(f"--compare: {error}")
    suite, device = _chosen(options), options.device
    dtypes = tuple(options.dtype or default_dtypes(device))
    name = "-".join([options.suite, *(options.dtype or [])])
    results: Row = {"suite": name, "environment": results_module.environment(device)}
    try:
        with Steps(_expected_seconds(suite, device, dtypes)) as steps, _empty_compiler_cache():
            results |= _measured(suite, device, dtypes, steps)
            steps.begin("saving, drawing", _DRAWING)
            path = results_module.save(results, options.output)
            pictures = plots.draw(path)
            page = report.write(path)
    except timing.ParityError as error:
        print(f"not the same function, so nothing is compared: {error}", file=sys.stderr)
        return 1
    changes = compare.changes(earlier, results) if earlier else []
    if options.json:
        print(json.dumps(results | ({"changes": [asdict(change) for change in changes]} if earlier else {})))
    else:
        tables.show(results, [path, *pictures, page])
        if earlier:
            compare.show(changes)
    return 1 if any(change.is_regression for change in changes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fastdense bench", description="fastdense against naive concatenation and every alternative, measured here."
    )
    several: Row = {"nargs": "+"}
    parser.add_argument(
        "--suite",
        choices=SUITES,
        default="quick",
        help="quick: against naive, about five minutes on two cores (default); peers: DenseNet-121 beside "
        "torch.compile, OpenVINO, ONNX Runtime, timm, MONAI; sizes: other networks and resolutions beside OpenVINO; "
        "scaling: depth, batch, resolution; full: hours",
    )
    parser.add_argument("--device", default=default_device(), help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32, and bf16 on a GPU", **several)
    parser.add_argument("--arch", choices=CONFIGS, metavar="NETWORK", help="time these instead", **several)
    parser.add_argument("--size", type=positive, help="height and width (default: 224; CIFAR networks: 32)", **several)
    parser.add_argument("--batch", type=positive, help="their images in a batch (default: 8)", **several)
    parser.add_argument("--mode", choices=MODES, help="what of them is timed (default: step and inference)", **several)
    parser.add_argument("--seconds", type=float, help="about how long the rounds of one mode take")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="an earlier run; slower than that is exit code 1"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=results_module.default_folder(),
        metavar="DIR",
        help="where results, plots and the report go (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else, on stdout")
    return parser


def _chosen(options: argparse.Namespace) -> Suite:
    """The suite, or the speed alone of what was asked for by hand."""
    suite = SUITES[options.suite]
    if options.arch or options.size or options.batch or options.mode:
        contenders = max((meeting.contenders for meeting in suite.meetings), key=len, default=NAIVE_AND_FAST)
        modes = options.mode or ("step", "inference")
        phases = [tuple(m for m in modes if m in phase) for phase in (TRAINING, INFERENCE)]
        networks = [
            Network(arch, size)
            for arch in options.arch or ["densenet121"]
            for size in options.size or [image_size(arch)]
        ]
        meetings = [
            Meeting(network, phase, contenders, tuple(options.batch or [8]))
            for network, phase in itertools.product(networks, filter(None, phases))
        ]
        suite = Suite(tuple(meetings), suite.seconds)
    return replace(suite, seconds=options.seconds) if options.seconds else suite


# -- parts ----------------------------------------------------------------------------------------------------

_CHECKING, _MEASURING, _GROWING, _ROOFLINE, _DRAWING = 2.0, 4.0, 9.0, 8.0, 8.0
"""Seconds that parts take on two cores, per subject and dtype, case, point, case and run, for the time left."""

_GROWTH_ROUNDS = 5


def _expected_seconds(suite: Suite, device: str, dtypes: tuple[str, ...]) -> float:
    cases = suite.speed_cases(device, dtypes)
    checks = _CHECKING * len({(case.subject, case.dtype) for case in cases})
    memory = _MEASURING * len(suite.memory_cases(device, dtypes))
    growth = _GROWING * len(list(suite.growth_cases(device, dtypes[0])))
    trained = sum(2 * program.seeds * program.expected_seconds for program in suite.programs)
    others = trained + _ROOFLINE * len(suite.roofline) + _DRAWING
    return checks + sum(case.expected_seconds for case in cases) + memory + growth + others


def _measured(suite: Suite, device: str, dtypes: tuple[str, ...], steps: Steps) -> Row:
    """All parts of the results; one that a suite does not measure is empty."""
    cases = suite.speed_cases(device, dtypes)
    checks = []
    for subject, name in dict.fromkeys((case.subject, case.dtype_name) for case in cases):
        steps.begin(f"parity: {subject.name}, {name}", _CHECKING)
        checks.append(timing.check(subject, device, name, DTYPES[name]))
    speed = [row for case in cases for row in timing.measure(case, steps.begin)]
    with meter(device) as bytes_meter:
        memory = _measure_memory(suite, device, dtypes, bytes_meter, steps)
        growth = _measure_growth(suite, device, dtypes[0], bytes_meter, steps)
    return {
        "parity": checks,
        "speed": speed,
        "memory": memory,
        "growth": growth,
        "roofline": _measure_parts(suite, device, dtypes[-1], steps),
        "training": [training.compare(program, device, steps.begin) for program in suite.programs],
    }


@contextmanager
def _empty_compiler_cache() -> Iterator[None]:
    """For torch.compile's first calls to be first ones."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def _measure_memory(suite: Suite, device: str, dtypes: tuple[str, ...], meter: Meter, steps: Steps) -> list[Row]:
    rows = []
    for case in suite.memory_cases(device, dtypes):
        steps.begin(f"memory: {case}, {case.mode}", _MEASURING)
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
    for workload in workloads.values():
        workload.clock("step")
    times = rounds.interleaved(list(workloads), _GROWTH_ROUNDS, lambda name: 1000 * workloads[name].clock("step"))
    return [rounds.spread("step_ms", times[name]) for name in workloads]


def _memory_row(case: MemoryCase, meter: Meter) -> Row:
    return {
        "subject": case.subject.name,
        "arguments": getattr(case.subject, "arguments", {}),
        "title": case.subject.title,
        "size": case.subject.size,
        "batch": case.batch,
        "dtype": case.dtype_name,
        "mode": case.mode,
        "contender": case.contender.name,
        **{f"{name}_bytes" if name != "note" else name: value for name, value in asdict(meter.measure(case)).items()},
    }


def _measure_parts(suite: Suite, device: str, dtype: str, steps: Steps) -> list[Row]:
    rows = []
    for network, batch in suite.roofline:
        steps.begin(f"roofline: {network.title}, batch {batch}", _ROOFLINE)
        rows += parts.measure(network, batch, device, dtype)
    return rows


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


if __name__ == "__main__":
    sys.exit(main())
