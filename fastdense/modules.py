"""Drop-in modules: the reference's parameters and names, the ops' speed.

Each module is its reference class with another ``forward``: it gathers its parameters for an op, and updates
the running statistics from what the op returns. Whatever the op does not promise to reproduce (hooks on inner
modules, parametrisations, other norms or activations, an empty batch) runs the reference's forward instead,
after one warning, so nothing is silently bypassed.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layouts, ops, reference
from .backends import Prepared
from .fallback import conv_dtype, fast_backend, is_channels_last, stock_computes
from .kernels.contract import ChannelStats, DenseLayers, Norm, empty_channels_last
from .layouts import BlockLayout, TransitionLayout
from .norms import (
    BatchStats,
    count_of,
    group_of,
    groups,
    norm_for,
    norm_lists,
    running_norm,
    unbiased,
    update_running_stats,
    uses_batch_stats,
)
from .ready import Inference, Ready
from .served import BatchNorm, Conv, global_hooks, obstacle_in, own_hooks, parameter


class Layer(NamedTuple):
    """One layer of a dense block, whatever its implementation calls its parts."""

    norm1: BatchNorm
    conv1: Conv
    norm2: BatchNorm | None  # None without bottleneck
    conv2: Conv | None
    drop_rate: float  # 0 in evaluation
    drops_channels: bool  # whole ones, as Dropout2d
    drops_every_conv: bool
    recomputes: bool

    @property
    def growth_conv(self) -> Conv:
        """The 3x3 whose output are the new features."""
        return self.conv1 if self.conv2 is None else self.conv2


class Fused(nn.Module):
    """What dense blocks and transitions share: they read what they are made of once.

    Attributes:
        inference_op: of :mod:`fastdense.ops`, that computes them at running statistics.
    """

    inference_op: str

    def read(self) -> Any:
        """What the modules below are, or why the op would not reproduce their forward."""
        raise NotImplementedError

    def obstacle(self) -> str | None:
        """Why the op would not reproduce its forward, or ``None``."""
        found = self.read()
        return found if isinstance(found, str) else None

    def inference_arguments(self) -> tuple[Any, ...] | None:
        """In evaluation, the op's arguments after x; ``None`` where the output depends on more than these."""
        raise NotImplementedError

    def first_parts(self) -> tuple[BatchNorm, Conv]:
        """The first norm and convolution."""
        raise NotImplementedError

    def _ready_for(self, x: Tensor) -> Ready | None:
        """What an earlier call has read, where that still stands; ``None`` where all must be read anew."""
        if torch.compiler.is_compiling() or type(x) is not Tensor or global_hooks():
            return None
        return Ready.of(self)

    def prepared(self, x: Tensor) -> Prepared | None:
        """What makes the output of x, and of tensors like it, in evaluation without autograd; ``None`` for no such."""
        found = self._inference_of(x, self._ready_for(x))
        return None if found is None else found[0].prepared(x, *found[1:])

    def _at_once(self, x: Tensor, ready: Ready | None) -> Tensor | None:
        """In evaluation without autograd the output, by what an earlier call has made ready; else ``None``."""
        found = self._inference_of(x, ready)
        return None if found is None else found[0].run(x, *found[1:])

    def _inference_of(self, x: Tensor, ready: Ready | None) -> tuple[Inference, torch.dtype, str] | None:
        """What makes the output of x at once, with the dtype that it convolves in and the backend; else ``None``."""
        if self.training or ready is None or isinstance(ready.reading, str):
            return None
        inference = ready.inference(self)
        if inference.arguments is None or inference.needs_grad(x):
            return None
        backend = fast_backend(self, x)
        if backend is None or not stock_computes(x, *inference.first) or x.shape[1] != inference.channels:
            return None
        return inference, conv_dtype(x, parameter(inference.first[1], "weight")), backend


