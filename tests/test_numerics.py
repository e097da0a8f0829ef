"""The numbers: fast against stock PyTorch by the budgets of ``fastdense.parity``, on every device.

Half precision is compared on networks whose ReLUs stay clear of zero (see ``clear_relus``), where errors are of
the size of a rounding, and stock's and ours differ by little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastdense
from fastdense import FastDenseBlock, parity

pytestmark = pytest.mark.filterwarnings("error::fastdense.FallbackWarning")

PRECISIONS = {
    "fp32": dict(dtype=torch.float32),
    "fp16": dict(dtype=torch.float16),
    "bf16": dict(dtype=torch.bfloat16),
    "autocast fp16": dict(dtype=torch.float16, autocast=True),
    "autocast bf16": dict(dtype=torch.bfloat16, autocast=True),
}
every_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
train_and_eval = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])

BLOCKS = {
    "odd channels": (dict(num_layers=3, num_input_features=13, growth_rate=5), (2, 13, 5, 4)),
    "growth 1": (dict(num_layers=4, num_input_features=15, growth_rate=1, bn_size=16), (2, 15, 4, 5)),
    "growth 12, no bottleneck": (
        dict(num_layers=3, num_input_features=16, growth_rate=12, bn_size=None),
        (2, 16, 5, 5),
    ),
    "growth 33": (dict(num_layers=2, num_input_features=33, growth_rate=33), (2, 33, 5, 5)),
    "sequences": (dict(num_layers=3, num_input_features=13, growth_rate=5, spatial_dims=1), (2, 13, 21)),
    "volumes": (dict(num_layers=3, num_input_features=13, growth_rate=5, spatial_dims=3), (2, 13, 3, 5, 4)),
    "volumes, no bottleneck": (
        dict(num_layers=3, num_input_features=16, growth_rate=12, bn_size=None, spatial_dims=3),
        (2, 16, 3, 4, 5),
    ),
}

STEMS = {
    "ImageNet stem": (dict(small_inputs=False), (32, 32)),
    "CIFAR stem": (dict(small_inputs=True), (8, 8)),
    "sequences": (dict(spatial_dims=1), (45,)),
    "volumes": (dict(spatial_dims=3), (32, 25, 28)),
}


@pytest.fixture(params=["auto", "torch"])
def backend(request) -> Iterator[str]:
    """The device's own kernels, and the portable ones."""
    with fastdense.use_backend(request.param):
        yield request.param


every_backend = pytest.mark.usefixtures("backend")


# -- item 1: twice stock's error ------------------------------------------------------------------------------


def need_stock(precision: dict[str, object], dims: int, device: str) -> None:
    """Skip where stock PyTorch, with which a transition is to be compared, does not compute it at all."""
    if dims == 3 and precision["dtype"] is not torch.float32 and device == "cpu":
        pytest.skip("PyTorch has no average pool of volumes in half precision on CPUs")


@every_precision
@train_and_eval
@pytest.mark.parametrize("geometry", BLOCKS)
def test_block(geometry, train, precision, device, twins, randn, clear_relus, assert_parity):
    arguments, shape = BLOCKS[geometry]
    pair = [module.train(train).to(device) for module in twins("block", **arguments)]
    inputs = [randn(*shape, seed=seed, device=device) for seed in range(3)]
    clear_relus(pair, inputs)
    assert_parity(*pair, inputs, **precision)


@every_backend
@pytest.mark.parametrize("precision", ["fp32", "autocast bf16"])
def test_block_of_a_batch_that_is_cut(precision, device, twins, randn, clear_relus, assert_parity):
    """Its widest temporary, of a bottleneck, is larger than what one pass takes at once on a CPU."""
    pair = [module.to(device) for module in twins("block", 2, 8, growth_rate=16)]
    inputs = [randn(5, 8, 128, 128, seed=seed, device=device) for seed in range(3)]
    clear_relus(pair, inputs)
    assert_parity(*pair, inputs, **PRECISIONS[precision])


@every_precision
@train_and_eval
@pytest.mark.parametrize("spatial", [(7, 5), (11,), (5, 4, 3)], ids=str)
def test_transition(spatial, train, precision, device, twins, randn, clear_relus, assert_parity):
    need_stock(precision, len(spatial), device)
    pair = [module.train(train).to(device) for module in twins("transition", 19, 9, spatial_dims=len(spatial))]
    inputs = [randn(2, 19, *spatial, seed=seed, device=device) for seed in range(3)]
    clear_relus(pair, inputs)
    assert_parity(*pair, inputs, **precision)


