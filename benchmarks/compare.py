"""Is fast slower, or larger, than in an earlier run?  ``fastdense bench --compare OLD.json``, or two files::

    python -m fastdense.benchmarks.compare OLD.json NEW.json

A machine's speed differs from run to run, so what is compared is fast's time over naive's, round by round, which
both runs measured in one breath. A case has regressed if that ratio grew by more than a fifth and the two runs'
rounds are told apart by Mann and Whitney's test at 1%, after Holm's correction for the number of cases. Bytes do not
scatter: they have regressed when they grew by more than a twentieth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from . import results as results_module
from .contenders import FAST, NAIVE
from .tables import console_for_tables, empty_table

Row = dict[str, Any]

SIGNIFICANCE = 0.01
_SLOWER, _LARGER = 1.2, 1.05


@dataclass(frozen=True)
class Change:
    """Of one quantity of fast from the earlier run to the later one."""

    what: str
    quantity: str
    before: float
    after: float
    p_value: float
    """Of no change; 0 for bytes."""
    limit: float
    """The factor above which it is a regression, if significant."""

    @property
    def factor(self) -> float:
        return self.after / self.before

    @property
    def is_significant(self) -> bool:
        return self.p_value < SIGNIFICANCE

    @property
    def is_regression(self) -> bool:
        return self.is_significant and self.factor > self.limit

    @property
    def is_improvement(self) -> bool:
        return self.is_significant and self.factor < 1 / self.limit


def changes(old: Row, new: Row) -> list[Change]:
    """Of everything that both runs measured; p-values are corrected for how much that is."""
    return [*_holm(list(_times(old, new))), *_bytes(old, new)]


def _times(old: Row, new: Row) -> Iterator[Change]:
    from scipy.stats import mannwhitneyu

    before, after = _ratios(old), _ratios(new)
    for case in before.keys() & after.keys():
        p_value = mannwhitneyu(before[case], after[case]).pvalue
        first, second = (float(np.median(ratios[case])) for ratios in (before, after))
        yield Change(", ".join(case), "time over naive's", first, second, float(p_value), _SLOWER)


def _ratios(results: Row) -> dict[tuple[str, ...], list[float]]:
    """Fast's time over naive's, round by round, of each case and mode."""
    found: dict[tuple[str, ...], list[float]] = {}
    for rows in results_module.timings(results):
        by_name = {row["contender"]: row for row in rows}
        fast, naive = by_name[FAST.name], by_name[NAIVE.name]
        case = (fast["title"], f"batch {fast['batch']}", fast["dtype"], fast["mode"])
        found[case] = results_module.ratios(fast, naive)
    return found


def _holm(found: list[Change]) -> list[Change]:
    """With p-values that bound the chance of even one false alarm (Holm 1979); the largest factors first."""
    corrected, least = [], 0.0
    for rank, change in enumerate(sorted(found, key=lambda change: change.p_value)):
        least = max(least, min(1.0, (len(found) - rank) * change.p_value))
        corrected.append(replace(change, p_value=least))
    return sorted(corrected, key=lambda change: -change.factor)


def _bytes(old: Row, new: Row) -> Iterator[Change]:
    def found(results: Row) -> dict[tuple[str, str], int]:
        rows = [row for row in results["memory"] if row["contender"].startswith(FAST.name)]
        return {
            (f"{r['title']}, batch {r['batch']}, {r['dtype']}, {r['mode']}, {r['contender']}", name): r[key]
            for r in rows
            for name, key in (("saved bytes", "saved_bytes"), ("peak bytes", "peak_bytes"))
            if r[key] is not None
        }

    before, after = found(old), found(new)
    for what, name in before:
        if (what, name) in after:
            yield Change(what, name, before[what, name], after[what, name], 0.0, _LARGER)


def show(found: Sequence[Change]) -> None:
    """Print what regressed or improved, and how much there was to compare."""
    console = console_for_tables()
    notable = [change for change in found if change.is_regression or change.is_improvement]
    if notable:
        console.print(_table(notable))
    regressions = sum(change.is_regression for change in found)
    colour = "red" if regressions else "green"
    console.print(
        f"[{colour}]{regressions} regressions[/], {len(notable) - regressions} improvements, "
        f"in {len(found)} comparisons with the earlier run"
    )


def _table(found: Sequence[Change]) -> Table:
    table = empty_table("Against the earlier run", "case", "of fast")
    for column in ("before", "after", "factor", "p"):
        table.add_column(column, justify="right")
    for change in found:
        colour = "red" if change.is_regression else "green"
        values = [f"{value:.3g}" if value < 1e4 else f"{value:,.0f}" for value in (change.before, change.after)]
        p_value = f"{change.p_value:.1g}" if change.p_value else ""
        table.add_row(change.what, change.quantity, *values, f"[{colour}]{change.factor:.2f}x[/]", p_value)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where something regressed."""
    parser = argparse.ArgumentParser("python -m fastdense.benchmarks.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(argv)
    try:
        found = changes(results_module.load(options.old), results_module.load(options.new))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    show(found)
    return 1 if any(change.is_regression for change in found) else 0


if __name__ == "__main__":
    sys.exit(main())