class FusedBlock(Fused):
    """A dense block over one shared buffer. Goes before the class of an implementation, whose forward is its fallback.

    Shapes: [N, C_0, *spatial] in any strides -> [N, C_0 + L*k, *spatial], dense with channels innermost, not a view.
    """

    inference_op = "dense_block_inference"
    _layout: BlockLayout

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_stats(x, is_channels_last(x))[0]

    def forward_with_stats(self, x: Tensor, channels_last: bool = False) -> tuple[Tensor, BatchStats | None]:
        """The output and, where the block's norms made them, its batch statistics for the next norm.

        ``channels_last``: the features of the fallback would have that layout, even if x's does not say so.
        """
        ready = self._ready_for(x)
        out = self._at_once(x, ready)
        if out is not None:
            return out, None
        modules = self.read() if ready is None else ready.reading
        backend = fast_backend(self, x, modules if isinstance(modules, str) else None)
        if backend is None or isinstance(modules, str) or not stock_computes(x, modules[0].norm1, modules[0].conv1):
            return super().forward(x), None  # type: ignore[misc]  # of the class that this one goes before
        layers = self._gathered(ready, modules, x, channels_last)
        dtype = conv_dtype(x, layers.conv1_weight[0])
        uses_batch = any(layers.norm1_batch_stats) or any(layers.norm2_batch_stats)
        count = count_of(x, layers.group) if uses_batch else 0
        biases = [bias for bias in (parameter(layer.conv1, "bias") for layer in modules) if bias is not None]
        tensors = itertools.chain([x], biases, *layers[:10])
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        features, channels = slice(0, layers.output_channels), x.shape[1]  # features: in the buffer
        stats = None
        if not needs_grad and not uses_batch and not layers.growth_mask:
            out = _inference(x, layers, biases, dtype, backend)
        else:
            x, extended, features = _with_biases(x, layers, biases) if biases else (x, layers, features)
            keep = needs_grad and not modules[0].recomputes
            result = ops.dense_block(x, extended, dtype=dtype, save_bottleneck=keep, backend=backend)
            out, shared = result.out, ChannelStats(result.mean, result.var).part(features)
            if uses_batch:
                bottlenecks = ChannelStats(result.bottleneck_mean, result.bottleneck_var)
                self._update(modules, layers, shared, bottlenecks, count)
            if any(layers.norm1_batch_stats):
                stats = BatchStats(shared.mean, shared.var, count, layers.group)
        if biases or self._layout.only_new:
            out, stats = self._returned(out, stats, features, channels)
        return out, stats

    def dense_layers(self) -> list[Layer]:
        """In the order of the forward."""
        layout = self._layout
        found = []
        for layer in _child(self, layout.layers)._modules.values():
            state = cast(nn.Module, layer).__dict__
            parts: dict[str, Any] = _child(cast(nn.Module, layer), layout.holder)._modules
            drop = parts[layout.dropout] if layout.dropout else None
            if drop is not None:
                drop_rate = drop.p if drop.training else 0.0
            else:
                drop_rate = state[layout.drop_rate] if layout.drop_rate and state["training"] else 0.0
            found.append(
                Layer(
                    parts[layout.norm1],
                    parts[layout.conv1],
                    parts[layout.norm2] if layout.norm2 else None,
                    parts[layout.conv2] if layout.conv2 else None,
                    drop_rate,
                    drop is not None and type(drop) is not nn.Dropout,
                    state.get("drop_every_conv", False),
                    bool(layout.recompute and state[layout.recompute]),
                )
            )
        return found

    @property
    def new_channels(self) -> dict[str, int]:
        """How many each layer adds, by the layers' names."""
        names = _child(self, self._layout.layers)._modules
        return {name: layer.growth_conv.out_channels for name, layer in zip(names, self.dense_layers(), strict=True)}

    def inference_arguments(self) -> tuple[DenseLayers] | None:
        modules = self.read()
        if isinstance(modules, str) or self._layout.only_new:
            return None
        layers = self._gather(modules, parameter(modules[0].conv1, "weight"), False)
        uses_batch = any(layers.norm1_batch_stats) or any(layers.norm2_batch_stats)
        has_biases = any(parameter(layer.conv1, "bias") is not None for layer in modules)
        return None if uses_batch or has_biases or layers.growth_mask else (layers,)

    def first_parts(self) -> tuple[BatchNorm, Conv]:
        return self.dense_layers()[0][:2]

    def _gathered(self, ready: Ready | None, layers: list[Layer], x: Tensor, channels_last: bool) -> DenseLayers:
        """By an earlier call, where nothing is drawn."""
        if ready is None or layers[0].drop_rate > 0:
            return self._gather(layers, x, channels_last)
        key = x.dtype, x.device, torch.is_inference_mode_enabled()  # whose tensors autograd refuses
        if key not in ready.gathered:
            ready.gathered[key] = self._gather(layers, x, channels_last)
        return cast(DenseLayers, ready.gathered[key])

    def _gather(self, layers: list[Layer], x: Tensor, channels_last: bool) -> DenseLayers:
        """The layers' parameters, and the dropout masks in the order and layout of the fallback."""
        first = layers[0]
        norms1 = [layer.norm1 for layer in layers]
        norms2 = [layer.norm2 for layer in layers if layer.norm2 is not None]
        batch1, batch2 = ([uses_batch_stats(norm) for norm in norms] for norms in (norms1, norms2))
        bottleneck_mask, growth_mask = [], []
        if first.drop_rate > 0:
            for layer in layers:
                if layer.conv2 is not None and layer.drops_every_conv:
                    bottleneck_mask.append(_dropout_mask(x, layer.conv1, layer, channels_last))
                growth_mask.append(_dropout_mask(x, layer.growth_conv, layer, channels_last))
        return DenseLayers(
            *norm_lists(norms1, x),
            [parameter(layer.conv1, "weight") for layer in layers],
            *norm_lists(norms2, x),
            [parameter(layer.conv2, "weight") for layer in layers if layer.conv2 is not None],
            bottleneck_mask,
            growth_mask,
            batch1,
            [norm.eps for norm in norms1],
            batch2,
            [norm.eps for norm in norms2],
            first.drop_rate,
            next((group_of(norm) for norm in itertools.compress(norms1 + norms2, batch1 + batch2)), ""),
            self._layout.new_first,
        )

    def _update(
        self,
        modules: list[Layer],
        layers: DenseLayers,
        shared: ChannelStats,
        bottleneck: ChannelStats,
        count: int | Tensor,
    ) -> None:
        """The running statistics, from the batch's of all features and of each layer's bottleneck."""
        norms1 = [layer.norm1 for layer in modules]
        norms2 = [layer.norm2 for layer in modules if layer.norm2 is not None]
        means, variances = (
            [vector[layers.reads(i)] for i in range(len(norms1))] + list(narrow.unbind()[: len(norms2)])
            for vector, narrow in (
                (shared.mean, bottleneck.mean),
                (unbiased(shared.var, count), unbiased(bottleneck.var, count)),
            )
        )
        update_running_stats(norms1 + norms2, means, variances)

    def _returned(
        self, out: Tensor, stats: BatchStats | None, features: slice, channels: int
    ) -> tuple[Tensor, BatchStats | None]:
        """Of the buffer, with its ``features``, the input's ``channels`` among them, what the forward returns."""
        start, end = features.start, features.stop
        if self._layout.only_new and getattr(self, self._layout.only_new):
            start, end = (start, end - channels) if self._layout.new_first else (start + channels, end)
            if stats is not None:
                part = slice(start - features.start, end - features.start)
                stats = stats._replace(mean=stats.mean[part], var=stats.var[part])
        if (start, end) != (0, out.shape[1]):
            out = _with_channels(out, -start, end - out.shape[1])
        return out, stats

    def read(self) -> list[Layer] | str:
        """The layers, or why the op would not reproduce their forward."""
        layout = self._layout
        if layout.layers and list(self._modules) != [layout.layers]:
            return f"its children are {', '.join(self._modules)} instead of {layout.layers}"
        modules = cast(dict[str, nn.Module], _child(self, layout.layers)._modules)
        if not modules:
            return "it has no layers"
        for name, layer in modules.items():
            if type(layer) is not layout.layer_class:
                return f"{name} is a {type(layer).__name__}"
            obstacle = own_hooks(layer)
            if layout.holder and not obstacle:
                if list(layer._modules) != [layout.holder]:
                    obstacle = f"its children are {', '.join(layer._modules)} instead of {layout.holder}"
                elif type(layer._modules[layout.holder]) is not nn.Sequential:
                    obstacle = f"{layout.holder}: it is a {type(layer._modules[layout.holder]).__name__}"
                else:
                    obstacle = own_hooks(_child(layer, layout.holder))
            obstacle = obstacle or obstacle_in(_child(layer, layout.holder), layout)
            if obstacle:
                return f"{name}: {obstacle}"
        layers = self.dense_layers()
        settings = _settings(layers[0])
        for name, these in zip(modules, map(_settings, layers), strict=True):
            if these != settings:
                return f"{name} differs from {next(iter(modules))} in dropout, biases or training mode"
        norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2) if norm is not None]
        if len(groups(norms)) > 1:
            return "its norms take their statistics over different processes"
        return layers


