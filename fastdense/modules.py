"""Drop-in modules: the reference's parameters and names, the ops' speed.

Each module is its reference class with another ``forward``: it gathers its parameters for an op, and updates
the running statistics from what the op returns. Whatever the op does not promise to reproduce (hooks on inner
modules, parametrisations, other norms or activations, an empty batch) runs the reference's forward instead,
after one warning, so nothing is silently bypassed.
"""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from . import backends, ops, reference
from .kernels.contract import ChannelStats, DenseLayers, Norm, empty_channels_last


class FallbackWarning(UserWarning):
    """A fast module ran its reference definition instead."""


BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
"""The norms that the ops compute."""


class BatchStats(NamedTuple):
    """Statistics of a batch, on their way from where they were made to the norms that use them."""

    mean: Tensor  # [C]
    var: Tensor  # [C], biased
    pixels: int | Tensor  # values of a channel
    group: str  # of the processes whose batches they are of, "" for this one alone


class FastDenseBlock(reference.DenseBlock):
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

    def forward(self, init_features: Tensor) -> Tensor:
        return self.forward_with_stats(init_features, is_channels_last(init_features))[0]

    def forward_with_stats(self, x: Tensor, channels_last: bool = False) -> tuple[Tensor, BatchStats | None]:
        """The output and, where the block's norms made them, its batch statistics for the next norm.

        ``channels_last``: the reference's features would have that layout, even if x's does not say so.
        """
        backend = _fast_backend(self, x, self._obstacle)
        if backend is None or not _stock_computes(x, self.layers()[0].norm1, self.layers()[0].conv1.weight):
            return super().forward(x), None
        layers = self._gather(x, channels_last)
        dtype = _conv_dtype(x, layers.conv1_weight[0])
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        uses_batch = any(layers.norm1_batch_stats) or any(layers.norm2_batch_stats)
        count = _count(x, layers.group) if uses_batch else 0
        if not needs_grad and not uses_batch and not layers.growth_mask:
            return ops.dense_block_inference(x, layers, dtype=dtype, backend=backend), None

        keep = needs_grad and not self.layers()[0].memory_efficient
        result = ops.dense_block(x, layers, dtype=dtype, save_bottleneck=keep, backend=backend)
        shared = ChannelStats(result.mean, result.var)
        norms: list[BatchNorm] = []
        stats: list[ChannelStats] = []
        for i, layer in enumerate(self.layers()):
            channels = layer.norm1.num_features
            norms.append(layer.norm1)
            stats.append(ChannelStats(shared.mean[:channels], shared.var[:channels]))
            if layer.has_bottleneck:
                norms.append(layer.norm2)
                stats.append(ChannelStats(result.bottleneck_mean[i], result.bottleneck_var[i]))
        _update_running_stats(norms, stats, count)
        made = BatchStats(shared.mean, shared.var, count, layers.group)
        return result.out, made if any(layers.norm1_batch_stats) else None

    def layers(self) -> list[reference.DenseLayer]:
        """In the order of the forward."""
        return cast(list[reference.DenseLayer], list(self.values()))

    def _gather(self, x: Tensor, channels_last: bool) -> DenseLayers:
        """The layers' parameters, and the dropout masks in the order and layout of the reference."""
        layers = self.layers()
        first = layers[0]
        parts = [cast(dict[str, Any], layer._modules) for layer in layers]
        norms1 = [part["norm1"] for part in parts]
        norms2 = [part["norm2"] for part in parts] if first.has_bottleneck else []
        batch1, batch2 = ([_uses_batch_stats(norm) for norm in norms] for norms in (norms1, norms2))
        bottleneck_mask, growth_mask = [], []
        if first.drop_rate > 0 and first.training:
            for layer in layers:
                if layer.has_bottleneck and layer.drop_every_conv:
                    bottleneck_mask.append(_dropout_mask(x, layer.conv1, layer.drop_rate, channels_last))
                growth_mask.append(_dropout_mask(x, layer.growth_conv, layer.drop_rate, channels_last))
        return DenseLayers(
            *_norm_lists(norms1, x),
            [part["conv1"]._parameters["weight"] for part in parts],
            *_norm_lists(norms2, x),
            [part["conv2"]._parameters["weight"] for part in parts] if first.has_bottleneck else [],
            bottleneck_mask,
            growth_mask,
            batch1,
            [norm.eps for norm in norms1],
            batch2,
            [norm.eps for norm in norms2],
            first.drop_rate,
            next((_group_of(norm) for norm in itertools.compress(norms1 + norms2, batch1 + batch2)), ""),
        )

    def _obstacle(self) -> str | None:
        """Why the op would not reproduce the layers' forward, or ``None``."""
        if not len(self):
            return "it has no layers"
        layers = self.layers()
        first = layers[0]
        parts = ["norm1", "relu1", "conv1"] + (["norm2", "relu2", "conv2"] if first.has_bottleneck else [])
        settings = _settings(first)
        norms: list[BatchNorm] = []
        for name, layer in zip(self, layers, strict=True):
            if type(layer) is not reference.DenseLayer:
                return f"{name} is a {type(layer).__name__}"
            if _settings(layer) != settings:
                return f"{name} differs from {next(iter(self))} in bottleneck, dropout or training mode"
            obstacle = _hooked(layer) or _obstacle_in(layer, parts)
            if obstacle:
                return f"{name}: {obstacle}"
            norms += [cast(BatchNorm, layer._modules[part]) for part in parts[::3]]
        if len(_groups(norms)) > 1:
            return "its norms take their statistics over different processes"
        return None


