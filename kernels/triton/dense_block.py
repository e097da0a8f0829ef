"""A whole dense block over one shared buffer, a few launches a layer (see :mod:`fastdense.kernels.contract`).

Training, layer l, all statistics made where a channel is written::

    conv1x1:   h = relu(scale1 * X[:, :C_l] + shift1) @ W1^T      and partial statistics of h
    finalise:  mean and var of h, scale2 and shift2
    conv3x3:   X[:, C_l : C_l+k] = conv3x3(relu(scale2 * h + shift2), W2)      and partial statistics of it
    finalise:  mean and var of the k channels, scale1 and shift1 of layer l+1 over C_l+k

In inference everything is known ahead: norm2 and its ReLU are the 1x1's epilogue, and the 3x3 reads u. Images
are independent then: where there are enough of them, one launch does the whole block, each program an image
(:mod:`.block_infer`). Nothing derived from a parameter outlives the call.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..contract import (
    ChannelStats,
    DenseBlockOutput,
    DenseLayers,
    empty_channels_last,
)
from ..group import join
from ..portable.batch_norm import Affine, affines, channels_of, rows, zero_stats
from .block_infer import Together, block_infer, fits
from .conv1x1 import bn_relu_conv1x1_fwd
from .conv3x3 import bn_relu_conv3x3_fwd
from .launch import on_device
from .prepared import Prepared
from .statistics import Partials, Vectors, copy_stats_fwd, merge, merge_for


@on_device
def dense_block(x: Tensor, layers: DenseLayers, dtype: torch.dtype, save_bottleneck: bool) -> DenseBlockOutput:
    """Forward with whichever statistics the norms ask for; convolutions compute in ``dtype``."""
    n, _, h, w = x.shape
    width, count = layers.bottleneck_channels, layers.num_layers
    store = torch.promote_types(x.dtype, dtype)
    out = empty_channels_last((n, layers.output_channels, h, w), store, x.device)
    shared = rows(out)  # X
    stats = zero_stats((layers.output_channels,), store, x.device)
    bottleneck_stats = zero_stats((count, width), store, x.device)
    each_bottleneck_stats = list(map(ChannelStats, bottleneck_stats.mean, bottleneck_stats.var))
    partials = Partials(x.device)
    share_stats = any(layers.norm1_batch_stats)
    weights1, weights3 = packed_weights(layers, dtype)
    vectors1, vectors2 = Vectors.empty(layers.output_channels, x.device), Vectors.empty(width, x.device)
    bottleneck: list[Tensor] = []
    pixels = n * h * w
    group = join(layers.group, pixels, x.device)

    reads = layers.reads(0)
    copy_stats_fwd(x, channels_of(shared, reads), partials if share_stats else None)
    merge_for(layers.norm1(0, stats), vectors1, stats.part(reads), partials if share_stats else None, group=group)
    for layer in range(count):
        writes = layers.writes(layer)
        source, vectors = channels_of(shared, reads), vectors1
        if layers.has_bottleneck:
            if save_bottleneck or not layer:
                hidden = torch.empty((pixels, width), dtype=dtype, device=x.device)
            if save_bottleneck:
                bottleneck.append(hidden)
            wanted = layers.norm2_batch_stats[layer]
            own = each_bottleneck_stats[layer]
            bn_relu_conv1x1_fwd(
                source, vectors, weights1[layer], hidden,
                keep=kept(layers.bottleneck_mask, layer), keep_scale=layers.keep_scale,
                stats=partials if wanted else None,
            )  # fmt: skip
            source, vectors = hidden, vectors2
            merge_for(layers.norm2(layer, own), vectors2, own, partials if wanted else None, group=group)
        bn_relu_conv3x3_fwd(
            source, vectors, weights3[layer], channels_of(shared, writes), (h, w),
            keep=kept(layers.growth_mask, layer), keep_scale=layers.keep_scale, stats=partials if share_stats else None,
        )  # fmt: skip
        if layer + 1 < count:
            norm, reads = layers.norm1(layer + 1, stats), layers.reads(layer + 1)
            first = writes.start - reads.start
            merge_for(norm, vectors1, stats.part(reads), partials if share_stats else None, first, group)
        elif share_stats:
            merge(stats, partials, writes.start, group)
    return DenseBlockOutput(out, bottleneck, *stats, *bottleneck_stats)


class PreparedBlock(Prepared):
    """A block at given statistics, norm2 folded into the 1x1: vectors made and weights packed."""

    def __init__(self, layers: DenseLayers, x_dtype: torch.dtype, dtype: torch.dtype):
        self._store, self._compute = torch.promote_types(x_dtype, dtype), dtype
        self._growth, self._width = layers.growth_rate, layers.bottleneck_channels
        self._reads = [layers.reads(layer) for layer in range(layers.num_layers)]
        self._writes = [layers.writes(layer) for layer in range(layers.num_layers)]
        self._new_first = layers.new_first
        unread = ChannelStats(*(layers.norm1_weight[0].new_empty(0) for _ in range(2)))
        norms1, norms2 = block_norms(layers, unread, [unread] * layers.num_layers)
        self._norms1 = [Vectors(norm.scale, norm.shift) for norm in norms1]
        self._norms2 = [Vectors(norm.scale, norm.shift) for norm in norms2]
        self._weights1, self._weights3 = packed_weights(layers, dtype)

    def run(self, x: Tensor) -> Tensor:
        n, c0, h, w = x.shape
        k, width = self._growth, self._width
        out = empty_channels_last((n, c0 + len(self._norms1) * k, h, w), self._store, x.device)
        shared = rows(out)
        copy_stats_fwd(x, channels_of(shared, self._reads[0]), None)
        if width and not self._new_first and fits(n, h * w, width, k, x.device):
            block_infer(shared, self._in_one_launch, c0, (h, w))
            return out
        if width:
            hidden = torch.empty((n * h * w, width), dtype=self._compute, device=x.device)  # u
        for layer, norm in enumerate(self._norms1):
            source, new = channels_of(shared, self._reads[layer]), channels_of(shared, self._writes[layer])
            if width:
                bn_relu_conv1x1_fwd(source, norm, self._weights1[layer], hidden, fold=self._norms2[layer])
                bn_relu_conv3x3_fwd(hidden, None, self._weights3[layer], new, (h, w))
            else:
                bn_relu_conv3x3_fwd(source, norm, self._weights3[layer], new, (h, w))
        return out

    @cached_property
    def _in_one_launch(self) -> Together:
        return Together.of(self._norms1, self._weights1, self._norms2, self._weights3)


def dense_block_inference(x: Tensor, layers: DenseLayers, dtype: torch.dtype) -> Tensor:
    """Forward with running statistics: X alone, [N, C_L, H, W]."""
    return PreparedBlock(layers, x.dtype, dtype)(x)


def block_norms(
    layers: DenseLayers, stats: ChannelStats, bottleneck_stats: list[ChannelStats]
) -> tuple[list[Affine], list[Affine]]:
    """The vectors of the layers' norm1 and norm2, made together: on a GPU, few launches for many vectors."""
    norms = [layers.norm1(layer, stats) for layer in range(layers.num_layers)]
    norms += [layers.norm2(layer, bottleneck_stats[layer]) for layer in range(len(layers.conv2_weight))]
    made = affines(norms, torch.float32)
    return made[: layers.num_layers], made[layers.num_layers :]


def packed_weights(layers: DenseLayers, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The 1x1 weights [B, C_l] and the 3x3 weights [k, 3, 3, B or C_l], dense and of ``dtype``."""
    first = [weight.flatten(1) for weight in layers.conv1_weight] if layers.has_bottleneck else []
    growth = [weight.permute(0, 2, 3, 1) for weight in layers.growth_weight]
    return _packed(first, dtype), _packed(growth, dtype)


def _packed(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Dense and of ``dtype``: as they are, or copied in one launch."""
    if all(weight.dtype == dtype and weight.is_contiguous() for weight in weights):
        return weights
    copies = [torch.empty(weight.shape, dtype=dtype, device=weight.device) for weight in weights]
    torch._foreach_copy_(copies, weights)
    return copies


def kept(masks: list[Tensor], layer: int) -> Tensor | None:
    return rows(masks[layer]).contiguous() if masks else None
