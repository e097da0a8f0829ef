"""Packages live in two top-level folders; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "fastdense",
        "fastdense.kernels",
        "fastdense.kernels.portable",
        "fastdense.kernels.triton",
        "fastdense.benchmarks",
    ],
    package_dir={
        "fastdense": "fastdense",
        "fastdense.kernels": "kernels",
        "fastdense.kernels.portable": "kernels/portable",
        "fastdense.kernels.triton": "kernels/triton",
        "fastdense.benchmarks": "benchmarks",
    },
    package_data={"fastdense": ["py.typed"], "fastdense.kernels": ["tuned/*.json"]},
)
