"""Time of every case: one pytest-benchmark test each, all contenders in it.

Machines are shared and their speed drifts, so the contenders take turns: every round times each of them once, in
an order that rotates from round to round. pytest-benchmark times the fast contender; the setup of its round times
the others that come before it. A ratio is the median of the rounds' ratios, in which drift cancels.

A case is timed only if its contenders compute the same, within the budgets of :mod:`fastdense.parity`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from time import perf_counter
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastdense import parity

from . import cases, rounds
from .cases import FAST, NAIVE, SpeedCase


def test_speed(case: SpeedCase, benchmark: BenchmarkFixture) -> None:
    errors = cases.parity_rows(case.subject, case.device, case.dtype)
    assert not list(parity.failures(errors))

    workloads = cases.workloads(case.subject, case.batch, case.device, case.dtype)
    times: dict[str, list[float]] = {name: [] for name in workloads}

    def clock(name: str) -> None:
        arguments = workloads[name].prepare(case.mode)
        start = perf_counter()
        workloads[name].run(*arguments)
        times[name].append(perf_counter() - start)

    def clock_those_before_fast() -> tuple[tuple[Any, ...], dict[str, Any]]:
        for name in takewhile(lambda name: name != FAST.name, turns):
            clock(name)
        return workloads[FAST.name].prepare(case.mode), {}

    for name in workloads:  # a first round warms up, a second one tells how many to run
        clock(name)
    start = perf_counter()
    for name in workloads:
        clock(name)
        del times[name][:]
    count = rounds.how_many(case.seconds, perf_counter() - start)

    turns = rounds.turns(list(workloads), count)
    benchmark.pedantic(workloads[FAST.name].run, setup=clock_those_before_fast, rounds=count)
    for name in turns:
        clock(name)
    assert benchmark.stats is not None, "pytest-benchmark is disabled"
    times[FAST.name] = benchmark.stats.stats.data
    benchmark.extra_info["rows"] = [_row(case, name, times) for name in workloads]
    benchmark.extra_info["parity"] = _parity_row(case, errors)


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    with rounds.no_garbage_collection():
        yield


def _row(case: SpeedCase, name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """One contender at one case; its speedup is over naive in channels-last memory."""
    seconds = times[name]
    speedups = [naive / own for naive, own in zip(times[NAIVE.name], seconds, strict=True)]
    return {
        "subject": case.subject.name,
        "title": case.subject.title,
        "mode": case.mode,
        "batch": case.batch,
        "dtype": case.dtype_name,
        "contender": name,
        "rounds": len(seconds),
        **rounds.spread("ms", [1000 * s for s in seconds]),
        **rounds.spread("speedup", speedups),
        "all_ms": [round(1000 * s, 4) for s in seconds],
    }


def _parity_row(case: SpeedCase, errors: list[parity.Row]) -> dict[str, Any]:
    worst = max(errors, key=lambda row: row.use)
    return {
        "subject": case.subject.name,
        "dtype": case.dtype_name,
        "tensors": len(errors),
        "worst_use_of_budget": worst.use,
        "worst_tensor": worst.name,
    }
