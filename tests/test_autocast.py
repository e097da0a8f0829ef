"""Autocast and half precision: the reference's dtypes and errors, float32 statistics, loss scaling."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdense
from fastdense import FastDenseBlock, FastDenseNet, FastTransition, ends
from fastdense.parity import across_inputs, check, compare, failures, observe

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def default_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class StemTail(nn.Sequential):
    """norm0-ReLU-pool0 as FastDenseNet runs it."""

    def __init__(self) -> None:
        super().__init__(OrderedDict(norm=nn.BatchNorm2d(8), relu=nn.ReLU(), pool=nn.MaxPool2d(3, stride=2, padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        return ends.stem_tail(list(self), x)


class Head(nn.Sequential):
    """norm5-ReLU-global average pool as FastDenseNet runs it."""

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(norm=nn.BatchNorm2d(8), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
        )

    def forward(self, x: Tensor) -> Tensor:
        return ends.head(self.norm, x, None)


STAGES: dict[str, Callable[[], nn.Module]] = {
    "stem tail": StemTail,
    "block": lambda: FastDenseBlock(2, 8, bn_size=2, growth_rate=4),
    "plain block": lambda: FastDenseBlock(2, 8, bn_size=None, growth_rate=4),
    "memory_efficient block": lambda: FastDenseBlock(2, 8, bn_size=2, growth_rate=4, memory_efficient=True),
    "transition": lambda: FastTransition(8, 4),
    "head": Head,
    "network": lambda: FastDenseNet(4, (2, 2), 8, bn_size=2, num_classes=5),
    "CIFAR network": lambda: FastDenseNet(4, (2, 2), 8, bn_size=2, num_classes=5, small_inputs=True),
}


def pair(stage: str, prepare: Callable[[nn.Module], Any] = lambda module: None) -> tuple[nn.Module, nn.Module]:
    """A fast module and its reference with equal parameters, both prepared."""
    torch.manual_seed(0)
    fast = STAGES[stage]()
    prepare(fast)
    stock = fastdense.to_reference(fast)
    if isinstance(stock, StemTail | Head):
        stock.__class__ = nn.Sequential
    return fast, stock


def features(stage: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    shape = (2, 3, 32, 32) if "network" in stage else (2, 8, 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dtypes_of(module: nn.Module, x: Tensor, autocast: torch.dtype | None) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in observe(module, x, autocast=autocast).items()}


def outcome(module: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> Any:
    """The dtypes that come out, or the error raised."""
    try:
        return dtypes_of(module, x, autocast)
    except (RuntimeError, ValueError) as error:
        return type(error), str(error)


def convolutions(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """Convert the convolutions and the classifier, leaving the norms: mixed precision by hand."""

    def convert(module: nn.Module) -> None:
        for child in module.modules():
            if isinstance(child, nn.Conv2d | nn.Linear):
                child.to(dtype)

    return convert


def batch_norms(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    def convert(module: nn.Module) -> None:
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.to(dtype)

    return convert


# -- dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("given", [torch.float32, "autocast's"], ids=["fp32 input", "half input"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_dtypes_are_the_references(stage, dtype, given, train):
    """Of the output, every gradient and every running statistic."""
    x = features(stage, dtype if given == "autocast's" else given)
    fast, stock = (dtypes_of(module.train(train), x, dtype) for module in pair(stage))
    assert fast == stock


def test_what_the_reference_does_under_autocast():
    """The dtypes of the test above in plain words, as a user counts on them."""
    block, _ = pair("block")
    seen = dtypes_of(block, features("block"), torch.bfloat16)
    assert seen["output"] == torch.float32  # like a concatenation of float32 and bfloat16
    assert dtypes_of(block, features("block", torch.bfloat16), torch.bfloat16)["output"] == torch.bfloat16
    network, _ = pair("network")
    seen = dtypes_of(network, features("network"), torch.bfloat16)
    assert seen.pop("output") == torch.bfloat16
    assert set(seen.values()) == {torch.float32}


@pytest.mark.parametrize("stage", ["block", "transition", "network"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_values_are_within_budget(stage, dtype):
    fast, stock = pair(stage)
    inputs = [features(stage, seed=seed) for seed in range(5)]
    assert not list(failures(check(fast, stock, inputs, dtype=dtype, autocast=True)))


@pytest.mark.parametrize("stage", ["block", "network"])
def test_no_grad_and_inference_mode(stage):
    fast, stock = pair(stage)
    x = features(stage)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            for train in (True, False):
                assert fast.train(train)(x).dtype == stock.train(train)(x).dtype


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_whole_module_in_half_precision(stage, dtype):
    """``model.bfloat16()`` and ``model.half()``: norms and running statistics are halves too."""
    x = features(stage, dtype)
    fast, stock = (outcome(module, x) for module in pair(stage, lambda module: module.to(dtype)))
    assert fast == stock
    assert set(fast.values()) == {dtype}


@pytest.mark.parametrize("stage", ["block", "plain block", "transition", "network"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_convolutions_with_float32_norms(stage, dtype):
    fast, stock = pair(stage, convolutions(dtype))
    exact = copy.deepcopy(stock).double()
    comparisons = []
    for seed in range(5):
        x = features(stage, dtype, seed)
        seen, expected = observe(copy.deepcopy(fast), x), observe(copy.deepcopy(stock), x)
        assert {name: t.dtype for name, t in seen.items()} == {name: t.dtype for name, t in expected.items()}
        comparisons.append(compare(seen, [expected], observe(copy.deepcopy(exact), x.double()), dtype))
    assert not list(failures(across_inputs(comparisons, dtype)))


# -- where autocast begins and ends --------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_autocast_disabled_inside_autocast(stage):
    fast, _ = pair(stage)
    x = features(stage)
    expected = fast(x)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        out = fast(x)
    assert torch.equal(out, expected)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("stage", STAGES)
def test_backward_inside_autocast(stage):
    """Autocast must not reach into a backward: the gradients are those of a backward outside."""
    fast, _ = pair(stage)
    gradients = []
    for inside in (False, True):
        module, x = copy.deepcopy(fast), features(stage).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
            out.backward(torch.ones_like(out))
        gradients.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("stage", ["block", "transition", "network"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float64_is_left_alone_by_autocast(stage, dtype):
    fast, stock = pair(stage, lambda module: module.double())
    x = features(stage, torch.float64)
    if stage == "network":  # its classifier, a stock nn.Linear, is not
        assert outcome(fast, x, dtype) == outcome(stock, x, dtype)
        fast, stock = fast.features, stock.features
    seen, expected = observe(fast, x, autocast=dtype), observe(stock, x)
    assert not list(failures(compare(seen, [expected], expected, torch.float64)))


# -- mismatches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["no autocast", "autocast"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("stage", ["block", "transition", "network"])
def test_mismatched_input_does_what_the_reference_does(stage, held, given, autocast):
    """PyTorch's own error, or PyTorch's own dtypes: never a silent promotion that stock PyTorch refuses."""
    x = features(stage, given)
    fast, stock = (outcome(module, x, autocast) for module in pair(stage, lambda module: module.to(held)))
    assert fast == stock


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("stage", ["block", "transition", "network"])
def test_norms_of_a_dtype_that_stock_refuses(stage, dtype):
    x = features(stage)
    fast, stock = (outcome(module, x) for module in pair(stage, batch_norms(dtype)))
    assert fast == stock
    assert stock[0] is RuntimeError


# -- training ------------------------------------------------------------------------------------------------


def test_grad_scaler_skips_an_overflow_and_recovers():
    """The scale that float16 gradients overflow at, the skipped step and the steps after it: all as in stock."""
    histories = []
    for model in pair("CIFAR network"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
        history = []
        for step in range(12):
            before = copy.deepcopy(list(model.parameters()))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                out = model(features("CIFAR network", seed=step))
            scaler.scale(out.float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            moved = not all(map(torch.equal, before, model.parameters()))
            history.append((scaler.get_scale(), moved))
        histories.append(history)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    fast, stock = histories
    assert fast == stock
    assert fast[0] == (2.0**19, False)
    assert fast[-1][1]


@pytest.mark.usefixtures("default_float64")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_default_dtype_float64(stage, dtype):
    """The default dtype is for new modules; it must leak into no computation of a module of another dtype."""
    fast, stock = pair(stage, lambda module: module.to(dtype))
    inputs = [features(stage, dtype, seed) for seed in range(3)]
    assert not list(failures(check(fast, stock, inputs, dtype=dtype)))
    for train in (True, False):
        seen = dtypes_of(fast.train(train), inputs[0], None)
        assert seen == dtypes_of(stock.train(train), inputs[0], None)
        assert set(seen.values()) == {dtype}


@pytest.mark.usefixtures("default_float64")
def test_network_built_under_default_dtype_float64():
    fast, _ = pair("network")
    assert set(dtypes_of(fast, torch.randn(2, 3, 32, 32), None).values()) == {torch.float64}
