"""How equal fast must be to naive: the one table of budgets, and how errors are measured against it.

Both are compared with the same network in float64. A tensor passes if its error is at most twice that of stock
PyTorch in the same dtype, plus one rounding of that dtype: being as good as PyTorch is the claim, and a fixed
tolerance would be loose for one tensor and unfair for the next.

A rounding that flips a ReLU changes a deep gradient by far more than a rounding, in either implementation and by
chance. So over several inputs the fast error is the median, and stock's the largest it makes, in either of its
memory formats.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)


def memory_formats_of(x: Tensor) -> tuple[torch.memory_format, ...]:
    """Those that stock PyTorch has for inputs such as x."""
    return {3: MEMORY_FORMATS[:1], 5: (torch.contiguous_format, torch.channels_last_3d)}.get(x.dim(), MEMORY_FORMATS)


@dataclass(frozen=True)
class Budget:
    """Largest error of the fast implementation: ``factor * stock's error + floor``, relative to float64."""

    factor: float
    floor: float

    def allows(self, stock_error: float) -> float:
        return self.factor * stock_error + self.floor


BUDGETS: dict[torch.dtype, Budget] = {
    torch.float64: Budget(factor=2, floor=1e-9),
    torch.float32: Budget(factor=2, floor=torch.finfo(torch.float32).eps),
    torch.float16: Budget(factor=2, floor=torch.finfo(torch.float16).eps / 2),
    torch.bfloat16: Budget(factor=2, floor=torch.finfo(torch.bfloat16).eps / 2),
}
"""By the dtype that the convolutions compute in. In float64 stock is the truth itself; the floor is for another order
of summation, which the worst conditioned gradients (of norm0, whose scale the next norms undo) amplify 1e5 times."""


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """``|actual - exact| / |exact|`` in the Euclidean norm; the absolute error where ``exact`` is zero.

    Infinite where NaN or infinity stand at different places.
    """
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    if actual.shape != exact.shape:
        raise ValueError(f"shapes differ: {list(actual.shape)} and {list(exact.shape)}")
    error, scale = (torch.linalg.vector_norm(values).item() for values in (actual - exact, exact))
    if not math.isfinite(error):
        finite = exact.isfinite()
        if not torch.equal(actual[~finite].nan_to_num(), exact[~finite].nan_to_num()):
            return math.inf
        error, scale = (torch.linalg.vector_norm(values[finite]).item() for values in (actual - exact, exact))
    error = error / scale if scale > 0 else error
    return math.inf if math.isnan(error) else error


@dataclass(frozen=True)
class Row:
    """One tensor's comparison."""

    name: str
    fast_error: float
    stock_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.fast_error <= self.allowed

    @property
    def use(self) -> float:
        """Share of the budget that is used."""
        return self.fast_error / self.allowed


def compare(
    fast: dict[str, Tensor], stocks: Sequence[dict[str, Tensor]], exact: dict[str, Tensor], dtype: torch.dtype
) -> list[Row]:
    """Every tensor of ``exact`` against its budget for ``dtype``; a missing tensor is an error.

    ``stocks`` are equally good runs of stock PyTorch, of which the least exact counts.
    """
    budget = BUDGETS[dtype]
    rows = []
    for name, truth in exact.items():
        stock_error = max(relative_error(stock[name], truth) for stock in stocks)
        rows.append(Row(name, relative_error(fast[name], truth), stock_error, budget.allows(stock_error)))
    return rows


def observe(
    model: nn.Module, x: Tensor, *, autocast: torch.dtype | None = None, seed: int = 0, backward: bool = True
) -> dict[str, Tensor]:
    """Run a model once and return what parity is about.

    Args:
        model: in the mode (train, eval) to be observed; its gradients are replaced.
        x: the input, [N, C, *spatial].
        autocast: dtype of an autocast around the forward.
        seed: of dropout, and of the output's random gradient.
        backward: observe gradients too.

    Returns:
        ``output``; ``grad input`` and ``grad <parameter>``; ``<buffer>`` for running statistics.
    """
    x = x.detach().clone().requires_grad_(backward)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.set_grad_enabled(backward), torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        out = model(x)
    seen = {"output": out.detach()}
    if backward:
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        out.backward(direction.to(out))
        seen["grad input"] = x.grad
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                seen[f"grad {name}"] = parameter.grad
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            seen[name] = buffer.clone()
    return seen


