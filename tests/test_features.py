"""The features of a FastDenseNet for others to use: stages, layers, the head, a new classifier."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdense

ARGUMENTS = dict(growth_rate=4, block_config=(2, 3), num_init_features=8, num_classes=5)
STAGES = ["conv0", "pool0", "denseblock1", "transition1", "denseblock2"]
LAYERS = [f"denseblock{i}.denselayer{j}" for i, count in ((1, 2), (2, 3)) for j in range(1, count + 1)]


@pytest.fixture(params=["train", "eval"])
def pair(request: pytest.FixtureRequest) -> tuple[fastdense.FastDenseNet, nn.Module]:
    torch.manual_seed(0)
    fast = fastdense.FastDenseNet(**ARGUMENTS).train(request.param == "train")
    return fast, fastdense.to_reference(fast)


def of_hooks(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What the named children of ``features`` return in a forward of stock modules."""
    seen: dict[str, Tensor] = {}
    for name in names:
        model.features.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out.clone()})
        )
    model(x)
    return seen


def test_intermediates_are_those_of_the_modules(pair: tuple[Any, Any], randn: Any) -> None:
    fast, stock = pair
    x = randn(2, 3, 48, 40)
    expected = of_hooks(stock, x, STAGES + LAYERS)
    assert expected.keys() == set(STAGES + LAYERS)
    found = fast.forward_intermediates(x, STAGES + LAYERS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for (name, ours), theirs in zip(fast.named_buffers(), stock.buffers(), strict=True):
        if "norm5" not in name:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_intermediates_of_blocks_by_default_and_without_copies(pair: tuple[Any, Any], randn: Any) -> None:
    fast, _ = pair
    assert list(fast.forward_intermediates(randn(2, 3, 32, 32))) == ["denseblock1", "denseblock2"]
    found = fast.forward_intermediates(randn(2, 3, 32, 32), ["denseblock2", "denseblock2.denselayer2"])
    block, layer = found["denseblock2"], found["denseblock2.denselayer2"]
    assert layer.shape == (2, 4, 4, 4)
    assert layer.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()


def test_gradients_through_intermediates(pair: tuple[Any, Any], randn: Any) -> None:
    fast, stock = (copy.deepcopy(model).double() for model in pair)
    gradients = []
    for model in (fast, stock):
        x = randn(2, 3, 32, 32, dtype=torch.float64).requires_grad_()
        if model is fast:
            taps = list(model.forward_intermediates(x, ["denseblock1.denselayer2", "transition1"]).values())
        else:
            taps = list(of_hooks(model, x, ["denseblock1.denselayer2", "transition1"]).values())
        sum(tap.sin().sum() for tap in taps).backward()
        gradients.append((x.grad, model.features.denseblock1.denselayer1.conv1.weight.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_features_and_head_are_the_forward(pair: tuple[Any, Any], randn: Any) -> None:
    fast, stock = pair
    x = randn(2, 3, 48, 40)
    features = fast.forward_features(x)
    torch.testing.assert_close(features, stock.features(x).relu(), rtol=1e-4, atol=1e-5)
    pooled = fast.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, fast.num_features) == (2, 20)
    torch.testing.assert_close(fast.forward_head(features), fast(x), rtol=1e-4, atol=1e-5)


def test_a_new_classifier(pair: tuple[Any, Any], randn: Any) -> None:
    fast, _ = pair
    x = randn(2, 3, 32, 32)
    fast.double().reset_classifier(7)
    assert fast(x.double()).shape == (2, 7)
    fast.reset_classifier(0)
    torch.testing.assert_close(fast(x.double()), fast.forward_head(fast.forward_features(x.double()), pre_logits=True))


def test_a_name_that_is_none(pair: tuple[Any, Any], randn: Any) -> None:
    with pytest.raises(
        ValueError, match=r"no intermediate denseblock3, norm0; there are conv0, pool0, denseblock1, .*"
    ):
        pair[0].forward_intermediates(randn(2, 3, 32, 32), ["norm0", "denseblock3", "denseblock1"])
