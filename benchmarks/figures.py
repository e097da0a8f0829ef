"""The figures of ``docs/algorithm.md``: ``python -m fastdense.benchmarks.figures [FOLDER]``.

They are drawn from the algorithm and its formulas, not from measurements. The same version of matplotlib writes the
same bytes, so that drawing them again changes nothing.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from fastdense.architectures import CONFIGS

_FOLDER = Path(__file__).parents[1] / "docs" / "figures"

_NAIVE, _FAST = "#D55E00", "#0072B2"  # Okabe and Ito's, told apart by colour-blind readers too
_NAIVE_PALE, _FAST_PALE = "#F5D0B5", "#BBD9EC"
_INK, _GREY, _PALE = "#333333", "#8A8A8A", "#ECECEC"

_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "fastdense",  # ids that do not change from run to run
    "svg.fonttype": "path",  # the same letters for every reader
}


def draw(folder: Path = _FOLDER) -> list[Path]:
    """Draw every figure into a folder that exists, and return their paths."""
    drawn = []
    for name, figure in _FIGURES.items():
        svg = io.StringIO()
        with style.context(_STYLE, after_reset=True):
            figure().savefig(svg, format="svg", facecolor="white", metadata={"Date": None})
        path = folder / f"{name}.svg"
        lines = (line.rstrip() for line in svg.getvalue().splitlines())
        path.write_bytes(("\n".join(lines) + "\n").encode())
        drawn.append(path)
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m fastdense.benchmarks.figures", description="Draw the docs' figures.")
    parser.add_argument("folder", nargs="?", type=Path, default=_FOLDER, help="where to (default: docs/figures)")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        parser.error(f"no such folder: {folder}")
    print(*draw(folder), sep="\n")
    return 0


# -- what is drawn with ---------------------------------------------------------------------------------------


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure in inches, with axes all over it whose unit is a hundredth of its width, from the upper left."""
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, 100)
    ax.set_ylim(100 * height / width, 0)
    ax.axis("off")
    return figure, ax


def _bar(ax: Axes, x: float, y: float, width: float, height: float, face: str, text: str = "", **options: Any) -> None:
    """A rectangle with text in its middle; white on dark."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor="white", linewidth=1.2))
    ink = "white" if face in (_NAIVE, _FAST) else _INK
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", **{"color": ink, **options})


def _step(ax: Axes, x: float, y: float, width: float, height: float, text: str, edge: str) -> None:
    """A computation: a rounded box."""
    shape = f"round,pad=0,rounding_size={min(1.0, height / 3)}"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor="white", edgecolor=edge, linewidth=1))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", linespacing=1.35)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = _GREY) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=1, shrinkA=0))


# -- the layout of X ------------------------------------------------------------------------------------------


def _slots(left: float, widths: Sequence[float]) -> list[tuple[float, float]]:
    """(x, width) of the block's input and of each layer's slice, side by side from ``left``."""
    return [(left + sum(widths[:i]), width) for i, width in enumerate(widths)]


def _layout() -> Figure:
    """X as rows of pixels, and what each of three layers reads and writes of it."""
    figure, ax = _canvas(9, 3.9)
    slots, height = _slots(15, (26, 14, 14, 14)), 3.4
    left, right = slots[0][0], sum(slots[-1])
    faces = (_PALE, "#9CC8E3", "#5FA6D0", "#2A86BF")
    names = ("the block's input", "$y_1$", "$y_2$", "$y_3$")

    for (x, width), name in zip(slots, ("$C_0$ channels", "$k$", "$k$", "$k$"), strict=True):
        ax.annotate("", (x + 0.3, 4.4), (x + width - 0.3, 4.4), arrowprops={"arrowstyle": "<->", "color": _GREY})
        ax.text(x + width / 2, 3.4, name, ha="center", va="bottom")
    for row, label in enumerate(("pixel 0", "pixel 1", "pixel 2", "", "pixel $M-1$")):
        y = 6 + row * height
        if not label:
            ax.text((left + right) / 2, y + height / 2, "⋮", ha="center", va="center")
            continue
        ax.text(left - 1.2, y + height / 2, label, ha="right", va="center")
        for (x, width), face, name in zip(slots, faces, names, strict=True):
            _bar(ax, x, y, width, height - 0.3, face, "" if row else name, color="white" if face == faces[-1] else _INK)
    note = "a pixel's channels\nlie side by side,\nthen the next pixel's"
    ax.text(right + 1.2, 6 + 1.5 * height, note, va="center", fontsize=8.5, color=_GREY, linespacing=1.5)

    y = 6 + 5 * height + 2.4
    for layer, channels in enumerate(("$C_0$", "$C_0 + k$", "$C_0 + 2k$"), start=1):
        x, width = slots[layer]
        ax.text(left - 1.2, y + 1.5, f"denselayer{layer}", ha="right", va="center")
        _bar(ax, left, y, x - left, 3, _FAST_PALE, f"reads {channels} channels")
        _bar(ax, x, y, width, 3, _FAST, "writes $k$")
        y += 4
    ax.text(left - 1.2, y + 1.5, "the next stage", ha="right", va="center")
    _bar(ax, left, y, right - left, 3, _FAST_PALE, "reads it all: X is the block's output")
    return figure


# -- the forward of a layer -----------------------------------------------------------------------------------


class Pass(NamedTuple):
    """One pass over memory: the tensors, named by their channels, that it reads and writes."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


