"""Stages of a network that one call runs: the same bits as stage by stage, and no longer than nothing has changed."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ready import CHANGES, afresh, warm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdense
from fastdense import FastDenseNet, backends, stages
from fastdense.chain import Chain
from fastdense.frozen import Frozen
from fastdense.modules import Fused

pytestmark = pytest.mark.skipif(backends._REGISTRY["cpu"].module is None, reason=backends._REGISTRY["cpu"].note)

ARGUMENTS = dict(growth_rate=4, block_config=(3, 3), num_init_features=8, bn_size=2, num_classes=5)


@pytest.fixture
def net(twins: Any) -> Any:
    """In evaluation, of a stem, two blocks, a transition and a head."""
    with fastdense.use_backend("cpu"):
        yield twins("net", **ARGUMENTS, seed=1)[0].eval()


@pytest.fixture
def x(randn: Any) -> Tensor:
    return randn(2, 3, 40, 36)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each call of a chain has run."""
    seen: list[int] = []
    run = Chain.run

    def counted(chain: Chain, remaining: Any, x: Tensor) -> tuple[Tensor, int]:
        out, length = run(chain, remaining, x)
        seen.append(length)
        return out, length

    monkeypatch.setattr(Chain, "run", counted)
    return seen


def outcome(run: Callable[[], Tensor]) -> Tensor | str:
    try:
        return run()
    except (ValueError, RuntimeError) as error:
        return str(error)


def test_all_stages_in_one_call(net: Any, x: Tensor, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = afresh(net, x)
    assert torch.equal(warm(net, x), expected)
    assert runs == [5, 5, 5]
    kept = net.features._ready
    for name in ("prepared", "forward", "read"):
        monkeypatch.setattr(Fused, name, None)
    assert torch.equal(warm(net, x), expected)
    assert net.features._ready is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inputs_of_every_kind(net: Any, randn: Any, dtype: torch.dtype, runs: list[int]) -> None:
    net.to(dtype)
    for shape in ((2, 3, 40, 36), (1, 3, 33, 64), (5, 3, 16, 16), (2, 3, 40, 36)):
        x = randn(*shape, dtype=dtype)
        for given in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
            assert torch.equal(warm(net, given), afresh(net, given))
    for autocast in {torch.bfloat16, torch.float16} if dtype == torch.float32 else ():
        with torch.autocast("cpu", autocast):
            assert torch.equal(warm(net, x), afresh(net, x))
    assert set(runs) == {5}
    with torch.inference_mode():
        assert net(x[:0]).shape == (0, 5)


def test_where_a_stage_would_have_to_cast(net: Any, x: Tensor) -> None:
    """bfloat16 features that autocast convolves in float16: neither holds the other's values."""
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        features = net.features
        x = features.conv0(x).bfloat16()
        del features.conv0
        made = [stages.through(features, x)[0] for _ in range(2)]
        assert torch.equal(made[0], made[1])
        assert made[0].dtype == features.denseblock2(features.transition1(features.denseblock1(x))).dtype


@torch.inference_mode()
def test_autocast_of_the_same_features(net: Any, x: Tensor) -> None:
    x = net.features.conv0(x)
    del net.features.conv0
    made = []
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            made.append(stages.through(net.features, x)[0])
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[3])
    assert not torch.equal(made[0].bfloat16(), made[1].bfloat16())


@pytest.mark.parametrize("shape", [(9, 3, 128, 96), (1, 3, 720, 608)])
def test_more_than_fits_between_stages(twins: Any, randn: Any, shape: tuple[int, ...]) -> None:
    """More images than go together, the last of them fewer; an image that takes more than is kept."""
    net, _ = twins("net", growth_rate=12, block_config=(2, 1, 1), num_init_features=24, bn_size=1, small_inputs=True)
    x = randn(*shape)
    with fastdense.use_backend("cpu"):
        assert torch.equal(warm(net.eval(), x), afresh(net, x))


@pytest.mark.parametrize("spatial_dims", [1, 3])
def test_sequences_and_volumes(twins: Any, randn: Any, spatial_dims: int, runs: list[int]) -> None:
    net, _ = twins("net", **ARGUMENTS, spatial_dims=spatial_dims)
    x = randn(2, 3, *[34, 40, 36][:spatial_dims])
    with fastdense.use_backend("cpu"):
        assert torch.equal(warm(net.eval(), x), afresh(net, x))
    assert runs == [5, 5, 5]


def test_too_small_an_image_is_the_same_error(net: Any, x: Tensor) -> None:
    warm(net, x)
    for size in (2, 4):
        small = x[..., :size, :size]
        expected = outcome(lambda small=small: afresh(net, small))
        assert isinstance(expected, str)
        with torch.inference_mode():
            assert outcome(lambda small=small: net(small)) == expected


