"""Numbers of README and docs, from saved results and from the model: ``make docs-numbers``.

Where a text says ``<!--n KEY-->VALUE<!--/n-->``, VALUE is what KEY stands for, and this program writes it anew. A test
fails where they differ, and where a measured quantity stands in a text without a key. Keys are

===================================================== ============================================================
``ms:RUN:SUBJECT:BATCH:DTYPE:MODE:CONTENDER``         median time, ms
``x:RUN:SUBJECT:BATCH:DTYPE:MODE:SLOWER/QUICKER``     how many times the other's time, median of the rounds
``first:RUN:SUBJECT:BATCH:DTYPE:MODE:CONTENDER``      first call and what builds it, s
``saved:RUN:SUBJECT:BATCH:DTYPE:CONTENDER``           what a training forward saves, MB an image
``peak:RUN:SUBJECT:BATCH:DTYPE:MODE:CONTENDER``       peak memory, MB
``growth:RUN:VARIABLE:VALUE:CONTENDER``               median time of a step where something grows, ms
``table:RUN:MODE``                                    all contenders of a run
``memory:RUN:MODE``                                   their peaks
``roofline:RUN``                                      each part's time over its floor
``curves:RUN``                                        how naive and fast learnt, and how long it took
``traffic:MODE:WHO``                                  what the passes over memory move, MB an image, by formula
``libraries:RUN``                                     other libraries' networks before and after ``convert``
``report:MODE``                                       a GPU's time an image that ``make kernel-report`` predicts, us
and those of :mod:`~fastdense.benchmarks.scaling_numbers`
===================================================== ============================================================

where RUN is the device and suite that a file of ``benchmarks/results`` is named by, of which the newest counts.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import figures, libraries
from . import results as results_module
from .contenders import FAST, MODES
from .results import three_digits
from .scaling_numbers import NUMBERS
from .training import chance, summaries

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]

_MARKED = re.compile(r"<!--n (?P<key>[^>]+?)-->(?P<value>.*?)<!--/n-->", re.DOTALL)

_QUANTITY = re.compile(r"\d[\d.,]*\s?(?:ms|us|(?:MB|GB|TB)(?:/s)?|GFLOP/s|TFLOP/s|images/s|x|%)(?!\w)")


def documents() -> list[Path]:
    """README and docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewritten(text: str) -> str:
    """With every marked value anew.

    Raises:
        ValueError: a key is unknown, or what it names was not measured.
    """
    return _MARKED.sub(lambda found: f"<!--n {found['key']}-->{value_of(found['key'])}<!--/n-->", text)


def unmarked(text: str) -> str:
    """The text without what is marked."""
    return _MARKED.sub("", text)