NAIVE_LAYER = (
    Pass("concatenate", ("C",), ("C",)),
    Pass("norm1: statistics", ("C",), ()),
    Pass("norm1: normalise", ("C",), ("C",)),
    Pass("relu1", ("C",), ("C",)),
    Pass("conv1, 1x1", ("C",), ("B",)),
    Pass("norm2: statistics", ("B",), ()),
    Pass("norm2: normalise", ("B",), ("B",)),
    Pass("relu2", ("B",), ("B",)),
    Pass("conv2, 3x3", ("B",), ("k",)),
)
FAST_LAYER = (
    Pass("$z$ = relu(scale1 $x$ + shift1)\n$h$ = $z\\,W_1$\ncount, mean, M2 of $h$", ("C",), ("B",)),
    Pass("$u$ = relu(scale2 $h$ + shift2)\n$y$ = conv3x3($u$, $W_2$)\ncount, mean, M2 of $y$", ("B",), ("k",)),
)
"""Of a training forward, at a layer that reads C channels, with B of a bottleneck and k new ones."""

_CHANNELS = {"C": 256, "B": 128, "k": 32}  # of the first layer of DenseNet-121's third block


def count(passes: Iterable[Pass], channels: str) -> int:
    """How often a tensor of so many channels goes through memory."""
    return sum((*each.reads, *each.writes).count(channels) for each in passes)


def _forward() -> Figure:
    """Naive's passes over memory and ours, bars as long as the tensors are wide."""
    figure, ax = _canvas(9, 6.3)
    for x, text in ((17, "read from memory"), (50, "computed in registers and cache"), (83, "written to memory")):
        ax.text(x, 2, text, ha="center", va="center", color=_GREY)
    _passes(ax, 5.4, NAIVE_LAYER, 3.9, "naive", (_NAIVE, _NAIVE_PALE))
    _passes(ax, 46.5, FAST_LAYER, 8.2, "fastdense", (_FAST, _FAST_PALE))
    widths = ", ".join(f"${name}$ = {width}" for name, width in _CHANNELS.items())
    note = f"Drawn for {widths}. M2 is the sum of squared deviations; the statistics of $y$ serve all later layers."
    ax.text(50, 67.6, note, ha="center", va="center", fontsize=8.5, color=_GREY)
    return figure


