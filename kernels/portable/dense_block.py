"""A whole dense block over one shared buffer: nothing concatenated, nothing normalised stored, no statistic twice.

Layer l of the block, on rows of X (see :mod:`fastdense.kernels.contract` for the letters)::

    z = relu(gamma1 * xhat + beta1)      of X[:, :C_l]
    h = z @ W1                           [M, B]
    u = relu(gamma2 * hhat + beta2)
    y = conv3x3(u, W2)                   [M, k]  ->  X[:, C_l : C_l+k]

Batch statistics belong to channels: each is computed once, when the channel is written, and every later
norm1 reads it. In backward the gradient of X is gathered raw, layers last to first,

    G[:, c] += rstd * gamma1 * da        P_c += rstd * gamma1 * s1 / M        Q_c += rstd^2 * gamma1 * s2 / M

and the true gradient ``G - P - Q * (x - mean)`` is formed only for channels about to be consumed: the k
channels of layer l when its own backward begins, the block's input at the end.

The work is cut into chunks of whole images so that what a pass makes is still in cache in the next.
"""

from __future__ import annotations

from typing import NamedTuple

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
)
from .batch_norm import (
    affine,
    affine_relu,
    channels_last,
    corrected,
    gemm_dtype,
    images,
    merge_stats,
    norm_gradients,
    norm_sums,
    row_stats,
    rows,
    zero_stats,
)

_CHUNK_BYTES = 4 << 20  # of a chunk's widest float32 temporary, on CPUs


class _Chunk(NamedTuple):
    """Whole images of the batch: their rows, and their shape."""

    rows: slice
    n: int
    h: int
    w: int


