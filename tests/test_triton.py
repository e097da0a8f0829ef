"""The Triton kernels: on a GPU where there is one, else interpreted on the CPU (where bfloat16 products are wrong).

The modules' tests run them too on a GPU, as the backend chosen there. Here are their numbers over geometries, what
they touch and leave alone, and what the compiler makes of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastdense
from fastdense.kernels import portable
from fastdense.kernels.contract import ChannelStats, Norm

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.filterwarnings("error::fastdense.FallbackWarning"),
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    pytestmark.append(pytest.mark.gpu)
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
PRECISIONS = {
    "fp32": dict(dtype=torch.float32),
    "fp16": dict(dtype=torch.float16),
    "autocast fp16": dict(dtype=torch.float16, autocast=True),
    "bf16": dict(dtype=torch.bfloat16),
}


def precisions(*names: str) -> pytest.MarkDecorator:
    """The interpreter multiplies bfloat16 wrongly, so that one is for GPUs."""
    marks = {"bf16": [pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU")]}
    values = [pytest.param(PRECISIONS[name], id=name, marks=marks.get(name, [])) for name in names]
    return pytest.mark.parametrize("precision", values)


train_and_eval = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])

BLOCKS = {
    "DenseNet-121, block 1": (dict(num_layers=2, num_input_features=64), (2, 64, 9, 8)),
    "DenseNet-121, block 2": (dict(num_layers=2, num_input_features=128), (2, 128, 7, 7)),
    "DenseNet-121, block 3": (dict(num_layers=2, num_input_features=256), (2, 256, 5, 4)),
    "DenseNet-121, block 4": (dict(num_layers=2, num_input_features=512), (2, 512, 3, 3)),
    "growth 48": (dict(num_layers=2, num_input_features=96, growth_rate=48), (2, 96, 4, 4)),
    "CIFAR, BC, growth 12": (dict(num_layers=3, num_input_features=24, growth_rate=12), (2, 24, 8, 8)),
    "CIFAR, BC, growth 40": (dict(num_layers=2, num_input_features=80, growth_rate=40), (2, 80, 4, 4)),
    "CIFAR, growth 12": (dict(num_layers=3, num_input_features=16, growth_rate=12, bn_size=None), (2, 16, 8, 8)),
    "CIFAR, growth 24": (dict(num_layers=2, num_input_features=16, growth_rate=24, bn_size=None), (2, 16, 6, 6)),
    "odd": (dict(num_layers=3, num_input_features=13, growth_rate=5, bn_size=3), (3, 13, 5, 7)),
}


@pytest.fixture(scope="module")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1")
    with fastdense.use_backend("triton"):
        yield


@pytest.fixture(params=["few rows", "many rows"])
def tiles(request, monkeypatch) -> None:
    """The block shapes of small problems, which all those here are, and those of large ones."""
    if request.param == "many rows":
        _many_rows(monkeypatch)


def _many_rows(monkeypatch) -> None:
    tuning = importlib.import_module("fastdense.kernels.triton.tuning")
    monkeypatch.setattr(tuning, "_FEW", 0)
    monkeypatch.setattr(tuning, "_MANY", 0)


# -- numbers ----------------------------------------------------------------------------------------------------


@precisions("fp32", "fp16", "bf16")
@train_and_eval
@pytest.mark.parametrize("geometry", BLOCKS)
def test_block(geometry, train, precision, device, twins, randn, clear_relus, monkeypatch, assert_parity):
    arguments, shape = BLOCKS[geometry]
    pair = [module.train(train).to(device) for module in twins("block", **arguments)]
    inputs = [randn(*shape, seed=seed, device=device) for seed in range(2)]
    clear_relus(pair, inputs)
    _many_rows(monkeypatch)
    assert_parity(*pair, inputs, **precision)


@precisions("fp32", "fp16", "bf16")
@train_and_eval
@pytest.mark.parametrize(
    ("kind", "arguments"), [("transition", (19, 9)), ("tails", (19,))], ids=["transition", "tails"]
)
def test_what_is_around_the_blocks(
    kind, arguments, train, precision, device, twins, randn, clear_relus, assert_parity, monkeypatch
):
    _many_rows(monkeypatch)
    pair = [module.train(train).to(device) for module in twins(kind, *arguments)]
    inputs = [randn(2, 19, 9, 7, seed=seed, device=device) for seed in range(5)]
    clear_relus(pair, inputs)
    assert_parity(*pair, inputs, **precision)


@precisions("fp32", "fp16", "autocast fp16", "bf16")
@train_and_eval
def test_network(train, precision, device, twins, randn, clear_relus, assert_parity, monkeypatch):
    """Stem tail, blocks, transitions and head, with statistics handed from one to the next."""
    _many_rows(monkeypatch)
    pair = [module.train(train).to(device) for module in twins("net", 12, (2, 2), 16, num_classes=10)]
    inputs = [randn(2, 3, 37, 32, seed=seed, device=device) for seed in range(2)]
    clear_relus(pair, inputs)
    assert_parity(*pair, inputs, **precision)


@precisions("fp32", "bf16")
@train_and_eval
def test_network_of_new_features_first(train, precision, device, twins, randn, clear_relus, assert_parity):
    pair = [module.train(train).to(device) for module in twins("new first", (2, 3), 12)]
    inputs = [randn(2, 3, 8, 7, seed=seed, device=device) for seed in range(2)]
    clear_relus(pair, inputs)
    assert_parity(*pair, inputs, **precision)


@pytest.mark.parametrize("frozen", ["norm1", "norm2"])
def test_mixed_norms(frozen, tiles, device, twins, randn, clear_relus, assert_parity):
    pair = [module.to(device) for module in twins("block", 3, 13, growth_rate=5, bn_size=3)]
    for module in pair:
        module.train()
        for name, norm in module.named_modules():
            if name.endswith(frozen) and "layer2" not in name:
                norm.eval()
    inputs = [randn(2, 13, 5, 4, seed=seed, device=device) for seed in range(2)]
    clear_relus(pair, inputs)
    assert_parity(*pair, inputs, dtype=torch.float32)


@pytest.mark.parametrize("options", [dict(memory_efficient=True), dict(bn_size=None)], ids=str)
def test_gradients_that_are_not_needed(options, tiles, device, twins, randn, clear_relus, assert_parity):
    """Frozen weights and norms, in layers above and below others; and recomputed bottlenecks."""
    pair = [module.train().to(device) for module in twins("block", 3, 13, growth_rate=5, **{"bn_size": 3} | options)]
    for module in pair:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("layer1" not in name and not name.startswith("denselayer2.conv"))
    inputs = [randn(2, 13, 5, 4, seed=seed, device=device) for seed in range(2)]
    clear_relus(pair, inputs)
    assert_parity(*pair, inputs, dtype=torch.float32)
    x = inputs[0]
    grads = []
    for module in pair:
        module(x).sin().sum().backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    assert {name for name, grad in grads[0].items() if grad is None} == {n for n, g in grads[1].items() if g is None}


@pytest.mark.parametrize("every_conv", [False, True])
def test_dropout_equals_the_references(every_conv, device, twins, randn):
    arguments = dict(growth_rate=5, bn_size=3, drop_rate=0.3, drop_every_conv=every_conv)
    fast, stock = (module.train().to(device) for module in twins("block", 3, 13, **arguments))
    x = randn(2, 13, 5, 4, device=device)
    outs = []
    for module in (fast, stock):
        torch.manual_seed(7)
        outs.append(module(x))
        outs[-1].sin().sum().backward()
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(fast.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@given(
    n=st.integers(1, 3),
    h=st.integers(1, 9),
    w=st.integers(2, 9),
    channels=st.integers(1, 40),
    growth=st.sampled_from([1, 7, 12, 33]),
    bn_size=st.sampled_from([None, 1, 4]),
    train=st.booleans(),
)
def test_any_shape(n, h, w, channels, growth, bn_size, train, device, twins, randn, assert_parity):
    arguments = dict(num_layers=2, num_input_features=channels, growth_rate=growth, bn_size=bn_size)
    pair = [module.train(train).to(device) for module in twins("block", **arguments)]
    inputs = [randn(n, channels, h, w, seed=seed, device=device) for seed in range(2)]
    assert_parity(*pair, inputs, dtype=torch.float32, backward=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_any_strides(layout, device, twins, randn):
    x = randn(2, 26, 6, 5, device=device)[:, :13]
    x = {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": x,
        "expanded": x[:, :1].expand(2, 13, 6, 5),
    }[layout]
    dense = x.contiguous()
    for kind, arguments in (("block", (2, 13, 3, 5)), ("transition", (13, 6)), ("tails", (13,))):
        fast, _ = (module.to(device) for module in twins(kind, *arguments))
        for train in (True, False):
            assert torch.equal(fast.train(train)(x), fast(dense))


def test_nan_and_infinity_pass_the_relus(device, twins, randn):
    fast, stock = (module.eval().to(device) for module in twins("net", 12, (2, 2), 16, num_classes=10))
    for value in (float("nan"), float("inf")):
        x = randn(3, 3, 32, 32, device=device)
        x[1, 0, 5, 5] = value
        with torch.no_grad():
            out, expected = fast(x), stock(x)
        assert torch.equal(out.isnan(), expected.isnan())
        assert out[1].isnan().any()
        assert out[[0, 2]].isfinite().all()


# -- the block in one launch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "growth"), [((7, 7), 32), ((9, 8), 12), ((3, 5), 5)])
def test_block_in_one_launch(size, growth, dtype, device, twins, randn, monkeypatch, assert_within_budget):
    dense_block = importlib.import_module("fastdense.kernels.triton.dense_block")
    fast, stock = (module.eval().to(device) for module in twins("block", 3, 20, growth_rate=growth))
    x = randn(3, 20, *size, device=device)
    exact = stock.double()(x.double())
    expected, x = stock.to(dtype)(x.to(dtype)), x.to(dtype)
    outs = []
    for one_launch in (True, False):
        monkeypatch.setattr(dense_block, "fits", lambda *_, one_launch=one_launch: one_launch)
        with torch.no_grad(), _launches() as launches:
            outs.append(fast.to(dtype)(x))
        assert ("_block_infer_kernel" in [launch.name for launch in launches]) == one_launch
    for out in outs:
        assert_within_budget({"output": out}, {"output": expected}, {"output": exact}, dtype)


# -- state --------------------------------------------------------------------------------------------------------


def test_every_change_of_a_parameter_is_seen(device, twins, randn):
    """Nothing folded or packed is kept from one call to the next."""
    fast, stock = (module.eval().to(device) for module in twins("block", 2, 13, 3, 5))
    x = randn(2, 13, 4, 4, device=device)
    with torch.no_grad():
        fast(x)
        for name, tensor in fast.state_dict().items():
            if tensor.is_floating_point():
                step = tensor.abs().mean()
                for module in (fast, stock):
                    module.state_dict()[name].add_(step)
                torch.testing.assert_close(fast(x), stock(x), rtol=1e-4, atol=1e-4)


def test_repeats_are_bit_equal(device, twins, randn):
    fast, _ = (module.train().to(device) for module in twins("net", 12, (2, 2), 16, num_classes=10))
    x = randn(2, 3, 32, 32, device=device)

    def step() -> list[Tensor]:
        fast.zero_grad()
        out = fast(x)
        out.sin().sum().backward()
        return [out, *(parameter.grad for parameter in fast.parameters())]

    first = step()
    for _ in range(2 if INTERPRETED else 250):
        assert all(map(torch.equal, first, step()))


@pytest.mark.slow
@only_interpreted
def test_training_follows_the_reference(twins, monkeypatch):
    """Fifty steps of SGD on real digits: the same loss, as far as rounding lets it be."""
    from fastdense import images

    _many_rows(monkeypatch)
    digits, labels, _, _ = images.digits()
    digits = (digits / 255 - 0.3) / 0.4
    pair = [module.train() for module in twins("net", 4, (1, 1), 8, in_channels=1, num_classes=10, small_inputs=True)]
    losses = []
    for module in pair:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
        losses.append([])
        for step in range(50):
            batch = slice(8 * step, 8 * step + 8)
            loss = torch.nn.functional.cross_entropy(module(digits[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    ours, theirs = map(np.array, losses)
    assert np.abs(ours - theirs).max() < 1e-3 * theirs.max()
    assert theirs[-10:].mean() < 0.95 * theirs[:10].mean()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_training_step_is_captured_by_a_cuda_graph(twins, randn):
    replayed, stepped = (twins("net", 12, (2, 2), 16, num_classes=10)[0].train().cuda() for _ in range(2))
    x, labels = randn(4, 3, 32, 32, device="cuda"), torch.arange(4, device="cuda")
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9) for module in (replayed, stepped)]

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)
        torch.nn.functional.cross_entropy(module(x), labels).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(replayed, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(replayed, optimizers[0])
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        step(stepped, optimizers[1])
    for (name, ours), theirs in zip(replayed.state_dict().items(), stepped.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """Every ``torch.empty`` of the kernels comes filled with NaN."""
    empty = torch.empty

    def fill(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    def switch(on: bool) -> None:
        monkeypatch.setattr(torch, "empty", fill if on else empty)

    return switch


def test_uninitialised_memory_is_never_read(device, twins, randn, poisoned):
    nets = [module.to(device) for module in twins("net", 12, (2, 2), 16, num_classes=10)][:1]
    nets += [module.to(device) for module in twins("net", 12, (2, 2), 16, num_classes=10, bn_size=None)][:1]
    x = randn(2, 3, 32, 32, device=device)
    for net in nets:
        for train in (True, False):
            results = []
            for poison in (False, True):
                poisoned(poison)
                net.train(train).zero_grad()
                out = net(x)
                out.sin().sum().backward()
                results.append([out, *(parameter.grad for parameter in net.parameters())])
            poisoned(False)
            assert all(map(torch.equal, *results))


def test_only_the_slice_is_written(device, randn):
    from fastdense.kernels.triton.conv1x1 import bn_relu_conv1x1_fwd
    from fastdense.kernels.triton.conv3x3 import bn_relu_conv3x3_fwd
    from fastdense.kernels.triton.statistics import Vectors

    n, h, w, k, growth, channels = 2, 5, 7, 13, 5, 24
    shared = randn(n * h * w + 3, channels, device=device)
    before = shared.clone()
    x = randn(n * h * w, k, seed=1, device=device)
    vectors = Vectors(torch.ones(k, device=device), torch.zeros(k, device=device))
    weight = randn(growth, 3, 3, k, seed=2, device=device)
    bn_relu_conv3x3_fwd(x, vectors, weight, shared[: n * h * w, 13 : 13 + growth], (h, w))
    image = x.view(n, h, w, k).permute(0, 3, 1, 2).relu()
    y = torch.conv2d(image, weight.permute(0, 3, 1, 2), padding=1).permute(0, 2, 3, 1).reshape(-1, growth)
    torch.testing.assert_close(shared[: n * h * w, 13 : 13 + growth], y, rtol=1e-4, atol=1e-4)
    shared[: n * h * w, 13 : 13 + growth] = before[: n * h * w, 13 : 13 + growth]
    assert torch.equal(shared, before)

    hidden = randn(n * h * w + 3, 8, seed=3, device=device)
    before = hidden.clone()
    prefix = shared[: n * h * w, :k]
    weight = randn(8, k, seed=4, device=device)
    bn_relu_conv1x1_fwd(prefix, vectors, weight, hidden[: n * h * w])
    torch.testing.assert_close(hidden[: n * h * w], prefix.relu() @ weight.t(), rtol=1e-4, atol=1e-4)
    assert torch.equal(hidden[n * h * w :], before[n * h * w :])


class _Traffic:
    """The addresses that each program touches."""

    def __init__(self) -> None:
        self.touched: dict[tuple[int, ...], list[np.ndarray]] = {}

    def note(self, builder, pointers, mask) -> None:
        addresses = np.unique(pointers.data[mask.data])
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.touched.setdefault(builder.grid_idx, []).append(np.stack([addresses, np.full_like(addresses, size)]))

    def take(self) -> list[np.ndarray]:
        """[2, n] for each program since the last call: addresses, each once, and how many bytes are there."""
        programs = [np.unique(np.concatenate(parts, axis=1), axis=1) for parts in self.touched.values()]
        self.touched.clear()
        return programs


def _bytes_in(touched: np.ndarray, *tensors: Tensor) -> int:
    """Of the addresses in the memory of ``tensors``."""
    total = 0
    for tensor in tensors:
        first = tensor.untyped_storage().data_ptr()
        inside = (touched[0] >= first) & (touched[0] < first + tensor.untyped_storage().nbytes())
        total += int(touched[1, inside].sum())
    return total


@pytest.fixture
def traffic(monkeypatch) -> _Traffic:
    from triton.runtime.interpreter import InterpreterBuilder

    counter = _Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def noted_load(self, ptrs, mask, *rest):
        counter.note(self, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def noted_store(self, ptrs, value, mask, *rest):
        counter.note(self, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
    return counter


def _launches(after=None):
    from fastdense.benchmarks.launches import recorded

    return recorded(make=True, after=after)


@only_interpreted
@pytest.mark.parametrize(
    ("train", "one_launch"),
    [(True, False), (False, False), (False, True)],
    ids=["training step", "inference by layer", "inference in one launch"],
)
def test_bytes_touched_are_the_compulsory_ones(train, one_launch, twins, randn, monkeypatch, traffic):
    """Each launch touches at most 1.15 of its floor, and pixels of x are read by one program of a 1x1 each."""
    dense_block = importlib.import_module("fastdense.kernels.triton.dense_block")
    monkeypatch.setattr(dense_block, "fits", lambda *_: one_launch)
    _many_rows(monkeypatch)
    net, _ = twins("net", 32, (2, 2), 64, num_classes=10)
    x = randn(2, 3, 40, 40).half()
    seen = []
    with torch.set_grad_enabled(train), _launches(after=lambda launch: seen.append((launch, traffic.take()))):
        out = net.half().train(train)(x)
        if train:
            out.sin().sum().backward()
    assert len({launch.name for launch, _ in seen}) >= (14 if train else 5 if one_launch else 6)
    for launch, programs in seen:
        touched = np.unique(np.concatenate(programs, axis=1), axis=1)
        total = int(touched[1].sum())
        if launch.name == "_block_infer_kernel":
            total -= _bytes_in(touched, launch.arguments["u_ptr"])  # stays in L2
        assert total <= 1.15 * launch.bytes(), (launch.name, total, launch.bytes())
        if launch.name in ("_bn_relu_conv1x1_fwd_kernel", "_bn_relu_pool_conv1x1_fwd_kernel"):
            x_ptr = launch.arguments["x_ptr"]
            assert sum(_bytes_in(program, x_ptr) for program in programs) == _bytes_in(touched, x_ptr)


@pytest.mark.parametrize("one_launch", [False, True], ids=["by layer", "in one launch"])
@torch.inference_mode()
def test_frozen_networks_have_everything_made(one_launch, device, twins, randn, monkeypatch):
    dense_block = importlib.import_module("fastdense.kernels.triton.dense_block")
    monkeypatch.setattr(dense_block, "fits", lambda *_: one_launch)
    net, _ = twins("net", 8, (2, 2), 16, num_classes=5)
    net.to(device).eval()
    frozen, x = fastdense.freeze(net), randn(2, 3, 40, 40, device=device)
    assert torch.equal(frozen(x), net(x))
    with _launches() as launches:
        frozen(x)
    blocks = 2 * (2 if one_launch else 1 + 2 * 2)
    assert len(launches) == 1 + blocks + 1 + 2  # the stem's tail, blocks, the transition, the head that is not frozen
    made = [launch.name for launch in launches]
    assert made.count("_finalise_kernel") == 1


@only_interpreted
def test_a_launch_is_quickly_asked_for(twins, randn):
    """While a GPU makes a step, its host asks for hundreds of launches: counted in calls of functions for each."""
    from fastdense.benchmarks.launches import recorded

    block, _ = twins("block", 6, 64)
    x = randn(2, 64, 8, 8)
    calls = 0

    def count(frame: Any, event: str, function: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def step() -> None:
        torch.autograd.grad(block.train()(x).sum(), list(block.parameters()))

    with recorded(make=False) as launches:
        step()  # to be remembered
        launches.clear()
        sys.setprofile(count)
        try:
            step()
        finally:
            sys.setprofile(None)
    assert len(launches) > 60
    assert calls < 80 * len(launches)


# -- operands and tuning ------------------------------------------------------------------------------------------


def test_float64_is_refused(device):
    from fastdense.kernels import triton as kernels

    with pytest.raises(TypeError, match="float32, bfloat16 and float16, got float64"):
        kernels.channel_stats(torch.zeros(2, 3, 4, 4, dtype=torch.float64, device=device))


def test_statistics_of_hard_data(device, randn):
    """Means far larger than deviations, over more tiles than one merge takes at a time."""
    from fastdense.kernels import triton as kernels

    x = randn(30, 40, 40, 40, device=device) * 0.1 + torch.linspace(-1e4, 1e4, 40, device=device)[:, None, None]
    mean, var = kernels.channel_stats(x)
    exact = x.double()
    expected = ChannelStats(exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0))
    torch.testing.assert_close(mean.double(), expected.mean, rtol=3e-7, atol=1e-3)
    torch.testing.assert_close(var.double(), expected.var, rtol=1e-2, atol=0)
    stock = portable.channel_stats(x)
    assert (mean - expected.mean).abs().max() <= 2 * (stock.mean - expected.mean).abs().max() + 1e-3


def test_the_default_dtype_does_not_matter(device, randn):
    from fastdense.kernels import triton as kernels

    x = randn(2, 5, 9, 8, device=device)
    expected = kernels.channel_stats(x)
    torch.set_default_dtype(torch.float16)
    try:
        made = kernels.channel_stats(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.stack(made), torch.stack(expected))


def test_tuned_files_and_their_override(tmp_path, monkeypatch):
    from fastdense.kernels.triton import tuning

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Some GPU")
    gpu, half = torch.device("cuda"), torch.bfloat16
    default = tuning.conv1x1_fwd(10**6, 128, 256, half, torch.device("cpu"))
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"configs": {"conv1x1_fwd": {"n128-k256-many-16bit": {"BLOCK_M": 256}}}}))
    assert tuning.conv1x1_fwd(10**6, 128, 256, half, gpu) == default
    monkeypatch.setattr(tuning, "_override", str(file))
    assert tuning.conv1x1_fwd(10**6, 128, 256, half, gpu).BLOCK_M == 256
    assert tuning.conv1x1_fwd(10**6, 128, 512, half, gpu) == default
    monkeypatch.setattr(tuning, "_override", "off")
    assert tuning.conv1x1_fwd(10**6, 128, 256, half, gpu) == default


def test_known_norms_make_exact_vectors(device):
    from fastdense.kernels.triton.statistics import norm_vectors

    weight, bias, mean, var = (torch.linspace(0.5, 2, 37, device=device) * i for i in range(1, 5))
    scale, shift = norm_vectors(Norm(weight, bias, mean, var, 1e-5, False))
    expected = weight.double() / (var.double() + 1e-5).sqrt()
    torch.testing.assert_close(scale.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(shift.double(), bias.double() - mean.double() * expected, rtol=1e-5, atol=1e-6)


@only_interpreted
def test_tuning_tries_what_fits_and_reads_its_own_keys(twins, randn, monkeypatch):
    from fastdense.benchmarks import tune
    from fastdense.kernels.triton import tuning

    block, _ = twins("block", 2, 64)
    _many_rows(monkeypatch)
    with torch.no_grad(), _launches() as launches:
        block.half().train()(randn(2, 64, 12, 12).half())
    launch = next(launch for launch in launches if launch.name == "_bn_relu_conv1x1_fwd_kernel")
    seconds = {32: 1.0, 64: 0.5, 128: 2.0}
    monkeypatch.setattr(tune, "_seconds", lambda launch: seconds[launch.arguments["BLOCK_K"]] * launch.grid[0])
    winner, quickest, default = tune.best(launch)
    assert winner is not None
    assert winner["BLOCK_M"] == 256
    assert quickest < default
    n, k = launch.arguments["N"], launch.arguments["K"]
    assert tune._key(launch) == tuning.key(launch.arguments["M"], n, k, torch.float16) == "n128-k64-many-16bit"


# -- what the compiler makes of them --------------------------------------------------------------------------------


@pytest.mark.slow
def test_kernels_compile_clean_for_every_gpu(tmp_path):
    """No spills, no more shared memory than there is, tensor cores in every product: the report's exit status."""
    rows = tmp_path / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "fastdense.benchmarks.kernel_report", "--json", str(rows)],
        env=environment, capture_output=True, text=True, timeout=570, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    compiled = json.loads(rows.read_text())
    assert {row["gpu"] for row in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    products = [row for row in compiled if "conv" in row["kernel"] or row["kernel"] == "block_infer"]
    assert len(products) >= 4 * 7
    assert all(row["matrix"] > 0 for row in products)
    assert all(row["spills"] == 0 for row in compiled)