# -- changes ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::fastdense.FallbackWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_block_is_seen_at_once(net: Any, x: Tensor, change: Callable[[Any], None]) -> None:
    before = warm(net, x)
    change(net.features.denseblock1)
    with torch.inference_mode():
        after = outcome(lambda: net(x))
    expected = outcome(lambda: afresh(net, x))
    if isinstance(expected, str):
        assert after == expected
    else:
        assert torch.equal(after, expected)
        assert not torch.equal(after, before)


def transition_weight(features: Any) -> None:
    features.transition1.conv.weight.data[0, 0] += 1


def transition_in_training(features: Any) -> None:
    features.transition1.norm.train()


def transition_pools_otherwise(features: Any) -> None:
    features.transition1.pool = nn.MaxPool2d(2)


def transition_replaced(features: Any) -> None:
    features.transition1 = copy.deepcopy(features.transition1)
    features.transition1.conv.weight.data *= 2


def transition_hooked(features: Any) -> None:
    features.transition1.register_forward_hook(lambda module, args, out: 2 * out)


def block_hooked(features: Any) -> None:
    features.denseblock2.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def stem_statistics(features: Any) -> None:
    features.norm0.running_mean.data += 1


def stem_norm_moved(features: Any) -> None:
    features.norm0.weight.data = features.norm0.weight.data * 2


def stem_norm_in_training(features: Any) -> None:
    features.norm0.train()


def stem_relu_hooked(features: Any) -> None:
    features.relu0.register_forward_hook(lambda module, args, out: 2 * out)


def stem_pools_otherwise(features: Any) -> None:
    features.pool0.kernel_size, features.pool0.padding = 2, 0


def stem_without_relu(features: Any) -> None:
    features.relu0 = nn.Identity()


def another_stage(features: Any) -> None:
    features.add_module("more", nn.Softmax(1))


def first_convolution(features: Any) -> None:
    features.conv0.weight.data *= 2


def last_norm(features: Any) -> None:
    features.norm5.running_mean.data += 1


def hook_that_changes_a_later_stage(features: Any) -> None:
    def change(*_: Any) -> None:
        features.denseblock2.denselayer1.conv1.weight.data[:] = 0.5

    features.conv0.register_forward_hook(change)


@pytest.mark.filterwarnings("ignore::fastdense.FallbackWarning")
@pytest.mark.parametrize(
    "change",
    [
        transition_weight, transition_in_training, transition_pools_otherwise, transition_replaced, transition_hooked,
        block_hooked, stem_statistics, stem_norm_moved, stem_norm_in_training, stem_relu_hooked, stem_pools_otherwise,
        stem_without_relu, another_stage, first_convolution, last_norm, hook_that_changes_a_later_stage,
    ],
)  # fmt: skip
def test_a_change_of_a_stage_is_seen_at_once(net: Any, x: Tensor, change: Callable[[Any], None]) -> None:
    before = warm(net, x)
    change(net.features)
    with torch.inference_mode():
        after = net(x)
    assert torch.equal(after, afresh(net, x))
    assert not torch.equal(after, before)


@pytest.mark.filterwarnings("ignore::fastdense.FallbackWarning")
def test_what_stops_a_chain_is_gone_again(net: Any, x: Tensor, runs: list[int]) -> None:
    """A hook on a stage, or within one."""
    expected = warm(net, x)
    for module, lengths in ((net.features.transition1, [2, 0, 2]), (net.features.denseblock1.denselayer1, [1, 0, 3])):
        handle = module.register_forward_hook(lambda *_: None)
        runs.clear()
        torch.testing.assert_close(warm(net, x), expected)
        assert runs == 3 * lengths
        handle.remove()
        warm(net, x)
        runs.clear()
        assert torch.equal(warm(net, x), expected)
        assert runs == [5, 5, 5]


def test_a_stage_that_exchanges_a_part_of_a_later_one(net: Any, x: Tensor) -> None:
    """After an earlier part of the chain has seen that all is as it was."""
    layer = net.features.denseblock2.denselayer1
    other = copy.deepcopy(layer.conv1)
    other.weight.data *= 2
    convolutions = itertools.cycle([layer.conv1, other])
    net.features.transition1.register_forward_hook(lambda *_: setattr(layer, "conv1", next(convolutions)))
    with torch.inference_mode():
        first, second, *more = (net(x) for _ in range(6))
    assert not torch.equal(first, second)
    assert all(torch.equal(out, (first, second)[i % 2]) for i, out in enumerate(more))


def test_hooks_on_other_stages_fire(net: Any, x: Tensor, runs: list[int]) -> None:
    seen: list[str] = []
    net.features.conv0.register_forward_hook(lambda *_: seen.append("conv0"))
    net.features.norm5.register_forward_pre_hook(lambda *_: seen.append("norm5"))
    warm(net, x)
    assert seen == 3 * ["conv0", "norm5"]
    kept = net.features._ready
    warm(net, x)
    assert net.features._ready is kept
    assert set(runs) == {0, 3}  # neither stem nor head


