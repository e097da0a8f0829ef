"""Backward of a whole dense block: layers last to first, one pass over the prefix a layer, corrections deferred.

G is the gradient buffer, of X's layout and dtype, raw: each norm1 adds ``scale1 * da`` to it, the first one from what
arrives, and its correction to the vectors P and Q. Layer l begins when all its readers are done::

    dy = G + P + Q * (x - mean)                     of its k channels, [M, k]
    da2, s1, s2 = conv3x3 dgrad, ReLU of norm2      dW2 = conv3x3 wgrad
    G[:, :C_l] += scale1 * da1, s1, s2, dW1         one pass over X[:, :C_l], dh formed in its prologue
    P, Q += norm1's

Every sum is made in two stages, in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import portable
from ..contract import (
    ChannelStats,
    DenseBlockGrads,
    DenseBlockNeeds,
    DenseBlockOutput,
    DenseLayers,
    empty_channels_last,
)
from ..group import join
from ..portable.batch_norm import channels_of, rows
from .conv1x1 import bn_relu_conv1x1_bwd, bn_relu_conv1x1_fwd
from .conv3x3 import bn_relu_conv3x3_wgrad, conv3x3_dgrad
from .dense_block import block_norms, kept, packed_weights
from .gradients import norm_sums, true_gradient
from .launch import on_device
from .statistics import Partials, Vectors


@on_device
def dense_block_backward(
    grad_out: Tensor,
    output: DenseBlockOutput,
    layers: DenseLayers,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    needs: DenseBlockNeeds,
) -> DenseBlockGrads:
    """Gradients from that of X, for an input of ``x_dtype``. Bottlenecks that were not kept are made again."""
    if layers.bottleneck_channels > 256:  # more than the fused 1x1 holds at once
        return portable.dense_block_backward(grad_out, output, layers, dtype, x_dtype, needs)
    n, channels, h, w = output.out.shape
    width, count, device = layers.bottleneck_channels, n * h * w, grad_out.device
    shared = rows(output.out)
    g = empty_channels_last((n, channels, h, w), shared.dtype, device)
    raw = rows(g)
    is_like_g = grad_out.dtype == g.dtype and grad_out.movedim(1, -1).is_contiguous()
    arriving = rows(grad_out if is_like_g else g.copy_(grad_out))  # what of G there is so far
    stats = ChannelStats(output.mean, output.var)
    correction = tuple(torch.zeros((2, channels), dtype=torch.float32, device=device))  # P and Q
    corrections2 = tuple(
        zip(*torch.zeros((2, layers.num_layers, width), dtype=torch.float32, device=device), strict=True)
    )
    bottleneck_stats = list(map(ChannelStats, output.bottleneck_mean, output.bottleneck_var))
    norms1, norms2 = block_norms(layers, stats, bottleneck_stats)
    weights1, weights3 = packed_weights(layers, dtype)
    sums = Partials(device)
    group = join(layers.group, count, device)
    grads = _empty(layers, needs, grad_out)

    def room(channels: int) -> Tensor:
        """For what a layer makes for itself, and the next writes over."""
        return torch.empty((count, channels), dtype=dtype, device=device)

    dy, da, hidden = room(layers.growth_rate), room(width), room(0 if output.bottleneck else width)
    for layer in reversed(range(needs.first_layer(), layers.num_layers)):
        reads, writes = layers.reads(layer), layers.writes(layer)
        source, so_far, target = (channels_of(tensor, reads) for tensor in (shared, arriving, raw))
        norm1, own1 = norms1[layer], tuple(vector[reads] for vector in correction)
        mean, p, q = (vector[writes] for vector in (stats.mean, *correction))
        if group is not None and any(layers.norm1_batch_stats):
            group.add_up(p, q)
        true_gradient(
            channels_of(arriving, writes), channels_of(shared, writes), mean, (p, q), dy,
            keep=kept(layers.growth_mask, layer), keep_scale=layers.keep_scale,
        )  # fmt: skip
        if layers.has_bottleneck:
            norm2, keep = norms2[layer], kept(layers.bottleneck_mask, layer)
            if output.bottleneck:
                hidden = output.bottleneck[layer]
            else:
                vectors = Vectors(norm1.scale, norm1.shift)
                bn_relu_conv1x1_fwd(source, vectors, weights1[layer], hidden, keep=keep, keep_scale=layers.keep_scale)
            conv3x3_dgrad(dy, weights3[layer], hidden, norm2, da, (h, w), sums)
            dw = bn_relu_conv3x3_wgrad(dy, hidden, norm2, (h, w)) if needs.conv2[layer] else None
            own = corrections2[layer]
            norm_sums(
                sums, count, norm2.scale, norm2.rstd, grads.norm2_weight[layer], grads.norm2_bias[layer],
                own, batch=layers.norm2_batch_stats[layer], add=False,
                conv=None if dw is None else (dw, grads.conv2_weight[layer]),
            )  # fmt: skip
            if group is not None and layers.norm2_batch_stats[layer]:
                group.add_up(*own)
            dw = bn_relu_conv1x1_bwd(
                source, norm1, weights1[layer], hidden, da, norm2, own, so_far, target, sums,
                need_weight=needs.conv1[layer], keep=keep, keep_scale=layers.keep_scale,
            )  # fmt: skip
        else:
            conv3x3_dgrad(dy, weights3[layer], source, norm1, target, (h, w), sums, arriving=so_far)
            dw = bn_relu_conv3x3_wgrad(dy, source, norm1, (h, w)) if needs.conv1[layer] else None
        norm_sums(
            sums, count, norm1.scale, norm1.rstd, grads.norm1_weight[layer], grads.norm1_bias[layer],
            own1, batch=layers.norm1_batch_stats[layer], add=True,
            conv=None if dw is None else (dw, grads.conv1_weight[layer]),
        )  # fmt: skip
        arriving = raw

    if needs.x:
        reads = layers.reads(0)
        dx = empty_channels_last((n, layers.input_channels, h, w), x_dtype, device)
        p, q = (vector[reads] for vector in correction)
        if group is not None and any(layers.norm1_batch_stats):
            group.add_up(p, q)
        true_gradient(channels_of(raw, reads), channels_of(shared, reads), stats.mean[reads], (p, q), rows(dx))
        grads = grads._replace(x=dx)
    return grads


def _empty(layers: DenseLayers, needs: DenseBlockNeeds, like: Tensor) -> DenseBlockGrads:
    """Room for the gradients of norms that will be reached and of weights that are wanted; the others are empty."""
    first = needs.first_layer()
    reached = [layer >= first for layer in range(layers.num_layers)]

    def room(parameters: list[Tensor], filled: list[bool]) -> list[Tensor]:
        return [torch.empty_like(p) if fills else p.new_empty(0) for p, fills in zip(parameters, filled, strict=False)]

    return DenseBlockGrads(
        like.new_empty(0),
        room(layers.norm1_weight, reached),
        room(layers.norm1_bias, reached),
        room(layers.conv1_weight, needs.conv1),
        room(layers.norm2_weight, reached),
        room(layers.norm2_bias, reached),
        room(layers.conv2_weight, needs.conv2),
    )
