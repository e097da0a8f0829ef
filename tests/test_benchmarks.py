"""The benchmark's parts run, save what they promise, and draw it; and the memory numbers that the README claims."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the packages of fastdense[bench]")
pytest.importorskip("pytest_benchmark", reason="needs the packages of fastdense[bench]")
pytest.importorskip("sklearn", reason="needs the packages of fastdense[bench]")

from fastdense import images
from fastdense.benchmarks import cases, memory, plots, run
from fastdense.benchmarks import results as results_module
from fastdense.memory import saved_activation_bytes


def test_photographs_are_normalised_crops_and_always_the_same() -> None:
    photos = images.photographs(48, 4)
    assert photos.shape == (4, 3, 48, 48)
    assert photos.dtype == torch.float32
    pixels = photos * torch.tensor(images.IMAGENET_STD).view(3, 1, 1) + torch.tensor(images.IMAGENET_MEAN).view(3, 1, 1)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert photos.flatten(1).std(1).min() > 0.3, "a real photograph is not flat"
    assert torch.equal(images.photographs(48, 2), photos[:2])


def test_digits_are_split_and_standardised() -> None:
    train_x, train_y, test_x, test_y = images.digits()
    assert train_x.shape == (1438, 1, 8, 8)
    assert test_x.shape == (359, 1, 8, 8)
    assert train_y.shape == (1438,)
    assert test_y.unique().tolist() == list(range(10))
    torch.testing.assert_close(torch.stack(torch.std_mean(train_x)), torch.tensor([1.0, 0.0]))
    assert torch.equal(images.digits()[0], train_x)


def test_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdense\[bench\]'"):
        images.digits()


# -- the runner ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of the smallest suite."""
    folder = tmp_path_factory.mktemp("results")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run.main(["--suite", "smoke", "--device", "cpu", "--json", "--output", str(folder)]) == 0
    assert json.loads(printed.getvalue()) == results_module.load(results_module.latest(folder))
    return folder


@pytest.fixture(scope="module")
def smoke_results(smoke: Path) -> dict[str, Any]:
    return results_module.load(results_module.latest(smoke))


def test_run_shows_tables(smoke_results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run.show(smoke_results, [Path("speed.png")])
    printed = capsys.readouterr().out
    for part in ("Parity", "Time", "Memory of training", "Growth", "test accuracy", "speed.png"):
        assert part in printed


def test_run_records_the_environment(smoke_results: dict[str, Any]) -> None:
    environment = smoke_results["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["device_type"] == "cpu"
    assert {"device", "isa", "threads", "triton", "python", "commit", "date"} <= environment.keys()


def test_run_times_every_contender_in_every_round(smoke_results: dict[str, Any]) -> None:
    rows = smoke_results["speed"]
    suite = cases.SUITES["smoke"]
    assert len(rows) == len(suite.speed_cases("cpu", ("fp32",))) * len(cases.SPEED_CONTENDERS)
    assert {row["mode"] for row in rows} == set(cases.MODES)
    for row in rows:
        assert len(row["all_ms"]) == row["rounds"] >= 5
        assert 0 < row["ms_q1"] <= row["ms"] <= row["ms_q3"]
        assert 0 < row["speedup_q1"] <= row["speedup"] <= row["speedup_q3"]
        assert row["contender"] != cases.NAIVE.name or row["speedup"] == 1


def test_run_proves_parity_before_timing(smoke_results: dict[str, Any]) -> None:
    assert [row["subject"] for row in smoke_results["parity"]] == ["denseblock4"]
    assert 0 < smoke_results["parity"][0]["worst_use_of_budget"] <= 1


def test_run_measures_memory_and_its_growth(smoke_results: dict[str, Any]) -> None:
    for row in smoke_results["memory"] + smoke_results["growth"]:
        assert row["saved_bytes"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
        assert row["peak_bytes"] is not None or row["note"]
    assert {row["variable"] for row in smoke_results["growth"]} == {"depth", "batch", "resolution"}
    assert all(0 < row["step_ms_q1"] <= row["step_ms"] <= row["step_ms_q3"] for row in smoke_results["growth"])


def test_run_trains_both_alike(smoke_results: dict[str, Any]) -> None:
    runs = smoke_results["training"]["runs"]
    naive, fast = (torch.tensor(runs[name]["loss"]) for name in ("naive", "fast"))
    torch.testing.assert_close(fast[:5], naive[:5], rtol=1e-3, atol=0)


def test_run_draws_and_plots_can_be_drawn_again(smoke: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = sorted(smoke.glob("*.png"))
    assert [path.stem.rpartition("-")[2] for path in drawn] == ["growth", "memory", "fp32", "training"]
    for path in drawn:
        path.unlink()
    assert plots.main([str(results_module.latest(smoke))]) == 0
    assert sorted(map(Path, capsys.readouterr().out.split())) == drawn
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_plots_refuse_without_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "default_folder", lambda: tmp_path)
    assert plots.main([]) == 1
    assert "run `fastdense bench` first" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "3", json.dumps({"suite": "quick"})])
def test_plots_refuse_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert plots.main([str(path)]) == 1
    assert "is not a file of benchmark results" in capsys.readouterr().err


def test_unknown_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])


# -- memory ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meter() -> Iterator[memory.Meter]:
    if not memory.CAN_MEASURE_CPU_PEAK:
        pytest.skip("needs a /proc/self/clear_refs that can be written: Linux")
    with memory.meter("cpu") as meter:
        yield meter


def test_peak_of_naive_is_what_it_saved(meter: memory.Meter) -> None:
    """It is reached at the end of the forward, when everything is saved and little else is alive."""
    network = cases.Network("densenet_cifar", 32, arguments={"depth": 40})
    measured = meter.measure(cases.MemoryCase(network, cases.NAIVE, 8, "cpu", "fp32"))
    assert measured.saved is not None
    assert measured.peak is not None
    assert measured.saved <= measured.peak < 1.2 * measured.saved


def test_failed_measurement_says_why_and_the_next_succeeds(meter: memory.Meter) -> None:
    too_small = cases.Network("densenet_cifar", 4, arguments={"depth": 10})  # one value per channel
    failed = meter.measure(cases.MemoryCase(too_small, cases.FAST, 1, "cpu", "fp32"))
    assert failed.saved is None
    assert failed.peak is None
    assert "ended with 1" in failed.note
    assert meter.measure(cases.MemoryCase(too_small, cases.FAST, 2, "cpu", "fp32")).peak


@pytest.mark.parametrize(
    ("contender", "least", "most"),
    [(cases.NAIVE, 60, 75), (cases.FAST, 0, 20), (cases.FAST_RECOMPUTING, 0, 9)],
    ids=lambda value: value.name if isinstance(value, cases.Contender) else None,
)
def test_densenet121_saves_few_bytes(contender: cases.Contender, least: int, most: int) -> None:
    """MB per image of a training forward at batch 8, 224x224, bfloat16 autocast."""
    workload = cases.Workload(cases.DENSENET121, contender, 8, "cpu", torch.bfloat16)
    workload.prepare("forward")
    saved = saved_activation_bytes(workload.model, workload.forward) / 8 / 1e6
    assert least <= saved <= most
