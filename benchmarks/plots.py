"""Plots of saved results, and of nothing else: ``python -m fastdense.benchmarks.plots [RESULTS.json ...]``.

Without a file the newest results of each suite in ``benchmarks/results`` are drawn. The pictures go beside their file
and are named by device and suite, so that a later run of the same device replaces them.
"""

from __future__ import annotations

import argparse
import io
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

from . import results as results_module
from .contenders import (
    ALL,
    COMPILE,
    CUDA_GRAPHS,
    CUDNN_BENCHMARK,
    FAST,
    FAST_FROZEN,
    FAST_RECOMPUTING,
    MAX_AUTOTUNE,
    MODES,
    MONAI,
    NAIVE,
    NAIVE_CONTIGUOUS,
    NAIVE_RECOMPUTING,
    ONNXRUNTIME,
    OPENVINO,
    TIMM,
)
from .results import three_digits
from .training import summaries

Row = dict[str, Any]

_COLOURS = {  # most are Okabe and Ito's, told apart by colour-blind readers too
    NAIVE_CONTIGUOUS.name: "#999999",
    NAIVE.name: "#D55E00",
    NAIVE_RECOMPUTING.name: "#F0E442",
    CUDNN_BENCHMARK.name: "#8C510A",
    TIMM.name: "#C7A17A",
    MONAI.name: "#BFBFBF",
    COMPILE.name: "#E69F00",
    MAX_AUTOTUNE.name: "#F3CB6B",
    CUDA_GRAPHS.name: "#B8860B",
    OPENVINO.name: "#009E73",
    ONNXRUNTIME.name: "#CC79A7",
    FAST_RECOMPUTING.name: "#56B4E9",
    FAST_FROZEN.name: "#003F66",
    FAST.name: "#0072B2",
}
_LABELS = {
    NAIVE_CONTIGUOUS.name: "naive concatenation, contiguous",
    NAIVE.name: "naive concatenation, channels-last",
    FAST.name: "fastdense",
    FAST_RECOMPUTING.name: "fastdense, memory_efficient",
    FAST_FROZEN.name: "fastdense, frozen",
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
    results, drawn = results_module.load(path), []
    for name, png in pictures(results):
        picture = path.parent / f"{results_module.device_slug(results)}-{results['suite']}-{name}.png"
        picture.write_bytes(png)
        drawn.append(picture)
    return drawn


def pictures(results: Row) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of every plot."""
    with style.context(_STYLE):
        for name, figure in _figures(results):
            png = io.BytesIO()
            figure.savefig(png)
            yield name, png.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m fastdense.benchmarks.plots", description="Draw saved results.")
    parser.add_argument("results", nargs="*", type=Path, help="files of results (default: the newest of each suite)")
    options = parser.parse_args(argv)
    try:
        for path in options.results or results_module.newest(results_module.default_folder()):
            print(*draw(path), sep="\n")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _figures(results: Row) -> Iterator[tuple[str, Figure]]:
    environment = results["environment"]
    for dtype in dict.fromkeys(row["dtype"] for row in results["speed"]):
        rows = [rows for rows in results_module.timings(results) if rows[0]["dtype"] == dtype]
        yield f"speed-{dtype}", _speed(rows, dtype, environment)
    if results["memory"]:
        yield "memory", _memory(results["memory"], environment)
    if results["growth"]:
        yield "growth", _growth(results["growth"], environment)
    if results["roofline"]:
        yield "roofline", _roofline(results["roofline"], environment)
    if results["training"]:
        yield "training", _training(results["training"], environment)


# -- speed ----------------------------------------------------------------------------------------------------


def _speed(timings: list[list[Row]], dtype: str, environment: Row) -> Figure:
    """A panel a mode, a group of bars a subject; a contender that did not run says why."""
    contenders = _in_order({row["contender"] for rows in timings for row in rows})
    modes = [mode for mode in MODES if any(rows[0]["mode"] == mode for rows in timings)]
    groups = {mode: [rows for rows in timings if rows[0]["mode"] == mode] for mode in modes}
    lines = max(sum(len(rows) for rows in group) + len(group) for group in groups.values())
    title = f"Speed against naive concatenation, {dtype}: longer is faster"
    figure = _figure(14, 2.2 + 0.2 * lines, title, environment)
    shared = len({tuple((rows[0]["title"], rows[0]["batch"]) for rows in group) for group in groups.values()}) == 1
    panels = figure.subplots(1, len(modes), sharey=shared, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        axes.set_title(MODES[mode])
        height, places = 0.0, []
        for rows in groups[mode]:
            naive = _pick(rows, contender=NAIVE.name)
            places.append(height + (len(rows) - 1) / 2)
            for row in sorted(rows, key=lambda row: contenders.index(row["contender"])):
                _speed_bar(axes, row, naive, height)
                height += 1
            height += 1
        axes.axvline(1, color=_COLOURS[NAIVE.name], lw=1)
        axes.set_xlim(0, (1.55 if len(modes) > 2 else 1.35) * axes.get_xlim()[1])
        axes.set_xlabel("times as fast as naive, channels-last")
        axes.grid(axis="y", visible=False)
        axes.set_yticks(places, [f"{rows[0]['title']}\nbatch {rows[0]['batch']}" for rows in groups[mode]])
        if not shared or axes is panels[0]:
            axes.invert_yaxis()
    _legend(figure, contenders, "medians of interleaved rounds; whiskers: quartiles")
    return figure


def _speed_bar(axes: Axes, row: Row, naive: Row | None, height: float) -> None:
    if row["note"] is not None or naive is None:
        _annotate(axes, f"{_label(row['contender'])}: {row['note']}"[:70], 0, height, row["contender"])
        return
    speedup, low, high = results_module.ratio(naive, row)
    axes.barh(height, speedup, 0.9, color=_COLOURS[row["contender"]])
    if row is naive:
        _annotate(axes, f"{three_digits(row['ms'])} ms", 1, height, NAIVE.name)
        return
    axes.errorbar(speedup, height, xerr=[[speedup - low], [high - speedup]], color=_INK, lw=1, capsize=2)
    _annotate(axes, f"{speedup:.2f}x  {three_digits(row['ms'])} ms", max(high, 1), height, row["contender"])


# -- memory ---------------------------------------------------------------------------------------------------


def _memory(rows: list[Row], environment: Row) -> Figure:
    """Saved bytes an image, the peak of a step and the peak of inference, where they were measured."""
    contenders = _in_order({row["contender"] for row in rows})
    panels: list[tuple[str, str, Callable[[Row], float | None]]] = [
        ("saved by the forward for the backward", "MB per image", lambda row: _mega(row["saved_bytes"], row["batch"])),
        ("peak of a training step", "MB above the model and the batch", lambda row: _peak(row, "step")),
        ("peak of inference", "MB, the weights and all else included", lambda row: _peak(row, "inference")),
    ]
    panels = [panel for panel in panels if any(panel[2](row) is not None for row in rows)]
    groups = [
        list(dict.fromkeys((r["title"], r["batch"], r["dtype"]) for r in rows if value(r) is not None))
        for _, _, value in panels
    ]
    lines = max(len(contenders) * len(group) for group in groups)
    figure = _figure(14, 2.2 + 0.3 * lines, "Memory: shorter is better", environment)
    for axes, (title, unit, value), shown in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, groups, strict=True
    ):
        axes.set_title(title)
        for place, (network, batch, dtype) in enumerate(shown):
            own = [r for r in rows if (r["title"], r["batch"], r["dtype"]) == (network, batch, dtype)]
            bars = {r["contender"]: value(r) for r in own if value(r) is not None}
            for i, contender in enumerate(name for name in contenders if name in bars):
                height = place + 0.8 / len(bars) * (i - (len(bars) - 1) / 2)
                width = bars[contender] or 0.0
                axes.barh(height, width, 0.72 / len(bars), color=_COLOURS[contender])
                text = f"{three_digits(width)} MB{_less(width, bars.get(NAIVE.name))}"
                _annotate(axes, text, width, height, contender)
        axes.set_yticks(range(len(shown)), [f"{n}\n{d}, batch {b}" for n, b, d in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * axes.get_xlim()[1])
        axes.set_xlabel(unit)
        axes.grid(axis="y", visible=False)
    _legend(figure, contenders, "in brackets: against naive concatenation")
    return figure


def _peak(row: Row, mode: str) -> float | None:
    return _mega(row["peak_bytes"]) if row["mode"] == mode else None


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
    label = f"{three_digits(y[-1])} {unit}{_less(y[-1], naive.get(x[-1]))}"
    readable = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.annotate(label, (x[-1], y[-1]), (4, 9), textcoords="offset points", ha="right", color=colour, bbox=readable)


# -- roofline -------------------------------------------------------------------------------------------------


def _roofline(rows: list[Row], environment: Row) -> Figure:
    """Each part as a dot under the machine's roof, and its time over its floor as a bar."""
    cases = list(dict.fromkeys((row["title"], row["batch"], row["dtype"], row["mode"]) for row in rows))
    lines = max(len(rows), 12)
    figure = _figure(14, 2.2 + 0.22 * lines, "fastdense under the roof of this machine", environment)
    left, right = figure.subplots(1, 2)
    roof = rows[0]["flops"], rows[0]["bandwidth"]
    intensities = np.geomspace(0.5, 2000, 200)
    left.loglog(intensities, np.minimum(roof[0], intensities * roof[1]) / 1e9, color=_INK, lw=1.5)
    left.annotate(
        f"{roof[0] / 1e9:.0f} GFLOP/s, {roof[1] / 1e9:.0f} GB/s, both measured", (0.98, 0.04),
        xycoords="axes fraction", ha="right",
    )  # fmt: skip
    left.set_xlabel("arithmetic intensity: operations per byte that has to move")
    left.set_ylabel("GFLOP/s")
    colours = dict(zip(cases, ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#D55E00"), strict=False))
    height, ticks = 0, []
    for case in cases:
        own = [row for row in rows if (row["title"], row["batch"], row["dtype"], row["mode"]) == case]
        reached = [(2 * row["macs"] / row["bytes"], 2e-9 * row["macs"] / row["seconds"]) for row in own if row["macs"]]
        left.plot(*zip(*reached, strict=True), "o", color=colours[case], label=f"{case[0]}, batch {case[1]}, {case[3]}")
        for row in own:
            over = row["seconds"] / row["floor_s"]
            right.barh(height, over, 0.8, color=colours[case])
            _annotate(right, f"{over:.1f}  {three_digits(1e3 * row['seconds'])} ms", over, height, NAIVE.name)
            ticks.append((height, f"{row['part']}, {case[3]}"))
            height += 1
        height += 1
    left.legend(loc="upper left", fontsize=9)
    right.set_yticks(*zip(*ticks, strict=True), fontsize=8)
    right.invert_yaxis()
    right.axvline(1, color=_INK, lw=0.8)
    right.set_xlim(0, 1.2 * right.get_xlim()[1])
    right.set_xlabel("time over the floor: shorter is better")
    right.grid(axis="y", visible=False)
    return figure


# -- training -------------------------------------------------------------------------------------------------


def _training(training: list[Row], environment: Row) -> Figure:
    """Every program's loss curves on top of each other, of every seed, and how far apart those of a seed are."""
    figure = _figure(14, 1.5 + 3.6 * len(training), "Trained on handwritten digits, naive and fast", environment)
    rows = figure.subplots(len(training), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), row in zip(rows, training, strict=True):
        for name, width, alpha in ((NAIVE.name, 4, 0.35), (FAST.name, 1.0, 1.0)):
            for run in row["runs"][name]:
                losses = _smoothed(np.array(run["loss"]))
                epochs = np.linspace(0, row["epochs"], len(losses))
                left.semilogy(epochs, losses, color=_COLOURS[name], lw=width, alpha=alpha)
        found = summaries(row)
        text = [
            f"{name}: {min(own.accuracies):.1%} to {max(own.accuracies):.1%}, {own.seconds:.0f} s"
            for name, own in found.items()
        ]
        left.annotate(
            "\n".join(["test accuracy, time of a run", *text]),
            (0.98, 0.95), xycoords="axes fraction", ha="right", va="top",
        )  # fmt: skip
        left.set(title=row["title"], xlabel="epoch", ylabel="training loss")
        for at, (name, own) in enumerate(found.items()):
            right.plot(own.ends, np.full(len(own.ends), at), "o", color=_COLOURS[name], ms=9, alpha=0.7)
        right.set(xlabel="loss of the last steps, a dot a seed", yticks=(0, 1), ylim=(-0.6, 1.6))
        right.set_yticklabels(found)
    _legend(
        figure, [NAIVE.name, FAST.name], "the same seeds: a difference starts as a rounding, which training amplifies"
    )
    return figure


def _smoothed(losses: np.ndarray) -> np.ndarray:
    """Means of ten neighbours, where there are as many."""
    return np.convolve(losses, np.full(10, 0.1), "valid") if len(losses) > 20 else losses


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
            _annotate(axes, three_digits(value), value, y, NAIVE.name)
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


def _in_order(names: set[str]) -> list[str]:
    return [contender.name for contender in ALL if contender.name in names]


def _label(contender: str) -> str:
    return _LABELS.get(contender, contender)


def _legend(figure: Figure, contenders: list[str], note: str) -> None:
    """Under the title: the contenders' colours; at the foot, on the right, a note."""
    y = 1 - 0.42 / figure.get_figheight()
    handles = [Patch(color=_COLOURS[name], label=_label(name)) for name in contenders]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.002, y), ncols=min(len(handles), 5), fontsize=9.5
    )
    figure.text(0.99, 0.12 / figure.get_figheight(), note, ha="right", fontsize=8, color="#777777")


def _annotate(axes: Axes, text: str, x: float, y: float, contender: str) -> None:
    """A label right of a bar's end."""
    weight = "bold" if contender in (FAST.name, FAST_FROZEN.name, FAST_RECOMPUTING.name) else "normal"
    axes.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5, fontweight=weight
    )  # fmt: skip


def _pick(rows: list[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


if __name__ == "__main__":
    sys.exit(main())
