"""Frozen networks compute what they computed, of one state for ever, and say so where they cannot."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from sources import SOURCES
from torch import Tensor, nn

import fastdense
from fastdense.frozen import Frozen

ARGUMENTS = dict(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=5)


@pytest.fixture
def pair(twins: Any, device: str) -> tuple[nn.Module, nn.Module]:
    """A network in evaluation, and frozen."""
    fast, _ = twins("net", **ARGUMENTS)
    fast.to(device).eval()
    return fast, fastdense.freeze(fast)


def frozen_parts(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Frozen)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@torch.inference_mode()
def test_same_bits(twins: Any, randn: Any, device: str, dtype: torch.dtype) -> None:
    fast, _ = twins("net", **ARGUMENTS)
    fast.to(device, dtype).eval()
    frozen = fastdense.freeze(fast)
    assert frozen_parts(frozen) == [f"features.{n}" for n in ("pool0", "denseblock1", "transition1", "denseblock2")]
    for shape in ((2, 3, 64, 48), (1, 3, 40, 41), (3, 3, 33, 64)):
        x = randn(*shape, dtype=dtype, device=device)
        assert torch.equal(frozen(x), fast(x))
        x = x.to(memory_format=torch.channels_last)
        assert torch.equal(frozen(x), fast(x))


@torch.inference_mode()
def test_same_bits_under_autocast(pair: tuple[Any, Any], randn: Any, device: str) -> None:
    fast, frozen = pair
    x = randn(2, 3, 64, 64, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype):
            assert torch.equal(frozen(x), fast(x))
    assert torch.equal(frozen(x), fast(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_in_a_dtype_of_its_own(pair: tuple[Any, Any], randn: Any, device: str, dtype: torch.dtype) -> None:
    """What autocast would compute, without it: weights are cast once, norms keep theirs."""
    fast, _ = pair
    frozen, x = fastdense.freeze(fast, dtype), randn(2, 3, 64, 64, device=device)
    with torch.autocast(device, dtype):
        expected = fast(x)
        assert torch.equal(frozen(x), expected)
    assert torch.equal(frozen(x), expected)
    assert torch.equal(frozen(x.to(dtype)), expected)
    assert frozen.classifier.weight.dtype == dtype


@pytest.mark.parametrize("name", SOURCES)
@torch.inference_mode()
def test_networks_of_every_library(name: str) -> None:
    source = SOURCES[name]
    original = source.build().eval()
    fast, frozen = fastdense.convert(original), fastdense.freeze(original)
    found = frozen_parts(frozen)
    kept = [type(m).__name__ for m in frozen.modules() if isinstance(m, fastdense.modules.FusedBlock)]
    if name == "FC-DenseNet":  # it has biases
        assert kept
    else:
        assert found
        assert not kept
    for seed in (0, 1):
        assert torch.equal(frozen(source.images(seed=seed)), fast(source.images(seed=seed)))
    with torch.autocast("cpu", torch.bfloat16):
        expected = fast(source.images())
    made = fastdense.freeze(original, torch.bfloat16)(source.images())
    assert made.dtype == torch.bfloat16
    assert (made.float() - expected.float()).norm() < 4e-3 * expected.float().norm()  # a rounding: biases are cast too


@pytest.mark.parametrize("bn_size", [4, None])
@torch.inference_mode()
def test_block_alone(twins: Any, randn: Any, device: str, bn_size: int | None) -> None:
    fast, _ = twins("block", 3, 10, bn_size, 6)
    fast.to(device).eval()
    frozen, x = fastdense.freeze(fast), randn(2, 10, 9, 7, device=device)
    assert isinstance(frozen, Frozen)
    assert torch.equal(frozen(x), fast(x))
    assert frozen(randn(0, 10, 9, 7, device=device)).shape == (0, 28, 9, 7)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@torch.inference_mode()
def test_backends(pair: tuple[Any, Any], randn: Any, backend: str) -> None:
    fast, frozen = (model.cpu() for model in pair)
    if backend == "cpu" and fastdense.status().as_dict()["backend cpu"]["state"] != "available":
        pytest.skip("needs the C++ kernels")
    x = randn(2, 3, 48, 48)
    automatic = frozen(x)
    with fastdense.use_backend(backend):
        assert torch.equal(frozen(x), fast(x))
    with fastdense.use_backend("reference"), pytest.raises(RuntimeError, match="no reference"):
        frozen(x)
    assert torch.equal(frozen(x), automatic)


@torch.inference_mode()
def test_of_one_state_for_ever(pair: tuple[Any, Any], randn: Any, device: str) -> None:
    fast, frozen = pair
    x = randn(2, 3, 48, 48, device=device)
    before = frozen(x)
    for tensor in fast.state_dict().values():
        tensor.data.add_(1)
    assert not torch.equal(fast(x), before)
    assert torch.equal(frozen(x), before)
    assert torch.equal(fastdense.freeze(fast)(x), fast(x))
    assert frozen(x[:0]).shape == (0, 5)
    assert torch.equal(fastdense.freeze(frozen)(x), before)


def test_original_stays_as_it_is(twins: Any, randn: Any, device: str) -> None:
    fast, _ = twins("net", **ARGUMENTS)
    fast.to(device).train()
    frozen = fastdense.freeze(fast)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(module.training for module in fast.modules())
    fast(randn(2, 3, 48, 48, device=device)).sum().backward()
    assert all(parameter.grad is not None for parameter in fast.parameters())


@torch.inference_mode()
def test_moves_copies_and_pickles(pair: tuple[Any, Any], randn: Any, device: str) -> None:
    fast, frozen = pair
    x = randn(2, 3, 48, 48, device=device)
    expected = frozen(x)
    assert torch.equal(copy.deepcopy(frozen)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), expected)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    moved = frozen.to(torch.bfloat16)
    assert torch.equal(moved(x.bfloat16()), fast.to(torch.bfloat16)(x.bfloat16()))


@torch.inference_mode()
def test_from_several_threads(pair: tuple[Any, Any], randn: Any, device: str) -> None:
    fast, frozen = pair
    inputs = [randn(1 + i % 3, 3, 40 + i, 40, seed=i, device=device) for i in range(12)]
    expected = [fast(x) for x in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        with torch.inference_mode():
            for _ in range(5):
                for i in range(first, len(inputs), 3):
                    if not torch.equal(frozen(inputs[i]), expected[i]):
                        wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.inference_mode()
def test_intermediates(pair: tuple[Any, Any], randn: Any, device: str) -> None:
    fast, frozen = pair
    x = randn(2, 3, 48, 48, device=device)
    names = ["pool0", "denseblock1", "denseblock1.denselayer2", "transition1", "denseblock2.denselayer3"]
    for wanted in (None, names):
        expected = fast.forward_intermediates(x, wanted)
        found = frozen.forward_intermediates(x, wanted)
        assert found.keys() == expected.keys()
        for name in expected:  # of the stem, the convolution may be another's
            torch.testing.assert_close(found[name], expected[name])
    with pytest.raises(ValueError, match="no intermediate conv0"):
        frozen.forward_intermediates(x, ["conv0"])


def test_compiles(pair: tuple[Any, Any], randn: Any, device: str) -> None:
    fast, frozen = pair
    x = randn(2, 3, 48, 48, device=device)
    with torch.no_grad():
        compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), fast(x))


def test_what_it_refuses(pair: tuple[Any, Any], randn: Any, device: str) -> None:
    _, frozen = pair
    x = randn(2, 3, 48, 48, device=device)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        frozen.train()
    with pytest.raises(RuntimeError, match="no backward"):
        frozen(x.requires_grad_())
    with torch.no_grad():
        assert frozen(x).shape == (2, 5)
    block = frozen.features.denseblock1
    with pytest.raises(ValueError, match=r"takes \[N, 16, H, W\], got \[2, 15, 8, 8\]"):
        block(randn(2, 15, 8, 8, device=device))
    with pytest.raises(ValueError, match=r"takes \[N, 3, H, W\], got \[2, 3, 8\]"):
        frozen.features.pool0(randn(2, 3, 8, device=device))
    with pytest.raises(TypeError, match=r"takes torch.float32 on .*, got torch.float64"):
        block(randn(2, 16, 8, 8, device=device, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"features.pool0, features.denseblock1, .* are frozen"):
        fastdense.to_reference(frozen)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        frozen.load_state_dict(pair[0].state_dict())


@torch.inference_mode()
def test_hooks_fire(twins: Any, randn: Any, device: str) -> None:
    """What somebody watches stays a module."""
    fast, _ = twins("net", **ARGUMENTS)
    fast.to(device).eval()
    seen: list[str] = []
    fast.features.denseblock1.register_forward_hook(lambda *_: seen.append("block"))
    fast.features.transition1.register_forward_hook(lambda *_: seen.append("transition"))
    fast.features.denseblock2.denselayer1.norm1.register_forward_hook(lambda *_: seen.append("norm"))
    fast.features.relu0.register_forward_hook(lambda *_: seen.append("relu"))
    frozen = fastdense.freeze(fast)
    assert frozen_parts(frozen) == []
    x = randn(2, 3, 48, 48, device=device)
    with pytest.warns(fastdense.FallbackWarning):
        made = frozen(x)
    assert seen == ["relu", "block", "transition", "norm"]
    assert torch.equal(made, fast(x))


@torch.inference_mode()
def test_norms_of_batches_stay(twins: Any, randn: Any, device: str) -> None:
    """Without running statistics a norm depends on its batch even in evaluation."""
    fast, _ = twins("net", **ARGUMENTS)
    norm = fast.features.denseblock2.denselayer2.norm1
    norm.running_mean = norm.running_var = None
    fast.to(device).eval()
    frozen = fastdense.freeze(fast)
    assert "features.denseblock2" not in frozen_parts(frozen)
    x: Tensor = randn(2, 3, 48, 48, device=device)
    assert torch.equal(frozen(x), fast(x))
