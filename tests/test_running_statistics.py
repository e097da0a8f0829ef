"""Running statistics: once a step, the same as stock PyTorch's, and untouched where frozen."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdense
from fastdense import parity, reference


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def pair(kind="net", **kwargs):
    torch.manual_seed(0)
    if kind == "block":
        stock = reference.DenseBlock(3, 6, 2, 4, **kwargs)
    else:
        stock = reference.DenseNet(4, (2, 2), 8, 2, num_classes=3, **kwargs)
    return stock, fastdense.convert(stock)


def batches(count, *shape):
    generator = torch.Generator().manual_seed(2)
    return [2 * torch.randn(shape, generator=generator) + 1 for _ in range(count)]


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
def test_equal_over_twenty_steps(momentum):
    stock, fast = pair()
    exact = copy.deepcopy(stock).double()
    for model in (stock, fast, exact):
        for norm in norms(model):
            norm.momentum = momentum
        for x in batches(20, 2, 3, 32, 40):
            model(x.to(next(model.parameters()).dtype))
    statistics = [{name: b for name, b in m.named_buffers() if b.is_floating_point()} for m in (fast, stock, exact)]
    rows = parity.compare(statistics[0], statistics[1:2], statistics[2], torch.float32)
    assert not list(parity.failures(rows))
    assert {norm.num_batches_tracked.item() for norm in norms(fast)} == {20}


def test_the_first_call_ever_updates_once():
    _, fast = pair()
    fast(batches(1, 2, 3, 32, 32)[0])
    assert {norm.num_batches_tracked.item() for norm in norms(fast)} == {1}
    assert not any(torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean)) for norm in norms(fast))


def plainly(block, x):
    return block(x)


@pytest.mark.parametrize(
    ("call", "memory_efficient"),
    [
        (plainly, True),
        (partial(checkpoint, use_reentrant=False), False),
        (partial(checkpoint, use_reentrant=True), False),
        (partial(checkpoint, use_reentrant=False), True),
        (partial(checkpoint, use_reentrant=True), True),
    ],
    ids=["our own", "non-reentrant", "reentrant", "non-reentrant and our own", "reentrant and our own"],
)
def test_recomputation_updates_once_with_equal_gradients(call, memory_efficient):
    stock, fast = pair("block")
    fast_recomputing = fastdense.FastDenseBlock(3, 6, 2, 4, memory_efficient=memory_efficient)
    fast_recomputing.load_state_dict(stock.state_dict())
    (x,) = batches(1, 2, 6, 5, 4)
    seen = []
    for block, run in ((fast, plainly), (fast_recomputing, call)):
        y = x.clone().requires_grad_()
        out = run(block, y)
        out.square().sum().backward()
        seen.append([out, y.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert {norm.num_batches_tracked.item() for norm in norms(fast_recomputing)} == {1}


def test_reference_recomputation_updates_once_too():
    torch.manual_seed(0)
    block = reference.DenseBlock(3, 6, 2, 4, memory_efficient=True)
    plain = reference.DenseBlock(3, 6, 2, 4)
    plain.load_state_dict(block.state_dict())
    (x,) = batches(1, 2, 6, 5, 4)
    for b in (block, plain):
        b(x.requires_grad_()).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), plain.buffers(), strict=True))


def test_frozen_norms_are_bit_unchanged_and_others_train():
    stock, fast = pair()
    generator = torch.Generator().manual_seed(4)
    frozen = [
        f"features.{name}" for name in ("norm0", "denseblock1.denselayer2.norm1", "denseblock2.denselayer1.norm2")
    ]
    (x,) = batches(1, 2, 3, 32, 32)
    for model in (stock, fast):
        generator.manual_seed(4)
        for name in frozen:
            norm = model.get_submodule(name).eval()
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    before = copy.deepcopy(fast.state_dict())
    rows = parity.check(fast, stock, x, dtype=torch.float64)
    assert not list(parity.failures(rows))
    fast(x).sum().backward()
    for name, norm in fast.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            unchanged = all(
                torch.equal(before[f"{name}.{key}"], norm.state_dict()[key])
                for key in ("running_mean", "running_var", "num_batches_tracked")
            )
            assert unchanged == (name in frozen), name


def test_eval_and_no_grad_training_modes():
    _, fast = pair()
    (x,) = batches(1, 2, 3, 32, 32)
    before = copy.deepcopy(fast.state_dict())
    fast.eval()(x).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in fast.state_dict().items())
    with torch.no_grad():
        fast.train()(x)
    assert {norm.num_batches_tracked.item() for norm in norms(fast)} == {1}


def test_statistics_switched_off_after_construction():
    stock, fast = pair("block")
    for block in (stock, fast):
        for norm in norms(block):
            norm.track_running_stats = False
    (x,) = batches(1, 2, 6, 5, 4)
    assert not list(parity.failures(parity.check(fast, stock, x, dtype=torch.float32)))
    assert {norm.num_batches_tracked.item() for norm in norms(fast)} == {0}


def test_one_value_per_channel_is_pytorchs_error():
    stock, fast = pair("block")
    x = torch.randn(1, 6, 1, 1)
    messages = []
    for block in (stock, fast):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as error:
            block(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    torch.testing.assert_close(fast.eval()(x), stock.eval()(x))
    transition = fastdense.FastTransition(6, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        transition(torch.randn(1, 6, 1, 1))


@pytest.mark.parametrize("train", [True, False])
def test_empty_batch(train):
    stock, fast = pair("block")
    x = torch.randn(0, 6, 4, 4)
    shapes = [block.train(train)(x).shape for block in (stock, fast)]
    assert shapes[0] == shapes[1] == (0, 18, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(stock.buffers(), fast.buffers(), strict=True))