def _chunks(n: int, h: int, w: int, channels: int, device: torch.device) -> list[_Chunk]:
    per_chunk = max(1, _CHUNK_BYTES // (4 * h * w * channels)) if device.type == "cpu" else n
    sizes = [min(per_chunk, n - start) for start in range(0, n, per_chunk)]
    return [_Chunk(slice(i * per_chunk * h * w, (i * per_chunk + size) * h * w), size, h, w) for i, size in enumerate(sizes)]


class _NormReluConv:
    """Half a layer, ``conv(relu(norm(source)))`` with 1x1 or padded 3x3, over the rows of a source [M, C]."""

    def __init__(self, norm: Norm, weight: Tensor, mask: Tensor | None, drop_rate: float, dtype: torch.dtype):
        self.norm = norm
        self.acc = accumulator_dtype(dtype)
        self.scale, self.shift = affine(norm, self.acc)
        self.dtype, self.compute = dtype, gemm_dtype(dtype, weight.device)
        self.weight = weight.to(self.compute)
        self.pointwise = weight.shape[-1] == 1
        self.mask = None if mask is None else rows(channels_last(mask))
        self.keep_scale = 0.0 if drop_rate == 1 else 1 / (1 - drop_rate)

    def forward(self, source: Tensor, out: Tensor, chunks: list[_Chunk], want_stats: bool) -> ChannelStats | None:
        """Fill ``out`` [M, K] chunk by chunk; the statistics of what was stored, if wanted."""
        parts = []
        for chunk in chunks:
            z = affine_relu(source[chunk.rows], self.scale, self.shift).to(self.compute)
            y = self._conv(z, chunk).to(self.dtype)
            self._drop(y, chunk)
            out[chunk.rows] = y
            if want_stats:
                parts.append(row_stats(y))
        return merge_stats(parts, [chunk.n for chunk in chunks]) if want_stats else None

    def backward(
        self, dy: Tensor, source: Tensor, raw: Tensor, chunks: list[_Chunk], need_weight: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Add ``scale * da`` to ``raw`` [M, C]; return the weight's gradient and the norm's two sums.

        ``dy`` [M, K] is the gradient of the convolution's output after dropout, in the accumulator dtype.
        """
        dweight = torch.zeros_like(self.weight, dtype=self.acc) if need_weight else self.weight.new_empty(0)
        sums = None
        for chunk in chunks:
            x, dy_chunk = source[chunk.rows], dy[chunk.rows]
            self._drop(dy_chunk, chunk)
            z = affine_relu(x, self.scale, self.shift)
            dz, dw = self._conv_backward(dy_chunk.to(self.compute), z.to(self.compute), chunk, need_weight)
            if need_weight:
                dweight += dw
            da = torch.ops.aten.threshold_backward(dz.to(self.acc), z, 0)
            raw[chunk.rows].addcmul_(da, self.scale)
            partial = norm_sums(da, x, self.norm)
            sums = partial if sums is None else (sums[0] + partial[0], sums[1] + partial[1])
        return dweight, sums

    def _conv(self, z: Tensor, chunk: _Chunk) -> Tensor:
        if self.pointwise:
            return z @ self.weight.flatten(1).t()
        return rows(channels_last(torch.conv2d(images(z, *chunk[1:]), self.weight, padding=1)))

    def _conv_backward(
        self, dy: Tensor, z: Tensor, chunk: _Chunk, need_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self.pointwise:
            dweight = (dy.t() @ z).view_as(self.weight) if need_weight else None
            return dy @ self.weight.flatten(1), dweight
        dy, z = images(dy, *chunk[1:]), images(z, *chunk[1:])
        stride, padding, dilation = [1, 1], [1, 1], [1, 1]
        dz, dweight, _ = torch.ops.aten.convolution_backward(
            dy, z, self.weight, None, stride, padding, dilation, False, [0, 0], 1, [True, need_weight, False]
        )
        return rows(channels_last(dz)), dweight

    def _drop(self, y: Tensor, chunk: _Chunk) -> None:
        if self.mask is not None:
            y.mul_(self.mask[chunk.rows]).mul_(self.keep_scale)


class _Block:
    """The layers of one call, each split in its halves."""

    def __init__(self, layers: DenseLayers, dtype: torch.dtype):
        self.layers, self.dtype = layers, dtype

    def bottleneck(self, layer: int, norm1: Norm) -> _NormReluConv:
        """norm1-ReLU-conv1x1: prefix of X -> h."""
        mask = self.layers.bottleneck_mask[layer] if self.layers.bottleneck_mask else None
        return _NormReluConv(norm1, self.layers.conv1_weight[layer], mask, self.layers.drop_rate, self.dtype)

    def growth(self, layer: int, norm: Norm) -> _NormReluConv:
        """norm-ReLU-conv3x3: h (or the prefix, without bottlenecks) -> the new channels."""
        mask = self.layers.growth_mask[layer] if self.layers.growth_mask else None
        return _NormReluConv(norm, self.layers.growth_weight[layer], mask, self.layers.drop_rate, self.dtype)


def dense_block(x: Tensor, layers: DenseLayers, dtype: torch.dtype, save_bottleneck: bool) -> DenseBlockOutput:
    """Forward with whichever statistics the norms ask for; convolutions compute in ``dtype``."""
    n, c0, h, w = x.shape
    block = _Block(layers, dtype)
    store = torch.promote_types(x.dtype, dtype)
    shared = torch.empty((n * h * w, layers.output_channels), dtype=store, device=x.device)  # X
    stats = zero_stats((layers.output_channels,), store, x.device)
    bottleneck_stats = zero_stats((layers.num_layers, layers.bottleneck_channels), store, x.device)
    share_stats = any(layers.norm1_batch_stats)
    kept = layers.num_layers if save_bottleneck else 1
    bottleneck = torch.empty((kept, len(shared), layers.bottleneck_channels), dtype=dtype, device=x.device)

    x_rows = rows(channels_last(x))
    shared[:, :c0] = x_rows
    if share_stats:
        _store(stats, slice(0, c0), row_stats(x_rows))
    for layer in range(layers.num_layers):
        channels = c0 + layer * layers.growth_rate
        chunks = _chunks(n, h, w, channels, x.device)
        source, norm = shared[:, :channels], layers.norm1(layer, stats)
        if layers.has_bottleneck:
            hidden = bottleneck[layer if save_bottleneck else 0]
            use_batch = layers.norm2_batch_stats[layer]
            hidden_stats = block.bottleneck(layer, norm).forward(source, hidden, chunks, use_batch)
            _store(bottleneck_stats, layer, hidden_stats)
            source, norm = hidden, layers.norm2(layer, _at(bottleneck_stats, layer))
        new = slice(channels, channels + layers.growth_rate)
        new_stats = block.growth(layer, norm).forward(source, shared[:, new], chunks, share_stats)
        _store(stats, new, new_stats)

    if not (save_bottleneck and layers.has_bottleneck):
        bottleneck = bottleneck.new_empty(0)
    return DenseBlockOutput(images(shared, n, h, w), bottleneck, *stats, *bottleneck_stats)


def dense_block_inference(x: Tensor, layers: DenseLayers, dtype: torch.dtype) -> Tensor:
    """Forward with running statistics, norm2 folded into conv1: X alone, [N, C_L, H, W]."""
    n, c0, h, w = x.shape
    store = torch.promote_types(x.dtype, dtype)
    acc, compute = accumulator_dtype(store), gemm_dtype(dtype, x.device)
    unread = zero_stats((0,), store, x.device)
    norm1 = [affine(layers.norm1(layer, unread), acc) for layer in range(layers.num_layers)]
    conv1 = []
    if layers.has_bottleneck:
        for layer in range(layers.num_layers):
            scale, shift = affine(layers.norm2(layer, unread), acc)
            folded = layers.conv1_weight[layer].flatten(1).to(acc) * scale[:, None]
            conv1.append((shift.to(compute), folded.t().to(compute)))
    growth = [weight.to(compute) for weight in layers.growth_weight]

    shared = torch.empty((n * h * w, layers.output_channels), dtype=store, device=x.device)
    x_rows = rows(channels_last(x))
    for chunk in _chunks(n, h, w, layers.output_channels, x.device):  # through every layer while in cache
        shared_chunk = shared[chunk.rows]
        shared_chunk[:, :c0] = x_rows[chunk.rows]
        for layer, weight in enumerate(growth):
            channels = c0 + layer * layers.growth_rate
            z = affine_relu(shared_chunk[:, :channels], *norm1[layer]).to(compute)
            if layers.has_bottleneck:
                z = torch.addmm(conv1[layer][0], z, conv1[layer][1]).relu_()
            y = torch.conv2d(images(z, *chunk[1:]), weight, padding=1).to(dtype)
            shared_chunk[:, channels : channels + layers.growth_rate] = rows(channels_last(y))
    return images(shared, n, h, w)


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
    p, q = torch.zeros_like(stats.mean), torch.zeros_like(stats.mean)
    grads = _empty_grads(layers, shared)

    for layer in reversed(range(needs.first_layer(), layers.num_layers)):
        channels -= layers.growth_rate
        chunks = _chunks(n, h, w, channels, device)
        new = slice(channels, channels + layers.growth_rate)
        source, norm1 = shared[:, :channels], layers.norm1(layer, stats)
        dy = corrected(grad[:, new], shared[:, new], stats.mean[new], p[new], q[new])

        if layers.has_bottleneck:
            if output.bottleneck.numel():
                hidden = output.bottleneck[layer]
            else:
                hidden = torch.empty((count, layers.bottleneck_channels), dtype=dtype, device=device)
                block.bottleneck(layer, norm1).forward(source, hidden, chunks, want_stats=False)
            norm2 = layers.norm2(layer, _at(bottleneck_stats, layer))
            dh = torch.zeros_like(hidden, dtype=acc)
            dconv2, sums = block.growth(layer, norm2).backward(dy, hidden, dh, chunks, needs.conv2[layer])
            grads.conv2_weight[layer] = dconv2.to(layers.conv2_weight[layer].dtype)
            grads.norm2_weight[layer], grads.norm2_bias[layer], p2, q2 = norm_gradients(sums, norm2, count)
            dy = corrected(dh, hidden, norm2.mean, p2, q2)

        first = block.bottleneck(layer, norm1) if layers.has_bottleneck else block.growth(layer, norm1)
        dconv1, sums = first.backward(dy, source, grad[:, :channels], chunks, needs.conv1[layer])
        grads.conv1_weight[layer] = dconv1.to(layers.conv1_weight[layer].dtype)
        grads.norm1_weight[layer], grads.norm1_bias[layer], p1, q1 = norm_gradients(sums, norm1, count)
        p[:channels] += p1
        q[:channels] += q1

    if not needs.x:
        return grads
    c0 = slice(0, layers.input_channels)
    dx = corrected(grad[:, c0], shared[:, c0], stats.mean[c0], p[c0], q[c0]).to(x_dtype)
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
