"""Plots of saved results, and of nothing else: ``python -m fastdense.benchmarks.plots [RESULTS.json]``.

Without a file the newest results of ``benchmarks/results`` are drawn. The pictures go beside their file and are
named by the device, so that a later run of the same device replaces them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from .cases import FAST, FAST_RECOMPUTING, MODES, NAIVE, NAIVE_CONTIGUOUS, NAIVE_RECOMPUTING
from .results import default_folder, device_slug, latest, load
from .runtimes import (
    CHANNELS_LAST,
    COMPILE,
    EAGER,
    FASTDENSE,
    FASTDENSE_RECOMPUTING,
    ONNXRUNTIME,
    OPENVINO,
    PEER_MODES,
    RECOMPUTING,
    RUNTIMES,
)

Row = dict[str, Any]

_COLOURS = {  # of Okabe and Ito, told apart by colour-blind readers too
    NAIVE_CONTIGUOUS.name: "#999999",
    NAIVE.name: "#D55E00",
    NAIVE_RECOMPUTING.name: "#E69F00",
    FAST.name: "#0072B2",
    FAST_RECOMPUTING.name: "#56B4E9",
    EAGER.name: "#999999",
    CHANNELS_LAST.name: "#D55E00",
    RECOMPUTING.name: "#F0E442",
    COMPILE.name: "#E69F00",
    OPENVINO.name: "#009E73",
    ONNXRUNTIME.name: "#CC79A7",
    FASTDENSE_RECOMPUTING.name: "#56B4E9",
    FASTDENSE.name: "#0072B2",
}
_LABELS = {
    NAIVE_CONTIGUOUS.name: "naive concatenation, contiguous",
    NAIVE.name: "naive concatenation, channels-last",
    NAIVE_RECOMPUTING.name: "naive, memory_efficient",
    FAST.name: "fastdense",
    FAST_RECOMPUTING.name: "fastdense, memory_efficient",
    EAGER.name: "PyTorch, contiguous",
    CHANNELS_LAST.name: "PyTorch, channels-last",
    RECOMPUTING.name: "PyTorch, channels-last, memory_efficient",
    COMPILE.name: "torch.compile",
    OPENVINO.name: "OpenVINO",
    ONNXRUNTIME.name: "ONNX Runtime",
    FASTDENSE_RECOMPUTING.name: "fastdense, memory_efficient",
    FASTDENSE.name: "fastdense",
}
_INK = "#333333"

_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "savefig.dpi": 180,
}


def draw(path: Path) -> list[Path]:
    """Draw everything that a file of results has rows for.

    Returns:
        The pictures' paths.

    Raises:
        ValueError: the file does not hold results.
    """
    results = load(path)
    pictures = []
    with style.context(_STYLE):
        for name, figure in _figures(results):
            picture = path.parent / f"{device_slug(results)}-{name}.png"
            figure.savefig(picture)
            pictures.append(picture)
    return pictures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m fastdense.benchmarks.plots", description="Draw saved results.")
    parser.add_argument("results", nargs="?", type=Path, help="a file of results (default: the newest)")
    options = parser.parse_args(argv)
    try:
        pictures = draw(options.results or latest(default_folder()))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*pictures, sep="\n")
    return 0


def _figures(results: Row) -> Iterator[tuple[str, Figure]]:
    if "peers" in results:
        name = {"inference": "peers", "training": "training-peers"}[results["mode"]]
        yield name, _peers(results["mode"], results["peers"], results["environment"])
        return
    for dtype in dict.fromkeys(row["dtype"] for row in results["speed"]):
        rows = [row for row in results["speed"] if row["dtype"] == dtype]
        yield f"speed-{dtype}", _speed(rows, dtype, results["environment"])
    if results["memory"]:
        yield "memory", _memory(results["memory"], results["environment"])
    if results["growth"]:
        yield "growth", _growth(results["growth"], results["environment"])
    if results["training"]:
        yield "training", _training(results["training"], results["environment"])


# -- speed ----------------------------------------------------------------------------------------------------


def _speed(rows: list[Row], dtype: str, environment: Row) -> Figure:
    """A panel a mode, a group of bars a subject."""
    groups = list(dict.fromkeys((row["title"], row["batch"]) for row in rows))
    contenders = [NAIVE_CONTIGUOUS.name, NAIVE.name, FAST.name]
    title = f"Speed against naive concatenation, {dtype}: longer is faster"
    figure = _figure(14, 2.2 + 0.75 * len(groups), title, environment)
    panels = figure.subplots(1, len(MODES), sharey=True)
    for axes, mode in zip(panels, MODES, strict=True):
        axes.set_title({"forward": "training forward", "step": "training step"}.get(mode, mode))
        for place, (subject, batch) in enumerate(groups):
            for offset, contender in zip((-0.27, 0, 0.27), contenders, strict=True):
                row = _pick(rows, title=subject, batch=batch, mode=mode, contender=contender)
                if row is None:
                    continue
                low, high = row["speedup"] - row["speedup_q1"], row["speedup_q3"] - row["speedup"]
                axes.barh(place + offset, row["speedup"], 0.25, color=_COLOURS[contender])
                if contender != NAIVE.name:
                    axes.errorbar(row["speedup"], place + offset, xerr=[[low], [high]], color=_INK, lw=1, capsize=2)
                factor = f"{row['speedup']:.2f}x  " if contender != NAIVE.name else ""
                beyond_line = max(row["speedup_q3"], 1)
                _annotate(axes, f"{factor}{_number(row['ms'])} ms", beyond_line, place + offset, contender)
        axes.axvline(1, color=_COLOURS[NAIVE.name], lw=1)
        axes.set_xlim(0, 1.55 * max((row["speedup_q3"] for row in rows if row["mode"] == mode), default=1))
        axes.set_xlabel("times as fast as naive, channels-last")
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(groups)), [f"{subject}\nbatch {batch}" for subject, batch in groups])
    panels[0].invert_yaxis()
    _legend(figure, contenders, "medians of interleaved rounds; whiskers: quartiles")
    return figure


# -- peers ----------------------------------------------------------------------------------------------------


def _peers(mode: str, rows: list[Row], environment: Row) -> Figure:
    """A panel a dtype, a group of bars a network and batch; a contender that did not run says why."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    groups = list(dict.fromkeys((row["title"], row["batch"]) for row in rows))
    contenders = [runtime.name for runtime in RUNTIMES if mode in runtime.modes]
    figure = _figure(
        14, 2.2 + 1.4 * len(groups), f"{PEER_MODES[mode]} beside its peers: shorter is better", environment
    )
    for axes, dtype in zip(figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0], dtypes, strict=True):
        axes.set_title(dtype)
        for place, (network, batch) in enumerate(groups):
            for i, contender in enumerate(contenders):
                height = place + 0.14 * (i - (len(contenders) - 1) / 2)
                row = _pick(rows, title=network, batch=batch, dtype=dtype, contender=contender)
                if row is None:
                    continue
                if row["note"] is not None:
                    _annotate(axes, f"{_LABELS[contender]}: {row['note']}"[:60], 0, height, contender)
                    continue
                low, middle, high = (row[key] / batch for key in ("ms_q1", "ms", "ms_q3"))
                axes.barh(height, middle, 0.125, color=_COLOURS[contender])
                axes.errorbar(middle, height, xerr=[[middle - low], [high - middle]], color=_INK, lw=1, capsize=2)
                factor = "" if contender == FASTDENSE.name else f"  ({row['ratio']:.2f}x)"
                _annotate(axes, f"{_number(middle)} ms{factor}", high, height, contender)
        axes.set_xlim(0, 1.25 * axes.get_xlim()[1])
        axes.set_xlabel("ms per image")
        axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(groups)), [f"{network}\nbatch {batch}" for network, batch in groups])
    axes.invert_yaxis()
    _legend(figure, contenders, "medians and quartiles; in brackets: time over fastdense's")
    return figure


