"""Which Triton kernels a network launches, with what arithmetic and what compulsory traffic; no GPU needed.

The drivers of :mod:`fastdense.kernels.triton` run on meta tensors, and each launch is noted instead of made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastdense
from fastdense.kernels.contract import ChannelStats, Norm
from fastdense.modules import FastDenseBlock, FastTransition


@dataclass(frozen=True)
class Launch:
    """One launch: ``kernel[grid](**arguments)``, and of which part of the network it is."""

    part: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def replay(self) -> None:
        """Launch it again, on the tensors it was launched with."""
        self.kernel[self.grid](**self.arguments)

    def macs(self) -> int:
        """Multiply-accumulates of its products: the algorithm's, not the tiles'."""
        a = self.arguments
        if self.name == "_block_infer_kernel":
            channels = a["LAYERS"] * a["C0"] + a["GROWTH"] * a["LAYERS"] * (a["LAYERS"] - 1) // 2
            pixels = self.grid[0] * a["H"] * a["W"]
            return pixels * a["B"] * (channels + 9 * a["GROWTH"] * a["LAYERS"])
        return a["M"] * a["N"] * a["K"] * (9 if "conv3x3" in self.name else 1) if "conv" in self.name else 0

    def bytes(self) -> int:
        """What must move between memory and the chip: every operand once, every result once."""
        a = self.arguments
        size = {name: value.element_size() for name, value in a.items() if isinstance(value, Tensor)}
        parts = 8 * self.grid[0] if a.get("STATS") else 0  # bytes of mean and m2 for each channel
        if self.name == "_bn_relu_conv1x1_fwd_kernel":
            weights = (a["K"] + 8) * a["N"] * size["w_ptr"]
            return a["M"] * (a["K"] * size["x_ptr"] + a["N"] * size["h_ptr"]) + weights + parts * a["N"]
        if self.name == "_bn_relu_conv3x3_fwd_kernel":
            weights = 9 * a["K"] * a["N"] * size["w_ptr"]
            return a["M"] * (a["K"] * size["x_ptr"] + a["N"] * size["y_ptr"]) + weights + parts * a["N"]
        if self.name == "_block_infer_kernel":
            pixels = self.grid[0] * a["H"] * a["W"]
            return (
                pixels * (a["C0"] + a["LAYERS"] * a["GROWTH"]) * size["x_ptr"] + a["w1_ptr"].nbytes + a["w3_ptr"].nbytes
            )
        if self.name == "_bn_relu_pool_conv1x1_fwd_kernel":
            return a["M"] * (4 * a["K"] * size["x_ptr"] + a["N"] * size["out_ptr"]) + a["w_ptr"].nbytes
        if self.name == "_copy_stats_fwd_kernel":
            return a["M"] * a["C"] * (size["x_ptr"] + (size["y_ptr"] if a["COPY"] else 0)) + parts * a["C"]
        if self.name == "_bn_relu_maxpool_fwd_kernel":
            return a["x_ptr"].nbytes + a["out_ptr"].nbytes
        if self.name == "_bn_relu_mean_fwd_kernel":
            return a["x_ptr"].nbytes + a["out_ptr"].nbytes
        merged = 8 * a["TILES"] * a["C_NEW"] if a["MERGE"] else 0
        return merged + 24 * a["C_NORM"]


@contextlib.contextmanager
def recorded(make: bool) -> Iterator[list[Launch]]:
    """The launches made in the block, if ``make``, or only asked for; their ``part`` is empty."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def note(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        launches.append(Launch("", self, grid, dict(zip(self.arg_names, args, strict=False)) | options))
        return run(self, *args, grid=grid, warmup=warmup, **options) if make else None

    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = run


def forward_launches(arch: str, batch: int, size: int, dtype: torch.dtype, train: bool) -> list[Launch]:
    """Those of a forward of ``getattr(fastdense, arch)()`` on [batch, 3, size, size], without its convolution conv0."""
    from fastdense.kernels import triton as kernels

    with torch.device("meta"):
        net = getattr(fastdense, arch)().to(dtype).train(train)
        x = torch.empty((batch, 3, size, size), dtype=dtype)
    launches: list[Launch] = []
    stages = dict(net.features.named_children())
    names = list(stages)
    for i, (name, stage) in enumerate(stages.items()):
        with recorded(make=False) as part:
            if isinstance(stage, FastDenseBlock):
                layers = stage._gather(x, True)
                if train:
                    x = kernels.dense_block(x, layers, dtype, True).out
                else:
                    x = kernels.dense_block_inference(x, layers, dtype)
            elif isinstance(stage, FastTransition):
                x = kernels.transition(x, _norm(stage.norm, train), stage.conv.weight, dtype)
            elif isinstance(stage, nn.BatchNorm2d) and i == len(names) - 1:
                kernels.head(x, _norm(stage, train))
            elif isinstance(stage, nn.BatchNorm2d) and "pool0" in stages:
                if train:
                    kernels.channel_stats(x)
                x = kernels.stem_tail(x, _norm(stage, train))
            elif isinstance(stage, nn.Conv2d):
                x = stage(x).to(memory_format=torch.channels_last)
        launches += [Launch(name, launch.kernel, launch.grid, launch.arguments) for launch in part]
    return launches


def _norm(norm: nn.BatchNorm2d, train: bool) -> Norm:
    stats = ChannelStats(norm.running_mean, norm.running_var)  # type: ignore[arg-type]
    return Norm(norm.weight, norm.bias, *stats, norm.eps, train)