@every_precision
@train_and_eval
@pytest.mark.parametrize("stem", STEMS)
def test_network(stem, train, precision, device, twins, randn, clear_relus, assert_parity):
    arguments, spatial = STEMS[stem]
    need_stock(precision, len(spatial), device)
    pair = twins("net", 12, (2, 2), 16, num_classes=10, **arguments)
    pair = [module.train(train).to(device) for module in pair]
    inputs = [randn(2, 3, *spatial, seed=seed, device=device) for seed in range(3)]
    clear_relus(pair, inputs)
    assert_parity(*pair, inputs, **precision)


@train_and_eval
@pytest.mark.parametrize(
    "options",
    [
        dict(memory_efficient=True),
        dict(bn_size=None, memory_efficient=True),
        dict(compression=1.0),
        dict(memory_efficient=True, spatial_dims=3),
    ],
    ids=str,
)
def test_network_options(options, train, device, twins, randn, clear_relus, assert_parity):
    pair = twins("net", 12, (2, 2), 16, num_classes=10, small_inputs=True, **options)
    pair = [module.train(train).to(device) for module in pair]
    inputs = [randn(2, 3, *[8] * options.get("spatial_dims", 2), seed=seed, device=device) for seed in range(3)]
    clear_relus(pair, inputs)
    assert_parity(*pair, inputs, dtype=torch.float32)


@train_and_eval
def test_outputs_where_relus_do_come_near_zero(train, device, twins, randn, assert_parity):
    """A flipped ReLU changes the output continuously, so outputs and statistics need no clearance."""
    pair = [module.train(train).to(device) for module in twins("net", 12, (2, 2), 16, num_classes=10)]
    inputs = [randn(2, 3, 32, 32, seed=seed, device=device) for seed in range(3)]
    for precision in PRECISIONS.values():
        assert_parity(*pair, inputs, backward=False, **precision)


# -- items 3 and 4: statistics of hard data, NaN and infinity -------------------------------------------------


@every_backend
@train_and_eval
def test_mean_far_larger_than_deviation(train, device, twins, randn, clear_relus, assert_parity):
    """Where E[x^2] - E[x]^2 would be noise: mean 1e4, deviation 0.1."""
    pair = [module.train(train).to(device) for module in twins("block", 2, 16, growth_rate=8)]
    inputs = [randn(2, 16, 6, 6, seed=seed, device=device) / 10 + 1e4 for seed in range(3)]
    for module in pair:
        for layer in module.values():
            layer.norm1.running_mean[:16] += 1e4
            layer.norm1.running_var[:16] /= 100
    clear_relus(pair, inputs)
    assert_parity(*pair, inputs, dtype=torch.float32)


@every_backend
@train_and_eval
@pytest.mark.parametrize("gamma", [0.0, 1e-30, 1e-6])
@pytest.mark.parametrize("shape", [(2, 6, 5, 5), (2, 6, 25)], ids=["images", "sequences"])
def test_outputs_that_do_not_show_their_norms_inputs(
    shape, gamma, train, device, twins, randn, clear_relus, assert_parity
):
    """Where a norm's output is little but beta, a backward must not take its input from there."""
    pair = twins("block", 1, 6, growth_rate=4, bn_size=None, spatial_dims=len(shape) - 2)
    pair = [module.train(train).to(device) for module in pair]
    inputs = [randn(*shape, seed=seed, device=device) for seed in range(3)]
    clear_relus(pair, inputs)
    for module in pair:
        norm = module.denselayer1.norm1
        norm.weight.data[:2] = gamma
        norm.bias.data[:2] = torch.tensor([-1.0, 1.0], device=device)
    assert_parity(*pair, inputs, dtype=torch.float32)


@every_backend
@pytest.mark.parametrize("constant", [0.0, 1.0, 1e4, -3e4])
def test_constant_channels_stay_finite_and_within_one(constant, device, twins, batch_norms):
    """Normalised they are zero, but 1/sqrt(eps) magnifies what rounding leaves of their deviation."""
    fast, _ = twins("tails", 3)
    for norm in batch_norms(fast.to(device)):
        norm.reset_parameters()
    x = torch.full((2, 3, 9, 7), constant, device=device, requires_grad=True)
    out = fast(x)
    out.sum().backward()
    assert out.abs().max() <= 1  # not so if NaN
    assert x.grad.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in fast.buffers())


@every_backend
@train_and_eval
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("kind", ["block", "transition", "tails"])
def test_nan_and_infinity_stand_where_pytorch_puts_them(kind, value, train, device, twins, randn):
    arguments = {"block": (2, 5, 2, 3), "transition": (5, 3), "tails": (5,)}[kind]
    x = randn(2, 5, 8, 8, device=device)
    x[1, 2, 3, 4] = value
    with torch.no_grad():
        fast, stock = (module.to(device).train(train)(x) for module in twins(kind, *arguments))
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(fast), test(stock))


