"""Naive and fast trained on the same real images from the same seeds: their losses must lie on top of each other.

Each program is ``fastdense train`` on scikit-learn's handwritten digits by the paper's recipe, with ``--backend
reference`` and without. How far apart the seeds of naive end is what a difference is measured by: the chance that two
such samples of one distribution differ by as much is Mann and Whitney's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdense.training import loop
from fastdense.training.config import Config
from fastdense.training.ranks import Ranks

BACKENDS = {"naive": "reference", "fast": "auto"}
_LAST_STEPS = 50  # over whose losses the end of a run is averaged


@dataclass(frozen=True)
class Program:
    """A network, for how long, and from how many seeds."""

    arch: str
    epochs: int
    seeds: int
    epoch_s: float = 1.5
    """About how long an epoch takes on two cores."""

    @property
    def title(self) -> str:
        return f"{self.arch}, {self.epochs} epochs of digits"

    @property
    def expected_seconds(self) -> float:
        """Of one run, on two cores."""
        return self.epochs * self.epoch_s

    def config(self, contender: str, seed: int, device: str) -> Config:
        return Config.of(
            dict(arch=self.arch, epochs=self.epochs, seed=seed, device=device, backend=BACKENDS[contender])
        )


def compare(program: Program, device: str, begin: Callable[[str, float], None]) -> dict[str, Any]:
    """Train naive and fast from every seed, in turns; the row of the results.

    ``begin`` is told of each run, and about how many seconds it takes.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in BACKENDS}
    for seed in range(program.seeds):
        for name in BACKENDS:
            begin(f"training: {program.title}, {name}, seed {seed}", program.expected_seconds)
            runs[name].append(_train(program.config(name, seed, device), device))
    return {"arch": program.arch, "title": program.title, "epochs": program.epochs, "runs": runs}


@dataclass(frozen=True)
class Summary:
    """A contender's runs of a program, an entry a seed; milliseconds of a step and seconds of a run are medians."""

    accuracies: list[float]
    ends: list[float]
    """The mean losses of the last steps."""
    step_ms: float
    seconds: float


def summaries(row: dict[str, Any]) -> dict[str, Summary]:
    """Of each contender, from a row of the results."""
    return {
        name: Summary(
            [run["test_accuracy"][-1] for run in runs],
            [float(np.mean(run["loss"][-_LAST_STEPS:])) for run in runs],
            float(np.median([run["step_ms"] for run in runs])),
            float(np.median([run["seconds"] for run in runs])),
        )
        for name, runs in row["runs"].items()
    }


def chance(row: dict[str, Any]) -> float:
    """Of the contenders' last losses lying as far apart as they do, were they of one distribution: the p-value."""
    from scipy.stats import mannwhitneyu

    naive, fast = (summary.ends for summary in summaries(row).values())
    return float(mannwhitneyu(naive, fast).pvalue)


def _train(config: Config, device: str) -> dict[str, Any]:
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    loop.train(config, Ranks(0, 1, torch.device(device)), None, quiet=True, observe=rows.append)
    seconds = time.perf_counter() - start
    losses = [row["loss"] for row in rows if "loss" in row]
    epochs = [row for row in rows if "eval_accuracy" in row]
    steps_per_epoch = len(losses) / len(epochs)
    return {
        "seed": config.seed,
        "loss": losses,
        "test_accuracy": [row["eval_accuracy"] for row in epochs],
        "seconds": seconds,
        "step_ms": 1000 * float(np.median([row["seconds"] for row in epochs])) / steps_per_epoch,
    }
