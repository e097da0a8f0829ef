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

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..contract import (
    ChannelStats,
    DenseBlockGrads,
    DenseBlockNeeds,
    DenseBlockOutput,
    DenseLayers,
    Norm,
    accumulator_dtype,
    empty_channels_last,
)
from .batch_norm import (
    Correction,
    affine,
    affine_relu,
    cast,
    channel_stats,
    correction,
    gemm_dtype,
    image_stats,
    images,
    input_gradient,
    laid_out_as,
    mask_by_relu,
    merge_stats,
    norm_sums,
    rows,
    zero_stats,
)
from .chunks import Chunk, Scratch, chunks


class _NormReluConv:
    """Half a layer, ``conv(relu(norm(source)))`` with 1x1 or padded 3x3, over the rows of a source [M, C]."""

    def __init__(
        self, norm: Norm, weight: Tensor, mask: Tensor | None, drop_rate: float, dtype: torch.dtype, scratch: Scratch
    ):
        self.acc, self.scratch = accumulator_dtype(dtype), scratch
        self.vectors = affine(norm, self.acc)
        self.batch_stats = norm.batch_stats
        self.dtype, self.compute = dtype, gemm_dtype(dtype, weight.device)
        self.weight = cast(weight, self.compute)
        self.padding = weight.shape[-1] // 2
        self.mask = mask
        self.keep_scale = 0.0 if drop_rate == 1 else 1 / (1 - drop_rate)

    def forward(
        self, source: Tensor, parts: list[Chunk], want_stats: bool, out: Tensor | None = None
    ) -> tuple[Tensor, ChannelStats | None]:
        """The output [M, K], in ``out`` if given, and its statistics, if wanted."""
        stats = []
        if out is None and len(parts) > 1:
            out = source.new_empty((len(source), len(self.weight)), dtype=self.dtype)
        for chunk in parts:
            z = cast(self._prologue(source[chunk.rows]), self.compute)
            y = cast(torch.conv2d(images(z, *chunk.shape), self.weight, padding=self.padding), self.dtype)
            self._drop(y, chunk)
            if out is None:
                out = rows(y)
            else:
                out[chunk.rows] = rows(y)
            if want_stats:
                stats.append(image_stats(y))
        assert out is not None
        return out, merge_stats(stats, parts) if want_stats else None

    def backward(
        self, dys: Iterable[Tensor], source: Tensor, parts: list[Chunk], need_weight: bool
    ) -> Iterator[Tensor]:
        """Yield each chunk's ``da`` [rows, C] from its gradient ``dy`` [rows, K] of the output.

        When all are consumed, ``dweight`` is the weight's gradient, ``s1`` and ``s2`` are the norm's sums.
        """
        total: tuple[Tensor, ...] | None = None
        for chunk, dy in zip(parts, dys, strict=True):
            x = source[chunk.rows]
            if x.dtype != self.acc or not x.is_contiguous():
                x = self.scratch("x", *x.shape).copy_(x)
            z = self._prologue(x)
            dy = images(dy, *chunk.shape)
            self._drop(dy, chunk)
            dz, dweight = self._conv_backward(cast(dy, self.compute), cast(z, self.compute), chunk, need_weight)
            dz = cast(dz, self.acc)
            da = mask_by_relu(dz, z, out=dz)
            sums = (cast(dweight, self.acc), *norm_sums(da, x, self.vectors, chunk.shape))
            total = sums if total is None else tuple(map(torch.add, total, sums))
            self.dweight, self.s1, self.s2 = total
            yield da

    def correction(self, count: int) -> Correction | None:
        """After :meth:`backward`: what flows to the source through the norm's batch statistics."""
        return correction(self.s1, self.s2, self.vectors, count) if self.batch_stats else None

    def _prologue(self, x: Tensor) -> Tensor:
        """z [rows, C] in the accumulator dtype."""
        return affine_relu(x, self.vectors, self.scratch("z", *x.shape))

    def _conv_backward(self, dy: Tensor, z: Tensor, chunk: Chunk, need_weight: bool) -> tuple[Tensor, Tensor]:
        """dz [rows, C] and the weight's gradient, from dy [n, K, h, w] and z [rows, C]."""
        dz, dweight, _ = torch.ops.aten.convolution_backward(
            dy, images(z, *chunk.shape), self.weight, None,
            [1, 1], [self.padding] * 2, [1, 1], False, [0, 0], 1, [True, need_weight, False],
        )  # fmt: skip
        return rows(dz), dweight if need_weight else self.weight.new_empty(0)

    def _drop(self, y: Tensor, chunk: Chunk) -> None:
        if self.mask is not None:
            y.mul_(self.mask[chunk.images]).mul_(self.keep_scale)


