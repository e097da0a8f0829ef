"""What a machine with a GPU is asked: in order, each thing once, and saved as it comes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
pytest.importorskip("matplotlib", reason="needs the packages of fastdense[bench]")
pytest.importorskip("sklearn", reason="needs the packages of fastdense[bench]")

from fastdense.benchmarks import gpu_check, plots, results


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls = []

    def answer(name: str, value: Any) -> gpu_check.Check:
        def give() -> Any:
            calls.append(name)
            if isinstance(value, Exception):
                raise value
            return value

        return gpu_check.Check(name, give)

    kernels = [{"kernel": "_a_kernel", "seconds": 2e-6, "bytes": 3e6, "macs": 0}]
    todo = [answer("ceilings", {"bytes_per_s": 3e12, "flops": 8e14}), answer("kernels/inference/1", kernels)]
    todo += [answer("networks/inference/1/eager", {"images_per_s": 10.0})]
    todo += [answer("networks/inference/1/fast", {"images_per_s": 40.0})]
    path, console = tmp_path / "gpu" / "gpu-check.json", Console(quiet=True)
    assert gpu_check.run(todo, path, {"commit": "a"}, -1, False, console) == 2
    assert gpu_check.run(todo[:1], path, {"commit": "a"}, 1, False, console) == 0
    assert gpu_check.run(todo, path, {"commit": "a"}, 1, False, console) == 0
    assert calls == [check.name for check in todo]
    answers = json.loads(path.read_text())["checks"]
    assert [list(table.columns[-1].cells) for table in gpu_check.tables(answers)] == [["2.00"], ["1.00x", "4.00x"]]
    picture = tmp_path / "gpu.png"
    plots.draw_gpu_check(
        gpu_check.kernel_rows(answers), gpu_check.network_rows(answers), results.environment("cpu"), picture
    )
    assert picture.stat().st_size > 10_000
    assert gpu_check.run([*todo, answer("parity/x", RuntimeError("no"))], path, {"commit": "b"}, 1, False, console) == 1
    assert len(calls) == 9


def test_runs_its_tests_by_its_own_python(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        assert not (cwd / "kernels").exists(), "it would be imported a second time"
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "5 passed", "")

    monkeypatch.setattr(subprocess, "run", run)
    tests = [
        check for check in gpu_check.checks() if check.name.startswith("parity/") and check.name != "parity/verify"
    ]
    assert all(check.answer()["passed"] for check in tests), "a file is missing"
    assert len(commands) == len(tests)
    assert all(command[:3] == [sys.executable, "-m", "pytest"] for command in commands)
