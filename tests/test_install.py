"""Building, installing and importing: on a bare machine, with nothing but PyTorch."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import distribution, distributions
from pathlib import Path
from typing import Any

import pytest

import fastdense

pytestmark = pytest.mark.skipif(
    not all(any(distributions(name=name)) for name in ("pip", "setuptools")),
    reason="building a wheel needs pip and setuptools",
)

CHECKOUT = Path(__file__).parents[1]
HAS_COMPILER = platform.machine() == "x86_64" and shutil.which("g++") is not None
FOLDERS = {
    "fastdense": Path("fastdense"),
    "kernels": Path("fastdense/kernels"),
    "benchmarks": Path("fastdense/benchmarks"),
}
"""Folders of the checkout, and where they are installed."""
OPTIONAL = ("triton", "torchvision", "rich", "matplotlib", "sklearn", "scikit_learn", "fastdense", "__editable__")
"""What the bare machine does not have, as its files are named; fastdense itself is installed there anew."""


LIBRARY = {"fastdense/kernels/cpu/_library.abi3.so"} if HAS_COMPILER else set()
"""What is compiled, where it can be."""


@pytest.fixture(autouse=True, scope="module")
def _compiled_without_optimisation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which is five times as quick, and as good for seeing what is installed."""
    compiler = tmp_path_factory.mktemp("compiler") / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        if HAS_COMPILER:
            patch.setenv("CC", str(compiler))
            patch.setenv("CXX", str(compiler))
        yield


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, as from version control."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        shutil.copytree(CHECKOUT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, checkout)
    (built,) = dist.glob("fastdense-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel in it."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", target, wheel)
    return target


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages beside PyTorch without the optional ones."""
    folder = tmp_path_factory.mktemp("bare")
    link(packages_of("torch"), folder, lambda name: not name.lower().startswith(OPTIONAL))
    return folder


def packages_of(name: str) -> Path:
    """The folder that a package is installed in."""
    return Path(str(distribution(name).locate_file("")))


def link(packages: Path, folder: Path, wanted: Callable[[str], bool]) -> None:
    for entry in packages.iterdir():
        if wanted(entry.name):
            (folder / entry.name).symlink_to(entry)


def pip(*arguments: str | Path) -> None:
    options = ("--quiet", "--no-index", "--disable-pip-version-check")
    done = subprocess.run([sys.executable, "-m", "pip", *arguments, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_alone(code: str, paths: Iterable[Path], cwd: Path, *arguments: str) -> str:
    """Run Python where only ``paths`` are installed: no compiler, no GPU, no site-packages; return what it prints."""
    unset = {"FASTDENSE_BACKEND", "CC", "CXX", "PYTHONHOME"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-S", "-s", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules_of(checkout: Path) -> set[str]:
    """Where the checkout's modules, and the report's template, belong in an installation."""
    installed = {"fastdense/py.typed"}
    for folder, package in FOLDERS.items():
        files = (file for kind in ("*.py", "*.jinja") for file in (checkout / folder).rglob(kind))
        installed |= {str(package / file.relative_to(checkout / folder)) for file in files}
    return installed


def modules_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


# -- building ------------------------------------------------------------------------------------------------


def test_wheel_holds_every_module_and_nothing_else(wheel, checkout):
    expected = modules_of(checkout)
    assert {"fastdense/kernels/portable/__init__.py", "fastdense/benchmarks/__init__.py"} < expected
    assert modules_in(wheel) == expected | LIBRARY


@pytest.mark.skipif(not HAS_COMPILER, reason="needs g++ and x86-64")
def test_one_wheel_serves_every_python(wheel):
    assert "-cp310-abi3-" in wheel.name


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as files:
        read = {name.split(".dist-info/")[1]: name for name in files.namelist() if ".dist-info/" in name}
        metadata = files.read(read["METADATA"]).decode()
        entry_points = files.read(read["entry_points.txt"]).decode()
    assert "fastdense = fastdense.cli:main" in entry_points
    assert "licenses/LICENSE" in read
    assert f"\nVersion: {fastdense.__version__}\n" in metadata
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==).*$", metadata, re.MULTILINE)
    assert set(required) == {"torch", "rich"}


BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""


def test_builds_where_only_setuptools_is_installed(checkout, wheel, tmp_path):
    """What build isolation does, to the checkout and to its source distribution: importing torch would fail."""
    only = tmp_path / "site"
    only.mkdir()
    link(packages_of("setuptools"), only, lambda name: name.startswith(("setuptools", "_distutils_hack")))

    version = run_alone(
        "import runpy, sys; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')", [only], checkout
    )
    assert version.splitlines()[-1] == fastdense.__version__

    sdist = run_alone(BUILD, [only], checkout, "sdist", str(tmp_path)).splitlines()[-1]
    with tarfile.open(tmp_path / sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.removesuffix(".tar.gz")
    sources = Path("kernels/cpu/src")
    assert {file.name for file in (unpacked / sources).iterdir()} == {
        file.name for file in (checkout / sources).iterdir()
    }
    rebuilt = run_alone(BUILD, [only], unpacked, "wheel", str(tmp_path)).splitlines()[-1]
    assert modules_in(tmp_path / rebuilt) == modules_in(wheel) - LIBRARY  # there is no compiler either


def test_building_requires_setuptools_alone():
    """Of a version that knows a licence by its SPDX expression, as the metadata give it."""
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    build = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["build-system"]
    (requirement,) = build["requires"]
    name, _, minimum = requirement.partition(">=")
    assert name == "setuptools"
    assert int(minimum.partition(".")[0]) >= 77
    assert build["build-backend"] == "setuptools.build_meta"


# -- installed on a bare machine -----------------------------------------------------------------------------

USE = """
import contextlib, importlib.metadata, io, json
import torch
import fastdense, fastdense.kernels, fastdense.benchmarks, fastdense.cli

torch.manual_seed(0)
block = fastdense.FastDenseBlock(2, 4, bn_size=2, growth_rate=4)
optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
x, losses = torch.randn(4, 4, 8, 8), []
for _ in range(5):
    optimizer.zero_grad()
    loss = block(x)[:, 4:].square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

try:
    fastdense.densenet121(weights="DEFAULT")
except ValueError as error:
    refusal = str(error)
with contextlib.redirect_stdout(io.StringIO()) as printed:
    exit_code = fastdense.cli.main(["status"])

print(json.dumps(dict(
    files=[m.__file__ for m in (fastdense, fastdense.kernels, fastdense.benchmarks)],
    version=importlib.metadata.version("fastdense"),
    losses=losses,
    refusal=refusal,
    status=fastdense.status().as_dict(),
    printed=printed.getvalue(),
    exit_code=exit_code,
)))
"""


@pytest.fixture(scope="module")
def used(installed: Path, bare: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What using the installed package on a bare machine reports."""
    return json.loads(run_alone(USE, [installed, bare], tmp_path_factory.mktemp("empty")).splitlines()[-1])


def test_installs_and_imports(used, installed):
    assert all(Path(file).is_relative_to(installed) for file in used["files"])
    assert used["version"] == fastdense.__version__


def test_block_trains(used):
    assert used["losses"] == sorted(used["losses"], reverse=True)


def test_status_says_what_is_missing_and_why(used):
    status = used["status"]
    for package in ("triton", "torchvision"):
        assert status[package]["state"] == "not installed"
    for item in ("cuda", "backend triton"):
        assert status[item]["state"] == "unavailable"
        assert status[item]["note"]
    chosen = status["chosen for cpu"]["state"]
    assert status[f"backend {chosen}"]["state"] == "available"
    assert used["exit_code"] == 0
    assert all(item in used["printed"] for item in status)


def test_without_a_compiler(installed, bare, tmp_path):
    """The portable kernels serve, and the status says why."""
    partial = tmp_path / "site"
    shutil.copytree(installed, partial, ignore=shutil.ignore_patterns("*.so"))
    used = json.loads(run_alone(USE, [partial, bare], tmp_path).splitlines()[-1])
    status = used["status"]
    assert status["backend cpu"]["state"] == "unavailable"
    assert "compiler" in status["backend cpu"]["note"]
    assert status["chosen for cpu"]["state"] == "torch"
    assert used["losses"] == sorted(used["losses"], reverse=True)


def test_weights_by_name_need_torchvision(used):
    assert "torchvision" in used["refusal"]
    assert "not installed" in used["refusal"]


def test_editable_install(checkout, bare, tmp_path):
    """Both top-level folders are found through the checkout."""
    pip("install", "--no-deps", "--no-build-isolation", "--target", tmp_path, "--editable", checkout)
    code = "import site, sys; site.addsitedir(sys.argv[1])\n" + USE
    used = json.loads(run_alone(code, [bare], tmp_path, str(tmp_path)).splitlines()[-1])
    assert used["files"] == [str(checkout / folder / "__init__.py") for folder in FOLDERS]
    assert used["version"] == fastdense.__version__


# -- importing -----------------------------------------------------------------------------------------------

IMPORT = """
import json, sys, time, torch
processes = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn")
started, before = [], set(sys.modules)
sys.addaudithook(lambda event, _: started.append(event) if event in processes else None)
start = time.perf_counter()
import fastdense
seconds = time.perf_counter() - start
print(json.dumps(dict(seconds=seconds, started=started, modules=sorted(set(sys.modules) - before))))
"""


def test_import_is_quick_and_starts_nothing(tmp_path):
    """Here, where everything may be installed: what is not needed yet is neither imported nor compiled."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=tmp_path)
    found = json.loads(done.stdout)
    heavy = {"triton", "torchvision", "matplotlib", "sklearn", "rich", "PIL", "pytest"}
    assert not heavy & {name.partition(".")[0] for name in found["modules"]}
    assert not {"torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"} & set(found["modules"])
    assert not found["started"]
    assert found["seconds"] < 1.5