# -- memory ---------------------------------------------------------------------------------------------------


def _memory(rows: list[Row], environment: Row) -> Figure:
    """Saved bytes an image, and the peak of a step, where it was measured."""
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    panels: list[tuple[str, str, Callable[[Row], float | None]]] = [
        ("saved by the forward for the backward", "MB per image", lambda row: _mega(row["saved_bytes"], row["batch"])),
        ("peak of a training step", "MB above the model and the batch", lambda row: _mega(row["peak_bytes"])),
    ]
    panels = [panel for panel in panels if any(panel[2](row) is not None for row in rows)]
    groups = [
        list(dict.fromkeys((r["title"], r["batch"], r["dtype"]) for r in rows if value(r) is not None))
        for _, _, value in panels
    ]
    figure = _figure(14, 2.2 + 1.2 * max(map(len, groups)), "Memory of training: shorter is better", environment)
    for axes, (title, unit, value), shown in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, groups, strict=True
    ):
        axes.set_title(title)
        for place, (network, batch, dtype) in enumerate(shown):
            for i, contender in enumerate(contenders):
                row = _pick(rows, title=network, batch=batch, dtype=dtype, contender=contender)
                width = None if row is None else value(row)
                if width is None:
                    continue
                height = place + 0.2 * (i - (len(contenders) - 1) / 2)
                axes.barh(height, width, 0.18, color=_COLOURS[contender])
                naive = _pick(rows, title=network, batch=batch, dtype=dtype, contender=NAIVE.name)
                _annotate(
                    axes,
                    f"{_number(width)} MB{_less(width, value(naive) if naive else None)}",
                    width,
                    height,
                    contender,
                )
        axes.set_yticks(range(len(shown)), [f"{n}\n{d}, batch {b}" for n, b, d in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
        axes.set_xlabel(unit)
        axes.grid(axis="y", visible=False)
    _legend(figure, contenders, "in brackets: against naive concatenation")
    return figure


def _less(value: float, naive: float | None) -> str:
    """How many times less than naive, where that is worth saying."""
    return f"  ({naive / value:.1f}x less)" if naive and naive > 1.05 * value else ""


def _mega(value: int | None, images: int = 1) -> float | None:
    return None if value is None else value / images / 1e6


# -- growth ---------------------------------------------------------------------------------------------------


class _Quantity(NamedTuple):
    """What grows in a line of panels."""

    key: str
    label: str
    unit: str
    scale: float
    naive_in_depth: int
    """The degree of naive's growth with depth: it saves every prefix again. Multiplications grow so in any case."""
    fast_in_depth: int


_QUANTITIES = (
    _Quantity("peak_bytes", "peak of a training step (MB)", "MB", 1e-6, 2, 1),
    _Quantity("saved_bytes", "saved for backward (MB)", "MB", 1e-6, 2, 1),
    _Quantity("step_ms", "time of a training step (ms)", "ms", 1, 2, 2),
)


def _growth(rows: list[Row], environment: Row) -> Figure:
    """Measured points, and the polynomials that theory expects through them."""
    variables = list(dict.fromkeys(row["variable"] for row in rows))
    quantities = [q for q in _QUANTITIES if any(row.get(q.key) is not None for row in rows)]
    figure = _figure(14, 1.3 + 3.8 * len(quantities), "Growth of a training step", environment)
    for line, quantity in zip(figure.subplots(len(quantities), len(variables), squeeze=False), quantities, strict=True):
        for axes, variable in zip(line, variables, strict=True):
            shown = [row for row in rows if row["variable"] == variable and row[quantity.key] is not None]
            points = {
                contender: {
                    row["value"]: row[quantity.key] * quantity.scale for row in shown if row["contender"] == contender
                }
                for contender in (NAIVE.name, FAST.name)
            }
            in_depth = {NAIVE.name: quantity.naive_in_depth, FAST.name: quantity.fast_in_depth}
            for contender, curve in points.items():
                degree = {"depth": in_depth[contender], "batch": 1, "resolution": 2}[variable]
                _curve(axes, curve, contender, degree, points[NAIVE.name], quantity.unit)
            axes.set_title(_growth_title(variable, shown))
            axes.set_xlabel(_VARIABLES[variable])
            axes.set_ylabel(quantity.label)
            axes.set_xlim(0, 1.05 * max(row["value"] for row in shown))
            axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    _legend(figure, [NAIVE.name, FAST.name], "dots: measured; lines: least-squares fits of the expected degree")
    return figure


_VARIABLES = {"depth": "depth", "batch": "images in a batch", "resolution": "height and width (pixels)"}


def _growth_title(variable: str, rows: list[Row]) -> str:
    """The network, and under it what is held fixed."""
    row = rows[0]
    arguments = ", ".join(f"{name}={value}" for name, value in row["arguments"].items() if name != variable)
    network = f"{row['subject']}({arguments})" if arguments else row["subject"]
    fixed = [f"{row['size']}x{row['size']}"] if variable != "resolution" else []
    fixed += [f"batch {row['batch']}"] if variable != "batch" else []
    return network + "\n" + ", ".join((*fixed, row["dtype"]))


def _curve(
    axes: Axes, points: dict[int, float], contender: str, degree: int, naive: dict[int, float], unit: str
) -> None:
    """A quantity over what grows; the last point is labelled with how much less than naive it is."""
    if not points:
        return
    x, y = np.array(list(points.items())).T
    colour = _COLOURS[contender]
    axes.plot(x, y, "o", color=colour, ms=6)
    if len(points) > degree + 1:
        every_x = np.linspace(x[0], x[-1], 100)
        axes.plot(every_x, np.polyval(np.polyfit(x, y, degree), every_x), color=colour, lw=1.5)
    label = f"{_number(y[-1])} {unit}{_less(y[-1], naive.get(x[-1]))}"
    readable = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.annotate(label, (x[-1], y[-1]), (4, 9), textcoords="offset points", ha="right", color=colour, bbox=readable)


# -- training -------------------------------------------------------------------------------------------------


def _training(training: Row, environment: Row) -> Figure:
    """Both loss curves on top of each other, and how far apart they are."""
    runs = training["runs"]
    losses = {name: np.array(run["loss"]) for name, run in runs.items()}
    steps = np.arange(1, len(losses["naive"]) + 1)
    epochs = steps * training["epochs"] / len(steps)
    title = f"DenseNet-BC of depth {training['arguments']['depth']} trained on handwritten digits from one seed"
    figure = _figure(11, 6.5, title, environment)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(epochs, losses["naive"], color=_COLOURS[NAIVE.name], lw=5, alpha=0.5)
    above.plot(epochs, losses["fast"], color=_COLOURS[FAST.name], lw=1.2)
    above.set_ylim(bottom=0)
    above.set_ylabel("training loss")
    accuracy = {name: run["test_accuracy"][-1] for name, run in runs.items()}
    above.annotate(
        f"test accuracy\nnaive {accuracy['naive']:.1%}\nfast {accuracy['fast']:.1%}",
        (0.98, 0.95), xycoords="axes fraction", ha="right", va="top",
    )  # fmt: skip
    rounding = np.finfo(np.float32).eps
    below.semilogy(epochs, np.maximum(np.abs(losses["fast"] - losses["naive"]), rounding), color=_INK, lw=1)
    below.set_ylabel("difference")
    below.set_xlabel("epoch")
    below.set_xlim(0, training["epochs"])
    _legend(figure, [NAIVE.name, FAST.name], "the difference starts as a rounding, which training amplifies")
    return figure


# -- a GPU's check ------------------------------------------------------------------------------------------------


def draw_gpu_check(kernels: list[Row], networks: list[Row], environment: Row, picture: Path) -> None:
    """Each kernel's time over its floor, and each contender's speed over eager's, from rows of ``gpu-check``."""
    modes = list(dict.fromkeys(row["mode"] for row in kernels))
    cases = list(dict.fromkeys((row["mode"], row["batch"]) for row in networks))
    lines = max([len(kernels) + len(modes), len(networks) + len(cases), 1])
    with style.context(_STYLE):
        figure = _figure(14, 1.5 + 0.24 * lines, "DenseNet-121 in bfloat16 on a GPU", environment)
        left, right = figure.subplots(1, 2)
        _bars(left, "time over floor: shorter is better", [
            (f"{row['kernel']}, {row['mode']}", row["seconds"] / row["floor"], _COLOURS[FAST.name]) for row in kernels
        ])  # fmt: skip
        _bars(right, "speed over eager AMP: longer is better", [
            (
                f"{row['contender']}, {row['mode']}, batch {row['batch']}",
                row["of_eager"],
                _COLOURS[FAST.name if row["contender"].startswith("fast") else NAIVE.name],
            )
            for row in networks
            if row["of_eager"] is not None
        ])  # fmt: skip
        figure.savefig(picture)


def _bars(axes: Axes, title: str, bars: list[tuple[str, float, str]]) -> None:
    """One below the other, with a line at 1."""
    axes.set_title(title)
    if bars:
        labels, values, colours = zip(*bars, strict=True)
        axes.barh(range(len(bars)), values, color=colours)
        axes.set_yticks(range(len(bars)), labels, fontsize=8)
        for y, value in enumerate(values):
            _annotate(axes, _number(value), value, y, NAIVE.name)
    axes.invert_yaxis()
    axes.axvline(1, color=_INK, linewidth=0.8)
    axes.grid(axis="y", visible=False)


# -- what the figures share -----------------------------------------------------------------------------------

_HEAD, _FOOT = 0.95, 0.35
"""Inches that the title and legend, and the line about the environment, take."""


def _figure(width: float, height: float, title: str, environment: Row) -> Figure:
    """Empty, with its title, and at its foot where it was measured."""
    between = (0, _FOOT / height, 1, 1 - (_HEAD + _FOOT) / height)
    layout = ConstrainedLayoutEngine(rect=between, wspace=0.04, hspace=0.06)
    figure = Figure(figsize=(width, height), layout=layout)
    where = [
        environment["device"],
        environment["isa"] if environment["device_type"] == "cpu" else f"CUDA {environment['cuda']}",
        f"threads: {environment['threads']}" if environment["device_type"] == "cpu" else "",
        f"torch {environment['torch']}",
        f"fastdense {environment['fastdense']}, {environment['backend']} backend",
        f"commit {environment['commit']}" if environment["commit"] else "",
        environment["date"],
    ]
    figure.text(0.01, 1 - 0.15 / height, title, va="top", fontsize=15, fontweight="bold")
    figure.text(0.01, 0.12 / height, "  |  ".join(filter(None, where)), fontsize=8, color="#777777")
    return figure


def _legend(figure: Figure, contenders: list[str], note: str) -> None:
    """Under the title: the contenders' colours, and a note on the right."""
    y = 1 - 0.42 / figure.get_figheight()
    handles = [Patch(color=_COLOURS[name], label=_LABELS[name]) for name in contenders]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.002, y), ncols=len(handles), fontsize=9.5)
    figure.text(0.99, y - 0.11 / figure.get_figheight(), note, ha="right", va="top", fontsize=9.5)


def _annotate(axes: Axes, text: str, x: float, y: float, contender: str) -> None:
    """A label right of a bar's end."""
    weight = "bold" if contender in (FAST.name, FAST_RECOMPUTING.name, FASTDENSE.name) else "normal"
    axes.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5, fontweight=weight
    )  # fmt: skip


def _number(value: float) -> str:
    """Three digits, and whole numbers from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _pick(rows: list[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


if __name__ == "__main__":
    sys.exit(main())
