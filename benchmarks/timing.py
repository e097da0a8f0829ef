"""Time of every case, from one procedure for all contenders and modes.

Machines are shared and their speed drifts, so contenders take turns: a round times each of them once, in an order
that rotates. Each finds caches full of another's data. A ratio is the median of the rounds' ratios, in which drift
cancels. A contender's first call is timed together with what builds it: conversion, export, compilation.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdense import parity

from . import rounds
from .cases import SpeedCase
from .contenders import FAST, NAIVE, NAIVE_CONTIGUOUS, Contender, Workload
from .subjects import Subject, calibrated, parity_rows

Row = dict[str, Any]

_INDISPENSABLE = (NAIVE, FAST)
"""Whose failure ends the benchmark; another's is said in its row."""

_SETTLE = 0.1
"""Seconds before each turn in company of runtimes with threads of their own, in which those stop spinning; ONNX
Runtime's were seen to slow whatever came 20 ms later by up to 1.6 times. The pause puts everyone's threads to sleep,
so in such company a turn is two calls, of which the second is timed, unless a call is so long that it cannot matter."""
_LONG = 0.4  # seconds


class ParityError(Exception):
    """fastdense is further from float64 than its budget."""


def check(subject: Subject, device: str, dtype_name: str, dtype: torch.dtype) -> Row:
    """Fast against naive: output, every gradient and running statistics on small batches; the row of the results.

    Raises:
        ParityError: something is over its budget of :mod:`fastdense.parity`.
    """
    rows = parity_rows(subject, device, dtype)
    for failure in parity.failures(rows):
        raise ParityError(f"{subject.name}, {dtype_name}: {failure}")
    worst = max(rows, key=lambda row: row.use)
    return {
        "subject": subject.name,
        "dtype": dtype_name,
        "tensors": len(rows),
        "worst_use_of_budget": worst.use,
        "worst_tensor": worst.name,
    }


def measure(case: SpeedCase, begin: Callable[[str, float], None]) -> list[Row]:
    """A row a contender and mode.

    Args:
        case: what is measured.
        begin: told of each part, and about how many seconds it takes.

    Raises:
        ParityError: fastdense's outputs of the very inputs that are timed are over their budget.
    """
    inference = case.modes == ("inference",)
    entrants = {contender.name: contender for contender in case.entrants}
    notes = {name: contender.why_not(case.dtype_name) for name, contender in entrants.items()}
    workloads: dict[str, Workload] = {}
    first_calls: dict[str, float] = {}
    for name, contender in entrants.items():
        if notes[name] is None:
            begin(f"{case}: first call of {name}", contender.first_call_s)
            try:
                workloads[name], first_calls[name] = _built(case, contender)
            except Exception as error:
                if contender in _INDISPENSABLE:
                    raise
                notes[name] = f"failed with {type(error).__name__}: {str(error).strip()[:200]}"
    errors = _errors(case, workloads) if inference else {}

    rows = []
    settle = any(entrants[name].export for name in workloads)
    for mode in case.modes:
        begin(f"{case}, {mode}", case.seconds)
        times = _times(workloads, mode, case.seconds, case.fewest_rounds, settle)
        for name in entrants:
            row = _row(case, mode, name, notes[name])
            if name in times:
                row |= _timing(times[name]) | {"first_call_s": first_calls[name], "error": errors.get(name)}
            rows.append(row)
    workloads.clear()
    gc.collect()
    return rows


def _built(case: SpeedCase, contender: Contender) -> tuple[Workload, float]:
    """A workload after its first call, and what both took."""
    weights = calibrated(case.subject)
    start = time.perf_counter()
    workload = Workload(case.subject, contender, case.batch, case.device, case.dtype, weights)
    workload.run(*workload.prepare(case.modes[-1]))
    return workload, time.perf_counter() - start


def _errors(case: SpeedCase, workloads: dict[str, Workload]) -> dict[str, float]:
    """Each contender's relative error against the naive subject in float64, the median of its inputs."""
    truths = _truths(case)
    errors = {
        name: [parity.relative_error(out, truth) for out, truth in zip(workload.outputs(), truths, strict=True)]
        for name, workload in workloads.items()
    }
    stock = max(max(errors[name]) for name in (NAIVE_CONTIGUOUS.name, NAIVE.name) if name in errors)
    found = {name: statistics.median(values) for name, values in errors.items()}
    row = parity.Row("fast's output", found[FAST.name], stock, parity.BUDGETS[case.dtype].allows(stock))
    for failure in parity.failures([row]):
        raise ParityError(f"{case}: {failure}")
    return found


def _truths(case: SpeedCase) -> list[Tensor]:
    exact = case.subject.naive().double().eval()
    exact.load_state_dict(calibrated(case.subject).state_dict())
    with torch.inference_mode():
        return [exact(x.double()) for x in case.subject.inputs(case.batch, case.dtype)]


def _times(
    workloads: dict[str, Workload], mode: str, seconds: float, fewest: int, settle: bool
) -> dict[str, list[float]]:
    """Each contender's seconds, round by round."""

    def clock(name: str) -> float:
        if settle:
            time.sleep(_SETTLE)
            if usual[name] < _LONG:
                workloads[name].clock(mode)
        return workloads[name].clock(mode)

    usual = {name: workload.clock(mode) for name, workload in workloads.items()}
    of_one = sum(2 * s + _SETTLE if settle and s < _LONG else s for s in usual.values())
    count = rounds.how_many(seconds, of_one, fewest)
    return rounds.interleaved(list(workloads), count, clock)


def _row(case: SpeedCase, mode: str, name: str, note: str | None) -> Row:
    return {
        "subject": case.subject.name,
        "title": case.subject.title,
        "mode": mode,
        "batch": case.batch,
        "dtype": case.dtype_name,
        "contender": name,
        "note": note,
    }


def _timing(seconds: Sequence[float]) -> Row:
    return {
        "rounds": len(seconds),
        **rounds.spread("ms", [1000 * s for s in seconds]),
        "all_ms": [round(1000 * s, 4) for s in seconds],
    }
