"""FastDenseNet around the ops: which stages they run, networks that were changed, and hooks anywhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fastdense import FallbackWarning, FastDenseBlock, FastDenseNet, FastTransition, backends, reference

ARGUMENTS = (4, (2, 2), 6, 2, 0.0, 5)


def names(calls: list[Any]) -> list[str]:
    return [op.name().removeprefix("fastdense::") for op, _, _ in calls]


@pytest.fixture
def nets(twins) -> tuple[FastDenseNet, reference.DenseNet]:
    return twins("net", *ARGUMENTS)


@pytest.fixture
def x(randn) -> Tensor:
    return randn(2, 3, 32, 32)


# -- what runs as an op ---------------------------------------------------------------------------------------


def test_every_stage_of_a_training_step_is_an_op(nets, x, op_calls):
    """Statistics are computed for the stem alone: after that each channel brings its own."""
    fast, _ = nets
    with op_calls() as calls:
        fast(x).sum().backward()
    forward = ["stem_tail", "dense_block", "transition", "dense_block", "head"]
    assert names(calls) == ["channel_stats", *forward, *(f"{op}_backward" for op in reversed(forward))]


@pytest.mark.parametrize("spatial", [(32, 32), (16, 16, 16)], ids=["images", "volumes"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_stems_convolution_makes_is_read_where_it_is(channels, spatial, randn, op_calls):
    fast, x = FastDenseNet(*ARGUMENTS, in_channels=channels, spatial_dims=len(spatial)), randn(2, channels, *spatial)
    made = []
    fast.features.conv0.register_forward_hook(lambda module, args, out: made.append(out.data_ptr()))
    with op_calls() as calls:
        fast(x).sum().backward()
    read = [args[0].data_ptr() for op, args, _ in calls if op.name() == "fastdense::stem_tail"]
    assert len(made) == 1
    assert read == made


def test_every_stage_of_inference_is_an_op(nets, x, op_calls):
    fast, _ = nets
    with op_calls() as calls, torch.no_grad():
        fast.eval()(x)
    backend = backends.select(x.device, x.dtype)
    stem = "stem_inference" if backends.preparation(backend, "stem_inference") else "stem_tail"
    assert names(calls) == [stem, "dense_block_inference", "transition", "dense_block_inference", "head"]


def test_frozen_norms_need_no_statistics(nets, x, op_calls):
    fast, _ = nets
    with op_calls() as calls:
        fast.eval()(x)
    assert names(calls) == ["stem_tail", "dense_block", "transition", "dense_block", "head"]


def test_a_backward_below_which_nothing_is_wanted_stops_there(nets, x, op_calls):
    fast, _ = nets
    for name, parameter in fast.named_parameters():
        parameter.requires_grad_(name.startswith(("features.denseblock2", "features.norm5", "classifier")))
    with op_calls() as calls:
        fast(x).sum().backward()
    assert [name for name in names(calls) if "backward" in name] == ["head_backward", "dense_block_backward"]


# -- state_dict keys and arguments ----------------------------------------------------------------------------


def test_modules_take_torchvisions_arguments_and_names():
    densenet = pytest.importorskip("torchvision.models.densenet", reason="needs torchvision")
    ours = FastDenseBlock(3, 6, 2, 4, 0.1, True)
    theirs = densenet._DenseBlock(3, 6, 2, 4, 0.1, True)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    named = dict(num_layers=3, num_input_features=6, bn_size=2, growth_rate=4, drop_rate=0.1, memory_efficient=True)
    assert str(FastDenseBlock(**named)) == str(ours)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]

    ours, theirs = FastTransition(6, 3), densenet._Transition(6, 3)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]


def test_children_of_a_transition_work_one_by_one(twins, randn, assert_within_budget):
    """As segmentation models call them."""
    fast, stock = (module.double() for module in twins("transition", 6, 3))
    x = randn(2, 6, 8, 8, dtype=torch.float64)
    exact = stock(x)
    separate = fast.pool(fast.conv(fast.relu(fast.norm(x))))
    assert_within_budget({"out": separate}, {"out": exact}, {"out": exact}, torch.float64)


# -- networks that were changed -------------------------------------------------------------------------------


def without_norm5(net: nn.Module) -> None:
    del net.features.norm5


def norm5_in_the_middle(net: nn.Module) -> None:
    """A BatchNorm that is not the last stage has no ReLU and no pool."""
    net.features.add_module("after", nn.Conv2d(net.classifier.in_features, net.classifier.in_features, 1))


def identity_for_norm5(net: nn.Module) -> None:
    net.features.norm5 = nn.Identity()


def stem_without_pool(net: nn.Module) -> None:
    del net.features.pool0


def identity_for_pool0(net: nn.Module) -> None:
    net.features.pool0 = nn.Identity()


def stem_of_stride_one(net: nn.Module) -> None:
    net.features.pool0.stride = 1


def ceiling_pool(net: nn.Module) -> None:
    net.features.pool0.ceil_mode = True


def other_relu(net: nn.Module) -> None:
    net.features.relu0 = nn.LeakyReLU(0.2)


def stage_between(net: nn.Module) -> None:
    stages = list(net.features.named_children())
    net.features = nn.Sequential()
    for name, stage in stages:
        net.features.add_module(name, stage)
        if name == "denseblock1":
            net.features.add_module("attention", nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Sigmoid()))


def relu_in_place_after_a_transition(net: nn.Module) -> None:
    net.features.transition1 = nn.Sequential(net.features.transition1, nn.ReLU(inplace=True))


def other_head(net: nn.Module) -> None:
    net.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(net.classifier.in_features, 3, dtype=torch.float64))


def features_of_another_class(net: nn.Module) -> None:
    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net.features = Doubled(OrderedDict(net.features.named_children()))


def instance_norm(net: nn.Module) -> None:
    net.features.norm5 = nn.InstanceNorm2d(net.features.norm5.num_features)


CHANGES = [
    without_norm5,
    norm5_in_the_middle,
    identity_for_norm5,
    stem_without_pool,
    identity_for_pool0,
    stem_of_stride_one,
    ceiling_pool,
    other_relu,
    stage_between,
    relu_in_place_after_a_transition,
    other_head,
    features_of_another_class,
    instance_norm,
]


@pytest.mark.filterwarnings("error::fastdense.FallbackWarning")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_networks_compute_what_stock_would(change, train, nets, x, assert_parity):
    for net in nets:
        torch.manual_seed(0)
        change(net.double().train(train))
    assert_parity(*nets, x, dtype=torch.float64)


# -- item 22: hooks fire, with one warning --------------------------------------------------------------------


def called_modules(net: nn.Module, register: Callable[..., Any], run: Callable[[], Any]) -> list[str]:
    """The names of the modules that a global hook sees, in order."""
    name_of = {module: name for name, module in net.named_modules()}
    seen: list[str] = []
    handle = register(lambda module, *_: seen.append(name_of[module]))
    try:
        run()
    finally:
        handle.remove()
    return seen


@pytest.mark.filterwarnings("ignore::fastdense.FallbackWarning")
@pytest.mark.parametrize(
    "register",
    [nn_module.register_module_forward_hook, nn_module.register_module_forward_pre_hook],
    ids=["forward", "pre-forward"],
)
def test_global_hooks_see_what_they_see_in_stock(register, nets, x):
    fast, stock = (called_modules(net, register, lambda net=net: net(x)) for net in nets)
    assert fast == stock


@pytest.mark.filterwarnings("ignore::fastdense.FallbackWarning")
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_any_module_fires_once(register, nets, x, assert_within_budget):
    fast, stock = (net.double() for net in nets)
    expected = stock(x.double())
    state = fast.state_dict()
    for name, module in fast.named_modules():
        fired: list[str] = []
        handle = getattr(module, register)(lambda *_, name=name, fired=fired: fired.append(name))
        out = fast(x.double())
        handle.remove()
        assert fired == [name]
        assert_within_budget({"out": out}, {"out": expected}, {"out": expected}, torch.float64)
    assert fast.state_dict().keys() == state.keys()


def test_a_hook_may_replace_the_output(nets, x, assert_within_budget):
    for net in nets:
        net.double()
        for name in ("conv0", "norm0", "pool0", "denseblock1", "transition1", "norm5"):
            net.features.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * 2)
    out, expected = (net(x.double()) for net in nets)
    assert_within_budget({"out": out}, {"out": expected}, {"out": expected}, torch.float64)


@pytest.mark.parametrize("kind", ["block", "transition"])
def test_one_warning_a_module(kind, twins, randn):
    fast, _ = twins(kind, *{"block": (2, 5, 2, 3), "transition": (5, 3)}[kind])
    child = fast.denselayer2.relu2 if kind == "block" else fast.relu
    child.register_forward_hook(lambda *_: None)
    x = randn(2, 5, 6, 6)
    with pytest.warns(FallbackWarning) as caught:
        outputs = [fast(x), fast(x), fast.eval()(x)]
    assert len(caught) == 1
    assert torch.equal(outputs[0], outputs[1])
