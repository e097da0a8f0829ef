"""Everything worth knowing of the Triton kernels on this GPU, in one resumable command: ``make gpu-check``.

Checks run one after the other, each saved when done to ``benchmarks/results/<device>/gpu-check.json``; a second run
goes on with those the same commit has not answered yet. A run starts no check after ``--minutes``.

- parity: ``fastdense verify``, the tests of the kernels, and at the end all others that need a GPU, in float32, float16
  and bfloat16 against float64
- kernels: each launch of a DenseNet-121, its median time beside its floor at the GPU's measured ceilings
- parts: each block and transition beside stock PyTorch and torch.compile doing the same
- networks: inference, training forward and step with SGD at batch 1, 32 and 256, beside eager channels-last AMP and
  torch.compile
- sanitizer: compute-sanitizer's memcheck over a small network, where it is installed
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastdense
from fastdense import reference

from . import plots, results
from .launches import Launch, recorded

_BATCHES = (256, 32, 1)
_MODES = ("inference", "training forward", "training step")
_FIRST = [
    ("inference", 256),
    ("training step", 256),
    ("inference", 1),
    ("training step", 32),
    ("training forward", 256),
]
_TESTS = ("numerics", "ops", "state", "freeze", "determinism", "compile")  # beside those of the kernels
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Check:
    """A question and the function that answers it with something JSON can hold."""

    name: str
    answer: Callable[[], Any]


def checks() -> list[Check]:
    """All of them, the most important first."""
    found = [
        Check("parity/verify", _verify),
        Check("parity/triton", partial(_tests, "triton")),
        Check("ceilings", ceilings),
    ]
    for batch in (256, 32):
        for mode in ("training step", "inference"):
            found.append(Check(f"kernels/{mode}/{batch}", partial(_kernels, mode, batch)))
    cases = dict.fromkeys([*_FIRST, *itertools.product(_MODES, _BATCHES)])
    for contender in ("fast", "fast, CUDA graph", "fast, frozen", "eager", "torch.compile"):
        for mode, batch in cases:
            if contender == "fast, frozen" and mode != "inference":
                continue
            found.append(Check(f"networks/{mode}/{batch}/{contender}", partial(_network, contender, mode, batch)))
    for contender in ("fast", "eager", "torch.compile"):
        found.append(Check(f"parts/{contender}", partial(_parts, contender)))
    found += [Check(f"parity/{name}", partial(_tests, name)) for name in _TESTS]
    return [*found, Check("sanitizer", _sanitizer)]


# -- answers --------------------------------------------------------------------------------------------------------


def _tests(name: str) -> dict[str, Any]:
    """Those of ``tests/test_<name>.py`` that need a GPU, by this Python; several at a time, for Triton to compile."""
    file = Path(__file__).parent.parent / "tests" / f"test_{name}.py"
    if not file.exists():
        return {"passed": None, "note": "no tests beside the package: not a checkout"}
    options = ["-q", "--maxfail", "20", "-m", "gpu", "-k", "not compile_clean"]
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    run = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)  # not beside `kernels`
    return {"passed": run.returncode == 0, "summary": run.stdout.strip().splitlines()[-1:], "tail": run.stdout[-3000:]}


def _verify() -> dict[str, Any]:
    command = [sys.executable, "-m", "fastdense", "verify", "--device", "cuda", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"passed": run.returncode == 0, "report": json.loads(run.stdout) if run.stdout else run.stderr[-2000:]}


def ceilings() -> dict[str, float]:
    """Bytes a second of a large copy, and bfloat16 operations a second of a large product."""
    a = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    m = torch.randn(8192, 8192, dtype=_DTYPE, device="cuda")
    return {
        "bytes_per_s": 2 * a.nbytes / _seconds(lambda: b.copy_(a)),
        "flops": 2 * 8192**3 / _seconds(lambda: m @ m),
    }


def _kernels(mode: str, batch: int) -> list[dict[str, Any]]:
    """Median seconds of each launch, and what it must move and multiply."""
    run = _runner(_model(fastdense, mode != "inference"), _input(batch), mode)
    with recorded(make=True) as launches:
        run()
    return [_timed(launch) for launch in launches]


def _timed(launch: Launch) -> dict[str, Any]:
    sizes = {key: value for key, value in launch.arguments.items() if isinstance(value, int | bool | str)}
    return {
        "kernel": launch.label, "grid": list(launch.grid), "arguments": sizes, "seconds": _seconds(launch.replay, 20),
        "bytes": launch.bytes(), "macs": launch.macs(),
    }  # fmt: skip


def _network(contender: str, mode: str, batch: int) -> dict[str, Any]:
    library = reference if contender in ("eager", "torch.compile") else fastdense
    net, x = _model(library, mode != "inference"), _input(batch)
    if contender == "fast, frozen":
        net = fastdense.freeze(net)
    started = time.perf_counter()
    run = _runner(_compiled(net, "max-autotune") if contender == "torch.compile" else net, x, mode)
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    if contender == "fast, CUDA graph":
        run = _graphed(run)
    torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(run, 200)
    peak = torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "images_per_s": batch / seconds, "first_call_s": first, "peak_bytes": peak}


def _compiled(net: nn.Module, mode: str) -> Any:
    torch.compiler.reset()  # the same code is compiled for so few modules, and then runs as it is
    return torch.compile(net, mode=mode)


def _runner(net: Any, x: Tensor, mode: str) -> Callable[[], Any]:
    """One call in ``mode``, under AMP. A training forward keeps what a backward needs, and drops it with its output."""

    def forward() -> Tensor:
        with torch.autocast("cuda", _DTYPE, cache_enabled=False):
            return net(x)

    if mode == "inference":
        return torch.inference_mode()(forward)
    if mode == "training forward":
        return forward
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(forward(), labels).backward()
        optimizer.step()

    return step


def _graphed(run: Callable[[], Any]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _parts(contender: str) -> list[dict[str, Any]]:
    """Training forward and inference of each block and transition, on inputs of its size at batch 256."""
    rows = []
    library = fastdense if contender == "fast" else reference
    for train in (True, False):
        net, size = _model(library, train), 56
        for name, part in net.features.named_children():
            if not name.startswith(("denseblock", "transition")):
                continue
            channels = next(m for m in part.modules() if isinstance(m, nn.BatchNorm2d)).num_features
            x = torch.randn(256, channels, size, size, dtype=_DTYPE, device="cuda")
            x = x.to(memory_format=torch.channels_last)
            module = _compiled(part, "default") if contender == "torch.compile" else part
            mode = "training forward" if train else "inference"
            rows.append({"part": name, "mode": mode, "seconds": _seconds(_runner(module, x, mode))})
            size //= 2 if name.startswith("transition") else 1
    return rows


def _sanitizer() -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"passed": None, "note": "compute-sanitizer is not installed"}
    program = (
        "import torch, fastdense; net = fastdense.densenet_bc_100_12().cuda()\n"
        "for train in (True, False): net.train(train)(torch.randn(2, 3, 33, 32, device='cuda'))"
    )
    command = [tool, "--error-exitcode", "1", sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"passed": run.returncode == 0, "tail": run.stdout[-2000:]}


def _model(library: Any, train: bool) -> Any:
    torch.manual_seed(0)
    return library.densenet121().train(train).to("cuda", memory_format=torch.channels_last)


def _input(batch: int) -> Tensor:
    x = torch.randn(batch, 3, 224, 224, device="cuda")
    return x.to(memory_format=torch.channels_last)


def _seconds(run: Callable[[], Any], milliseconds: int = 100) -> float:
    """The median, with L2 emptied before each call."""
    import triton.testing

    return 1e-3 * triton.testing.do_bench(run, warmup=25, rep=milliseconds, return_mode="median")


# -- the run --------------------------------------------------------------------------------------------------------


def run(
    todo: list[Check], path: Path, environment: dict[str, Any], minutes: float, again: bool, console: Console
) -> int:
    """Answer what ``path`` does not hold yet for this commit: 0 when all is well, 1 on a failure, 2 out of time."""
    saved = json.loads(path.read_text()) if path.exists() and not again else {}
    if saved.get("environment", {}).get("commit") != environment["commit"]:
        saved = {}
    answers: dict[str, Any] = saved.get("checks", {})
    started = time.monotonic()
    for check in todo:
        if check.name in answers:
            continue
        if time.monotonic() - started > 60 * minutes:
            console.print(f"[yellow]out of time before {check.name}: run again to go on")
            return 2
        before = time.monotonic()
        try:
            answers[check.name] = check.answer()
        except Exception as error:
            answers[check.name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        console.print(f"{check.name}: {time.monotonic() - before:.0f} s")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment, "checks": answers}, indent=1) + "\n")
    failed = [name for name, answer in answers.items() if isinstance(answer, dict) and answer.get("passed") is False]
    for name in failed:
        console.print(f"[red]{name} failed: {answers[name].get('error') or answers[name]}")
    return 1 if failed else 0


def kernel_rows(answers: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each mode and kernel its launches, their seconds together, and their floor at the measured ceilings."""
    found = []
    for name, launches in answers.items():
        if not name.startswith("kernels/") or isinstance(launches, dict):
            continue
        ceilings = answers["ceilings"]
        for kernel in dict.fromkeys(launch["kernel"] for launch in launches):
            own = [launch for launch in launches if launch["kernel"] == kernel]
            floors = [max(x["bytes"] / ceilings["bytes_per_s"], 2 * x["macs"] / ceilings["flops"]) for x in own]
            found.append({
                "mode": name.removeprefix("kernels/"), "kernel": kernel,
                "launches": len(own), "seconds": sum(launch["seconds"] for launch in own), "floor": sum(floors),
            })  # fmt: skip
    return found


