"""Proof on the user's machine: fast and naive DenseNets on real photographs, both against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import images, models, parity, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_GROUPS: dict[str, Callable[[str], bool]] = {
    "output": lambda name: name == "output",
    "input gradient": lambda name: name == "grad input",
    "parameter gradients": lambda name: name.startswith("grad ") and name != "grad input",
    "running statistics": lambda name: name != "output" and not name.startswith("grad "),
}
"""What a line of the result is about, by the names of :func:`fastdense.parity.observe`."""


@dataclass(frozen=True)
class Line:
    """All tensors of one kind in one dtype and mode; the errors are those of the worst of them.

    Attributes:
        dtype: ``fp32``, ``bf16`` or ``fp16``; the latter two by autocast.
        mode: ``train`` (a training step) or ``eval`` (inference).
        what: the kind of tensors.
        tensors: how many there are.
        fast_error: of the tensor that uses the most of its budget, relative to float64.
        stock_error: of stock PyTorch, for the same tensor.
        allowed: that tensor's budget.
        failed: names of the tensors over their budgets.
    """

    dtype: str
    mode: str
    what: str
    tensors: int
    fast_error: float
    stock_error: float
    allowed: float
    failed: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failed

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def verify(
    arch: str = "densenet121",
    *,
    dtypes: Iterable[str] = tuple(DTYPES),
    size: int = 128,
    batch: int = 2,
    inputs: int = 5,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda step: None,
) -> list[Line]:
    """Compare ``fastdense.<arch>`` with ``fastdense.reference.<arch>`` on photographs, forward and every gradient.

    Args:
        arch: a constructor's name.
        dtypes: keys of ``DTYPES``.
        size: height and width of the photographs.
        batch: photographs in a batch.
        inputs: batches, over which :func:`fastdense.parity.across_inputs` takes the errors.
        seed: of the weights.
        device: where to compute.
        progress: called before each of :func:`num_steps` steps with its description.

    Raises:
        ImportError: scikit-learn, which ships the photographs, is not installed.
    """
    dtypes = tuple(dtypes)
    photographs = images.photographs(size, batch * inputs).to(device)
    torch.manual_seed(seed)
    stock = getattr(reference, arch)().to(device)
    fast = getattr(models, arch)().to(device)
    fast.load_state_dict(stock.state_dict())
    exact = copy.deepcopy(stock).double()

    lines = []
    for mode in ("train", "eval"):
        train = mode == "train"
        for model in (stock, fast, exact):
            model.train(train)
        comparisons: dict[str, list[list[parity.Row]]] = {name: [] for name in dtypes}
        for i, x in enumerate(photographs.split(batch)):
            progress(f"float64, {mode}, batch {i + 1} of {inputs}")
            truth = parity.observe(copy.deepcopy(exact), x.double(), backward=train)
            for name in dtypes:
                progress(f"{name}, {mode}, batch {i + 1} of {inputs}")
                dtype = DTYPES[name]
                autocast = dtype != torch.float32
                rows = parity.compare_models(fast, stock, truth, x, dtype, autocast=autocast, backward=train)
                comparisons[name].append(rows)
        for name in dtypes:
            lines += _lines(name, mode, parity.across_inputs(comparisons[name], DTYPES[name]))
    return lines


def num_steps(dtypes: Iterable[str], inputs: int) -> int:
    """How often :func:`verify` calls ``progress``."""
    return 2 * inputs * (1 + len(tuple(dtypes)))


def _lines(dtype: str, mode: str, rows: list[parity.Row]) -> list[Line]:
    lines = []
    for what, belongs in _GROUPS.items():
        group = [row for row in rows if belongs(row.name)]
        if not group or (mode == "eval" and what == "running statistics"):
            continue
        worst = max(group, key=lambda row: row.use)
        failed = tuple(row.name for row in group if not row.passed)
        errors = (worst.fast_error, worst.stock_error, worst.allowed)
        lines.append(Line(dtype, mode, what, len(group), *errors, failed))
    return lines