def value_of(key: str) -> str:
    """What a key stands for."""
    if key in NUMBERS:
        return NUMBERS[key]()
    kind, *names = key.split(":")
    if kind not in _KINDS:
        raise ValueError(f"unknown key {key!r}: its kind must be one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](*names)
    except (StopIteration, TypeError, KeyError):
        raise ValueError(f"{key!r} names nothing that was measured") from None


@functools.cache
def _run(name: str) -> Row:
    path = next(
        path for path in results_module.newest(results_module.default_folder()) if path.stem.rpartition("-")[0] == name
    )
    return results_module.load(path)


def _timed(run: str, subject: str, batch: str, dtype: str, mode: str, contender: str) -> Row:
    wanted = {"subject": subject, "batch": int(batch), "dtype": dtype, "mode": mode, "contender": contender}
    return next(row for row in _run(run)["speed"] if row.items() >= wanted.items() and row["note"] is None)


def _ms(*names: str) -> str:
    return three_digits(_timed(*names)["ms"])


def _ratio(run: str, subject: str, batch: str, dtype: str, mode: str, pair: str) -> str:
    slower, quicker = (_timed(run, subject, batch, dtype, mode, name) for name in pair.split("/"))
    return f"{results_module.ratio(slower, quicker)[0]:.2f}x"


def _first_call(*names: str) -> str:
    return three_digits(_timed(*names)["first_call_s"])


def _remembered(run: str, **wanted: Any) -> Row:
    return next(row for row in _run(run)["memory"] if row.items() >= wanted.items())


def _saved(run: str, subject: str, batch: str, dtype: str, contender: str) -> str:
    row = _remembered(run, subject=subject, batch=int(batch), dtype=dtype, mode="step", contender=contender)
    return f"{row['saved_bytes'] / row['batch'] / 1e6:.1f}"


def _peak(run: str, subject: str, batch: str, dtype: str, mode: str, contender: str) -> str:
    row = _remembered(run, subject=subject, batch=int(batch), dtype=dtype, mode=mode, contender=contender)
    return f"{row['peak_bytes'] / 1e6:.0f}"


def _growth(run: str, variable: str, value: str, contender: str) -> str:
    wanted = {"variable": variable, "value": int(value), "contender": contender}
    return three_digits(next(row for row in _run(run)["growth"] if row.items() >= wanted.items())["step_ms"])


def _traffic(mode: str, who: str) -> str:
    naive, fast = figures.COEFFICIENTS[mode]
    return f"{2e-6 * sum(figures.traffic({'naive': naive, 'fast': fast}[who]).values()):.0f}"


def _report(mode: str) -> str:
    _, found, rest = (ROOT / "docs" / "kernel-report.txt").read_text().partition(f"densenet121, {mode},")
    image = re.search(r"([\d.]+) an image", rest) if found else None
    if image is None:
        raise KeyError(mode)
    return image[1]


def _table(run: str, mode: str) -> str:
    """A line a contender, two columns a case: ms, and how many times fast's."""
    cases = [rows for rows in results_module.timings(_run(run)) if rows[0]["mode"] == mode]
    titles = [f"{rows[0]['title']}, batch {rows[0]['batch']}, {rows[0]['dtype']}" for rows in cases]
    lines = ["", f"| {MODES[mode]}, ms | " + " | ".join(titles) + " |", "|---" * (len(cases) + 1) + "|"]
    for contender in dict.fromkeys(row["contender"] for rows in cases for row in reversed(rows)):
        cells = [_cell(rows, contender) for rows in cases]
        if any(cells):
            lines.append(f"| {contender} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _cell(rows: list[Row], contender: str) -> str:
    by_name = {row["contender"]: row for row in rows if row["note"] is None}
    if contender not in by_name:
        return ""
    row, fast = by_name[contender], by_name[FAST.name]
    factor = "" if row is fast else f" ({results_module.ratio(row, fast)[0]:.2f}x)"
    return three_digits(row["ms"]) + factor


def _memory(run: str, mode: str) -> str:
    """A line a contender: the peak of a step, or of inference."""
    rows = [row for row in _run(run)["memory"] if row["mode"] == mode and row["peak_bytes"] is not None]
    cases = list(dict.fromkeys((row["title"], row["batch"], row["dtype"]) for row in rows))
    lines = ["", f"| peak of {MODES[mode]}, MB | " + " | ".join(f"{t}, batch {b}, {d}" for t, b, d in cases) + " |"]
    lines.append("|---" * (len(cases) + 1) + "|")
    for contender in dict.fromkeys(row["contender"] for row in reversed(rows)):
        own = {(r["title"], r["batch"], r["dtype"]): r["peak_bytes"] for r in rows if r["contender"] == contender}
        cells = [f"{own[case] / 1e6:,.0f}" if case in own else "" for case in cases]
        lines.append(f"| {contender} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _roofline(run: str) -> str:
    rows = _run(run)["roofline"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    lines = ["", "| part | " + " | ".join(f"{mode}, ms | over floor" for mode in modes) + " |"]
    lines.append("|---" * (2 * len(modes) + 1) + "|")
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [next(row for row in rows if (row["part"], row["mode"]) == (part, mode)) for mode in modes]
        cells = [f"{three_digits(1e3 * r['seconds'])} | {r['seconds'] / r['floor_s']:.1f}" for r in own]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _curves(run: str) -> str:
    """A line a program and contender: the least and the most of its seeds, and the median of its last losses."""
    lines = ["", "| | seeds | | test accuracy | last losses (median) | p | a step | a run |", "|---" * 8 + "|"]
    for row in _run(run)["training"]:
        for name, found in summaries(row).items():
            seeds = len(found.ends)
            lines.append(
                f"| {row['title']} | {seeds} | {name} | {min(found.accuracies):.1%} to {max(found.accuracies):.1%} "
                f"| {min(found.ends):.4f} to {max(found.ends):.4f} ({np.median(found.ends):.4f}) "
                f"| {f'{chance(row):.2f}' if seeds > 1 else ''} | {three_digits(found.step_ms)} ms "
                f"| {found.seconds:.0f} s |"
            )
    return "\n".join([*lines, ""])


def _libraries(run: str) -> str:
    lines = [libraries.HEADINGS, ("---",) * len(libraries.HEADINGS), *map(libraries.cells, _run(run)["libraries"])]
    return "\n".join(["", *(f"| {' | '.join(line)} |" for line in lines), ""])


_KINDS: dict[str, Callable[..., str]] = {
    "ms": _ms,
    "x": _ratio,
    "first": _first_call,
    "saved": _saved,
    "peak": _peak,
    "growth": _growth,
    "table": _table,
    "memory": _memory,
    "roofline": _roofline,
    "curves": _curves,
    "libraries": _libraries,
    "traffic": _traffic,
    "report": _report,
}


def main() -> int:
    """Rewrite README and docs; 1 where a key stands for nothing."""
    for path in documents():
        text = path.read_text()
        try:
            path.write_text(rewritten(text))
        except ValueError as error:
            print(f"error: {path.relative_to(ROOT)}: {error}", file=sys.stderr)
            return 1
    return 0


def stray_quantities(text: str) -> Iterator[str]:
    """What looks measured and has no key, outside of code."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", unmarked(text), flags=re.DOTALL)
    yield from (found.group() for found in _QUANTITY.finditer(prose))


if __name__ == "__main__":
    sys.exit(main())
