"""The benchmark's parts run, save what they promise, and draw it; and the memory numbers that the README claims."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="needs the packages of fastdense[bench]")
pytest.importorskip("sklearn", reason="needs the packages of fastdense[bench]")

from fastdense import images, parity
from fastdense.benchmarks import (
    cases,
    compare,
    contenders,
    libraries,
    memory,
    plots,
    report,
    run,
    tables,
    timing,
    training,
)
from fastdense.benchmarks import results as results_module
from fastdense.benchmarks.contenders import Contender, Workload
from fastdense.memory import saved_activation_bytes

Row = dict[str, Any]


def test_photographs_are_normalised_crops_and_always_the_same() -> None:
    photos = images.photographs(48, 4)
    assert photos.shape == (4, 3, 48, 48)
    assert photos.dtype == torch.float32
    pixels = photos * torch.tensor(images.IMAGENET_STD).view(3, 1, 1) + torch.tensor(images.IMAGENET_MEAN).view(3, 1, 1)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert photos.flatten(1).std(1).min() > 0.3, "a real photograph is not flat"
    assert torch.equal(images.photographs(48, 2), photos[:2])


def test_digits_are_split() -> None:
    train_x, train_y, test_x, test_y = images.digits()
    assert train_x.shape == (1438, 1, 8, 8)
    assert test_x.shape == (359, 1, 8, 8)
    assert train_y.shape == (1438,)
    assert test_y.unique().tolist() == list(range(10))
    assert (train_x.min(), train_x.max()) == (0, 255)
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
    assert json.loads(printed.getvalue()) == results_module.load(*results_module.newest(folder))
    return folder


@pytest.fixture(scope="module")
def smoke_results(smoke: Path) -> Row:
    return results_module.load(*results_module.newest(smoke))


def test_run_shows_tables(smoke_results: Row, capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(smoke_results, [Path("speed.png")])
    printed = capsys.readouterr().out
    for part in ("Parity", "Time, ms", "alternatives", "Memory", "Growth", "floor", "test accuracy", "speed.png"):
        assert part in printed


def test_run_records_the_environment(smoke_results: Row) -> None:
    environment = smoke_results["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["device_type"] == "cpu"
    assert {"device", "isa", "mhz", "threads", "triton", "python", "commit", "date"} <= environment.keys()


def test_run_times_every_entrant_in_every_round(smoke_results: Row) -> None:
    expected = [
        (case.subject.name, mode, contender.name)
        for case in cases.SUITES["smoke"].speed_cases("cpu", ("fp32",))
        for mode in case.modes
        for contender in case.entrants
    ]
    rows = smoke_results["speed"]
    assert [(row["subject"], row["mode"], row["contender"]) for row in rows] == expected
    for row in rows:
        if row["note"] is None:
            assert len(row["all_ms"]) == row["rounds"] >= 5
            assert 0 < row["ms_q1"] <= row["ms"] <= row["ms_q3"]
            assert row["first_call_s"] > 0
            assert row["mode"] != "inference" or 0 < row["error"] < 1e-5
        else:
            assert row["note"].endswith("missing")


def test_run_proves_parity_before_timing(smoke_results: Row) -> None:
    assert [row["subject"] for row in smoke_results["parity"]] == ["denseblock4", "densenet_cifar"]
    assert all(0 < row["worst_use_of_budget"] <= 1 for row in smoke_results["parity"])


def test_run_measures_memory_and_its_growth(smoke_results: Row) -> None:
    for row in smoke_results["memory"] + smoke_results["growth"]:
        assert row["mode"] == "inference" or row["saved_bytes"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
        assert row["peak_bytes"] is not None or row["note"]
    assert {row["mode"] for row in smoke_results["memory"]} == {"step", "inference"}
    assert {row["variable"] for row in smoke_results["growth"]} == {"depth", "batch", "resolution"}
    assert all(0 < row["step_ms_q1"] <= row["step_ms"] <= row["step_ms_q3"] for row in smoke_results["growth"])


def test_run_places_every_part_under_the_roof(smoke_results: Row) -> None:
    rows = smoke_results["roofline"]
    assert {row["mode"] for row in rows} == {"inference", "forward", "backward"}
    for row in rows:
        assert row["seconds"] > 0
        least = max(row["bytes"] / row["bandwidth"], 2 * row["macs"] / row["flops"])
        assert row["floor_s"] >= (1 - 1e-9) * least > 0


def test_run_trains_both_alike(smoke_results: Row) -> None:
    (row,) = smoke_results["training"]
    for naive, fast in zip(row["runs"]["naive"], row["runs"]["fast"], strict=True):
        assert naive["seed"] == fast["seed"]
        ours, theirs = (torch.tensor(run["loss"]) for run in (fast, naive))
        torch.testing.assert_close(ours[:5], theirs[:5], rtol=1e-3, atol=0)
    assert [len(found.ends) for found in training.summaries(row).values()] == [2, 2]


def test_run_draws_and_plots_can_be_drawn_again(smoke: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = sorted(smoke.glob("*.png"))
    assert [path.stem.partition("-smoke-")[2] for path in drawn] == [
        "growth", "memory", "roofline", "speed-fp32", "training",
    ]  # fmt: skip
    for path in drawn:
        path.unlink()
    assert plots.main(list(map(str, results_module.newest(smoke)))) == 0
    assert sorted(map(Path, capsys.readouterr().out.split())) == drawn
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_report_is_one_page_that_holds_everything(smoke: Path) -> None:
    (page,) = smoke.glob("*.html")
    text = page.read_text()
    assert text.count('src="data:image/png;base64,') == 5
    assert "http" not in text, "it opens without a network"
    for part in ("denseblock4", "OpenVINO", "test accuracy", torch.__version__):
        assert part in text
    assert re.search(r'<td class="(green|red|default) right">\d', text), "ratios keep their colours"
    assert report.main([str(smoke / "missing.json")]) == 1


def test_networks_of_ones_own_choice(tmp_path: Path) -> None:
    chosen = ["--arch", "densenet_40_12", "--batch", "1", "2", "--mode", "inference", "--seconds", "0.01"]
    for size, options in ((8, ["--size", "8"]), (32, [])):  # of the paper where none is given
        folder = tmp_path / str(size)
        assert run.main([*chosen, *options, "--output", str(folder)]) == 0
        results = results_module.load(*results_module.newest(folder))
        found = {(row["title"], row["batch"], row["dtype"], row["mode"]) for row in results["speed"]}
        assert found == {(f"densenet_40_12, {size}x{size}", batch, "fp32", "inference") for batch in (1, 2)}
        assert not results["memory"]


def test_plots_refuse_without_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results_module, "default_folder", lambda: tmp_path)
    assert plots.main([]) == 1
    assert "run `fastdense bench` first" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "3", json.dumps({"suite": "quick"})])
def test_plots_refuse_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert plots.main([str(path)]) == 1
    assert "is not a file of benchmark results" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--compare", str(path)])
    assert "is not a file of benchmark results" in capsys.readouterr().err


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert run.main([]) == 2
    assert "pip install 'fastdense[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "slow"], "invalid choice: 'slow'"),
        (["--arch", "resnet50"], "invalid choice: 'resnet50'"),
        (["--batch", "0"], "must be at least 1, got 0"),
        (["--compare", "nowhere.json"], "No such file"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])


# -- contenders --------------------------------------------------------------------------------------------------

TINY = cases.Network("densenet_40_12", 16)


def tiny_case(contenders: tuple[Contender, ...], modes: tuple[str, ...] = ("inference",)) -> cases.SpeedCase:
    return cases.SpeedCase(TINY, modes, 2, "cpu", "fp32", contenders, seconds=0.01, fewest_rounds=8)


def measured(case: cases.SpeedCase) -> dict[str, Row]:
    """The rows of a case of one mode, by contender."""
    return {row["contender"]: row for row in timing.measure(case, lambda what, seconds: None)}


@pytest.mark.parametrize("contender", [c for c in contenders.ALL if c.packages], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype_name", cases.DTYPES)
def test_other_libraries_compute_the_same(contender: Contender, dtype_name: str) -> None:
    for package in contender.packages:
        pytest.importorskip(package, reason="needs the packages of fastdense[peers]")
    if dtype_name not in contender.dtypes:
        assert contender.why_not(dtype_name) == f"{dtype_name} not offered"
        return
    network = TINY if contender.networks is None else cases.Network(contender.networks[0], 64)
    case = cases.SpeedCase(
        network, ("inference",), 2, "cpu", dtype_name, (*contenders.NAIVE_AND_FAST, contender), 0.01, 2
    )
    row = measured(case)[contender.name]
    assert row["note"] is None
    assert 0 < row["error"] < {"fp32": 1e-4, "bf16": 0.2}[dtype_name]


@pytest.mark.parametrize("name", ["kuangliu", "FC-DenseNet"])
def test_networks_of_other_libraries_before_and_after(name: str) -> None:
    row = libraries.measured(libraries.NETWORKS[name]._replace(shape=(2, 3, 32, 32)), "cpu", 0.01)
    assert all(min(row[mode][which]) > 0 for mode in ("step", "inference") for which in ("before", "after"))
    assert 0 < row["saved_bytes"]["after"] < row["saved_bytes"]["before"]
    _, shape, *times, saved = libraries.cells({"network": name, **row})
    assert shape == "2x3x32x32"
    assert all(cell.endswith("x") or "->" in cell for cell in (*times, saved))


def test_missing_package_and_failing_contender_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(model: nn.Module, mode: str) -> nn.Module:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    monkeypatch.setattr(torch, "compile", no_compiler)
    found = measured(tiny_case(contenders.ALL))
    assert found["OpenVINO"]["note"] == "openvino missing"
    assert found["ONNX Runtime"]["note"] == "onnxruntime, onnx, onnxscript missing"
    assert found["torch.compile"]["note"] == "failed with RuntimeError: no C++ compiler"
    assert {name for name, row in found.items() if row["note"] is None} == {
        "naive contiguous",
        "naive",
        "fast",
        "fast, frozen",
    }


def test_every_contender_that_trains_is_compiled_or_recomputes_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def compile_nothing(model: nn.Module, mode: str) -> nn.Module:
        modes.append(mode)
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    found = measured(tiny_case(contenders.ALL, ("step",)))
    assert all(row["note"] is None and row["error"] is None for row in found.values())
    assert modes == ["default", "max-autotune-no-cudagraphs"]
    for contender in contenders.MEMORY_CONTENDERS:
        workload = contenders.Workload(TINY, contender, 2, "cpu", torch.float32)
        efficient = {m.memory_efficient for m in workload.model.modules() if hasattr(m, "memory_efficient")}
        assert efficient == {"memory_efficient" in contender.name}


def test_training_does_not_learn() -> None:
    """Every round does the same work on the same weights."""
    workload = contenders.Workload(TINY, contenders.FAST, 2, "cpu", torch.float32)
    before = {name: p.clone() for name, p in workload.model.named_parameters()}
    for _ in range(2):
        workload.run(*workload.prepare("step"))
    assert all(torch.equal(before[name], p) and p.grad.any() for name, p in workload.model.named_parameters())


def test_inexact_fast_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    head = cases.Network.fast

    def inexact(network: cases.Network, **options: Any) -> nn.Module:
        model = head(network, **options)
        model.classifier.register_forward_hook(lambda module, args, out: out * 1.001)
        return model

    monkeypatch.setattr(cases.Network, "fast", inexact)
    with pytest.raises(timing.ParityError, match=r"fast's output: error .* allowed"):
        measured(tiny_case(contenders.NAIVE_AND_FAST))

    wrong = parity.Row("conv0.weight.grad", fast_error=1.0, stock_error=1e-7, allowed=2e-7)
    monkeypatch.setattr(timing, "parity_rows", lambda subject, device, dtype: [wrong])
    assert run.main(["--arch", "densenet_40_12", "--dtype", "fp32"]) == 1
    assert re.search(r"not the same function.*conv0.weight.grad: error 1, allowed", capsys.readouterr().err)


# -- two runs ----------------------------------------------------------------------------------------------------


def later(results: Row, slower: float, scatter: float, rng: np.random.Generator) -> Row:
    """Another run: each round scatters, naive is the machine's new speed, fast ``slower`` than that."""
    again = copy.deepcopy(results)
    for row in again["speed"]:
        if row["note"] is None:
            factor = 1.3 * (slower if row["contender"] == "fast" else 1)
            row["all_ms"] = [factor * ms * rng.lognormal(sigma=scatter) for ms in row["all_ms"]]
    return again