def _settings(layer: reference.DenseLayer) -> tuple[Any, ...]:
    """What all layers of a block must have in common."""
    return layer.has_bottleneck, layer.drop_rate, layer.drop_every_conv, layer.training


class FastTransition(reference.Transition):
    """:class:`fastdense.reference.Transition` in one pass, pooling before it multiplies.

    Args:
        num_input_features: channels in, C.
        num_output_features: channels out, C'.
        drop_rate: dropout between convolution and pool; while it is active they do not commute, and the
            reference runs.
        spatial_dims: 1 for sequences [N, C, L], 2 for images, 3 for volumes [N, C, D, H, W].

    Shapes: [N, C, *spatial] in any strides -> [N, C', *(size // 2)], dense with channels innermost.
    """

    def forward(self, x: Tensor, stats: BatchStats | None = None, channels_last: bool = True) -> Tensor:
        """``stats``: the batch statistics of x where they are known already.

        ``channels_last``: the reference's features would have that layout, on which its dropout depends.
        """
        backend = _fast_backend(self, x, self._obstacle)
        norm_module = cast(BatchNorm, self.norm)
        if backend is None or not _stock_computes(x, norm_module, self.conv.weight):
            return super().forward(x)
        if self._drops():
            return super().forward(x if channels_last else x.contiguous())
        norm = _norm_for(norm_module, x, stats, backend)
        dtype = _conv_dtype(x, self.conv.weight)
        return ops.transition(x, norm, self.conv.weight, dtype=dtype, backend=backend)

    def _drops(self) -> bool:
        return hasattr(self, "drop") and self.drop.training and self.drop.p > 0

    def _obstacle(self) -> str | None:
        parts = ["norm", "relu", "conv"] + (["drop"] if hasattr(self, "drop") else []) + ["pool"]
        return _obstacle_in(self, parts)


def stem_tail(norm: BatchNorm, relu: nn.Module, pool: nn.Module, x: Tensor) -> Tensor:
    """``pool(relu(norm(x)))`` in one pass where the three are a stem's, else one by one."""
    backend = None if any(map(_unusual, (norm, relu, pool))) else _fast_backend(norm, x)
    if backend is None or not _stock_computes(x, norm):
        return pool(relu(norm(x)))
    return ops.stem_tail(x, _norm_for(norm, x, None, backend), backend=backend)