# -- item 5: memory that nothing has written to ---------------------------------------------------------------


@contextmanager
def uninitialised_memory_is_nan(nan: bool) -> Iterator[None]:
    """Within, ``torch.empty`` and its like give NaN, or whatever the memory holds."""
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = nan
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = previous
        torch.use_deterministic_algorithms(False)


@train_and_eval
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "autocast bf16"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(bn_size=None), dict(memory_efficient=True), dict(spatial_dims=1), dict(spatial_dims=3)],
    ids=str,
)
def test_uninitialised_memory_is_never_read(options, precision, train, device, twins, randn, assert_identical):
    seen = []
    for nan in (False, True):
        fast, _ = twins("net", 5, (2, 1), 7, num_classes=3, **options)
        fast.to(device).train(train)
        x = randn(2, 3, *(35, 33, 32)[: options.get("spatial_dims", 2)], device=device)
        with uninitialised_memory_is_nan(nan):
            assert not nan or torch.empty(3, device=device).isnan().all()
            seen.append(parity.observe(fast, x, autocast=precision))
            with torch.inference_mode():
                seen[-1]["inference"] = fast.eval()(x)
    assert all(tensor.isfinite().all() for tensor in seen[1].values())
    assert_identical(*seen)


# -- item 6: shapes -------------------------------------------------------------------------------------------


def sizes(least: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Spatial dimensions of sequences, images and volumes."""
    side, short = st.integers(least, 57), st.integers(least, 11)
    return st.one_of(st.tuples(side), st.tuples(side, side), st.tuples(short, short, short))


@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 17),
    growth_rate=st.sampled_from([1, 12, 33, 48]),
    bn_size=st.sampled_from([None, 1, 4]),
    num_layers=st.integers(1, 2),
    spatial=sizes(1),
    train=st.booleans(),
)
@example(batch=1, channels=3, growth_rate=48, bn_size=4, num_layers=2, spatial=(57, 1), train=True)
@example(batch=1, channels=1, growth_rate=1, bn_size=1, num_layers=1, spatial=(1, 1), train=False)
def test_block_of_any_shape(
    device, twins, randn, assert_parity, batch, channels, growth_rate, bn_size, num_layers, spatial, train
):
    pair = twins("block", num_layers, channels, bn_size, growth_rate, spatial_dims=len(spatial))
    x = randn(batch, channels, *spatial, device=device)
    pair = [module.to(device).train(train) for module in pair]
    if train and batch * math.prod(spatial) == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            pair[0](x)
        return
    assert_parity(*pair, x, dtype=torch.float64)
    assert_parity(*pair, x, dtype=torch.float32, backward=False)


@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 17),
    spatial=sizes(2),
    train=st.booleans(),
)
def test_transition_of_any_shape(device, twins, randn, assert_parity, batch, channels, spatial, train):
    pair = twins("transition", channels, (channels + 1) // 2, spatial_dims=len(spatial))
    pair = [module.to(device).train(train) for module in pair]
    assert_parity(*pair, randn(batch, channels, *spatial, device=device), dtype=torch.float64)


@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 17),
    spatial=sizes(3),
    train=st.booleans(),
)
@example(batch=1, channels=3, spatial=(57, 1), train=True)
def test_stem_tail_and_head_of_any_shape(device, twins, randn, assert_parity, batch, channels, spatial, train):
    pair = [module.to(device).train(train) for module in twins("tails", channels, spatial_dims=len(spatial))]
    assert_parity(*pair, randn(batch, channels, *spatial, device=device), dtype=torch.float64)


# -- item 7: one value per channel, empty batch ---------------------------------------------------------------

SMALL = {"block": (2, 5, 2, 3), "transition": (5, 3), "tails": (5,)}


def outcome(module: nn.Module, x: Tensor) -> tuple[object, ...]:
    """What a forward gives: the output's shape and dtype, or the type of its exception and its message."""
    try:
        out = module(x)
    except Exception as error:
        return type(error), str(error)
    return out.shape, out.dtype


@pytest.mark.parametrize("kind", SMALL)
def test_one_value_per_channel_is_pytorchs_error(kind, device, twins, randn, assert_identical):
    fast, stock = (module.to(device) for module in twins(kind, *SMALL[kind]))
    before = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    x = randn(1, 5, 1, 1, device=device)
    assert outcome(fast, x) == outcome(stock, x)
    assert outcome(fast, x)[0] is ValueError
    assert_identical(fast.state_dict(), before)


@train_and_eval
@pytest.mark.parametrize("kind", SMALL)
def test_empty_batch_does_what_pytorch_does(kind, train, device, twins):
    fast, stock = (module.to(device).train(train) for module in twins(kind, *SMALL[kind]))
    x = torch.empty(0, 5, 8, 8, device=device)
    assert outcome(fast, x) == outcome(stock, x)


# -- item 8: layouts ------------------------------------------------------------------------------------------


def sliced(x: Tensor) -> Tensor:
    """The same values as every other channel and the inner pixels of a larger tensor."""
    n, c, *spatial = x.shape
    large = x.new_full((n + 1, 2 * c, *(size + 3 for size in spatial)), float("nan"))
    view = large[(slice(1, None), slice(None, None, 2), *[slice(1, -2)] * len(spatial))]
    return view.copy_(x)


LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": sliced,
    "batch expanded": lambda x: x[:1].expand(x.shape),
    "width expanded": lambda x: x[..., :1].expand(x.shape),
    "all expanded": lambda x: x.flatten()[:1].view([1] * x.dim()).expand(x.shape),
}