@pytest.fixture
def steady(smoke_results: Row) -> Row:
    """A run of ten rounds a row that do not scatter."""
    results = copy.deepcopy(smoke_results)
    for row in results["speed"]:
        if row["note"] is None:
            row["all_ms"] = [row["ms"]] * 10
    return later(results, 1.0, 0.05, np.random.default_rng(0))


def test_a_slowed_build_is_flagged_and_the_same_is_not(steady: Row) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        assert not any(change.is_regression for change in compare.changes(steady, later(steady, 1.0, 0.05, rng)))
        slowed = compare.changes(steady, later(steady, 1.5, 0.05, rng))
        assert all(change.is_regression for change in slowed if change.quantity == "time over naive's")
        quicker = compare.changes(steady, later(steady, 0.7, 0.05, rng))
        assert all(change.is_improvement for change in quicker if change.quantity == "time over naive's")


def test_a_large_but_chance_difference_is_not_flagged(steady: Row) -> None:
    """Two rounds prove nothing."""
    new = later(steady, 1.5, 0.05, np.random.default_rng(2))
    for results in (steady, new):
        for row in results["speed"]:
            if row["note"] is None:
                row["all_ms"] = row["all_ms"][:2]
    found = compare.changes(steady, new)
    assert all(change.factor > 1.2 for change in found if change.quantity == "time over naive's")
    assert not any(change.is_regression for change in found)