class _Block:
    """The layers of one call, each split in its halves."""

    def __init__(self, layers: DenseLayers, dtype: torch.dtype):
        self.layers, self.dtype = layers, dtype
        self.scratch = Scratch(accumulator_dtype(dtype), layers.conv1_weight[0].device)

    def bottleneck(self, layer: int, norm1: Norm) -> _NormReluConv:
        """norm1-ReLU-conv1x1: prefix of X -> h."""
        mask = self.layers.bottleneck_mask[layer] if self.layers.bottleneck_mask else None
        return _NormReluConv(
            norm1, self.layers.conv1_weight[layer], mask, self.layers.drop_rate, self.dtype, self.scratch
        )

    def growth(self, layer: int, norm: Norm) -> _NormReluConv:
        """norm-ReLU-conv3x3: h (or the prefix, without bottlenecks) -> the new channels."""
        mask = self.layers.growth_mask[layer] if self.layers.growth_mask else None
        return _NormReluConv(
            norm, self.layers.growth_weight[layer], mask, self.layers.drop_rate, self.dtype, self.scratch
        )


def dense_block(x: Tensor, layers: DenseLayers, dtype: torch.dtype, save_bottleneck: bool) -> DenseBlockOutput:
    """Forward with whichever statistics the norms ask for; convolutions compute in ``dtype``."""
    n, c0, h, w = x.shape
    block = _Block(layers, dtype)
    store = torch.promote_types(x.dtype, dtype)
    out = empty_channels_last((n, layers.output_channels, h, w), store, x.device)
    shared = rows(out)  # X
    stats = zero_stats((layers.output_channels,), store, x.device)
    bottleneck_stats = zero_stats((layers.num_layers, layers.bottleneck_channels), store, x.device)
    share_stats = any(layers.norm1_batch_stats)
    bottleneck: list[Tensor] = []

    shared[:, :c0] = rows(x)
    if share_stats:
        _store(stats, slice(0, c0), channel_stats(x))
    for layer in range(layers.num_layers):
        channels = c0 + layer * layers.growth_rate
        parts = chunks((n, channels, h, w), x.device)
        source, norm = shared[:, :channels], layers.norm1(layer, stats)
        if layers.has_bottleneck:
            use_batch = layers.norm2_batch_stats[layer]
            hidden, hidden_stats = block.bottleneck(layer, norm).forward(source, parts, use_batch)
            if save_bottleneck:
                bottleneck.append(hidden)
            _store(bottleneck_stats, layer, hidden_stats)
            source, norm = hidden, layers.norm2(layer, _at(bottleneck_stats, layer))
        new = slice(channels, channels + layers.growth_rate)
        _, new_stats = block.growth(layer, norm).forward(source, parts, share_stats, out=shared[:, new])
        _store(stats, new, new_stats)

    return DenseBlockOutput(out, bottleneck, *stats, *bottleneck_stats)


