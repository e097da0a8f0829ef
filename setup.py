"""Packages live in two top-level folders, and the CPU kernels are compiled; everything else is in pyproject.toml.

The kernels' library needs no header of Python or torch: one binary serves all their versions. Each instruction
set's file says itself what it is compiled for, so the binary runs on any x86-64. Without a compiler the package
installs all the same, and runs its portable algorithm.
"""

import platform
import sys

from setuptools import Extension, setup

# GCC 12 takes the undefined vectors of its own AVX-512 header for mistakes.
COMPILE = [
    "-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]  # fmt: skip
SOURCES = ("library", "avx2", "avx512", "avx512_bf16", "amx")
HEADERS = (
    "abi", "avx512_bf16_vectors", "avx512_vectors", "conv1x1", "conv3x3", "dense_block", "elements", "gemm",
    "includes", "kernels", "memory", "norm", "pack", "pointwise", "pointwise_backward", "statistics", "stem", "team",
    "training",
)  # fmt: skip

cpu_library = Extension(
    "fastdense.kernels.cpu._library",
    sources=[f"kernels/cpu/src/{name}.cpp" for name in SOURCES],
    depends=[f"kernels/cpu/src/{name}.h" for name in HEADERS],
    extra_compile_args=COMPILE,
    language="c++",
    py_limited_api=True,
    optional=True,
)


has_kernels = sys.platform != "win32" and platform.machine() in ("x86_64", "AMD64")

setup(
    packages=[
        "fastdense",
        "fastdense.converters",
        "fastdense.kernels",
        "fastdense.kernels.cpu",
        "fastdense.kernels.portable",
        "fastdense.kernels.triton",
        "fastdense.training",
        "fastdense.benchmarks",
    ],
    package_dir={
        "fastdense": "fastdense",
        "fastdense.kernels": "kernels",
        "fastdense.kernels.cpu": "kernels/cpu",
        "fastdense.kernels.portable": "kernels/portable",
        "fastdense.kernels.triton": "kernels/triton",
        "fastdense.benchmarks": "benchmarks",
    },
    include_package_data=False,  # the sources of the CPU kernels stay behind
    package_data={
        "fastdense": ["py.typed"],
        "fastdense.benchmarks": ["*.jinja"],
        "fastdense.kernels": ["tuned/*.json"],
    },
    ext_modules=[cpu_library] if has_kernels else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if has_kernels else {},
)
