"""``make bench-peers``, ``bench-training``: every contender is a row, nothing inexact is timed, rows are drawn."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="needs the packages of fastdense[bench]")
pytest.importorskip("sklearn", reason="needs the packages of fastdense[bench]")

import fastdense
from fastdense import parity
from fastdense.benchmarks import peers, plots, runtimes
from fastdense.benchmarks import results as results_module
from fastdense.benchmarks.cases import Network

CASE = peers.Case(Network("densenet_40_12", 16), 2, "fp32")
SMALL = ("--arch", "densenet_40_12", "--size", "16")
FEWEST = (runtimes.EAGER, runtimes.CHANNELS_LAST, runtimes.FASTDENSE)


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_compiled() -> Iterator[None]:
    """That takes a minute, and test_compile.py compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model: model)
        yield


@pytest.fixture(scope="module", params=runtimes.PEER_MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(mode: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small run of the command line, in a folder with its plot."""
    path = tmp_path_factory.mktemp("peers") / "rows.json"
    options = ["--mode", mode, "--batch", "2", "--dtype", "float32", "bf16", "--repeats", "2", "--json", str(path)]
    assert peers.main([*SMALL, *options]) == 0
    return path


@pytest.fixture(scope="module")
def rows(saved: Path) -> list[dict[str, Any]]:
    return results_module.load(saved)["peers"]


def measured(repeats: int = 1) -> dict[str, dict[str, Any]]:
    """The rows of the case, by contender."""
    return {row["contender"]: row for row in peers.measure(CASE, 0.1, repeats, lambda what, seconds: None)}


def test_every_contender_has_a_row_in_every_dtype(mode: str, rows: list[dict[str, Any]]) -> None:
    names = [runtime.name for runtime in runtimes.RUNTIMES if mode in runtime.modes]
    assert names[-1] == "fastdense"
    assert [(row["dtype"], row["contender"]) for row in rows] == [(d, n) for d in ("fp32", "bf16") for n in names]
    for row in rows:
        if row["note"] is None:
            assert len(row["all_ms"]) == row["rounds"] == 2
            assert 0 < row["ms_q1"] <= row["ms"] <= row["ms_q3"]
            assert row["ms_per_image"] == row["ms"] / row["batch"]
            assert row["first_call_s"] > 0
            assert row["contender"] != "fastdense" or row["ratio"] == 1
            assert row["contender"] != "fastdense" or 0 < row["error"] <= row["allowed_error"]


@pytest.mark.parametrize(("dtype", "largest"), [("fp32", 1e-4), ("bf16", 0.2)])
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_vendor_runtimes_compute_the_same(
    mode: str, rows: list[dict[str, Any]], name: str, dtype: str, largest: float
) -> None:
    runtime = next(runtime for runtime in runtimes.RUNTIMES if runtime.name == name)
    if mode not in runtime.modes:
        assert all(row["contender"] != name for row in rows)
        return
    for package in runtime.packages:
        pytest.importorskip(package, reason="needs the packages of fastdense[peers]")
    (row,) = (row for row in rows if (row["contender"], row["dtype"]) == (name, dtype))
    if dtype not in runtime.dtypes:
        assert row["note"] == "not offered"
    else:
        assert row["note"] is None
        assert 0 < row["error"] < largest


def test_missing_package_and_failing_contender_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def no_compiler(model: nn.Module) -> nn.Module:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    monkeypatch.setattr(torch, "compile", no_compiler)
    found = measured()
    assert found["openvino"]["note"] == "openvino missing"
    assert found["onnxruntime"]["note"] == "onnxruntime, onnx, onnxscript missing"
    assert found["compile"]["note"] == "failed with RuntimeError: no C++ compiler"
    assert {name for name, row in found.items() if row["note"] is None} == {"eager", "channels_last", "fastdense"}

    results = {"environment": results_module.environment("cpu"), "mode": "inference", "peers": list(found.values())}
    peers.show(results, plots.draw(results_module.save(results, tmp_path)))
    printed = capsys.readouterr().out
    for part in ("openvino missing", "onnxscript missing", "no C++ compiler", "first call", "peers.png"):
        assert part in printed


def test_inexact_fastdense_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    convert = fastdense.convert

    def inexact(model: nn.Module, inplace: bool) -> nn.Module:
        model = convert(model, inplace)
        with torch.no_grad():
            model.classifier.bias += 1e-3  # type: ignore[union-attr, operator]
        return model

    monkeypatch.setattr(peers, "RUNTIMES", FEWEST)
    assert measured()["fastdense"]["error"] > 0
    monkeypatch.setattr(fastdense, "convert", inexact)
    with pytest.raises(peers.ParityError, match=r"fastdense's logits: error .* allowed"):
        measured()
    assert peers.main([*SMALL, "--batch", "2", "--dtype", "fp32", "--repeats", "1"]) == 1
    assert "fastdense's logits" in capsys.readouterr().err


def test_training_recomputes_and_does_not_learn() -> None:
    """The variants do what their names say, and every round does the same work on the same weights."""
    model = CASE.network.build(peers.NAIVE)
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    for runtime in (runtimes.CHANNELS_LAST, runtimes.RECOMPUTING, runtimes.FASTDENSE, runtimes.FASTDENSE_RECOMPUTING):
        own = copy.deepcopy(model)
        first, second = (runtime.build(own, x, torch.float32)(x) for _ in range(2))
        torch.testing.assert_close(first, second)
        assert all(torch.equal(before[name], p) and p.grad.any() for name, p in own.named_parameters())
        efficient = [m.memory_efficient for m in own.modules() if hasattr(m, "memory_efficient")]
        assert set(efficient) == {runtime in (runtimes.RECOMPUTING, runtimes.FASTDENSE_RECOMPUTING)}


def test_inexact_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = parity.Row("conv0.weight.grad", fast_error=1.0, stock_error=1e-7, allowed=2e-7)
    monkeypatch.setattr(peers, "parity_rows", lambda network, device, dtype: [wrong])
    with pytest.raises(peers.ParityError, match=r"conv0.weight.grad: error 1, allowed"):
        peers.measure(dataclasses.replace(CASE, mode="training"), 0.1, 1, lambda what, seconds: None)


def test_plot_is_drawn_from_saved_rows(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (picture,) = saved.parent.glob("*-peers.png")
    picture.unlink()
    assert plots.main([str(saved)]) == 0
    assert capsys.readouterr().out.split() == [str(picture)]
    assert picture.stat().st_size > 10_000


def test_default_folder_keeps_peers_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``make plots`` draws the newest results of ``fastdense bench``, whatever was compared since."""
    monkeypatch.setattr(results_module, "default_folder", lambda: tmp_path)
    monkeypatch.setattr(peers, "RUNTIMES", FEWEST)
    assert peers.main([*SMALL, "--batch", "1", "--dtype", "fp32", "--repeats", "1"]) == 0
    assert json.loads(results_module.latest(tmp_path / "peers").read_text())["peers"]
    with pytest.raises(FileNotFoundError):
        results_module.latest(tmp_path)
