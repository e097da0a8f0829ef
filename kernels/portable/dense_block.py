"""A whole dense block over one shared buffer: nothing concatenated, nothing normalised stored, no statistic twice.

Layer l of the block, on rows of X (see :mod:`fastdense.kernels.contract` for the letters)::

    z = relu(gamma1 * xhat + beta1)      of X[:, :C_l]
    h = z @ W1                           [M, B]
    u = relu(gamma2 * hhat + beta2)
    y = conv3x3(u, W2)                   [M, k]  ->  X[:, C_l : C_l+k]

Batch statistics belong to channels: each is computed once, when the channel is written, and every later
norm1 reads it. In backward the gradient of X is gathered raw, layers last to first,

    G[:, :C_l] += scale1 * da        P[:C_l] -= scale1 * s1 / M        Q[:C_l] -= scale1 * rstd1 * s2 / M

and the true gradient ``G + P + Q * (x - mean)`` is formed only for channels about to be consumed: the k
channels of layer l when its own backward begins, the block's input at the end.

The work is cut into chunks of whole images so that what a pass makes is still in cache in the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from ..contract import (
    ChannelStats,
    DenseBlockGrads,
    DenseBlockNeeds,
    DenseBlockOutput,
    DenseLayers,
    accumulator_dtype,
    empty_channels_last,
    in_channels_last,
)
from ..group import Group, join
from .batch_norm import (
    Affine,
    Correction,
    add_up,
    affine,
    affine_relu,
    affines,
    cast,
    channel_stats,
    gemm_dtype,
    images,
    input_gradient,
    laid_out_as,
    mask_by_relu,
    merge_stats,
    norm_backward,
    norm_sums,
    norms_at_once,
    prefix,
    row_stats,
    rows,
    zero_stats,
)
from .chunks import OF_A_BLOCK, Chunk, Scratch, chunks
from .conv import conv, conv_backward


class _Block:
    """The layers of one call, each split in its halves."""

    def __init__(self, layers: DenseLayers, dtype: torch.dtype):
        device = layers.conv1_weight[0].device
        self.dtype, self.acc, self.compute = dtype, accumulator_dtype(dtype), gemm_dtype(dtype, device)
        self.scratch, self.keep_scale = Scratch(self.acc, device), layers.keep_scale
        self._conv1, self._conv1_mask = layers.conv1_weight, layers.bottleneck_mask
        self._growth, self._growth_mask = layers.growth_weight, layers.growth_mask

    def bottleneck(self, layer: int, norm1: Affine) -> _NormReluConv:
        """norm1-ReLU-conv1x1: prefix of X -> h."""
        return _NormReluConv(self, norm1, self._conv1[layer], self._conv1_mask[layer] if self._conv1_mask else None)

    def growth(self, layer: int, norm: Affine) -> _NormReluConv:
        """norm-ReLU-conv3x3: h (or the prefix, without bottlenecks) -> the new channels."""
        return _NormReluConv(self, norm, self._growth[layer], self._growth_mask[layer] if self._growth_mask else None)

    def input_gradients(
        self, da: Tensor, norm: Affine, source: Tensor, through: Correction | None, parts: Sequence[Chunk]
    ) -> Iterator[Tensor]:
        """Those of a norm, chunk by chunk [m, C], each good until the next."""
        for chunk in parts:
            out = self.scratch("dx", chunk.pixels, da.shape[1])
            yield input_gradient(chunk.of(da), norm.scale, chunk.of(source), through, out)


class _NormReluConv:
    """Half a layer, ``conv(relu(norm(source)))`` with 1x1 or padded 3x3, over the rows of a source [M, C]."""

    def __init__(self, block: _Block, vectors: Affine, weight: Tensor, mask: Tensor | None):
        self.block, self.vectors, self.mask = block, vectors, mask
        self.weight = cast(weight, block.compute)
        self.dweight: Tensor

    def forward(
        self, source: Tensor, parts: Sequence[Chunk], want_stats: bool, out: Tensor | None = None
    ) -> tuple[Tensor, ChannelStats | None]:
        """The output [M, K], in ``out`` if given, and its statistics, if wanted."""
        stats = []
        if out is None and len(parts) > 1:
            out = source.new_empty((source.shape[0], self.weight.shape[0]), dtype=self.block.dtype)
        for chunk in parts:
            z = self._prologue(chunk.of(source), chunk)
            y = cast(conv(cast(z, self.block.compute), self.weight, chunk.shape), self.block.dtype)
            if self.mask is not None:
                self._drop(y, self.mask[chunk.images])
            if out is None:
                out = y
            else:
                chunk.of(out).copy_(y)
            if want_stats:
                stats.append(row_stats(y, chunk))
        assert out is not None
        return out, merge_stats(stats, parts) if want_stats else None

    def backward(
        self,
        dys: Iterable[Tensor],
        source: Tensor,
        parts: Sequence[Chunk],
        need_weight: bool,
        out: Tensor | None = None,
    ) -> Iterator[tuple[Chunk, Tensor, Tensor]]:
        """Yield each chunk with its x and da [m, C], from its gradient dy [m, K], which it overwrites.

        da is gathered in ``out`` [M, C] if given; when all are consumed, ``dweight`` is the weight's gradient.
        """
        acc, compute, scratch = self.block.acc, self.block.compute, self.block.scratch
        for chunk, dy in zip(parts, dys, strict=True):
            x = chunk.of(source)
            if x.dtype != acc or not x.is_contiguous():
                x = scratch("x", chunk.pixels, x.shape[1]).copy_(x)
            z = self._prologue(x, chunk)
            if self.mask is not None:
                self._drop(dy, self.mask[chunk.images])
            dz, dweight = conv_backward(
                cast(dy, compute), cast(z, compute), self.weight, chunk.shape, need_weight, scratch
            )
            if dweight is not None:
                dweight = cast(dweight, acc)
                self.dweight = dweight if chunk is parts[0] else self.dweight.add_(dweight)
            dz = cast(dz, acc)
            yield chunk, x, mask_by_relu(dz, z, out=dz if out is None else chunk.of(out))

    def _prologue(self, x: Tensor, chunk: Chunk) -> Tensor:
        """z [m, C] in the accumulator dtype, good until the next."""
        return affine_relu(x, self.vectors, self.block.scratch("z", chunk.pixels, x.shape[1]))

    def _drop(self, y: Tensor, mask: Tensor) -> None:
        y.mul_(rows(mask)).mul_(self.block.keep_scale)


def dense_block(x: Tensor, layers: DenseLayers, dtype: torch.dtype, save_bottleneck: bool) -> DenseBlockOutput:
    """Forward with whichever statistics the norms ask for; convolutions compute in ``dtype``."""
    n, c0, *spatial = x.shape
    block = _Block(layers, dtype)
    store = torch.promote_types(x.dtype, dtype)
    out = empty_channels_last((n, layers.output_channels, *spatial), store, x.device)
    shared = rows(out)  # X
    stats = zero_stats((layers.output_channels,), store, x.device)
    bottleneck_stats: list[ChannelStats] = []
    share_stats = any(layers.norm1_batch_stats)
    bottleneck: list[Tensor] = []
    group = join(layers.group, len(shared), x.device)

    has_bottleneck, growth_rate, device = layers.has_bottleneck, layers.growth_rate, x.device
    widths = [c0] + [growth_rate] * layers.num_layers
    written = list(zip(*(tensor.split(widths, -1) for tensor in (shared, *stats)), strict=True))  # by x, layer 0, ...
    first, *first_stats = written[0]
    first.copy_(rows(x))
    if share_stats:
        _store(channel_stats(x), first_stats, group)
    channels = c0
    for layer, (new, *new_stats) in enumerate(written[1:]):
        parts = chunks((n, channels, *spatial), device)
        source, norm = prefix(shared, channels), layers.norm1(layer, stats)
        if has_bottleneck:
            use_batch = layers.norm2_batch_stats[layer]
            hidden, hidden_stats = block.bottleneck(layer, affine(norm, block.acc)).forward(source, parts, use_batch)
            if save_bottleneck:
                bottleneck.append(hidden)
            if hidden_stats is None:
                hidden_stats = zero_stats((layers.bottleneck_channels,), store, device)
            elif group is not None:
                group.merge(hidden_stats)
            bottleneck_stats.append(hidden_stats)
            source, norm = hidden, layers.norm2(layer, hidden_stats)
        _, found = block.growth(layer, affine(norm, block.acc)).forward(source, parts, share_stats, out=new)
        if found is not None:
            _store(found, new_stats, group)
        channels += growth_rate

    if not bottleneck_stats:
        return DenseBlockOutput(out, bottleneck, *stats, *zero_stats((layers.num_layers, 0), store, x.device))
    return DenseBlockOutput(out, bottleneck, *stats, *map(torch.stack, zip(*bottleneck_stats, strict=True)))


def dense_block_inference(x: Tensor, layers: DenseLayers, dtype: torch.dtype) -> Tensor:
    """Forward with running statistics, norm2 folded into conv1: X alone, [N, C_L, H, W]."""
    n, c0, *spatial = x.shape
    store = torch.promote_types(x.dtype, dtype)
    acc, compute = accumulator_dtype(store), gemm_dtype(dtype, x.device)
    unread = zero_stats((0,), store, x.device)
    norm1 = affines([layers.norm1(layer, unread) for layer in range(layers.num_layers)], acc)
    conv1 = []
    if layers.has_bottleneck:
        for layer, weight in enumerate(layers.conv1_weight):
            norm2 = affine(layers.norm2(layer, unread), acc)
            folded = cast(weight, acc) * norm2.scale.view(-1, *[1] * (x.dim() - 1))
            conv1.append((cast(folded, compute), cast(norm2.shift, compute)))
    growth = [cast(weight, compute) for weight in layers.growth_weight]

    out = empty_channels_last((n, layers.output_channels, *spatial), store, x.device)
    shared = rows(out)
    shared[:, :c0] = rows(x)
    scratch = Scratch(acc, x.device)
    for chunk in chunks((n, layers.output_channels, *spatial), x.device, OF_A_BLOCK):  # through every layer in cache
        part = chunk.of(shared)
        for layer, weight in enumerate(growth):
            channels = c0 + layer * layers.growth_rate
            z = affine_relu(part[:, :channels], norm1[layer], scratch("z", chunk.pixels, channels))
            z = cast(z, compute)
            if layers.has_bottleneck:
                folded, bias = conv1[layer]
                z = conv(z, folded, chunk.shape, bias).relu_()
            part[:, channels : channels + layers.growth_rate] = cast(conv(z, weight, chunk.shape), dtype)
    return out


def dense_block_backward(
    grad_out: Tensor,
    output: DenseBlockOutput,
    layers: DenseLayers,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    needs: DenseBlockNeeds,
) -> DenseBlockGrads:
    """Gradients from that of X, for an input of ``x_dtype``. Bottlenecks that were not kept are made again."""
    n, channels, *spatial = output.out.shape
    block = _Block(layers, dtype)
    shared = rows(output.out)
    acc = accumulator_dtype(shared.dtype)
    count, device = shared.shape[0], shared.device
    stats = ChannelStats(output.mean, output.var)
    bottleneck_stats = ChannelStats(output.bottleneck_mean, output.bottleneck_var)
    use_batch = any(layers.norm1_batch_stats)
    group = join(layers.group, count, device)
    through = Correction.none(stats.mean)  # P and Q
    has_bottleneck, growth_rate, width = layers.has_bottleneck, layers.growth_rate, layers.bottleneck_channels
    widths = [layers.input_channels] + [growth_rate] * layers.num_layers
    written = list(zip(*(tensor.split(widths, -1) for tensor in (shared, *through)), strict=True))  # by x, layer 0, ...
    given = in_channels_last(cast(grad_out, acc))
    raw = rows(given)  # G: as it came, for the last layer, which leaves it in memory of our own
    before = channels - growth_rate  # of the last layer
    grad = torch.empty((count, before), dtype=acc, device=device) if given is grad_out else raw
    shares = [*prefix(grad, before).split(widths[:-1], -1), raw.narrow(-1, before, growth_rate)]
    one = torch.ones((), dtype=acc, device=device)
    first_layer = needs.first_layer()
    norms1 = affines([layers.norm1(layer, stats) for layer in range(layers.num_layers)], acc)
    norms2 = affines([layers.norm2(i, _at(bottleneck_stats, i)) for i in range(len(layers.norm2_weight))], acc)
    parameters = (
        layers.norm1_weight, layers.norm1_bias, layers.conv1_weight,
        layers.norm2_weight, layers.norm2_bias, layers.conv2_weight,
    )  # fmt: skip
    gradients: list[list[Tensor | None]] = [[None] * len(tensors) for tensors in parameters]
    dnorm1_weight, dnorm1_bias, dconv1_weight, dnorm2_weight, dnorm2_bias, dconv2_weight = gradients

    def true_gradient(writer: int) -> Tensor:
        """G + P + Q * (x - mean) of the channels of one writer, [M, k]."""
        x, mean, p, q = written[writer]
        if group and use_batch:
            group.add_up(p, q)
        return input_gradient(shares[writer], one, x, Correction(mean, p, q) if use_batch else None)

    for layer in reversed(range(first_layer, layers.num_layers)):
        channels -= growth_rate
        parts = chunks((n, channels, *spatial), device)
        source, norm1 = prefix(shared, channels), norms1[layer]
        dy = true_gradient(layer + 1)
        if has_bottleneck:
            first = block.bottleneck(layer, norm1)
            hidden = output.bottleneck[layer] if output.bottleneck else first.forward(source, parts, False)[0]
            norm2, uses_batch = norms2[layer], layers.norm2_batch_stats[layer]
            second, narrow = block.growth(layer, norm2), chunks((n, width, *spatial), device)
            at_once, sums = uses_batch and norms_at_once(hidden, acc, narrow, group), []
            da = torch.empty(hidden.shape, dtype=acc, device=device) if len(narrow) > 1 else None
            dys: Iterable[Tensor] = map(Chunk.of, narrow, repeat(dy))
            for chunk, x, part in second.backward(dys, hidden, narrow, needs.conv2[layer], da):
                if not at_once:
                    sums.append(norm_sums(part, x, norm2, chunk))
            da = part if da is None else da
            if at_once:
                dhidden, s1, s2 = norm_backward(da, hidden, norm2)
                dys = map(Chunk.of, parts, repeat(dhidden))
            else:
                s1, s2 = add_up(sums)
                own = Correction.of(norm2, s1, s2, count, group) if uses_batch else None
                dys = block.input_gradients(da, norm2, hidden, own, parts)
            dnorm2_weight[layer] = cast(s2, layers.norm2_weight[layer].dtype)
            dnorm2_bias[layer] = cast(s1, layers.norm2_bias[layer].dtype)
            if needs.conv2[layer]:
                dconv2_weight[layer] = laid_out_as(second.dweight, layers.conv2_weight[layer])
        else:
            first = block.growth(layer, norm1)
            dys = map(Chunk.of, parts, repeat(dy))

        so_far, read, sums = prefix(raw, channels), prefix(grad, channels), []
        for chunk, x, da in first.backward(dys, source, parts, needs.conv1[layer]):
            sums.append(norm_sums(da, x, norm1, chunk))
            torch.addcmul(chunk.of(so_far), da, norm1.scale, out=chunk.of(read))
        raw = grad
        s1, s2 = add_up(sums)
        if layers.norm1_batch_stats[layer]:
            through.add(norm1, s1, s2, count)
        dnorm1_weight[layer] = cast(s2, layers.norm1_weight[layer].dtype)
        dnorm1_bias[layer] = cast(s1, layers.norm1_bias[layer].dtype)
        if needs.conv1[layer]:
            dconv1_weight[layer] = laid_out_as(first.dweight, layers.conv1_weight[layer])

    dx = shared.new_empty(0)
    if needs.x:
        dx = images(cast(true_gradient(0), x_dtype), (n, *spatial))
    return DenseBlockGrads(
        dx,
        *(
            [p.new_empty(0) if gradient is None else gradient for gradient, p in zip(*pair, strict=True)]
            for pair in zip(gradients, parameters, strict=True)
        ),
    )


def _store(stats: ChannelStats, where: list[Tensor], group: Group | None) -> None:
    if group is not None:
        group.merge(stats)
    mean, var = where
    mean.copy_(stats.mean)
    var.copy_(stats.var)


def _at(stats: ChannelStats, layer: int) -> ChannelStats:
    return ChannelStats(stats.mean[layer], stats.var[layer])
