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

The work is cut into chunks of whole images so that what a pass makes is still in cache in the next. Their views are
made and their kernels prepared before the first one runs: a kernel sweeps the caches, and a line of Python after it
takes several times as long as one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

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
from ..group import join
from .batch_norm import (
    Affine,
    AffineMap,
    Correction,
    LateAffineMap,
    add_up,
    affines,
    cast,
    channel_stats,
    channels_of,
    gemm_dtype,
    images,
    input_gradient,
    is_pytorchs_own,
    laid_out_as,
    mask_by_relu,
    merge_stats,
    norm_backward,
    passed_dtype,
    rows,
    show_inputs,
    tensor_stats,
    zero_stats,
)
from .chunks import OF_A_BLOCK, Scratch, chunks
from .conv import conv, conv_backward


class _Half(NamedTuple):
    """Half a layer: norm, ReLU and convolution of a source."""

    shape: tuple[int, ...]  # of the source: N, C, *spatial
    weight: Tensor  # of the convolution
    mask: Tensor | None  # of its dropout


class _Block:
    """What the layers of one call share."""

    def __init__(self, out: Tensor, layers: DenseLayers, dtype: torch.dtype):
        """``out`` is X."""
        n, channels, *spatial = out.shape
        self.dtype, self.acc, self.compute = dtype, accumulator_dtype(dtype), gemm_dtype(dtype, out.device)
        self.keep_scale = layers.keep_scale
        self.group = join(layers.group, out.numel() // channels, out.device)
        self.passed = passed_dtype(dtype, out.dim(), self.group) if dtype == out.dtype == self.compute else self.acc
        self.narrow = self.passed != self.acc  # then norms want dense sources

        def halves(weights: list[Tensor], masks: list[Tensor]) -> list[_Half]:
            return [
                _Half((n, weight.shape[1], *spatial), weight, masks[layer] if masks else None)
                for layer, weight in enumerate(weights)
            ]

        masks = layers.bottleneck_mask if layers.has_bottleneck else layers.growth_mask
        self.firsts = halves(layers.conv1_weight, masks)  # of prefixes of X
        self.seconds = halves(layers.conv2_weight, layers.growth_mask)  # of bottlenecks
        parts = [(half, chunk) for half in self.firsts + self.seconds for chunk in chunks(half.shape, out.device)]
        self.scratch = Scratch(self.passed, out.device, max(chunk.pixels * half.shape[1] for half, chunk in parts))

    def conv(self, z: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        """What convolves z, of the dtype that is passed, in the dtype for that, and returns y of the block's."""
        if self.compute == self.dtype == z.dtype:
            return conv(z, cast(weight, self.compute))
        return lambda: cast(conv(cast(z, self.compute), cast(weight, self.compute))(), self.dtype)

    def conv_backward(
        self, z: Tensor, weight: Tensor, need_weight: bool
    ) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """What takes dy and returns dz, of z's dtype, and the weight's gradient."""
        compute = self.compute
        if compute == z.dtype:
            of_dy = conv_backward(z, cast(weight, compute), need_weight)
            return lambda dy: of_dy(cast(dy, compute))

        def backward(dy: Tensor) -> tuple[Tensor, Tensor | None]:
            dz, dweight = conv_backward(cast(z, compute), cast(weight, compute), need_weight)(cast(dy, compute))
            return cast(dz, z.dtype), None if dweight is None else cast(dweight, z.dtype)

        return backward

    def store(self, stats: ChannelStats, where: ChannelStats) -> None:
        """Statistics of this process's pixels, as everyone's."""
        if self.group is not None:
            self.group.merge(stats)
        where.mean.copy_(stats.mean)
        where.var.copy_(stats.var)


class _NormRelu:
    """``relu(norm(source))`` of half a layer, by chunk."""

    def __init__(self, block: _Block, half: _Half, norm: AffineMap, copy: bool):
        """``copy``: of a source that is not dense or not of the dtype that is passed."""
        self.block, self.chunks, self.norm = block, chunks(half.shape, half.weight.device), norm
        self._z = [block.scratch("z", (chunk.size, *half.shape[1:])) for chunk in self.chunks]
        self._x = [block.scratch("x", z.shape) for z in self._z] if copy else []
        self._normalise = [norm.into(z) for z in self._z]
        self._masks = [] if half.mask is None else self.cut(half.mask)

    def cut(self, x: Tensor) -> list[Tensor]:
        """[N, ...] by chunk."""
        return [chunk.of(x) for chunk in self.chunks]

    def _drop(self, y: Tensor, chunk: int) -> None:
        y.mul_(self._masks[chunk]).mul_(self.block.keep_scale)


class _Forward(_NormRelu):
    """Half a layer, ``conv(relu(norm(source)))``."""

    def __init__(self, block: _Block, half: _Half, norm: AffineMap, copy: bool = False):
        super().__init__(block, half, norm, copy)
        self._shape = (half.shape[0], len(half.weight), *half.shape[2:])
        self._conv = [block.conv(z, half.weight) for z in self._z]

    def __call__(
        self, source: list[Tensor], stats: ChannelStats | None = None, out: list[Tensor] | None = None
    ) -> Tensor:
        """The output [N, K, *spatial], or ``out`` by chunk where that is given; its statistics go to ``stats``."""
        whole, found = None, []
        if out is None and len(source) > 1:
            whole = empty_channels_last(self._shape, self.block.dtype, source[0].device)
            out = self.cut(whole)
        for i, x in enumerate(source):
            self._normalise[i](self._x[i].copy_(x) if self._x else x).relu_()
            y = self._conv[i]()
            if self._masks:
                self._drop(y, i)
            if out is not None:
                out[i].copy_(y)
            if stats is not None:
                found.append(tensor_stats(y))
        if stats is not None:
            self.block.store(merge_stats(found, self.chunks), stats)
        return y if whole is None else whole


class _Backward(_NormRelu):
    """The backward of half a layer."""

    def __init__(
        self,
        block: _Block,
        half: _Half,
        vectors: Affine,
        need_weight: bool,
        norm_reads: Literal["source", "copy", "z"],
        norm_gives: Literal["sums", "scaled", "dx"],
    ):
        """``norm_reads``: the source, dense and of the dtype that is passed; a copy that is; or z, which shows it."""
        affine_map = AffineMap(vectors.scale, vectors.shift, len(half.shape))
        super().__init__(block, half, affine_map, norm_reads == "copy")
        self._reads_z = norm_reads == "z"
        self._conv_backward = [block.conv_backward(z, half.weight, need_weight) for z in self._z]
        self.norm_backward = norm_backward(vectors.of_output() if self._reads_z else vectors, norm_gives)
        self.vectors, self.at_once = vectors, norm_gives == "dx"
        self.dweight: Tensor | None = None
        self.sums: Sequence[Tensor | None] = (None, None)  # the norm's

    def __call__(
        self, dys: Iterable[Tensor], source: list[Tensor], out: list[Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the norm reads and da of each chunk, da in ``out`` if given, from dy, which it overwrites.

        When all are consumed, ``dweight`` is the weight's gradient.
        """
        for i, (dy, x) in enumerate(zip(dys, source, strict=True)):
            if self._x:
                x = self._x[i].copy_(x)
            z = self._normalise[i](x).relu_()
            if self._masks:
                self._drop(dy, i)
            dz, dweight = self._conv_backward[i](dy)
            if self.dweight is None or dweight is None:
                self.dweight = dweight
            else:
                self.dweight = cast(self.dweight, self.block.acc).add_(dweight)
            yield z if self._reads_z else x, mask_by_relu(dz, z, out=dz if out is None else out[i])


def dense_block(x: Tensor, layers: DenseLayers, dtype: torch.dtype, save_bottleneck: bool) -> DenseBlockOutput:
    """Forward with whichever statistics the norms ask for; convolutions compute in ``dtype``."""
    n, _, *spatial = x.shape
    depth, dims = layers.num_layers, x.dim()
    store = torch.promote_types(x.dtype, dtype)
    out = empty_channels_last((n, layers.output_channels, *spatial), store, x.device)  # X
    stats = zero_stats((layers.output_channels,), store, x.device)
    bottleneck_stats = zero_stats((depth, layers.bottleneck_channels), store, x.device)
    share_stats = any(layers.norm1_batch_stats)

    block = _Block(out, layers, dtype)
    first, *written = layers.written()
    written_stats = list(map(stats.part, written))
    hidden_stats = list(map(ChannelStats, *bottleneck_stats))
    norms1 = [LateAffineMap(layers.norm1(i, stats), block.acc, dims) for i in range(depth)]
    norms2 = [LateAffineMap(layers.norm2(i, hidden_stats[i]), block.acc, dims) for i in range(len(block.seconds))]
    firsts = [_Forward(block, half, norm, block.narrow) for half, norm in zip(block.firsts, norms1, strict=True)]
    seconds = [_Forward(block, half, norm) for half, norm in zip(block.seconds, norms2, strict=True)]
    sources = [half.cut(channels_of(out, layers.reads(layer))) for layer, half in enumerate(firsts)]
    targets = [half.cut(channels_of(out, new)) for half, new in zip(seconds or firsts, written, strict=True)]

    channels_of(out, first).copy_(x)
    if share_stats:
        block.store(channel_stats(x), stats.part(first))
    bottleneck: list[Tensor] = []
    for layer, half in enumerate(firsts):
        source = sources[layer]
        norms1[layer].read()
        if seconds:
            hidden = half(source, hidden_stats[layer] if layers.norm2_batch_stats[layer] else None)
            if save_bottleneck:
                bottleneck.append(hidden)
            half = seconds[layer]
            source = half.cut(hidden)
            norms2[layer].read()
        half(source, written_stats[layer] if share_stats else None, targets[layer])
    return DenseBlockOutput(out, list(map(rows, bottleneck)), *stats, *bottleneck_stats)


def dense_block_inference(x: Tensor, layers: DenseLayers, dtype: torch.dtype) -> Tensor:
    """Forward with running statistics, norm2 folded into conv1: X alone, [N, C_L, *spatial]."""
    n, _, *spatial = x.shape
    depth, dims = layers.num_layers, x.dim()
    store = torch.promote_types(x.dtype, dtype)
    acc, compute = accumulator_dtype(store), gemm_dtype(dtype, x.device)
    unread = zero_stats((0,), store, x.device)
    norms1 = affines([layers.norm1(layer, unread) for layer in range(depth)], acc)
    norms2 = affines([layers.norm2(layer, unread) for layer in range(len(layers.conv2_weight))], acc)
    maps = [AffineMap(norm.scale, norm.shift, dims) for norm in norms1]
    conv1 = []
    for weight, norm2 in zip(layers.conv1_weight, norms2, strict=False):  # without bottlenecks there is no norm2
        folded = cast(weight, acc) * norm2.scale.view(-1, *[1] * (dims - 1))
        conv1.append((cast(folded, compute), cast(norm2.shift, compute)))
    growth = [cast(weight, compute) for weight in layers.growth_weight]

    out = empty_channels_last((n, layers.output_channels, *spatial), store, x.device)
    channels_of(out, layers.reads(0)).copy_(x)
    parts = chunks(out.shape, x.device, OF_A_BLOCK)
    passed = passed_dtype(store, dims, None) if store == compute else acc
    widest = layers.output_channels - layers.growth_rate
    scratch = Scratch(passed, x.device, max(chunk.pixels for chunk in parts) * widest)
    for chunk in parts:  # through every layer in cache
        features = chunk.of(out)
        sources = [channels_of(features, layers.reads(layer)) for layer in range(depth)]
        targets = [channels_of(features, layers.writes(layer)) for layer in range(depth)]
        temporaries = [scratch("z", source.shape) for source in sources]
        for layer, weight in enumerate(growth):
            source = sources[layer]
            if passed != acc:  # norms want it dense
                source = scratch("x", source.shape).copy_(source)
            z = cast(maps[layer].into(temporaries[layer])(source).relu_(), compute)
            if conv1:
                z = conv(z, *conv1[layer])().relu_()
            targets[layer].copy_(cast(conv(z, weight)(), dtype))
    return out


class _GradientOfX:
    """That of X, gathered raw by the layers that read it, last to first."""

    def __init__(self, grad_out: Tensor, output: DenseBlockOutput, layers: DenseLayers, block: _Block):
        n, _, *spatial = output.out.shape
        self.given = in_channels_last(cast(grad_out, block.passed))
        self._last = layers.reads(layers.num_layers - 1)
        self.raw = channels_of(self.given, self._last)  # G, but for what the last layer writes
        if self.given is grad_out:  # no memory of our own
            self.raw = empty_channels_last(self.raw.shape, block.passed, grad_out.device)
        self.through = Correction.none(output.mean)  # P and Q
        self.dy = empty_channels_last((n, layers.growth_rate, *spatial), block.acc, grad_out.device)

        written = layers.written()
        raw = [*map(self.part, written[:-1]), channels_of(self.given, written[-1])]
        through = self.through.per_channel(grad_out.dim())
        x = [channels_of(output.out, new) for new in written]
        self._written = list(zip(raw, x, map(through.part, written), strict=True))
        self._use_batch, self._group = any(layers.norm1_batch_stats), block.group
        self._one = torch.ones((), dtype=block.acc, device=grad_out.device)

    def part(self, channels: slice) -> Tensor:
        """G of some channels of X."""
        start = self._last.start
        return channels_of(self.raw, slice(channels.start - start, channels.stop - start))

    def of_layer(self, layer: int) -> Tensor:
        """The true one of what a layer wrote, good until the next."""
        return self._formed(layer + 1, self.dy)

    def of_input(self) -> Tensor:
        """That of the block's input."""
        raw, _, _ = self._written[0]
        return self._formed(0, empty_channels_last(raw.shape, self.dy.dtype, raw.device))

    def _formed(self, writer: int, out: Tensor) -> Tensor:
        """G + P + Q * (x - mean) of the channels of one writer."""
        raw, x, through = self._written[writer]
        if self._use_batch and self._group is not None:
            self._group.add_up(through.p, through.q)
        return input_gradient(raw, self._one, x, through if self._use_batch else None, out)


def dense_block_backward(
    grad_out: Tensor,
    output: DenseBlockOutput,
    layers: DenseLayers,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    needs: DenseBlockNeeds,
) -> DenseBlockGrads:
    """Gradients from that of X, for an input of ``x_dtype``. Bottlenecks that were not kept are made again."""
    n, _, *spatial = output.out.shape
    block, count = _Block(output.out, layers, dtype), n * math.prod(spatial)
    stats = ChannelStats(output.mean, output.var)
    hidden_stats = list(map(ChannelStats, output.bottleneck_mean, output.bottleneck_var))
    norms1 = affines([layers.norm1(i, stats) for i in range(len(block.firsts))], block.acc)
    norms2 = affines([layers.norm2(i, hidden_stats[i]) for i in range(len(block.seconds))], block.acc)
    dims, narrow, dense = output.out.dim(), block.narrow, block.dtype == block.passed
    shown = show_inputs(norms1) if dense and not narrow else [False] * len(norms1)
    firsts = [
        _Backward(block, half, norm, need_weight, "z" if is_shown else "copy", "scaled" if narrow else "sums")
        for half, norm, need_weight, is_shown in zip(block.firsts, norms1, needs.conv1, shown, strict=True)
    ]
    whole = dense and is_pytorchs_own(dims, block.group)
    seconds = [
        _Backward(block, half, norm, need_weight, "source" if dense else "copy", "dx" if whole and batch else "sums")
        for half, norm, need_weight, batch in zip(
            block.seconds, norms2, needs.conv2, layers.norm2_batch_stats, strict=True
        )
    ]
    gradient = _GradientOfX(grad_out, output, layers, block)
    sources, gathered, throughs = [], [], []  # of each layer: what it reads of X, and adds to of G, P and Q
    for layer, half in enumerate(firsts):
        channels = layers.reads(layer)
        sources.append(half.cut(channels_of(output.out, channels)))
        gathered.append(half.cut(gradient.part(channels)))
        throughs.append(gradient.through.part(channels))
    so_far = [*gathered[:-1], half.cut(channels_of(gradient.given, channels))]
    hiddens = [images(hidden, (n, *spatial)) for hidden in output.bottleneck]
    again = []  # what makes the bottlenecks that were not kept
    if seconds and not hiddens:
        again = [_Forward(block, half, first.norm, narrow) for half, first in zip(block.firsts, firsts, strict=True)]
    da = None  # of a bottleneck, where it is made in more than one chunk
    if seconds and len(seconds[0].chunks) > 1:
        da = empty_channels_last((n, layers.bottleneck_channels, *spatial), block.passed, grad_out.device)

    def gradients_of_hidden(layer: int, dy: Tensor) -> Iterable[Tensor]:
        """Those of a bottleneck, by the chunks of the first half, each good until the next."""
        first, second, sums = firsts[layer], seconds[layer], []
        hidden = again[layer](sources[layer]) if again else hiddens[layer]
        for x, part in second(second.cut(dy), second.cut(hidden), None if da is None else second.cut(da)):
            if not second.at_once:
                sums.append(second.norm_backward(part, x)[1:])
        whole = part if da is None else da
        if second.at_once:
            dhidden, *second.sums = second.norm_backward(whole, hidden)
            yield from first.cut(dhidden)
            return
        second.sums = add_up(sums)
        through = None
        if layers.norm2_batch_stats[layer]:
            through = Correction.of(second.vectors, *second.sums, count, block.group).per_channel(dims)
        for part, x in zip(first.cut(whole), first.cut(hidden), strict=True):
            yield input_gradient(part, second.norm.scale, x, through, block.scratch("dx", part.shape))

    for layer in reversed(range(needs.first_layer(), len(firsts))):
        dy, first, sums = gradient.of_layer(layer), firsts[layer], []
        parts = first(gradients_of_hidden(layer, dy) if seconds else first.cut(dy), sources[layer])
        for (x, part), before, after in zip(parts, so_far[layer], gathered[layer], strict=True):
            scaled, s1, s2 = first.norm_backward(part, x)
            sums.append((s1, s2))
            if narrow:
                torch.add(before, scaled, out=after)
            else:
                torch.addcmul(before, part, first.norm.scale, out=after)
        first.sums = add_up(sums)
        if layers.norm1_batch_stats[layer]:
            throughs[layer].add(first.vectors, *first.sums, count)

    return DenseBlockGrads(
        cast(gradient.of_input(), x_dtype) if needs.x else grad_out.new_empty(0),
        *_gradients(firsts, layers.norm1_weight, layers.norm1_bias, layers.conv1_weight),
        *_gradients(seconds, layers.norm2_weight, layers.norm2_bias, layers.conv2_weight),
    )


def _gradients(halves: list[_Backward], *parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Those of the weights and biases of the norms and of the convolutions' weights, as their parameters are."""
    found = [[half.sums[1] for half in halves], [half.sums[0] for half in halves], [half.dweight for half in halves]]
    for gradients, tensors in zip(found, parameters, strict=True):
        yield [p.new_empty(0) if g is None else laid_out_as(g, p) for g, p in zip(gradients, tensors, strict=True)]
