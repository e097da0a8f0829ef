"""What a backend computes: the functions, their tensors and layouts. ``fastdense.ops`` calls nothing else.

Notation of one dense block, used throughout the package:

====== ==========================================================================================
N H W  images, rows, columns; ``M = N*H*W`` pixels. A backend may serve sequences [N, C, L] and volumes
       [N, C, D, H, W] too; "spatial" stands for whichever dimensions there are
C_0    channels of the block's input
k      growth rate: channels that each of the L layers adds
C_l    ``C_0 + l*k``: channels that layer l reads
B      channels of a bottleneck (``bn_size * k``)
X      the block's output, [N, C_L, H, W] in channels-last memory, so that its rows are pixels:
       as [M, C_L], layer l reads the prefix ``X[:, :C_l]`` and writes ``X[:, C_l : C_l+k]``; where
       new features go first, it reads the last C_l channels and writes the k before them
====== ==========================================================================================

A backend is a module with the functions

- ``channel_stats``
- ``dense_block``, ``dense_block_backward``, ``dense_block_inference``
- ``transition``, ``transition_backward``
- ``stem_tail``, ``stem_tail_backward``, and optionally ``stem_inference``
- ``head``, ``head_backward``

taking and returning the types below. Every function is pure: it changes no argument and returns fresh
tensors, a forward's not views. Statistics and all accumulators are of ``accumulator_dtype``; statistics are
those of the values as stored and, where a group is named, of those of all its processes (:mod:`.group`). What
a forward returns for its backward has the layouts given here for every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_channels_last(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N, C, *spatial] uninitialised, dense with channels innermost and not a view: users may write to it in place.

    Of images and volumes that is PyTorch's channels_last and channels_last_3d; of sequences it has no name there, and
    of [N, C] there is no other.
    """
    if len(shape) == 2:
        return torch.empty(shape, dtype=dtype, device=device)
    if len(shape) == 3:
        n, channels, length = shape
        return torch.empty_strided((n, channels, length), (channels * length, 1, channels), dtype=dtype, device=device)
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=dtype, device=device, memory_format=layout)


def in_channels_last(x: Tensor) -> Tensor:
    """[N, C, *spatial] in that memory: x itself where it is so already."""
    by_pixels = x.movedim(1, -1)
    return x if by_pixels.is_contiguous() else by_pixels.contiguous().movedim(-1, 1)


