"""Options of ``pytest benchmarks/bench_speed.py``: which cases it times."""

from __future__ import annotations

import pytest

from .cases import DTYPES, SUITES, default_device, default_dtypes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdense")
    group.addoption("--suite", choices=SUITES, default="quick", help="how much is timed (default: quick)")
    group.addoption("--device", default=default_device(), help="cpu or cuda (default: the GPU if there is one)")
    group.addoption("--dtype", choices=DTYPES, help="one dtype (default: fp32; on a GPU bf16 autocast too)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        suite, device, dtype = (metafunc.config.getoption(name) for name in ("suite", "device", "dtype"))
        cases = SUITES[suite].speed_cases(device, (dtype,) if dtype else default_dtypes(device))
        metafunc.parametrize("case", cases, ids=str)