SPATIAL = {1: (42,), 2: (6, 7), 3: (4, 2, 5)}
every_dimension = pytest.mark.parametrize("dims", SPATIAL, ids="{}-D".format)


def plain_copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def forward_and_backward(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    module.zero_grad()
    out = module(x)
    out.backward(grad)
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


@train_and_eval
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["block", "transition"])
@every_dimension
def test_any_layout_of_input_and_gradient(dims, kind, layout, train, device, twins, randn, assert_identical):
    fast = twins(kind, *SMALL[kind], spatial_dims=dims)[0].to(device).train(train)
    plain_x = randn(2, 5, *SPATIAL[dims], device=device)
    plain_grad = randn(*fast(plain_x).shape, seed=1, device=device)
    x, grad = LAYOUTS[layout](plain_x), LAYOUTS[layout](plain_grad)
    ours = forward_and_backward(fast, x, grad)
    assert_identical(ours, forward_and_backward(fast, plain_copy(x), plain_copy(grad)))
    assert ours["out"].movedim(1, -1).is_contiguous()


@train_and_eval
@pytest.mark.parametrize("layout", LAYOUTS)
@every_dimension
def test_any_layout_before_stem_tail_and_of_the_heads_gradient(
    dims, layout, train, device, twins, randn, assert_identical
):
    fast = twins("tails", 5, spatial_dims=dims)[0].to(device).train(train)
    x = LAYOUTS[layout](randn(2, 5, *SPATIAL[dims], device=device))
    for grad in (randn(2, 5, device=device), randn(2, 10, device=device)[:, ::2], x.new_ones(()).expand(2, 5)):
        ours = forward_and_backward(fast, x, grad)
        assert_identical(ours, forward_and_backward(fast, plain_copy(x), plain_copy(grad)))


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("kind", ["block", "transition"])
@every_dimension
def test_output_is_dense_channels_last_and_no_view(dims, kind, mode, layout, device, twins, randn):
    fast = twins(kind, *SMALL[kind], spatial_dims=dims)[0].to(device).train(mode == "train")
    with torch.set_grad_enabled(mode != "inference"):
        out = fast(LAYOUTS[layout](randn(2, 5, *SPATIAL[dims], device=device)))
    n, c, *spatial = out.shape
    assert out.movedim(1, -1).stride() == torch.empty(n, *spatial, c).stride()
    assert out.untyped_storage().nbytes() == out.numel() * out.element_size()
    assert out._base is None


def test_heads_of_other_people_work(device, twins, randn):
    """flatten, view and reshape of pooled features, and a linear layer on them, as torchvision's users write."""
    fast, stock = (module.to(device) for module in twins("block", *SMALL["block"]))
    x = randn(2, 5, 6, 7, device=device)
    results = []
    for block in (fast, stock):
        features = F.relu(block(x))
        pooled = F.adaptive_avg_pool2d(features, (1, 1))
        flat = torch.flatten(pooled, 1)
        for other in (pooled.view(2, -1), pooled.view(features.size(0), -1), pooled.squeeze(), pooled.reshape(2, -1)):
            assert torch.equal(other, flat)
        assert features.flatten(2).mean(2).shape == flat.shape
        F.linear(flat, torch.ones(3, flat.shape[1], device=device)).sum().backward()
        results.append({name: p.grad for name, p in block.named_parameters()})
    assert results[0].keys() == results[1].keys()
    assert all(g is not None and g.isfinite().all() for g in results[0].values())


def test_weights_in_channels_last(device, randn, assert_identical):
    torch.manual_seed(0)
    block = FastDenseBlock(2, 5, 2, 3).to(device)
    x, grad = randn(2, 5, 6, 7, device=device), randn(2, 11, 6, 7, seed=1, device=device)
    plain = forward_and_backward(block, x, grad)
    moved = forward_and_backward(block.to(memory_format=torch.channels_last), x, grad)
    assert_identical(plain, moved)
