"""Interleaved rounds: contenders take turns, so that the drift of a shared machine's speed cancels in their ratios."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

_MOST = 199


def how_many(seconds: float, of_one: float, fewest: int) -> int:
    """Rounds that take about ``seconds``, where one takes ``of_one``, but ``fewest`` at least."""
    return min(max(int(seconds / of_one), fewest), _MOST)


def turns(names: list[str], rounds: int) -> Iterator[str]:
    """Round after round, each beginning one contender later."""
    for i in range(rounds):
        first = i % len(names)
        yield from names[first:] + names[:first]


def interleaved(names: list[str], rounds: int, clock: Callable[[str], float]) -> dict[str, list[float]]:
    """What ``clock`` says of each contender, round by round."""
    times: dict[str, list[float]] = {name: [] for name in names}
    with no_garbage_collection():
        for name in turns(names, rounds):
            times[name].append(clock(name))
    return times


def spread(what: str, values: list[float]) -> dict[str, float]:
    """The median and the quartiles, as columns of a row."""
    median, low, high = quartiles(values)
    return {what: median, f"{what}_q1": low, f"{what}_q3": high}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The median, and the quartiles below and above it."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return median, low, high


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """It would hit one contender and not the next."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