def head(norm: BatchNorm, x: Tensor, stats: BatchStats | None) -> Tensor:
    """norm, ReLU and global average pool of [N, C, *spatial] in one pass where possible: [N, C]."""
    backend = None if _unusual(norm) else _fast_backend(norm, x)
    if backend is None or not _stock_computes(x, norm):
        return reference.global_avg_pool(F.relu(norm(x), inplace=True))
    return ops.head(x, _norm_for(norm, x, stats, backend), backend=backend)


# -- what the modules share ----------------------------------------------------------------------------------


def _fast_backend(module: nn.Module, x: Tensor, obstacle: Callable[[], str | None] = lambda: None) -> str | None:
    """The backend for ``x``, or ``None`` where the reference must run: on request, or for a reason warned of."""
    if not isinstance(x, Tensor) or x.dim() not in (3, 4, 5) or x.numel() == 0 or _is_transformed():
        if _groups([m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]) - {""}:
            # the other processes would wait for what the reference does not send
            raise ValueError(
                "SyncBatchNorm over several processes needs [N, C, *spatial] on each, N >= 1, outside torch.func's "
                f"transforms; got {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        return None  # the reference knows what PyTorch does with these
    backend = backends.select(x.device, x.dtype, x.dim() - 2)
    if backend == backends.REFERENCE:
        return None
    reason = obstacle()
    if reason is None:
        return backend
    if not getattr(module, "_warned_of_fallback", False):
        module.__dict__["_warned_of_fallback"] = True
        _warn(f"{type(module).__name__} runs the reference implementation, without its savings: {reason}")
    return None


def _warn(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=4)


# Dynamo cannot trace a warning, and need not: this is torch.compiler.assume_constant_result without importing Dynamo
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_transformed() -> bool:
    """Inside torch.func's vmap, grad or jvp, or forward-mode differentiation, of which the ops know nothing."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def hooked(module: nn.Module) -> str | None:
    """What would be bypassed if the module's forward were not called through ``__call__``."""
    return _hooked(module) or _global_hooks()


def _hooked(module: nn.Module) -> str | None:
    """The same, of the module itself; by its dict, since a network has hundreds of modules to look at."""
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "it has hooks"
    if "forward" in state:
        return "its forward was replaced"
    if state.get("_compiled_call_impl") is not None:
        return "it is compiled by itself"
    return None


def _obstacle_in(module: nn.Module, parts: Sequence[str]) -> str | None:
    """Why ``module`` is not exactly the stock modules ``parts`` one after the other, or ``None``."""
    if list(module._modules) != list(parts):
        return f"its children are {', '.join(module._modules)} instead of {', '.join(parts)}"
    for name, child in module._modules.items():
        reason = _unlike_stock(cast(nn.Module, child))
        if reason:
            return f"{name}: {reason}"
    if len({_DIMS[kind] for kind in map(type, module._modules.values()) if kind in _DIMS}) > 1:
        return "its children have different spatial dimensions"
    return _global_hooks()


def _unusual(module: nn.Module) -> str | None:
    """Why the ops would not reproduce a stock module of a DenseNet, or ``None``."""
    return _unlike_stock(module) or _global_hooks()


def _unlike_stock(module: nn.Module) -> str | None:
    """The same, of the module itself."""
    kind = type(module)
    if kind not in _STOCK:
        return f"it is a {kind.__name__}"
    state = module.__dict__
    for attribute, expected in _STOCK[kind].items():
        if state[attribute] not in expected:
            return f"its {attribute} is {state[attribute]}"
    if kind in _CONVS:
        if state["padding"][0] != state["kernel_size"][0] // 2:
            return f"its padding is {state['padding']}"
        if state["_parameters"]["bias"] is not None:
            return "it has a bias"
    return _hooked(module)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = ((nn.AvgPool1d, nn.MaxPool1d), (nn.AvgPool2d, nn.MaxPool2d), (nn.AvgPool3d, nn.MaxPool3d))
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DIMS: dict[type[nn.Module], int] = {
    kind: dims
    for dims, kinds in enumerate(zip(_CONVS, _NORMS, *zip(*_POOLS, strict=True), strict=True), start=3)
    for kind in kinds
}
"""Dimensions of what goes through a module; those that are not here, such as SyncBatchNorm, take any."""


def _stock(dims: int) -> dict[type[nn.Module], dict[str, tuple[Any, ...]]]:
    """The modules of ``dims`` spatial dimensions that the ops reproduce, with the settings they do it for."""

    def alike(size: int) -> tuple[Any, ...]:
        return size, (size,) * dims

    zero, one, two, three = map(alike, range(4))
    avg_pool, max_pool = _POOLS[dims - 1]
    conv = dict(
        kernel_size=(one[1], three[1]),
        stride=(one[1],),
        padding=(zero[1], one[1]),
        dilation=(one[1],),
        groups=(1,),
        padding_mode=("zeros",),
    )
    average = dict(kernel_size=two, stride=two, padding=zero, ceil_mode=(False,))
    average |= dict(divisor_override=(None,)) if dims > 1 else {}
    maximum = dict(
        kernel_size=three, stride=two, padding=one, dilation=one, ceil_mode=(False,), return_indices=(False,)
    )
    return {_CONVS[dims - 1]: conv, avg_pool: average, max_pool: maximum}


_STOCK: dict[type[nn.Module], dict[str, tuple[Any, ...]]] = {
    **{kind: {} for kind in (*_NORMS, nn.SyncBatchNorm, nn.ReLU, nn.Dropout)},
    **_stock(1),
    **_stock(2),
    **_stock(3),
}
"""The modules that the ops reproduce, with the settings they do it for."""


def _global_hooks() -> str | None:
    """What would be bypassed of every module."""
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "modules have global hooks"
    return None


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def _conv_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What a stock convolution of x computes in."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else weight.dtype


def _stock_computes(x: Tensor, norm: BatchNorm, weight: Tensor | None = None) -> bool:
    """Whether stock PyTorch takes x in this norm and this convolution; where not, the reference raises its error."""
    if x.dim() != _DIMS.get(type(norm), x.dim()) or (weight is not None and x.dim() != weight.dim()):
        return False
    if weight is not None and (weight.dtype == torch.float64 if _autocasts(x) else x.dtype != weight.dtype):
        return False
    vector = norm.weight if norm.weight is not None else norm.running_mean
    half = x.dtype in (torch.bfloat16, torch.float16)
    return vector is None or vector.dtype == x.dtype or (half and vector.dtype == torch.float32)


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch's convolutions take [N, C, *spatial] for channels-last; ambiguous strides count as contiguous.

    Sequences never are: PyTorch's norms make them contiguous.
    """
    return x.dim() in (4, 5) and x.stride(1) == 1 and x.stride(-1) == x.shape[1] > 1


def _dropout_mask(x: Tensor, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, drop_rate: float, channels_last: bool) -> Tensor:
    """True where the reference, at the same state of the generator, would keep a value of conv's output.

    The values drawn depend on dtype and layout, so those are the reference's.
    """
    shape = (x.shape[0], conv.out_channels, *x.shape[2:])
    inner = channels_last or is_channels_last(conv.weight)
    ones = (empty_channels_last if inner else torch.empty)(shape, dtype=_conv_dtype(x, conv.weight), device=x.device)
    return F.dropout(ones.fill_(1), drop_rate, training=True) != 0


def _uses_batch_stats(norm: BatchNorm) -> bool:
    return norm.training or norm._buffers["running_mean"] is None


def _group_of(norm: BatchNorm) -> str:
    """The name of the process group over whose batches a norm takes its statistics; "" for this process's alone."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training or not (dist.is_available() and dist.is_initialized()):
        return ""
    group = cast(dist.ProcessGroup, norm.process_group or dist.group.WORLD)
    return group.group_name if dist.get_world_size(group) > 1 else ""


def _groups(norms: Sequence[BatchNorm]) -> set[str]:
    """Of all norms that use the statistics of a batch."""
    return {_group_of(norm) for norm in norms if _uses_batch_stats(norm)}


def _affine(norm: BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    return (
        x.new_ones(norm.num_features) if weight is None else weight,
        x.new_zeros(norm.num_features) if bias is None else bias,
    )


def _norm_lists(norms: list[BatchNorm], x: Tensor) -> tuple[list[Tensor], ...]:
    """Weights, biases, running means, running variances; the latter two empty where the batch's are used."""
    unread = x.new_empty(0)
    vectors = [
        (*_affine(norm, x), *((unread, unread) if _uses_batch_stats(norm) else _running_stats(norm))) for norm in norms
    ]
    return tuple([list(column) for column in zip(*vectors, strict=True)]) if vectors else ([], [], [], [])


def _norm_for(norm: BatchNorm, x: Tensor, stats: BatchStats | None, backend: str) -> Norm:
    """The norm as an op takes it; its running statistics are updated if it is training."""
    if not _uses_batch_stats(norm):
        return Norm(*_affine(norm, x), *_running_stats(norm), norm.eps, False)
    group = _group_of(norm)
    if stats is None or stats.group != group:
        count = _count(x, group)
        mean, var = ops.channel_stats(x, backend=backend, group=group)
        stats = BatchStats(mean, var, count, group)
    _update_running_stats([norm], [ChannelStats(stats.mean, stats.var)], stats.pixels)
    return Norm(*_affine(norm, x), stats.mean, stats.var, norm.eps, True, group)


def _count(x: Tensor, group: str) -> int | Tensor:
    """Values of a channel in a batch, or in those of a group's processes: then float64, on x's device."""
    count = x.numel() // x.shape[1]
    if group:
        from torch.distributed import _functional_collectives as functional  # not every build has it

        own = torch.tensor(float(count), dtype=torch.float64, device=x.device)
        return functional.all_reduce(own, "sum", group)  # type: ignore[arg-type]  # a name
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    return count


@torch.no_grad()
def _update_running_stats(norms: Sequence[BatchNorm], stats: Sequence[ChannelStats], count: int | Tensor) -> None:
    """What each training BatchNorm does with the statistics of its batch of ``count`` values per channel.

    Nothing when a checkpoint runs the forward again inside a backward: they were updated the first time.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return
    tracking = [
        (norm, batch)
        for norm, batch in zip(norms, stats, strict=True)
        if norm.training and norm.track_running_stats and norm.running_mean is not None
    ]
    if not tracking:
        return
    torch._foreach_add_([_buffer(norm, "num_batches_tracked") for norm, _ in tracking], 1)
    by_momentum = defaultdict(list)
    for norm, batch in tracking:
        by_momentum[norm.momentum].append((norm, batch))
    for momentum, group in by_momentum.items():
        running = [_buffer(norm, name) for name in ("running_mean", "running_var") for norm, _ in group]
        unbiased = torch._foreach_mul([batch.var for _, batch in group], count / (count - 1))
        values = [batch.mean for _, batch in group] + list(unbiased)
        values = [value.to(target.dtype) for value, target in zip(values, running, strict=True)]
        if momentum is None:  # the average of all batches so far
            shares = [_buffer(norm, "num_batches_tracked").double().reciprocal() for norm, _ in group] * 2
            for target, value, share in zip(running, values, shares, strict=True):
                target.lerp_(value, share.to(target.dtype))
        else:
            torch._foreach_lerp_(running, values, momentum)


def _running_stats(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    return _buffer(norm, "running_mean"), _buffer(norm, "running_var")


def _buffer(norm: BatchNorm, name: str) -> Tensor:
    return cast(Tensor, norm._buffers[name])