def _passes(ax: Axes, top: float, passes: Sequence[Pass], height: float, who: str, colours: tuple[str, str]) -> None:
    """One row a pass: what it reads, what it computes, what it writes; and the sum of it all."""
    colour, pale = colours
    times = {name: count(passes, name) for name in _CHANNELS}
    terms = " + ".join(f"{number if number > 1 else ''}{name}" for name, number in times.items())
    total = sum(number * _CHANNELS[name] for name, number in times.items())
    ax.text(2, top, who, weight="bold", fontsize=11, color=colour, va="center")
    summary = f"{len(passes)} passes, ${terms}$ = {total:,} channels of $M$ pixels"
    ax.text(98, top, summary, ha="right", va="center", color=colour)
    left, right, thick = 34.0, 66.0, 2.7
    for row, each in enumerate(passes):
        y = top + 2.6 + row * height
        middle = y + height / 2
        _step(ax, left, y + 0.25, right - left, height - 0.5, each.name, colour)
        for name in each.reads:
            width = _CHANNELS[name] / 9
            _bar(ax, left - 2 - width, middle - thick / 2, width, thick, pale, f"${name}$")
            _arrow(ax, (left - 1.7, middle), (left - 0.1, middle))
        for name in each.writes:
            _bar(ax, right + 2, middle - thick / 2, _CHANNELS[name] / 9, thick, colour, f"${name}$")
            _arrow(ax, (right + 0.1, middle), (right + 1.8, middle))


# -- the deferred backward ------------------------------------------------------------------------------------


def _backward() -> Figure:
    """G, P and Q of a block of three layers, from the arrival of its output's gradient to that of its input."""
    figure, ax = _canvas(9, 4.7)
    slots, height, pitch = _slots(14.5, (14, 9, 9, 9)), 4.4, 9.4
    left, right = slots[0][0], sum(slots[-1])

    ax.text(left - 2, 2.6, "channels of G:", ha="right", va="center", color=_GREY)
    for (x, width), name in zip(slots, ("input", "$y_1$", "$y_2$", "$y_3$"), strict=True):
        ax.text(x + width / 2, 2.6, name, ha="center", va="center")

    def row(y: float, name: str, what: str) -> None:
        ax.text(left - 2, y + height / 2, name, ha="right", va="center", weight="bold")
        ax.text(right + 3, y + height / 2, what, va="center", linespacing=1.6)

    y = 5.0
    row(y, "start", "G = the gradient of X,  P = Q = 0")
    _bar(ax, left, y, right - left, height, _PALE, "the gradient of X")
    for consumed in (3, 2, 1, 0):
        y += pitch if consumed < 3 else 7.4
        x, width = slots[consumed]
        _bar(ax, x, y, width, height, _FAST, f"$dy_{consumed}$" if consumed else "$dx$")
        for at, size in slots[consumed + 1 :]:
            ax.add_patch(Rectangle((at + 0.2, y), size - 0.4, height, fill=False, ec="#CFCFCF", ls=(0, (3, 3))))
        if not consumed:
            row(y, "end", "$dx$ = G + P + Q (x - mean)")
            break
        _bar(ax, left, y, x - left, height, _FAST_PALE, f"+ scale · $da_{consumed}$")
        _bar(ax, left, y + height + 0.3, x - left, 1.1, _GREY)
        ax.text(left - 2, y + height + 0.85, "P, Q", ha="right", va="center", fontsize=8.5, color=_GREY)
        sums = f"G += scale · $da_{consumed}$,   P += $p_{consumed}$,   Q += $q_{consumed}$"
        what = f"$dy_{consumed}$ = G + P + Q (x - mean)  of the slice\n{sums}  of the prefix"
        row(y, f"denselayer{consumed}", what)
    legend = (
        Patch(facecolor=_FAST, label="true gradient, formed where it is consumed"),
        Patch(facecolor=_FAST_PALE, label="G, raw: read once, written once"),
        Patch(facecolor=_GREY, label="P and Q: vectors, nothing per pixel"),
    )
    ax.legend(handles=legend, loc="lower center", ncols=3, frameon=False, fontsize=8.5, handlelength=1.2)
    return figure


# -- bytes ----------------------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """How often each tensor of a part goes through memory; see docs/algorithm.md for the passes."""

    stem: tuple[float, float, float]  # images, conv0's output, the pooled output
    layer: tuple[float, float, float]  # C, B, k
    ends: tuple[float, float]  # C_0, C_L: of a block, besides its layers
    transition: tuple[float, float]  # its channels in and out, at the pixels before the pool
    head: float  # its channels


