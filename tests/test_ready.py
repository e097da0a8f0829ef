"""What a block or transition has made ready for inference is used as long as it is right, and no longer."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import fastdense
from fastdense import FastDenseBlock, FastTransition, backends, ready, stages
from fastdense.kernels.cpu import library as cpu_library
from fastdense.modules import Fused
from fastdense.ready import Ready, Snapshot


@pytest.fixture(params=["torch", "cpu"])
def block(request: pytest.FixtureRequest, twins: Any) -> FastDenseBlock:
    """In evaluation, on a backend that makes nothing ready of its own, and on one that does."""
    if backends._REGISTRY[request.param].module is None:
        pytest.skip(backends._REGISTRY[request.param].note)
    with fastdense.use_backend(request.param):
        yield twins("block", 3, 8, bn_size=2, growth_rate=4)[0].eval()


@pytest.fixture
def transition(block: FastDenseBlock, twins: Any) -> FastTransition:
    """On the same backends."""
    return twins("transition", 8, 5, drop_rate=0.5)[0].eval()


@pytest.fixture
def x(randn: Any) -> Tensor:
    return randn(2, 8, 6, 5)


def warm(block: nn.Module, x: Tensor) -> Tensor:
    """The output of a third call, all of which are the same."""
    with torch.inference_mode():
        first, second, third = (block(x) for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    return third


def afresh(block: nn.Module, x: Tensor) -> Tensor:
    """The output of a forward that reads everything anew."""
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fused, "_ready_for", lambda block, x: None)
        patch.setattr(stages, "may_run", lambda x: False)
        return block(x)


def test_read_once(block: FastDenseBlock, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    warm(block, x)
    ready = block._ready
    for name in ("read", "_gather", "dense_layers", "inference_arguments"):
        monkeypatch.setattr(FastDenseBlock, name, None)
    warm(block, x)
    assert block._ready is ready


def test_prepared_once(x: Tensor, twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = backends.preparation("cpu", "dense_block_inference") if backends._REGISTRY["cpu"].module else None
    if prepared is None:
        pytest.skip(backends._REGISTRY["cpu"].note)
    made: list[object] = []
    with fastdense.use_backend("cpu"):
        block = twins("block", 3, 8, bn_size=2, growth_rate=4)[0].eval()
        monkeypatch.setitem(
            backends.kernels("cpu").PREPARED,
            "dense_block_inference",
            lambda *args, **options: made.append(options) or prepared(*args, **options),
        )
        warm(block, x)
        with torch.autocast("cpu", torch.bfloat16):
            warm(block, x)
        warm(block, x)
        assert made == [dict(x_dtype=x.dtype, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        block.denselayer2.conv1.weight.data[0, 0] += 1
        warm(block, x)
        assert len(made) == 3


def weight_below_autograds_sight(block: Any) -> None:
    block.denselayer2.conv1.weight.data[0, 0] += 1


def weight_elsewhere(block: Any) -> None:
    block.denselayer2.conv2.weight.data = block.denselayer2.conv2.weight.data * 2


def weight_in_other_strides(block: Any) -> None:
    weight = block.denselayer3.conv1.weight
    weight.data = weight.data.reshape(weight.shape[1], weight.shape[0], 1, 1).transpose(0, 1)


def weight_replaced(block: Any) -> None:
    block.denselayer1.conv1.weight = nn.Parameter(block.denselayer1.conv1.weight * 2)


def norm_below_autograds_sight(block: Any) -> None:
    block.denselayer2.norm1.bias.data += 1


def norm_elsewhere(block: Any) -> None:
    block.denselayer2.norm2.weight.data = block.denselayer2.norm2.weight.data * 2


def norm_in_other_strides_from_the_same_address(block: Any) -> None:
    bias = block.denselayer3.norm2.bias
    bias.data = torch.cat([bias.data, bias.data + 1])[: len(bias)]
    with torch.inference_mode():
        block(torch.zeros(1, 8, 2, 2))
    bias.data = bias.data.as_strided((len(bias),), (2,))


def statistics(block: Any) -> None:
    block.denselayer3.norm1.running_mean += 1


def statistics_replaced(block: Any) -> None:
    block.denselayer3.norm1.running_var = block.denselayer3.norm1.running_var * 2


def eps(block: Any) -> None:
    block.denselayer1.norm2.eps = 0.5


def without_affine(block: Any) -> None:
    block.denselayer1.norm1.weight = None


def another_layer(block: Any) -> None:
    block.denselayer2 = copy.deepcopy(block.denselayer2)
    block.denselayer2.conv2.weight.data *= 2


def another_convolution(block: Any) -> None:
    torch.manual_seed(1)
    block.denselayer2.conv2 = nn.Conv2d(8, 4, 3, padding=1, bias=False)


def fewer_layers(block: Any) -> None:
    del block.denselayer3


def batch_statistics(block: Any) -> None:
    block.denselayer2.norm1.running_mean = block.denselayer2.norm1.running_var = None


def a_norm_in_training(block: Any) -> None:
    block.denselayer2.norm2.train()


def dilated(block: Any) -> None:
    block.denselayer1.conv2.dilation = block.denselayer1.conv2.padding = (2, 2)


def another_class(block: Any) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block.denselayer2.conv1.__class__ = Doubled


def another_activation(block: Any) -> None:
    block.denselayer1.relu2 = nn.GELU()


def another_forward(block: Any) -> None:
    conv = block.denselayer1.conv1
    conv.forward = lambda x, forward=conv.forward: 2 * forward(x)


def forward_hook(block: Any) -> None:
    block.denselayer3.conv2.register_forward_hook(lambda module, args, out: 2 * out)


def forward_pre_hook(block: Any) -> None:
    block.denselayer3.register_forward_pre_hook(lambda module, args: (torch.cat(args[0], 1) * 2,))


def parametrized(block: Any) -> None:
    with torch.random.fork_rng():
        parametrizations.spectral_norm(block.denselayer1.conv2)


def pruned(block: Any) -> None:
    prune.l1_unstructured(block.denselayer2.conv1, "weight", 0.5)


def load_state_dict(block: Any) -> None:
    block.load_state_dict({name: tensor * 2 for name, tensor in block.state_dict().items()})


def load_state_dict_by_assigning(block: Any) -> None:
    block.load_state_dict({name: tensor * 2 for name, tensor in block.state_dict().items()}, assign=True)


def trained(block: Any) -> None:
    block.train()(torch.ones(2, 8, 6, 5) * torch.arange(5)).square().mean().backward()
    torch.optim.SGD(block.parameters(), 1e-2).step()
    block.eval()


CHANGES = [
    weight_below_autograds_sight, weight_elsewhere, weight_in_other_strides, weight_replaced,
    norm_below_autograds_sight, norm_elsewhere, norm_in_other_strides_from_the_same_address,
    statistics, statistics_replaced, eps, without_affine, another_layer, another_convolution, fewer_layers,
    batch_statistics, a_norm_in_training, dilated, another_class, another_activation, another_forward,
    forward_hook, forward_pre_hook, parametrized, pruned, load_state_dict, load_state_dict_by_assigning, trained,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::fastdense.FallbackWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_once(block: FastDenseBlock, x: Tensor, change: Callable[[Any], None]) -> None:
    before = warm(block, x)
    change(block)
    with torch.inference_mode():
        after = block(x)
    assert torch.equal(after, afresh(block, x))
    assert after.shape != before.shape or not torch.equal(after, before)


def weight(transition: Any) -> None:
    transition.conv.weight.data[0, 0] += 1


def weight_moved(transition: Any) -> None:
    transition.conv.weight.data = transition.conv.weight.data * 2


def norm(transition: Any) -> None:
    transition.norm.running_mean += 1


def norm_moved(transition: Any) -> None:
    transition.norm.bias.data = transition.norm.bias.data + 1


def norm_of_its_batch(transition: Any) -> None:
    transition.norm.train()


def convolution_replaced(transition: Any) -> None:
    torch.manual_seed(1)
    transition.conv = nn.Conv2d(8, 7, 1, bias=False)


def with_a_bias(transition: Any) -> None:
    transition.conv.bias = nn.Parameter(torch.ones(5))


def hooked(transition: Any) -> None:
    transition.relu.register_forward_hook(lambda module, args, out: 2 * out)


def another_pool(transition: Any) -> None:
    transition.pool = nn.MaxPool2d(2)


@pytest.mark.filterwarnings("ignore::fastdense.FallbackWarning")
@pytest.mark.parametrize(
    "change",
    [
        weight,
        weight_moved,
        norm,
        norm_moved,
        norm_of_its_batch,
        convolution_replaced,
        with_a_bias,
        hooked,
        another_pool,
    ],
)
def test_a_change_of_a_transition_is_seen_at_once(
    transition: FastTransition, x: Tensor, change: Callable[[Any], None]
) -> None:
    before = warm(transition, x)
    ready = transition._ready
    warm(transition, x)
    assert transition._ready is ready
    change(transition)
    with torch.inference_mode():
        after = transition(x)
    assert torch.equal(after, afresh(transition, x))
    assert after.shape != before.shape or not torch.equal(after, before)


def test_a_transition_that_drops(transition: FastTransition, x: Tensor) -> None:
    warm(transition, x)
    transition.drop.train()
    with torch.inference_mode():
        torch.manual_seed(0)
        dropped = transition(x)
        torch.manual_seed(0)
        assert torch.equal(fastdense.to_reference(transition)(x), dropped)
    assert (dropped == 0).any()


def test_a_transition_of_one_pixel_is_an_error(transition: FastTransition, x: Tensor) -> None:
    warm(transition, x)
    with torch.inference_mode(), pytest.raises(ValueError, match="spatial dimensions must be at least 2"):
        transition(x[..., :1])


def test_global_hooks_fire(block: FastDenseBlock, x: Tensor) -> None:
    warm(block, x)
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        with pytest.warns(fastdense.FallbackWarning, match="global hooks"), torch.inference_mode():
            block(x)
    finally:
        handle.remove()
    assert block.denselayer2.conv1 in seen


def test_gradients_flow(block: FastDenseBlock, x: Tensor) -> None:
    warm(block, x)
    assert block(x).requires_grad
    block.requires_grad_(False)
    assert not block(x).requires_grad
    assert block(x.requires_grad_()).requires_grad
    block.denselayer3.norm2.bias.requires_grad_()
    assert block(x.detach()).requires_grad


def test_inputs_of_every_kind(block: FastDenseBlock, randn: Any) -> None:
    for shape in ((2, 8, 6, 5), (1, 8, 3, 9), (3, 8, 1, 1)):
        x = randn(*shape)
        for given in (x, x.to(memory_format=torch.channels_last), x.flip(0).transpose(2, 3).contiguous().mT):
            assert torch.equal(warm(block, given), afresh(block, given))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(warm(block, x), afresh(block, x))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"norm1_weight must be \[9\]"):
        block(randn(2, 9, 6, 5))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="should be the same"):
        block(randn(2, 8, 6, 5, dtype=torch.bfloat16))
    with torch.inference_mode(), pytest.raises(ValueError, match="expected 4D input"):
        block(randn(2, 8, 6))
    with torch.inference_mode():
        assert block(randn(0, 8, 6, 5)).shape == (0, 20, 6, 5)


def test_parameters_on_another_device_are_pytorchs_error(
    block: FastDenseBlock, transition: FastTransition, x: Tensor
) -> None:
    for module in (block, transition):
        warm(module, x)
        module.to("meta")
        with torch.inference_mode():
            with pytest.raises(RuntimeError) as ours:
                module(x)
            with pytest.raises(RuntimeError) as theirs:
                fastdense.to_reference(module)(x)
        assert str(ours.value) == str(theirs.value)


def test_another_backend(block: FastDenseBlock, x: Tensor) -> None:
    out = warm(block, x)
    with fastdense.use_backend("reference"):
        assert torch.equal(warm(block, x), warm(fastdense.to_reference(block), x))
    with fastdense.use_backend("torch"):
        torch.testing.assert_close(warm(block, x), out)


def test_whoever_watches_sees_the_op(block: FastDenseBlock, x: Tensor, op_calls: Any) -> None:
    warm(block, x)
    with torch.inference_mode():
        with op_calls() as calls:
            block(x)
        assert [op._opname for op, _, _ in calls] == ["dense_block_inference"]
        with torch.profiler.profile() as profile:
            block(x)
        assert "fastdense::dense_block_inference" in {event.key for event in profile.key_averages()}
        with FlopCounterMode(display=False) as flops:
            block(x)
        assert flops.get_total_flops() > 0
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert block(mode.from_tensor(x)).shape == (2, 20, 6, 5)
    warm(block, x)


def test_copies_have_nothing_ready(block: FastDenseBlock, x: Tensor) -> None:
    out = warm(block, x)
    for made in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), copy.copy(block)):
        assert torch.equal(warm(made, x), out)
    assert copy.deepcopy(block)._ready is None
    replica = block._replicate_for_data_parallel()
    assert not block._ready._snapshot.holds(replica)


def test_to_reference_leaves_nothing_behind(block: FastDenseBlock, x: Tensor) -> None:
    warm(block, x)
    stock = fastdense.to_reference(block)
    assert all(not isinstance(value, Ready) for module in stock.modules() for value in vars(module).values())


def test_nothing_lives_longer_for_it(block: FastDenseBlock, x: Tensor) -> None:
    warm(block, x)
    old = weakref.ref(block.denselayer2.conv1.weight)
    block.denselayer2.conv1.weight = nn.Parameter(block.denselayer2.conv1.weight.detach().clone())
    block.train()
    block(x)
    assert old() is None
    gone = weakref.ref(block.eval().denselayer2.conv1.weight)
    warm(block, x)
    del block.denselayer2.conv1, block.denselayer2
    with torch.inference_mode(), pytest.raises(ValueError, match="layer 1"):
        block(x)
    assert gone() is None


def test_from_several_threads(block: FastDenseBlock, x: Tensor) -> None:
    expected = afresh(block, x)
    same: list[bool] = []

    def work() -> None:
        with torch.inference_mode():
            same.extend(torch.equal(block(x), expected) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 80


@pytest.mark.parametrize("in_python", [True, False])
def test_a_snapshot_sees_each_attribute(in_python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_python:
        monkeypatch.setattr(ready, "_HAS_LOCK", False)
    elif isinstance(cpu_library.load(), str):
        pytest.skip(cpu_library.load())
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(nn.BatchNorm2d(1)))
    snapshot = Snapshot(module, module.children())
    assert snapshot.holds(module)
    below = [vars(part) for part in module.modules() if part is not module]
    places = [
        module._modules,
        *below,
        *(part[name] for part in below for name in ("_parameters", "_buffers", "_modules")),
    ]
    assert len(places) == 13
    for place in places:
        for name, value in list(place.items()):
            place[name] = copy.copy(value) if isinstance(value, dict) else object()
            assert not snapshot.holds(module), name
            place[name] = value
            assert snapshot.holds(module)
        place["another"] = None
        assert not snapshot.holds(module)
        del place["another"]
    assert snapshot.holds(module)
    assert not snapshot.holds(copy.deepcopy(module))


# -- training -------------------------------------------------------------------------------------------------


def step(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics of a forward and a backward, which leave the statistics as they were."""
    state = copy.deepcopy(block.state_dict())
    block.zero_grad()
    out = block(x)
    out.square().mean().backward()
    found = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    found |= {f"new {name}": tensor.clone() for name, tensor in block.named_buffers()} | {"out": out.detach()}
    for name, tensor in block.state_dict().items():
        tensor.copy_(state[name])
    return found


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_read_once_in_training(
    block: FastDenseBlock, x: Tensor, drop_rate: float, twins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = twins("block", 3, 8, bn_size=2, growth_rate=4, drop_rate=drop_rate)[0].train()
    step(block, x)
    monkeypatch.setattr(FastDenseBlock, "read", None)
    if not drop_rate:
        monkeypatch.setattr(FastDenseBlock, "_gather", None)
    first, second = step(block, x)["out"], step(block, x)["out"]
    assert torch.equal(first, second) == (drop_rate == 0)


@pytest.mark.filterwarnings("ignore::fastdense.FallbackWarning")
@pytest.mark.parametrize("change", [change for change in CHANGES if change is not trained])
def test_a_change_is_seen_at_once_in_training(
    block: FastDenseBlock, x: Tensor, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    step(block.train(), x)
    change(block)
    after = step(block, x)
    monkeypatch.setattr(Fused, "_ready_for", lambda block, x: None)
    afresh = step(block, x)
    assert after.keys() == afresh.keys()
    assert all(torch.equal(after[name], afresh[name]) for name in after)


def test_frozen_and_thawed(block: FastDenseBlock, x: Tensor) -> None:
    block.train()
    every = set(step(block, x))
    block.denselayer2.conv1.weight.requires_grad_(False)
    assert every - set(step(block, x)) == {"denselayer2.conv1.weight"}
    block.denselayer2.conv1.weight.requires_grad_(True)
    assert set(step(block, x)) == every


def test_parameters_of_one_call_are_not_kept(block: FastDenseBlock, x: Tensor) -> None:
    block.train()
    given = {name: (p * 1) for name, p in block.named_parameters()}
    gone = weakref.ref(given["denselayer2.conv1.weight"])
    torch.func.functional_call(block, given, (x,))
    del given
    assert gone() is None


def test_whoever_watches_a_step_sees_the_ops(block: FastDenseBlock, x: Tensor, op_calls: Any) -> None:
    """And gets the same bits."""
    expected = step(block.train(), x)
    with op_calls() as calls:
        watched = step(block, x)
    assert [op._opname for op, _, _ in calls] == ["dense_block", "dense_block_backward"]
    with torch.profiler.profile() as profile:
        profiled = step(block, x)
    assert {"fastdense::dense_block", "fastdense::dense_block_backward"} <= {e.key for e in profile.key_averages()}
    for found in (watched, profiled):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_default_device_is_that_of_new_tensors_alone(block: FastDenseBlock, x: Tensor) -> None:
    warm(block, x)
    with torch.device("meta"):
        block.denselayer1.conv1.weight.data[0] += 1  # so that it is packed anew
        out = warm(block, x)
    assert torch.equal(out, afresh(block, x))
    expected = step(block.train(), x)
    with torch.device("meta"):
        found = step(block, x)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("train", [True, False])
def test_a_layer_on_another_device_is_an_error(block: FastDenseBlock, x: Tensor, train: bool) -> None:
    block.train(train)(x)
    block.denselayer2.to("meta")
    with pytest.raises(ValueError, match=r"layer 1: norm1_weight must be on cpu as x is, got meta"):
        block(x)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"layer 1: norm1_weight must be on cpu"):
        block(x)
    with torch.inference_mode(), pytest.raises(TypeError, match=r"torch.float32 on cpu and meta, got torch.float32 on"):
        fastdense.freeze(block.eval())(x)


def test_a_convolution_on_another_device_is_an_error(block: FastDenseBlock, x: Tensor) -> None:
    warm(block, x)
    block.denselayer3.conv2.to("meta")
    with torch.inference_mode(), pytest.raises(ValueError, match=r"layer 2: conv2_weight must be on cpu"):
        block(x)
