"""A run's plots, tables and environment as one HTML file: ``python -m fastdense.benchmarks.report RESULTS.json``."""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.table import Table
from rich.text import Text

from . import plots, tables
from .results import default_folder, load, newest

_TEMPLATE = Path(__file__).with_suffix(".html.jinja")


def write(path: Path) -> Path:
    """Write the page of a file of results beside it.

    Raises:
        ValueError: the file does not hold results.
    """
    results = load(path)
    page = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE.read_text()).render(
        environment=results["environment"],
        headline=Text.from_markup(tables.headline(results)).plain,
        is_peers=results["suite"].partition("-")[0] in ("peers", "full"),
        pictures=[{"name": name, "data": base64.b64encode(png).decode()} for name, png in plots.pictures(results)],
        tables=[_plain(table) for table in tables.tables(results)],
        training=list(tables.training_lines(results)),
    )  # fmt: skip
    target = path.with_suffix(".html")
    target.write_text(page)
    return target


def _plain(table: Table) -> dict[str, Any]:
    """A table's texts, with the colours of its cells as class names."""
    columns = [{"name": str(column.header), "align": column.justify} for column in table.columns]
    lines = zip(*(column.cells for column in table.columns), strict=True)
    rows = [
        {"cells": [_cell(cell) for cell in line], "ends_section": row.end_section}
        for line, row in zip(lines, table.rows, strict=True)
    ]
    return {"title": str(table.title), "columns": columns, "rows": rows}


def _cell(markup: Any) -> dict[str, str]:
    text = Text.from_markup(str(markup))
    return {"text": text.plain, "style": " ".join(str(span.style) for span in text.spans)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m fastdense.benchmarks.report", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, help="a file of results (default: the newest)")
    options = parser.parse_args(argv)
    try:
        print(write(options.results or newest(default_folder())[-1]))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