def _forward_layer(passes: Sequence[Pass]) -> tuple[float, float, float]:
    return count(passes, "C"), count(passes, "B"), count(passes, "k")


COEFFICIENTS: dict[str, tuple[Coefficients, Coefficients]] = {
    "inference": (
        Coefficients((1, 6, 1), (7, 6, 1), (0, 2), (5, 2.25), 5),
        Coefficients((1, 2, 1), (1, 2, 1), (2, 0), (1, 0.25), 1),
    ),
    "training forward": (
        Coefficients((1, 7, 1), _forward_layer(NAIVE_LAYER), (0, 2), (6, 2.25), 6),
        Coefficients((1, 3, 1), _forward_layer(FAST_LAYER), (2, 0), (1, 0.25), 1),
    ),
    "training backward": (
        Coefficients((1, 10, 1), (13, 12, 2), (0, 0), (10, 3.25), 9),
        Coefficients((1, 5, 2), (3, 5, 5), (3, 2), (5.25, 0.5), 3),
    ),
}
"""Naive's and ours, in every mode."""


def traffic(coefficients: Coefficients, size: int = 224) -> dict[str, float]:
    """Elements that DenseNet-121 moves for one image, by its parts."""
    config = CONFIGS["densenet121"]
    growth, channels = config["growth_rate"], config["num_init_features"]
    bottleneck, blocks = 4 * growth, config["block_config"]

    def total(times: Sequence[float], channels: Sequence[int], pixels: int) -> float:
        return pixels * sum(a * b for a, b in zip(times, channels, strict=True))

    half, side = size // 2, size // 4
    stem = (3 * size**2, channels * half**2, channels * side**2)
    parts = {"stem": total(coefficients.stem, stem, 1)}
    for i, layers in enumerate(blocks, start=1):
        block, first = 0.0, channels
        for _ in range(layers):
            block += total(coefficients.layer, (channels, bottleneck, growth), side**2)
            channels += growth
        parts[f"block {i}"] = block + total(coefficients.ends, (first, channels), side**2)
        if i < len(blocks):
            parts[f"transition {i}"] = total(coefficients.transition, (channels, channels // 2), side**2)
            channels, side = channels // 2, side // 2
    parts["head"] = coefficients.head * channels * side**2
    return parts


def _traffic() -> Figure:
    """Bytes of each part of DenseNet-121, naive's and ours."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplots(1, len(COEFFICIENTS), sharey=True)
    for ax, (mode, both) in zip(panels, COEFFICIENTS.items(), strict=True):
        megabytes = [{part: 2e-6 * elements for part, elements in traffic(each).items()} for each in both]
        most = max(max(each.values()) for each in megabytes)
        for offset, colour, values in zip((-0.2, 0.2), (_NAIVE, _FAST), megabytes, strict=True):
            for row, value in enumerate(values.values()):
                ax.barh(row + offset, value, height=0.36, color=colour)
                ax.text(value + most / 60, row + offset, f"{value:.1f}", va="center", fontsize=7.5)
        naive, fast = (sum(each.values()) for each in megabytes)
        ax.set_title(mode, fontsize=10.5, weight="bold", loc="left", pad=20)
        comparison = f"{naive:.0f} against {fast:.0f} MB, {naive / fast:.1f} times less"
        ax.text(0, 1.025, comparison, transform=ax.transAxes)
        ax.set_xlim(0, 1.17 * most)
        ax.set_xlabel("MB of one image")
        ax.set_yticks(range(len(megabytes[0])), list(megabytes[0]))
        ax.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    handles = [Patch(facecolor=_NAIVE, label="naive, eager"), Patch(facecolor=_FAST, label="fastdense")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


_FIGURES: dict[str, Callable[[], Figure]] = {
    "layout": _layout,
    "forward": _forward,
    "backward": _backward,
    "traffic": _traffic,
}


if __name__ == "__main__":
    raise SystemExit(main())
