"""Tables of saved results, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import results as results_module
from .contenders import FAST, MODES, NAIVE, NAIVE_AND_FAST
from .training import chance, summaries

Row = dict[str, Any]


def show(results: Row, paths: Sequence[Path]) -> None:
    """Print one run, and where it was saved."""
    console = console_for_tables()
    console.print()
    console.print(headline(results), highlight=False)
    for table in tables(results):
        console.print()
        console.print(table)
    console.print()
    for line in training_lines(results):
        console.print(line, highlight=False)
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)


def console_for_tables() -> Console:
    """Wide enough where nothing says how wide it is."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def headline(results: Row) -> str:
    """What it was measured on."""
    environment = results["environment"]
    sets = ", ".join((environment["isa"], *environment["bf16_isa"]))
    return (
        f"[bold]{environment['device']}[/], {sets}, {environment['threads']} threads, torch {environment['torch']}, "
        f"backend {environment['backend']}, {results['suite']} suite"
    )


def training_lines(results: Row) -> Iterator[str]:
    """How each contender learnt, and how long it took."""
    for row in results["training"] or []:
        for name, found in summaries(row).items():
            yield (
                f"{row['title']}, {name}, {len(found.ends)} seeds: last losses {min(found.ends):.4f} to "
                f"{max(found.ends):.4f}, test accuracy {min(found.accuracies):.1%} to {max(found.accuracies):.1%}, "
                f"{found.step_ms:.1f} ms a step, {found.seconds:.0f} s"
            )
        if len(row["runs"][NAIVE.name]) > 1:
            yield f"{row['title']}: the last losses of both lie as far apart by chance with p = {chance(row):.2f}"


def tables(results: Row) -> Iterator[Table]:
    """One of every part that has rows."""
    if results["parity"]:
        yield _parity(results["parity"])
    few = {contender.name for contender in NAIVE_AND_FAST}
    kinds: dict[bool, list[list[Row]]] = {True: [], False: []}  # whether these few alone took turns
    for rows in results_module.timings(results):
        kinds[{row["contender"] for row in rows} == few].append(rows)
    if kinds[True]:
        yield _against_naive(kinds[True])
    if kinds[False]:
        yield _against_all(kinds[False])
    for part, table in (("memory", _memory), ("growth", _growth), ("roofline", _roofline)):
        if results[part]:
            yield table(results[part])


def empty_table(title: str, *columns: str) -> Table:
    """In the style of the reports."""
    return Table(*columns, title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)


def _parity(rows: list[Row]) -> Table:
    table = empty_table(
        "Parity with naive, before timing: output, every gradient, running statistics", "subject", "dtype"
    )
    for column in ("tensors", "worst use of its budget"):
        table.add_column(column, justify="right")
    table.add_column("of")
    for row in rows:
        worst = f"{row['worst_use_of_budget']:.0%}"
        table.add_row(row["subject"], row["dtype"], str(row["tensors"]), worst, row["worst_tensor"])
    return table


def _against_naive(timings: list[list[Row]]) -> Table:
    """A line a mode, with the three contenders beside each other."""
    table = empty_table("Time, ms: medians of interleaved rounds", "subject", "mode")
    for column in ("rounds", *(contender.name for contender in NAIVE_AND_FAST), "fast over naive", "quartiles"):
        table.add_column(column, justify="right")
    for _, subject in groupby(timings, key=lambda rows: [rows[0][key] for key in ("title", "batch", "dtype")]):
        for i, contenders in enumerate(subject):
            rows = {row["contender"]: row for row in contenders}
            naive, fast = rows[NAIVE.name], rows[FAST.name]
            speedup, low, high = results_module.ratio(naive, fast)
            table.add_row(
                _where(fast, i),
                fast["mode"],
                str(fast["rounds"]),
                *(f"{rows[contender.name]['ms']:.1f}" for contender in NAIVE_AND_FAST),
                _coloured(speedup, low, high),
                f"{low:.2f}-{high:.2f}",
            )
        table.add_section()
    return table