def network_rows(answers: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each mode, batch and contender its images a second, and how many times eager's those are."""
    found = []
    for name, answer in answers.items():
        if name.startswith("networks/") and "images_per_s" in answer:
            _, mode, batch, contender = name.split("/")
            eager = answers.get(f"networks/{mode}/{batch}/eager", {}).get("images_per_s")
            ratio = answer["images_per_s"] / eager if eager else None
            row = {"mode": mode, "batch": int(batch), "contender": contender, "images_per_s": answer["images_per_s"]}
            found.append(row | {"of_eager": ratio})
    return found


def tables(answers: dict[str, Any]) -> list[Table]:
    """Kernels over their floors, and networks beside each other."""
    kernels = Table("mode", "kernel", "launches", "us", "floor, us", "over floor", title="Kernels", box=None)
    for row in kernel_rows(answers):
        times = (f"{1e6 * row['seconds']:.0f}", f"{1e6 * row['floor']:.0f}", f"{row['seconds'] / row['floor']:.2f}")
        kernels.add_row(row["mode"], row["kernel"], str(row["launches"]), *times)
    networks = Table("network", "batch", "contender", "images/s", "of eager", title="DenseNet-121", box=None)
    for row in network_rows(answers):
        ratio = "" if row["of_eager"] is None else f"{row['of_eager']:.2f}x"
        networks.add_row(row["mode"], str(row["batch"]), row["contender"], f"{row['images_per_s']:.0f}", ratio)
    return [kernels, networks]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="checks whose names begin so")
    parser.add_argument(
        "--minutes", type=float, default=9, help="start no check after that long (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="answer all anew")
    parser.add_argument("--output", type=Path, default=results.default_folder(), help="folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    console = Console()
    if not torch.cuda.is_available():
        console.print("gpu-check needs a CUDA GPU; `make kernel-report` needs none")
        return 1
    environment = results.environment("cuda")
    path = arguments.output / results.device_slug({"environment": environment}) / "gpu-check.json"
    todo = [check for check in checks() if check.name.startswith(arguments.only)]
    status = run(todo, path, environment, arguments.minutes, arguments.again, console)
    answers = json.loads(path.read_text())["checks"] if path.exists() else {}
    for table in tables(answers):
        console.print(table)
    picture = path.with_suffix(".png")
    plots.draw_gpu_check(kernel_rows(answers), network_rows(answers), environment, picture)
    console.print(f"{path}\n{picture}")
    return status


if __name__ == "__main__":
    sys.exit(main())
