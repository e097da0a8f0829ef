"""``load_weights``: the same tensors under the keys of every implementation, all of them or none."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdense

CONFIG = dict(growth_rate=4, block_config=(2, 3), num_init_features=8, num_classes=5)


def network(seed: int = 0) -> fastdense.FastDenseNet:
    torch.manual_seed(seed)
    model = fastdense.FastDenseNet(**CONFIG)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2) if name.endswith("var") else buffer.normal_()
    return model.eval()


def monai() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="needs MONAI")
    return nets.DenseNet(2, 3, 5, init_features=8, growth_rate=4, block_config=(2, 3)).eval()


def timm() -> nn.Module:
    models = pytest.importorskip("timm.models.densenet", reason="needs timm")
    return models.DenseNet(growth_rate=4, block_config=(2, 3), num_classes=5).eval()


def torchvision() -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    return models.DenseNet(4, (2, 3), 8, num_classes=5).eval()


def _renamed(pattern: str, name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state_dict: {re.sub(pattern, name, key): value for key, value in state_dict.items()}


_KEYS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "canonical": dict,
    "dotted": _renamed(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2"),
    "MONAI": lambda sd: _renamed("^classifier", "class_layers.out")(_renamed(r"(denselayer\d+)", r"\1.layers")(sd)),
    "gpleiss": _renamed(r"norm5", "norm_final"),
    "torchxrayvision": lambda sd: sd | {"op_threshs": torch.zeros(5)},
    "DataParallel": _renamed("^", "module."),
    "compiled in Lightning": _renamed("^", "model._orig_mod."),
    "checkpoint": lambda sd: {"state_dict": sd, "epoch": 3},
    "without counts": lambda sd: {key: value for key, value in sd.items() if "num_batches" not in key},
}


@pytest.mark.parametrize("kind", _KEYS)
def test_keys_of_every_implementation(kind: str, tmp_path: Path) -> None:
    source, x = network(1), torch.randn(2, 3, 32, 32)
    content = _KEYS[kind](source.state_dict())
    for given in (content, tmp_path / "weights.pt"):
        if given is not content:
            torch.save(content, given)
        model = network(2)
        found = fastdense.load_weights(model, given)
        assert torch.equal(model(x), source(x))
        assert found.tensors + len(found.kept) == len(source.state_dict())
        assert bool(found.renamed) == (kind not in ("canonical", "torchxrayvision", "checkpoint", "without counts"))
        assert found.ignored == (("op_threshs",) if kind == "torchxrayvision" else ())
        assert bool(found.kept) == (kind == "without counts")
        assert str(found).startswith(f"{found.tensors} tensors loaded")


@pytest.mark.parametrize("theirs", [monai, timm, torchvision], ids=lambda make: make.__name__)
def test_to_and_from_other_implementations(theirs: Callable[[], nn.Module]) -> None:
    source, x = network(1), torch.randn(2, 3, 64, 64)
    other = theirs()
    fastdense.load_weights(other, source.state_dict())
    torch.testing.assert_close(other(x), source(x), rtol=1e-4, atol=1e-5)
    back = network(2)
    fastdense.load_weights(back, other.state_dict())
    for (name, value), expected in zip(back.state_dict().items(), source.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_files = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    source, model = network(1), network(2)
    path = tmp_path / "weights.safetensors"
    torch_files.save_file(source.state_dict(), path)
    fastdense.load_weights(model, path)
    assert torch.equal(model.classifier.weight, source.classifier.weight)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        fastdense.load_weights(model, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd.pop("classifier.bias"), "missing: classifier.bias"),
        (lambda sd: sd.update({"head.weight": torch.zeros(1)}), "left over: head.weight"),
        (lambda sd: sd.update({"classifier.bias": torch.zeros(7)}), r"classifier.bias is \[7\], and the model's \[5\]"),
        (lambda sd: sd.update({"module.classifier.bias": torch.zeros(5)}), "are the same tensor"),
        (lambda sd: sd.update({"epoch": 3}), "expected a state dict of tensors"),
        (lambda sd: [sd.pop(key) for key in list(sd) if "conv" in key], "and 6 more"),
    ],
)
def test_what_does_not_fit_changes_nothing(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    model, state_dict = network(2), network(1).state_dict()
    change(state_dict)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fastdense.load_weights(model, state_dict)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        fastdense.load_weights(network(), tmp_path / "none.pt")