def _against_all(timings: list[list[Row]]) -> Table:
    """A line a contender."""
    table = empty_table("Time beside all alternatives, ms: medians of interleaved rounds", "subject", "contender")
    for column in ("ms", "quartiles", "per image", "times fast's", "first call, s", "error"):
        table.add_column(column, justify="right")
    for rows in timings:
        fast = next(row for row in rows if row["contender"] == FAST.name)
        for i, row in enumerate(rows):
            where = MODES[row["mode"]] if i == 2 else _where(row, i)
            if row["note"] is not None:
                table.add_row(where, row["contender"], row["note"])
                continue
            table.add_row(
                where,
                row["contender"],
                f"{row['ms']:.1f}",
                f"{row['ms_q1']:.1f}-{row['ms_q3']:.1f}",
                f"{row['ms'] / row['batch']:.2f}",
                "" if row is fast else _coloured(*results_module.ratio(row, fast)),
                f"{row['first_call_s']:.1f}",
                "" if row["error"] is None else f"{row['error']:.1e}",
            )
        table.add_section()
    return table


def _where(row: Row, line: int) -> str:
    return {0: row["title"], 1: f"batch {row['batch']}, {row['dtype']}"}.get(line, "")


def _coloured(ratio: float, low: float, high: float) -> str:
    """Green where three quarters of the rounds are in fast's favour, red where as many are not."""
    colour = "green" if low > 1 else "red" if high < 1 else "default"
    return f"[{colour}]{ratio:.2f}x[/]"


def _memory(rows: list[Row]) -> Table:
    table = empty_table("Memory, MB", "network", "batch", "dtype", "mode", "contender")
    for column in ("saved per image", "less", "peak", "less"):
        table.add_column(column, justify="right")
    for _, group in groupby(rows, key=lambda row: [row[key] for key in ("title", "batch", "dtype", "mode")]):
        same = list(group)
        naive = next(row for row in same if row["contender"] == NAIVE.name)
        for row in same:
            first = [row["title"], str(row["batch"]), row["dtype"], row["mode"]]
            table.add_row(
                *(first if row is same[0] else [""] * len(first)),
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


def _growth(rows: list[Row]) -> Table:
    table = empty_table("Growth of a training step", "with", "from", "to", "contender")
    for column in ("peak, MB", "grows", "time, ms", "grows"):
        table.add_column(column, justify="right")
    for (variable, contender), group in groupby(
        sorted(rows, key=lambda row: (row["variable"], row["contender"])),
        key=lambda row: (row["variable"], row["contender"]),
    ):
        points = list(group)
        first, last = points[0], points[-1]
        peak = _first_to_last([row["peak_bytes"] / 1e6 for row in points if row["peak_bytes"] is not None])
        times = _first_to_last([row["step_ms"] for row in points])
        table.add_row(variable, str(first["value"]), str(last["value"]), contender, *peak, *times)
    return table


def _first_to_last(values: list[float]) -> tuple[str, str]:
    if len(values) < 2:
        return "-", ""
    return f"{values[0]:.1f} to {values[-1]:.1f}", f"{values[-1] / values[0]:.1f}x"


def _roofline(rows: list[Row]) -> Table:
    table = empty_table("Time over the floor, by part", "network", "mode", "part")
    for column in ("ms", "floor, ms", "over floor", "GFLOP/s", "GB/s"):
        table.add_column(column, justify="right")
    for _, group in groupby(rows, key=lambda row: [row[key] for key in ("title", "batch", "dtype", "mode")]):
        for i, row in enumerate(group):
            table.add_row(
                _where(row, i),
                row["mode"] if i == 0 else "",
                row["part"],
                f"{1e3 * row['seconds']:.2f}",
                f"{1e3 * row['floor_s']:.2f}",
                f"{row['seconds'] / row['floor_s']:.1f}",
                f"{2e-9 * row['macs'] / row['seconds']:.1f}",
                f"{1e-9 * row['bytes'] / row['seconds']:.1f}",
            )
        table.add_section()
    return table
