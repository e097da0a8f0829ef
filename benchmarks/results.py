"""Results: rows and the environment they were measured in, one JSON file a run, named by device and date."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import fastdense

from . import rounds

_HERE = Path(__file__).parent
_DATE = "%Y%m%dT%H%M%SZ"

PARTS = ("suite", "parity", "speed", "memory", "growth", "roofline", "training")
"""What a file holds besides ``environment``; a part that was not measured is empty."""


def environment(device: str) -> dict[str, Any]:
    """What a measurement depends on."""
    gpu = device.startswith("cuda")
    return {
        "date": datetime.now(timezone.utc).strftime(_DATE),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if gpu else _cpu(),
        "device_type": "cuda" if gpu else device,
        "cpu": _cpu(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bf16_isa": _bfloat16_instructions(),
        "mhz": _cpuinfo("cpu MHz"),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "backend": fastdense.backends.select(torch.device(device), torch.float32),
        "fastdense": fastdense.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "openvino": _version("openvino"),
        "onnxruntime": _version("onnxruntime"),
        "timm": _version("timm"),
        "monai": _version("monai"),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _bfloat16_instructions() -> list[str]:
    return [flag for flag in ("avx512_bf16", "amx_bf16") if flag in _cpuinfo("flags").split()]


def default_folder() -> Path:
    """``benchmarks/results`` of a checkout, else ``fastdense-results`` where the program was started."""
    return _HERE / "results" if _is_checkout() else Path("fastdense-results")


def save(results: dict[str, Any], folder: Path) -> Path:
    """Write one run; the name is device, suite and date."""
    path = folder / f"{device_slug(results)}-{results['suite']}-{results['environment']['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def load(path: Path) -> dict[str, Any]:
    """Read one run.

    Raises:
        ValueError: the file does not hold one.
    """
    try:
        results = json.loads(path.read_text())
        missing = [part for part in ("environment", *PARTS) if part not in results]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a file of benchmark results: {error}") from None
    if missing:
        raise ValueError(f"{path} is not a file of benchmark results: it has no {', '.join(missing)}")
    return results


def newest(folder: Path) -> list[Path]:
    """The newest run of each device and suite in a folder, the very newest last.

    Raises:
        FileNotFoundError: there is none.
    """
    runs = sorted(folder.glob("*-????????T??????Z.json"), key=lambda path: path.stem.rpartition("-")[2])
    if not runs:
        raise FileNotFoundError(f"no benchmark results in {folder}: run `fastdense bench` first, or name a file")
    by_name: dict[str, Path] = {}
    for path in runs:
        name = path.stem.rpartition("-")[0]
        by_name.pop(name, None)
        by_name[name] = path
    return list(by_name.values())


def timings(results: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case and mode: contenders that took turns."""
    for _, rows in groupby(results["speed"], key=lambda row: [row[key] for key in ("title", "batch", "dtype", "mode")]):
        yield list(rows)


def ratio(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float]:
    """How many times another contender's time ``row``'s is: the rounds' median and quartiles (q1, q3)."""
    return rounds.quartiles(ratios(row, other))


def ratios(row: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """How many times another contender's time ``row``'s is, round by round."""
    return [own / theirs for own, theirs in zip(row["all_ms"], other["all_ms"], strict=True)]


def three_digits(value: float) -> str:
    """For people to read; whole numbers from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def device_slug(results: dict[str, Any]) -> str:
    """The device for file names, such as ``nvidia-h100-80gb-hbm3``; a CPU with its instruction set."""
    environment = results["environment"]
    name = environment["device"]
    if environment["device_type"] == "cpu":
        name += f" {environment['isa']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu() -> str:
    """The CPU's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """What Linux says of the first CPU; empty where nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


def _is_checkout() -> bool:
    return (_HERE.parent / "pyproject.toml").exists()


def _commit() -> str | None:
    """The commit of a checkout, marked where files differ from it."""
    if not _is_checkout():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=_HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