def _settings(layer: Layer) -> tuple[Any, ...]:
    """What all layers of a block must have in common."""
    return layer.drop_rate, layer.drops_channels, layer.drops_every_conv, parameter(layer.conv1, "bias") is None


def _child(module: nn.Module, name: str) -> nn.Module:
    return cast(nn.Module, module._modules[name]) if name else module


def _inference(x: Tensor, layers: DenseLayers, biases: list[Tensor], dtype: torch.dtype, backend: str) -> Tensor:
    """The features at running statistics. With biases: made without them, of which the norms know, then shifted."""
    if not biases:
        return ops.dense_block_inference(x, layers, dtype=dtype, backend=backend)
    shifts = [x.new_zeros(x.shape[1]), *biases]
    shift = torch.cat(shifts[::-1] if layers.new_first else shifts)
    means = [mean - shift[layers.reads(i)] for i, mean in enumerate(layers.norm1_running_mean)]
    out = ops.dense_block_inference(x, layers._replace(norm1_running_mean=means), dtype=dtype, backend=backend)
    return out.add_(shift.to(out.dtype).view(-1, *[1] * (out.dim() - 2)))


def _with_biases(x: Tensor, layers: DenseLayers, biases: list[Tensor]) -> tuple[Tensor, DenseLayers, slice]:
    """Of layers without bottleneck: a channel on x that every norm turns into ones, and the biases its weights.

    It is on the side where no new features go. The slice is that of the features in the buffer.
    """
    before, after = (0, 1) if layers.new_first else (1, 0)

    def joined(one: Tensor, others: Tensor, dim: int) -> Tensor:
        return torch.cat([others, one] if layers.new_first else [one, others], dim)

    def each_with(value: float, vectors: list[Tensor]) -> list[Tensor]:
        return [joined(vector.new_full((1,), value), vector, 0) for vector in vectors]

    centred = [
        F.pad(bias.reshape(-1, *[1] * (weight.dim() - 1)), [side // 2 for side in weight.shape[2:] for _ in "lr"])
        for bias, weight in zip(biases, layers.conv1_weight, strict=True)
    ]
    extended = layers._replace(
        norm1_weight=each_with(0, layers.norm1_weight),
        norm1_bias=each_with(1, layers.norm1_bias),
        norm1_running_mean=each_with(0, layers.norm1_running_mean),
        norm1_running_var=each_with(1, layers.norm1_running_var),
        conv1_weight=[joined(*pair, 1) for pair in zip(centred, layers.conv1_weight, strict=True)],
    )
    x = _with_channels(x, before, after, value=1)
    return x, extended, slice(before, before + layers.output_channels)


def _with_channels(x: Tensor, before: int, after: int, value: float = 0) -> Tensor:
    """x with so many more channels, or fewer where negative, not a view; the layout stays, that of a gradient too."""
    if x.dim() == 3 and before + after <= 0:  # of sequences PyTorch's pad knows no channels-last
        return x[:, -before : x.shape[1] + after].clone()
    return F.pad(x, [0, 0] * (x.dim() - 2) + [before, after], value=value)


class FastDenseBlock(FusedBlock, reference.DenseBlock):
    """:class:`fastdense.reference.DenseBlock` over one shared buffer; torchvision's arguments and names.

    Args:
        num_layers: L.
        num_input_features: channels of the input, C_0.
        bn_size: width of the bottleneck in growth rates; ``None`` for layers without one.
        growth_rate: channels that each layer adds, k.
        drop_rate: probability of dropping an element of the new features.
        memory_efficient: keep the shared buffer alone for the backward and recompute the bottlenecks.
        drop_every_conv: drop after conv1 too, as the paper does without data augmentation.
        spatial_dims: 1 for sequences [N, C, L], 2 for images, 3 for volumes [N, C, D, H, W].

    Shapes: [N, C_0, *spatial] in any strides -> [N, C_0 + L*k, *spatial], dense with channels innermost (channels_last
    of images, channels_last_3d of volumes), not a view.
    """

    @property
    def _layout(self) -> BlockLayout:  # type: ignore[override]  # of its layers, which have bottlenecks or not
        first = next(iter(self._modules.values()), None)
        return layouts.PLAIN if getattr(first, "has_bottleneck", True) is False else layouts.BOTTLENECK


class FusedTransition(Fused):
    """A transition in one pass, pooling before it multiplies. Goes before the class of an implementation.

    Shapes: [N, C, *spatial] in any strides -> [N, C', *(size // 2)], dense with channels innermost.
    """

    inference_op = "transition"
    _layout: TransitionLayout

    def forward(self, x: Tensor, stats: BatchStats | None = None, channels_last: bool = True) -> Tensor:
        """``stats``: the batch statistics of x where they are known already.

        ``channels_last``: the features of the fallback would have that layout, on which its dropout depends.
        """
        ready = self._ready_for(x)
        out = self._at_once(x, ready)
        if out is not None:
            return out
        backend = fast_backend(self, x, self.read() if ready is None else ready.reading)
        if backend is None:
            return super().forward(x)  # type: ignore[misc]  # of the class that this one goes before
        norm, conv = self.first_parts()
        if not stock_computes(x, norm, conv):
            return super().forward(x)  # type: ignore[misc]
        if self._drops():
            return super().forward(x if channels_last else x.contiguous())  # type: ignore[misc]
        dtype = conv_dtype(x, conv.weight)
        return ops.transition(x, norm_for(norm, x, stats, backend), conv.weight, dtype=dtype, backend=backend)

    def _inference_of(self, x: Tensor, ready: Ready | None) -> tuple[Inference, torch.dtype, str] | None:
        can_be_pooled = isinstance(x, Tensor) and x.dim() > 2 and min(x.shape[2:]) > 1
        return super()._inference_of(x, ready) if can_be_pooled else None

    def inference_arguments(self) -> tuple[Norm, Tensor] | None:
        if self.read() or self._drops():
            return None
        norm, conv = self.first_parts()
        running = running_norm(norm)
        return None if running is None else (running, parameter(conv, "weight"))

    def first_parts(self) -> tuple[BatchNorm, Conv]:
        parts: dict[str, Any] = self._modules
        return parts[self._layout.norm], parts[self._layout.conv]

    def _drops(self) -> bool:
        drop: Any = self._modules.get(self._layout.dropout)
        return drop is not None and drop.training and drop.p > 0

    def read(self) -> str | None:
        return obstacle_in(self, self._layout)


class FastTransition(FusedTransition, reference.Transition):
    """:class:`fastdense.reference.Transition` in one pass, pooling before it multiplies.

    Args:
        num_input_features: channels in, C.
        num_output_features: channels out, C'.
        drop_rate: dropout between convolution and pool; while it is active they do not commute, and the
            reference runs.
        spatial_dims: 1 for sequences [N, C, L], 2 for images, 3 for volumes [N, C, D, H, W].

    Shapes: [N, C, *spatial] in any strides -> [N, C', *(size // 2)], dense with channels innermost.
    """

    @property
    def _layout(self) -> TransitionLayout:  # type: ignore[override]  # one has a dropout, another not
        return layouts.DROPPING_TRANSITION if "drop" in self._modules else layouts.TRANSITION


def _dropout_mask(x: Tensor, conv: Conv, layer: Layer, channels_last: bool) -> Tensor:
    """True where the fallback, at the same state of the generator, would keep a value of conv's output.

    The values drawn depend on dtype and layout, so those are the fallback's.
    """
    shape = (x.shape[0], conv.out_channels, *x.shape[2:])
    dtype, device = conv_dtype(x, conv.weight), x.device
    if layer.drops_channels:
        ones = torch.ones((*shape[:2], *[1] * (x.dim() - 2)), dtype=dtype, device=device)
        kept = torch.feature_dropout(ones, layer.drop_rate, True) != 0
        return empty_channels_last(shape, torch.bool, device).copy_(kept)
    empty = empty_channels_last if channels_last or is_channels_last(conv.weight) else torch.empty
    return F.dropout(empty(shape, dtype=dtype, device=device).fill_(1), layer.drop_rate, training=True) != 0
