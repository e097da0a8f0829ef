"""Which Triton kernels a network launches, with what arithmetic and what compulsory traffic; no GPU needed.

The drivers of :mod:`fastdense.kernels.triton` run on meta tensors, and each launch is noted instead of made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastdense
from fastdense.kernels.contract import ChannelStats, DenseBlockNeeds, DenseLayers, Norm
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
        return self.kernel.fn.__name__

    @property
    def label(self) -> str:
        """Its name, for tables."""
        return self.name.removeprefix("_").removesuffix("_kernel")

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
        if "conv" not in self.name:
            return 0
        products = 2 if self.name == "_bn_relu_conv1x1_bwd_kernel" and a["WGRAD"] else 1
        return products * a["M"] * a["N"] * a["K"] * (9 if "conv3x3" in self.name else 1)

    def bytes(self) -> int:
        """What must move between memory and the chip: every operand once, every result once."""
        a = self.arguments
        size = {name: value.element_size() for name, value in a.items() if isinstance(value, Tensor)}
        parts = 8 * self.grid[0] if a.get("STATS") else 0  # mean and m2 of a channel, float32
        if self.name == "_bn_relu_conv1x1_fwd_kernel":
            vectors = 8 * a["K"] + (8 * a["N"] if a["FOLD"] else 0)
            tiles = a["M"] * (a["K"] * size["x_ptr"] + a["N"] * size["h_ptr"])
            return tiles + a["K"] * a["N"] * size["w_ptr"] + vectors + parts * a["N"]
        if self.name == "_bn_relu_conv3x3_fwd_kernel":
            vectors = 8 * a["K"] if a["NORM"] else 0
            tiles = a["M"] * (a["K"] * size["x_ptr"] + a["N"] * size["y_ptr"])
            return tiles + 9 * a["K"] * a["N"] * size["w_ptr"] + vectors + parts * a["N"]
        if self.name == "_block_infer_kernel":
            channels = a["C0"] + a["LAYERS"] * a["GROWTH"]
            vectors = sum(a[name].nbytes for name in ("scale1_ptr", "shift1_ptr", "scale2_ptr", "shift2_ptr"))
            tiles = self.grid[0] * a["H"] * a["W"] * channels * size["x_ptr"]
            return tiles + a["w1_ptr"].nbytes + a["w3_ptr"].nbytes + vectors
        if self.name == "_bn_relu_pool_conv1x1_fwd_kernel":
            tiles = a["M"] * (4 * a["K"] * size["x_ptr"] + a["N"] * size["out_ptr"])
            return tiles + a["w_ptr"].nbytes + 8 * a["K"]
        if self.name == "_bn_relu_conv1x1_bwd_kernel":
            tiles = a["M"] * (a["K"] * (size["x_ptr"] + 2 * size["g_ptr"]) + a["N"] * (size["h_ptr"] + size["da2_ptr"]))
            partial = 4 * self.grid[1] * a["K"] * (2 + (a["N"] if a["WGRAD"] else 0))
            return tiles + a["K"] * a["N"] * size["w_ptr"] + 12 * a["K"] + 16 * a["N"] + partial
        if self.name == "_conv3x3_dgrad_kernel":
            out = size["out_ptr"] * (2 if a["ADD"] else 1)
            tiles = a["M"] * (a["N"] * size["dy_ptr"] + a["K"] * (size["x_ptr"] + out))
            return tiles + 9 * a["K"] * a["N"] * size["w_ptr"] + 12 * a["K"] + 8 * self.grid[0] * a["K"]
        if self.name == "_bn_relu_conv3x3_wgrad_kernel":
            tiles = a["M"] * (a["N"] * size["dy_ptr"] + a["K"] * size["x_ptr"])
            return tiles + 8 * a["K"] + 4 * self.grid[2] * 9 * a["K"] * a["N"]
        if self.name == "_true_gradient_kernel":
            return a["M"] * a["C"] * (size["g_ptr"] + size["x_ptr"] + size["out_ptr"]) + 16 * a["C"]
        if self.name == "_norm_sums_kernel":
            norm = (8 * a["TILES"] + 16 + (16 if a["ADD"] else 8) + 2 * size["dbias_ptr"]) * a["C"]
            return norm + a["N"] * a["K"] * a["SIDE"] ** 2 * (4 * a["PARTS"] + size["dw_ptr"])
        if self.name == "_copy_stats_fwd_kernel":
            return a["M"] * a["C"] * (size["x_ptr"] + (size["y_ptr"] if a["COPY"] else 0)) + parts * a["C"]
        if self.name in ("_spread_kernel", "_bn_relu_maxpool_bwd_kernel"):
            taps = a["tap_ptr"].nbytes if "tap_ptr" in a else 0
            vectors = 12 * a["C"] + (8 * self.grid[0] * a["C"] if a["SUMS"] else 8 * a["C"])
            return a["x_ptr"].nbytes * (1 if a["SUMS"] else 2) + a["dout_ptr"].nbytes + taps + vectors
        if self.name in ("_bn_relu_maxpool_fwd_kernel", "_bn_relu_mean_fwd_kernel", "_bn_relu_pool_fwd_kernel"):
            return a["x_ptr"].nbytes + a["out_ptr"].nbytes + 8 * a["C"]
        if self.name != "_finalise_kernel":
            raise ValueError(f"no count of the bytes of {self.name}")
        merged = 8 * (a["TILES"] + 1) * a["C_NEW"] if a["MERGE"] else 0
        return merged + (16 + 2 * size["weight_ptr"]) * a["C_NORM"]


@contextlib.contextmanager
def recorded(make: bool, after: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """The launches made in the block, if ``make``, or only asked for; their ``part`` is empty.

    ``after`` is called with each when it was made.
    """
    from triton.runtime.jit import KernelInterface

    launches: list[Launch] = []
    get = KernelInterface.__getitem__

    def note(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            launches.append(Launch("", kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | options))
            if make:
                get(kernel, grid)(*args, **options)
            if after is not None:
                after(launches[-1])

        return launch

    KernelInterface.__getitem__ = note
    try:
        yield launches
    finally:
        KernelInterface.__getitem__ = get


def network_launches(
    arch: str, batch: int, size: int, dtype: torch.dtype, train: bool, backward: bool = False
) -> list[Launch]:
    """Those of a forward of ``getattr(fastdense, arch)()`` on [batch, 3, size, size], without its convolution conv0.

    With ``backward`` those of its backward instead, in the order of a backward.
    """
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
                layers = stage._gather(stage.dense_layers(), x, True)
                if train:
                    block_input, output = x, kernels.dense_block(x, layers, dtype, True)
                    x = output.out
                    if backward:
                        part.clear()
                        kernels.dense_block_backward(
                            torch.empty_like(x), output, layers, dtype, block_input.dtype, _all_needed(layers)
                        )
                else:
                    x = kernels.dense_block_inference(x, layers, dtype)
            elif isinstance(stage, FastTransition):
                norm, weight, block_input = _norm(stage.norm, train), stage.conv.weight, x
                x = kernels.transition(x, norm, weight, dtype)
                if backward:
                    part.clear()
                    kernels.transition_backward(torch.empty_like(x), block_input, norm, weight, dtype, True)
            elif isinstance(stage, nn.BatchNorm2d) and i == len(names) - 1:
                pooled = kernels.head(x, _norm(stage, train))
                if backward:
                    part.clear()
                    kernels.head_backward(pooled, x, _norm(stage, train))
            elif isinstance(stage, nn.BatchNorm2d) and "pool0" in stages:
                if train:
                    kernels.channel_stats(x)
                block_input, x = x, kernels.stem_tail(x, _norm(stage, train))
                if backward:
                    part.clear()
                    kernels.stem_tail_backward(torch.empty_like(x), block_input, _norm(stage, train))
            elif isinstance(stage, nn.Conv2d):
                x = stage(x).to(memory_format=torch.channels_last)
        made = [Launch(name, launch.kernel, launch.grid, launch.arguments) for launch in part]
        launches = made + launches if backward else launches + made
    return launches


def _all_needed(layers: DenseLayers) -> DenseBlockNeeds:
    every = [True] * layers.num_layers
    second = every if layers.has_bottleneck else []
    return DenseBlockNeeds(True, every, every, second, second)


def _norm(norm: nn.BatchNorm2d, train: bool) -> Norm:
    stats = ChannelStats(norm.running_mean, norm.running_var)  # type: ignore[arg-type]
    return Norm(norm.weight, norm.bias, *stats, norm.eps, train)