def conv_sizes(
    spatial: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[int]:
    """What a convolution without dilation makes of the spatial dimensions."""
    return [(size + 2 * p - k) // s + 1 for size, k, s, p in zip(spatial, kernel, stride, padding, strict=True)]


class ChannelStats(NamedTuple):
    """Batch statistics of a tensor [N, C, *spatial]: they belong to the channel, not to a BatchNorm."""

    mean: Tensor  # [C]
    var: Tensor  # [C], biased

    def part(self, channels: slice) -> ChannelStats:
        """Those of some channels, in the same memory."""
        return ChannelStats(self.mean[channels], self.var[channels])


class Norm(NamedTuple):
    """One BatchNorm and the statistics it normalises with: the batch's of its input, or its running ones."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    mean: Tensor  # [C]
    var: Tensor  # [C], biased
    eps: float
    batch_stats: bool  # mean and var depend on the input, so the backward differentiates through them
    group: str = ""  # the process group whose batches mean and var are of; "" for this process's, or running ones


class DenseLayers(NamedTuple):
    """The parameters of a block's L layers, one list entry a layer; the fields are the ops' arguments.

    A layer is norm1-ReLU-conv1 (1x1) -norm2-ReLU-conv2 (3x3). The shapes are those for images; kernels and masks
    have as many spatial dimensions as x. Without bottlenecks conv1 is the 3x3, and
    the fields of norm2, conv2 and ``bottleneck_mask`` are empty. The dropout masks are boolean, True where
    a value is kept, and empty where there is no dropout; kept values are divided by ``1 - drop_rate``.
    """

    norm1_weight: list[Tensor]  # [C_l]
    norm1_bias: list[Tensor]  # [C_l]
    norm1_running_mean: list[Tensor]  # [C_l]; not read where the batch's are used
    norm1_running_var: list[Tensor]  # [C_l]
    conv1_weight: list[Tensor]  # [B, C_l, 1, 1], or [k, C_l, 3, 3] without bottlenecks
    norm2_weight: list[Tensor]  # [B]
    norm2_bias: list[Tensor]  # [B]
    norm2_running_mean: list[Tensor]  # [B]
    norm2_running_var: list[Tensor]  # [B]
    conv2_weight: list[Tensor]  # [k, B, 3, 3]
    bottleneck_mask: list[Tensor]  # [N, B, H, W]
    growth_mask: list[Tensor]  # [N, k, H, W]
    norm1_batch_stats: list[bool]
    norm1_eps: list[float]
    norm2_batch_stats: list[bool]
    norm2_eps: list[float]
    drop_rate: float
    group: str = ""  # of all norms that use the batch's statistics, as of Norm
    new_first: bool = False  # whether X has its features from the last layer's to the input

    @property
    def keep_scale(self) -> float:
        """What dropout multiplies kept values by."""
        return 0.0 if self.drop_rate == 1 else 1 / (1 - self.drop_rate)

    @property
    def num_layers(self) -> int:
        return len(self.conv1_weight)

    @property
    def has_bottleneck(self) -> bool:
        return len(self.conv2_weight) > 0

    @property
    def growth_weight(self) -> list[Tensor]:
        """The 3x3 weights, whose outputs are the new channels."""
        return self.conv2_weight if self.has_bottleneck else self.conv1_weight

    @property
    def input_channels(self) -> int:
        return self.conv1_weight[0].shape[1]

    @property
    def growth_rate(self) -> int:
        return self.growth_weight[0].shape[0]

    @property
    def bottleneck_channels(self) -> int:
        return self.conv1_weight[0].shape[0] if self.has_bottleneck else 0

    @property
    def output_channels(self) -> int:
        return self.input_channels + self.num_layers * self.growth_rate

    def reads(self, layer: int) -> slice:
        """The channels of X that a layer reads; of the first, the block's input."""
        channels = self.conv1_weight[layer].shape[1]
        if not self.new_first:
            return slice(0, channels)
        every = self.output_channels
        return slice(every - channels, every)

    def writes(self, layer: int) -> slice:
        """Those that it makes."""
        source, k = self.reads(layer), self.growth_rate
        return slice(source.start - k, source.start) if self.new_first else slice(source.stop, source.stop + k)

    def written(self) -> list[slice]:
        """Those that are the input's, and those that each layer makes."""
        return [self.reads(0), *map(self.writes, range(self.num_layers))]

    def norm1(self, layer: int, batch: ChannelStats) -> Norm:
        """norm1 of one layer; ``batch`` are the statistics of X, of which it takes those that it reads."""
        stats = ChannelStats(self.norm1_running_mean[layer], self.norm1_running_var[layer])
        use_batch = self.norm1_batch_stats[layer]
        if use_batch:
            stats = batch.part(self.reads(layer))
        return Norm(self.norm1_weight[layer], self.norm1_bias[layer], *stats, self.norm1_eps[layer], use_batch)

    def norm2(self, layer: int, batch: ChannelStats) -> Norm:
        """norm2 of one layer; ``batch`` are the statistics of that layer's bottleneck."""
        use_batch = self.norm2_batch_stats[layer]
        return Norm(
            self.norm2_weight[layer],
            self.norm2_bias[layer],
            batch.mean if use_batch else self.norm2_running_mean[layer],
            batch.var if use_batch else self.norm2_running_var[layer],
            self.norm2_eps[layer],
            use_batch,
        )


class DenseBlockOutput(NamedTuple):
    """What ``dense_block`` returns. Statistics are zero where no norm of the block needs them."""

    out: Tensor  # X: [N, C_L, *spatial], channels-last
    bottleneck: list[Tensor]  # h of each layer, before norm2: [M, B]; no entries where they are not kept
    mean: Tensor  # [C_L], of X
    var: Tensor  # [C_L]
    bottleneck_mean: Tensor  # [L, B]
    bottleneck_var: Tensor  # [L, B]


class DenseBlockNeeds(NamedTuple):
    """Which gradients ``dense_block_backward`` must return; the others come back as empty tensors."""

    x: bool
    norm1: list[bool]  # of weight and bias
    conv1: list[bool]
    norm2: list[bool]
    conv2: list[bool]

    def first_layer(self) -> int:
        """The lowest layer that must be reached for what is asked for: the backward stops above the others."""
        if self.x:
            return 0
        lists = [needed for needed in self[1:] if needed]
        num_layers = len(self.conv1)
        return next((i for i in range(num_layers) if any(needed[i] for needed in lists)), num_layers)


class DenseBlockGrads(NamedTuple):
    """Gradients of ``dense_block``: the parameters' in their dtypes and strides, x's in channels-last memory."""

    x: Tensor
    norm1_weight: list[Tensor]
    norm1_bias: list[Tensor]
    conv1_weight: list[Tensor]
    norm2_weight: list[Tensor]
    norm2_bias: list[Tensor]
    conv2_weight: list[Tensor]


class NormGrads(NamedTuple):
    """Gradients of ``stem_tail`` and ``head``."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


class TransitionGrads(NamedTuple):
    """Gradients of ``transition``."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    conv_weight: Tensor