def test_more_memory_is_flagged(steady: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = copy.deepcopy(steady)
    for row in new["memory"]:
        if row["contender"] == "fast" and row["saved_bytes"]:
            row["saved_bytes"] *= 1.2
    paths = []
    for i, results in enumerate((steady, new)):
        paths.append(str(tmp_path / f"{i}.json"))
        Path(paths[-1]).write_text(json.dumps(results))
    assert compare.main([paths[0], paths[0]]) == 0
    assert compare.main(paths) == 1
    printed = capsys.readouterr().out
    assert "saved bytes" in printed
    assert "1.20x" in printed


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
    measured = meter.measure(cases.MemoryCase(network, contenders.NAIVE, 8, "cpu", "fp32"))
    assert measured.saved is not None
    assert measured.peak is not None
    assert measured.saved <= measured.peak < 1.2 * measured.saved


def test_failed_measurement_says_why_and_the_next_succeeds(meter: memory.Meter) -> None:
    too_small = cases.Network("densenet_cifar", 4, arguments={"depth": 10})  # one value per channel
    failed = meter.measure(cases.MemoryCase(too_small, contenders.FAST, 1, "cpu", "fp32"))
    assert failed.saved is None
    assert failed.peak is None
    assert "ended with 1" in failed.note
    assert meter.measure(cases.MemoryCase(too_small, contenders.FAST, 2, "cpu", "fp32")).peak


@pytest.mark.parametrize(
    ("contender", "least", "most"),
    [(contenders.NAIVE, 60, 75), (contenders.FAST, 0, 20), (contenders.FAST_RECOMPUTING, 0, 9)],
    ids=lambda value: value.name if isinstance(value, Contender) else None,
)
def test_densenet121_saves_few_bytes(contender: Contender, least: int, most: int) -> None:
    """MB per image of a training forward at batch 8, 224x224, bfloat16 autocast."""
    workload = Workload(cases.DENSENET121, contender, 8, "cpu", torch.bfloat16)
    workload.prepare("forward")
    saved = saved_activation_bytes(workload.model, workload.forward) / 8 / 1e6
    assert least <= saved <= most