def dense_block_inference(x: Tensor, layers: DenseLayers, dtype: torch.dtype) -> Tensor:
    """Forward with running statistics, norm2 folded into conv1: X alone, [N, C_L, H, W]."""
    n, c0, h, w = x.shape
    store = torch.promote_types(x.dtype, dtype)
    acc, compute = accumulator_dtype(store), gemm_dtype(dtype, x.device)
    unread = zero_stats((0,), store, x.device)
    norm1 = [affine(layers.norm1(layer, unread), acc) for layer in range(layers.num_layers)]
    conv1 = []
    if layers.has_bottleneck:
        for layer, weight in enumerate(layers.conv1_weight):
            norm2 = affine(layers.norm2(layer, unread), acc)
            folded = cast(weight, acc) * norm2.scale[:, None, None, None]
            conv1.append((cast(folded, compute), cast(norm2.shift, compute)))
    growth = [cast(weight, compute) for weight in layers.growth_weight]

    out = empty_channels_last((n, layers.output_channels, h, w), store, x.device)
    shared = rows(out)
    shared[:, :c0] = rows(x)
    for chunk in chunks((n, layers.output_channels, h, w), x.device):  # through every layer while in cache
        part = shared[chunk.rows]
        for layer, weight in enumerate(growth):
            channels = c0 + layer * layers.growth_rate
            z = images(cast(affine_relu(part[:, :channels], norm1[layer]), compute), *chunk.shape)
            if layers.has_bottleneck:
                z = torch.conv2d(z, *conv1[layer]).relu_()
            y = cast(torch.conv2d(z, weight, padding=1), dtype)
            part[:, channels : channels + layers.growth_rate] = rows(y)
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
    n, channels, h, w = output.out.shape
    block = _Block(layers, dtype)
    shared = rows(output.out)
    acc = accumulator_dtype(shared.dtype)
    count, device = len(shared), shared.device
    stats = ChannelStats(output.mean, output.var)
    bottleneck_stats = ChannelStats(output.bottleneck_mean, output.bottleneck_var)
    grad = torch.empty((n, h, w, channels), dtype=acc, device=device).copy_(grad_out.permute(0, 2, 3, 1))
    grad = grad.view(count, channels)  # G, raw
    through = Correction(stats.mean, torch.zeros_like(stats.mean), torch.zeros_like(stats.mean))  # P and Q
    one = torch.ones((), dtype=acc, device=device)
    grads = _empty_grads(layers, shared)

    def true_gradients(channels: slice, parts: list[Chunk]) -> Iterator[Tensor]:
        """G + P + Q * (x - mean) of some channels, chunk by chunk."""
        part = Correction(*(vector[channels] for vector in through)) if any(layers.norm1_batch_stats) else None
        for chunk in parts:
            yield input_gradient(grad[chunk.rows, channels], one, shared[chunk.rows, channels], part)

    for layer in reversed(range(needs.first_layer(), layers.num_layers)):
        channels -= layers.growth_rate
        parts = chunks((n, channels, h, w), device)
        source, norm1 = shared[:, :channels], layers.norm1(layer, stats)
        dys = true_gradients(slice(channels, channels + layers.growth_rate), parts)
        if layers.has_bottleneck:
            first = block.bottleneck(layer, norm1)
            if output.bottleneck:
                hidden = output.bottleneck[layer]
            else:
                hidden, _ = first.forward(source, parts, want_stats=False)
            second = block.growth(layer, layers.norm2(layer, _at(bottleneck_stats, layer)))
            das = list(second.backward(dys, hidden, parts, needs.conv2[layer]))
            second_through = second.correction(count)
            dys = (
                input_gradient(
                    da, second.vectors.scale, hidden[chunk.rows], second_through, block.scratch("dh", *da.shape)
                )
                for chunk, da in zip(parts, das, strict=True)
            )
            grads.norm2_weight[layer] = cast(second.s2, layers.norm2_weight[layer].dtype)
            grads.norm2_bias[layer] = cast(second.s1, layers.norm2_bias[layer].dtype)
            if needs.conv2[layer]:
                grads.conv2_weight[layer] = laid_out_as(second.dweight, layers.conv2_weight[layer])
        else:
            first = block.growth(layer, norm1)

        for chunk, da in zip(parts, first.backward(dys, source, parts, needs.conv1[layer]), strict=True):
            grad[chunk.rows, :channels].addcmul_(da, first.vectors.scale)
        first_through = first.correction(count)
        if first_through is not None:
            through.p[:channels].add_(first_through.p)
            through.q[:channels].add_(first_through.q)
        grads.norm1_weight[layer] = cast(first.s2, layers.norm1_weight[layer].dtype)
        grads.norm1_bias[layer] = cast(first.s1, layers.norm1_bias[layer].dtype)
        if needs.conv1[layer]:
            grads.conv1_weight[layer] = laid_out_as(first.dweight, layers.conv1_weight[layer])

    if not needs.x:
        return grads
    channels = layers.input_channels
    parts = chunks((n, channels, h, w), device)
    dx = torch.empty((count, channels), dtype=x_dtype, device=device)
    for chunk, part in zip(parts, true_gradients(slice(0, channels), parts), strict=True):
        dx[chunk.rows] = part
    return grads._replace(x=images(dx, n, h, w))


def _store(stats: ChannelStats, where: slice | int, values: ChannelStats | None) -> None:
    if values is not None:
        stats.mean[where], stats.var[where] = values


def _at(stats: ChannelStats, layer: int) -> ChannelStats:
    return ChannelStats(stats.mean[layer], stats.var[layer])


def _empty_grads(layers: DenseLayers, like: Tensor) -> DenseBlockGrads:
    """Nothing yet: an empty tensor in every place."""
    none = [[like.new_empty(0, dtype=p.dtype) for p in params] for params in (
        layers.norm1_weight, layers.norm1_bias, layers.conv1_weight,
        layers.norm2_weight, layers.norm2_bias, layers.conv2_weight,
    )]  # fmt: skip
    return DenseBlockGrads(like.new_empty(0), *none)