def check(
    fast: nn.Module,
    stock: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    *,
    dtype: torch.dtype,
    autocast: bool = False,
    backward: bool = True,
    memory_formats: Sequence[torch.memory_format] | None = None,
    observe_stock: Callable[..., dict[str, Tensor]] | None = None,
) -> list[Row]:
    """Compare two models of equal state; neither is changed.

    Args:
        fast: what is to be proved.
        stock: the same in stock PyTorch.
        inputs: [N, C, *spatial], one batch or several; converted to ``dtype`` unless ``autocast``.
        dtype: the models are converted to it, or autocast to it.
        autocast: keep the parameters as they are and autocast the forward to ``dtype``.
        backward: compare gradients too.
        memory_formats: stock's, by default all that it has; float64 runs in the first, fast in the last. Active
            dropout draws other values in another format: give it one.
        observe_stock: :func:`observe`, or what returns the same as that of a stock model without running it again.
    """
    observe_stock = observe_stock or observe
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    memory_formats = memory_formats or memory_formats_of(inputs[0])
    exact = copy.deepcopy(stock).double().to(memory_format=memory_formats[0])
    comparisons = []
    for x in inputs:
        in_double = x.double().contiguous(memory_format=memory_formats[0])
        truth = observe_stock(copy.deepcopy(exact), in_double, autocast=None, backward=backward)
        rows = compare_models(
            fast, stock, truth, x, dtype,
            autocast=autocast, backward=backward, memory_formats=memory_formats, observe_stock=observe_stock,
        )  # fmt: skip
        comparisons.append(rows)
    return across_inputs(comparisons, dtype)


def compare_models(
    fast: nn.Module,
    stock: nn.Module,
    truth: dict[str, Tensor],
    x: Tensor,
    dtype: torch.dtype,
    *,
    autocast: bool,
    backward: bool,
    memory_formats: Sequence[torch.memory_format] = MEMORY_FORMATS,
    observe_stock: Callable[..., dict[str, Tensor]] = observe,
) -> list[Row]:
    """Copies of two models on one input, stock in every memory format, against what float64 gave."""

    def seen(
        model: nn.Module, memory_format: torch.memory_format, observe: Callable[..., dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        model = copy.deepcopy(model).to(memory_format=memory_format)
        model = model if autocast else model.to(dtype)
        y = (x if autocast else x.to(dtype)).contiguous(memory_format=memory_format)
        return observe(model, y, autocast=dtype if autocast else None, backward=backward)

    stocks = [seen(stock, memory_format, observe_stock) for memory_format in memory_formats]
    return compare(seen(fast, memory_formats[-1], observe), stocks, truth, dtype)


def across_inputs(comparisons: Sequence[Sequence[Row]], dtype: torch.dtype) -> list[Row]:
    """One comparison from those of several inputs: the median of fast's errors, the largest of stock's."""
    budget = BUDGETS[dtype]
    rows = []
    for same in zip(*comparisons, strict=True):
        stock_error = max(row.stock_error for row in same)
        fast_error = statistics.median(row.fast_error for row in same)
        rows.append(Row(same[0].name, fast_error, stock_error, budget.allows(stock_error)))
    return rows


def failures(rows: Sequence[Row]) -> Iterator[str]:
    """A line for every row over its budget."""
    for row in rows:
        if not row.passed:
            yield f"{row.name}: error {row.fast_error:.3g}, allowed {row.allowed:.3g}, stock {row.stock_error:.3g}"