class Reversed(Tensor):
    """Whoever reads its memory reads it backwards."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [arg.as_subclass(Tensor).flip(0) if isinstance(arg, Reversed) else arg for arg in args]
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("stage", "name"), [("conv0", "weight"), ("norm0", "bias"), ("norm5", "weight")])
@torch.inference_mode()
def test_tensors_of_other_classes_are_not_read(net: Any, x: Tensor, stage: str, name: str) -> None:
    expected = net(x)
    module = net.features.get_submodule(stage)
    tensor = getattr(module, name)
    delattr(module, name)
    setattr(module, name, tensor.detach().flip(0).as_subclass(Reversed))
    for _ in range(3):
        torch.testing.assert_close(net(x), expected)


def test_gradients_flow(net: Any, x: Tensor) -> None:
    warm(net, x)
    assert net(x).requires_grad
    with torch.no_grad():
        assert torch.equal(net(x), warm(net, x))
    assert checkpoint(net, x, use_reentrant=False).requires_grad


def test_training_without_autograd_has_no_chain(net: Any, x: Tensor, runs: list[int]) -> None:
    warm(net, x)
    runs.clear()
    with torch.no_grad():
        net.train()(x)
    assert runs == []
    assert "_ready" not in vars(net.features)


def test_whoever_watches_sees_the_ops(net: Any, x: Tensor, op_calls: Any) -> None:
    expected = warm(net, x)
    names = ["stem_inference", "dense_block_inference", "transition", "dense_block_inference", "head"]
    with torch.inference_mode():
        for watched in (net, fastdense.freeze(net)):
            assert torch.equal(warm(watched, x), expected)
            with op_calls() as calls:
                assert torch.equal(watched(x), expected)
            assert [op._opname for op, _, _ in calls if op.namespace == "fastdense"] == names


def test_intermediates(net: Any, x: Tensor) -> None:
    warm(net, x)
    with torch.inference_mode():
        found = net.forward_intermediates(x)
        assert torch.equal(found["denseblock2"], stages.through(net.features, x)[0])


# -- what is kept -----------------------------------------------------------------------------------------------


def test_frozen_stages_are_not_looked_at(net: Any, x: Tensor, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = fastdense.freeze(net)
    expected = warm(frozen, x)
    for name in ("prepared", "forward"):
        monkeypatch.setattr(Frozen, name, None)
    monkeypatch.setattr(backends.kernels("cpu").PreparedBlock, "is_current", None)
    assert torch.equal(warm(frozen, x), expected)
    assert runs == 6 * [5]
    monkeypatch.undo()
    moved = frozen.to(torch.bfloat16)
    x = x.bfloat16()
    assert torch.equal(warm(moved, x), afresh(moved, x))


def test_copies_have_nothing_ready(net: Any, x: Tensor) -> None:
    expected = warm(net, x)
    for made in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.copy(net)):
        assert torch.equal(warm(made, x), expected)
    assert copy.deepcopy(net).features._ready is None
    replica = net.features._replicate_for_data_parallel()
    assert not net.features._ready.holds(replica)


def test_nothing_lives_longer_for_it(net: Any, x: Tensor) -> None:
    warm(net, x)
    layer = net.features.denseblock2.denselayer2
    old = weakref.ref(layer.conv1.weight)
    layer.conv1.weight = nn.Parameter(layer.conv1.weight.detach().clone())
    net.train()(x)
    assert old() is None
    gone = weakref.ref(net.features.transition1.conv.weight)
    warm(net.eval(), x)
    net.features.transition1.conv.weight = nn.Parameter(net.features.transition1.conv.weight.detach().clone())
    warm(net, x)
    assert gone() is None


def test_a_network_that_its_parameters_refer_to_can_be_collected(net: Any, x: Tensor, twins: Any) -> None:
    net = twins("net", **ARGUMENTS)[0].eval()
    for parameter in net.parameters():
        parameter.owner = net
    warm(net, x)
    gone = weakref.ref(net)
    del net, parameter
    gc.collect()
    assert gone() is None


def test_back_to_the_reference_nothing_is_left(net: Any, x: Tensor) -> None:
    warm(net, x)
    for inplace in (False, True):
        stock = fastdense.to_reference(net, inplace)
        assert all(vars(module).get("_ready") is None for module in stock.modules())


def test_other_backends_have_no_chains(net: FastDenseNet, x: Tensor, runs: list[int]) -> None:
    for name in ("torch", "reference"):
        with fastdense.use_backend(name):
            warm(net, x)
    assert runs == []
    assert "_ready" not in vars(net.features)
