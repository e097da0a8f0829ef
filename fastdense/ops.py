"""The ops: schemas, fakes, autograd. One functional op a block, transition, stem tail and head, and a whole stem.

Tensors in, fresh tensors out: nothing is mutated and no output aliases an input, so autograd, functionalisation
and CUDA graphs see ordinary ops. The shared buffer is allocated and written inside, below their sight.
Each op takes the name of its backend, so that a backward runs where its forward ran, and hands its arguments
to the function of the same name in that backend (see :mod:`fastdense.kernels.contract`).

Running statistics are not touched here: ``dense_block`` and ``channel_stats`` return the batch's.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, checks
from .kernels.contract import (
    ChannelStats,
    DenseBlockNeeds,
    DenseBlockOutput,
    DenseLayers,
    Norm,
    accumulator_dtype,
    conv_sizes,
    empty_channels_last,
    in_channels_last,
)
from .kernels.group import Group

_LIST_FIELDS = DenseLayers._fields[:12]  # Tensor[]
_PLAIN_FIELDS = DenseLayers._fields[12:]
_PARAMETER_FIELDS = ("norm1_weight", "norm1_bias", "conv1_weight", "norm2_weight", "norm2_bias", "conv2_weight")

_LAYERS = ", ".join(f"Tensor[] {field}" for field in _LIST_FIELDS)
_LAYER_OPTIONS = (
    "bool[] norm1_batch_stats, float[] norm1_eps, bool[] norm2_batch_stats, float[] norm2_eps, float drop_rate,"
    " str group, bool new_first"
)
_NORM = "Tensor norm_weight, Tensor norm_bias, Tensor norm_mean, Tensor norm_var"
_NORM_OPTIONS = "float eps, bool batch_stats, str group"

_SCHEMAS = {
    "channel_stats": "(Tensor x, *, str group, str backend) -> (Tensor, Tensor)",
    "dense_block": f"(Tensor x, {_LAYERS}, *, {_LAYER_OPTIONS}, ScalarType dtype, bool save_bottleneck, str backend)"
    " -> (Tensor, Tensor[], Tensor, Tensor, Tensor, Tensor)",
    "dense_block_backward": "(Tensor grad_out, Tensor out, Tensor[] bottleneck, Tensor mean, Tensor var,"
    f" Tensor bottleneck_mean, Tensor bottleneck_var, {_LAYERS}, *, {_LAYER_OPTIONS}, ScalarType dtype,"
    " ScalarType x_dtype, bool need_x, bool[] need_norm1, bool[] need_conv1, bool[] need_norm2, bool[] need_conv2,"
    " str backend) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])",
    "dense_block_inference": f"(Tensor x, {_LAYERS}, *, {_LAYER_OPTIONS}, ScalarType dtype, str backend) -> Tensor",
    "transition": f"(Tensor x, {_NORM}, Tensor conv_weight, *, {_NORM_OPTIONS}, ScalarType dtype, str backend)"
    " -> Tensor",
    "transition_backward": f"(Tensor grad_out, Tensor x, {_NORM}, Tensor conv_weight, *, {_NORM_OPTIONS},"
    " ScalarType dtype, bool need_weight, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "stem_tail": f"(Tensor x, {_NORM}, *, {_NORM_OPTIONS}, str backend) -> Tensor",
    "stem_tail_backward": f"(Tensor grad_out, Tensor x, {_NORM}, *, {_NORM_OPTIONS}, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    "stem_inference": f"(Tensor x, {_NORM}, Tensor conv_weight, *, {_NORM_OPTIONS}, int[] stride, int[] padding,"
    " ScalarType dtype, str backend) -> Tensor",
    "head": f"(Tensor x, {_NORM}, *, {_NORM_OPTIONS}, str backend) -> Tensor",
    "head_backward": f"(Tensor grad_out, Tensor x, {_NORM}, *, {_NORM_OPTIONS}, str backend)"
    " -> (Tensor, Tensor, Tensor)",
}

for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fastdense::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


# -- what users of the ops call -----------------------------------------------------------------------------


def channel_stats(x: Tensor, *, backend: str, group: str = "") -> ChannelStats:
    """Mean and biased variance of each channel of [N, C, *spatial], in the accumulator dtype; not differentiable.

    ``group``: name of a process group over all of whose x they are taken.
    """
    checks.check_spatial("channel_stats", x)
    return ChannelStats(*torch.ops.fastdense.channel_stats(x.detach(), group=group, backend=backend))


def dense_block(
    x: Tensor, layers: DenseLayers, *, dtype: torch.dtype, save_bottleneck: bool, backend: str
) -> DenseBlockOutput:
    """A dense block with the statistics its norms ask for; differentiable in x and the parameters.

    ========= ============================ =============================================================
    argument  shape                        dtype, layout
    ========= ============================ =============================================================
    x         [N, C_0, *spatial]           floating point, any strides; 1, 2 or 3 spatial dimensions
    layers    see ``DenseLayers``          convolution weights of any floating-point dtype
    out       [N, C_0 + L*k, *spatial]     the wider of x's and ``dtype``, dense channels-last
    ========= ============================ =============================================================

    Args:
        dtype: what the convolutions compute in and the bottlenecks are stored in.
        save_bottleneck: keep the bottlenecks for the backward; it recomputes them otherwise.
        backend: a name from :func:`fastdense.backends.select`.

    Raises:
        ValueError: shapes that do not fit each other.

    Source: DenseNet (arXiv 1608.06993), section 3; batch statistics per channel, not per norm.
    """
    checks.check_layers("dense_block", x, layers)
    lists, options = _flattened(layers)
    options.update(dtype=dtype, save_bottleneck=save_bottleneck, backend=backend)
    if not _is_seen(x, *itertools.chain(*lists)):
        return _dense_block_directly(x, lists, options)
    return DenseBlockOutput(*torch.ops.fastdense.dense_block(x, *lists, **options))


def dense_block_inference(x: Tensor, layers: DenseLayers, *, dtype: torch.dtype, backend: str) -> Tensor:
    """A dense block whose norms all use running statistics, without autograd. Shapes as in :func:`dense_block`."""
    checks.check_layers("dense_block_inference", x, layers)
    uses_batch = any(layers.norm1_batch_stats) or any(layers.norm2_batch_stats)
    checks.require(not uses_batch, "dense_block_inference: every norm must use running statistics")
    lists, options = _flattened(layers)
    return _call("dense_block_inference", x, *lists, **options, dtype=dtype, backend=backend)


def transition(x: Tensor, norm: Norm, conv_weight: Tensor, *, dtype: torch.dtype, backend: str) -> Tensor:
    """norm-ReLU-conv1x1-avgpool2x2, differentiable in x, the norm's weight and bias, and ``conv_weight``.

    [N, C, *spatial], [C', C, 1, ...] -> [N, C', *(size // 2)] of ``dtype``, dense channels-last.

    Raises:
        ValueError: shapes that do not fit each other, or an image smaller than the pool.
    """
    checks.check_transition(x, norm, conv_weight)
    return _call("transition", x, *norm[:4], conv_weight, **_options(norm), dtype=dtype, backend=backend)


def stem_tail(x: Tensor, norm: Norm, *, backend: str) -> Tensor:
    """norm-ReLU-maxpool3x3/2, differentiable in x and the norm's weight and bias.

    [N, C, *spatial] -> [N, C, *ceil(size / 2)] of x's dtype, dense channels-last.
    """
    checks.check_norm("stem_tail", x, norm)
    return _call("stem_tail", x, *norm[:4], **_options(norm), backend=backend)


def stem_inference(
    x: Tensor,
    norm: Norm,
    conv_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """conv-norm-ReLU-maxpool3x3/2 with running statistics, without autograd.

    [N, C, *spatial], [C', C, *kernel] -> [N, C', *ceil(size' / 2)] of ``dtype``, dense channels-last, where the
    convolution makes sizes'.

    Raises:
        ValueError: shapes that do not fit each other, or an image smaller than the kernel.
    """
    checks.check_stem(x, norm, conv_weight, stride, padding)
    options = dict(stride=list(stride), padding=list(padding), dtype=dtype, backend=backend)
    return _call("stem_inference", x, *norm[:4], conv_weight, **_options(norm), **options)


def head(x: Tensor, norm: Norm, *, backend: str) -> Tensor:
    """norm-ReLU-global average pool, differentiable in x and the norm's weight and bias.

    [N, C, *spatial] -> [N, C] of x's dtype.
    """
    checks.check_norm("head", x, norm)
    return _call("head", x, *norm[:4], **_options(norm), backend=backend)


def before_stem(x: Tensor) -> Tensor:
    """x as PyTorch's convolution should have it, before an op that reads channels-last memory.

    An image is smaller than what a stem makes of it, and than the gradient of that: of these nothing is copied then.
    Of sequences PyTorch's convolutions are no quicker so.
    """
    if x.dim() == 3:
        return x
    x = in_channels_last(x)
    # A single channel's stride may be anything; PyTorch sees channels-last memory where it is 1.
    return x if x.shape[1] > 1 else x.squeeze(1).unsqueeze(-1).movedim(-1, 1)


def _call(name: str, x: Tensor, *others: Tensor | list[Tensor], **options: Any) -> Any:
    """The op; without autograd its implementation, where nobody could tell: the dispatcher takes longer than a head."""
    tensors = itertools.chain.from_iterable([other] if isinstance(other, Tensor) else other for other in others)
    if torch.is_grad_enabled() or _is_seen(x, *tensors):
        return getattr(torch.ops.fastdense, name)(x, *others, **options)
    return _IMPLEMENTATIONS[name](x, *others, **options)


def are_observed() -> bool:
    """Whether ops are seen, or replaced, by a mode, a tracer or a profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether kernels may read them: they are of no class of tensors with a memory or a meaning of its own."""
    return {*map(type, tensors)} <= {Tensor, nn.Parameter}


def _is_seen(x: Tensor, *others: Tensor) -> bool:
    """Whether anything could tell an op of these tensors from the call of its implementation."""
    return torch.compiler.is_compiling() or are_observed() or x.device.type == "meta" or not are_plain([x, *others])


def _flattened(layers: DenseLayers) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """The ops' positional and keyword arguments."""
    return list(layers[: len(_LIST_FIELDS)]), dict(zip(_PLAIN_FIELDS, layers[len(_LIST_FIELDS) :], strict=True))


def _options(norm: Norm) -> dict[str, Any]:
    return dict(zip(Norm._fields[4:], norm[4:], strict=True))


# -- implementations: hand over to the backend ---------------------------------------------------------------


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}  # of the ops: their arguments and results


def _implement(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``function(kernels, first tensor, *rest)`` as the op, outside autocast: ops choose their dtypes."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(tensor: Tensor, *args: Any, backend: str, **kwargs: Any) -> Any:
            kernels = backends.kernels(backend)
            device = tensor.device.type
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return function(kernels, tensor, *args, **kwargs)
            return function(kernels, tensor, *args, **kwargs)

        torch.library.impl(f"fastdense::{name}", "default")(run)
        _IMPLEMENTATIONS[name] = run
        return function

    return register


@_implement("channel_stats")
def _channel_stats(kernels: Any, x: Tensor, group: str) -> Any:
    stats = kernels.channel_stats(x)
    if group:
        Group(group, x.numel() // x.shape[1], x.device).merge(stats)
    return tuple(stats)


@_implement("dense_block")
def _dense_block(
    kernels: Any, x: Tensor, *lists: list[Tensor], dtype: torch.dtype, save_bottleneck: bool, **options: Any
) -> Any:
    return tuple(kernels.dense_block(x, DenseLayers(*lists, **options), dtype, save_bottleneck))


@_implement("dense_block_inference")
def _dense_block_inference(kernels: Any, x: Tensor, *lists: list[Tensor], dtype: torch.dtype, **options: Any) -> Any:
    return kernels.dense_block_inference(x, DenseLayers(*lists, **options), dtype)


@_implement("dense_block_backward")
def _dense_block_backward(
    kernels: Any,
    grad_out: Tensor,
    *tensors: Any,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    need_x: bool,
    need_norm1: list[bool],
    need_conv1: list[bool],
    need_norm2: list[bool],
    need_conv2: list[bool],
    **options: Any,
) -> Any:
    output, lists = DenseBlockOutput(*tensors[:6]), tensors[6:]
    needs = DenseBlockNeeds(need_x, need_norm1, need_conv1, need_norm2, need_conv2)
    return tuple(kernels.dense_block_backward(grad_out, output, DenseLayers(*lists, **options), dtype, x_dtype, needs))


@_implement("transition")
def _transition(kernels: Any, x: Tensor, *args: Tensor, dtype: torch.dtype, **options: Any) -> Any:
    *norm, conv_weight = args
    return kernels.transition(x, Norm(*norm, **options), conv_weight, dtype)


@_implement("transition_backward")
def _transition_backward(
    kernels: Any,
    grad_out: Tensor,
    x: Tensor,
    *args: Tensor,
    dtype: torch.dtype,
    need_weight: bool,
    **options: Any,
) -> Any:
    *norm, conv_weight = args
    return tuple(kernels.transition_backward(grad_out, x, Norm(*norm, **options), conv_weight, dtype, need_weight))


@_implement("stem_tail")
def _stem_tail(kernels: Any, x: Tensor, *norm: Tensor, **options: Any) -> Any:
    return kernels.stem_tail(x, Norm(*norm, **options))


@_implement("stem_tail_backward")
def _stem_tail_backward(kernels: Any, grad_out: Tensor, x: Tensor, *norm: Tensor, **options: Any) -> Any:
    return tuple(kernels.stem_tail_backward(grad_out, x, Norm(*norm, **options)))


@_implement("stem_inference")
def _stem_inference(
    kernels: Any, x: Tensor, *args: Tensor, stride: list[int], padding: list[int], dtype: torch.dtype, **options: Any
) -> Any:
    *norm, weight = args
    if hasattr(kernels, "stem_inference"):
        return kernels.stem_inference(x, Norm(*norm, **options), weight, stride, padding, dtype)
    one, zero = [1] * len(stride), [0] * len(stride)
    y = torch.convolution(before_stem(x).to(dtype), weight.to(dtype), None, stride, padding, one, False, zero, 1)
    return kernels.stem_tail(in_channels_last(y), Norm(*norm, **options))


@_implement("head")
def _head(kernels: Any, x: Tensor, *norm: Tensor, **options: Any) -> Any:
    return kernels.head(x, Norm(*norm, **options))


@_implement("head_backward")
def _head_backward(kernels: Any, grad_out: Tensor, x: Tensor, *norm: Tensor, **options: Any) -> Any:
    return tuple(kernels.head_backward(grad_out, x, Norm(*norm, **options)))


# -- fakes: shapes, dtypes and strides without the values ----------------------------------------------------


@torch.library.register_fake("fastdense::channel_stats")
def _(x: Tensor, *, group: str, backend: str) -> Any:
    dtype = accumulator_dtype(x.dtype)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


@torch.library.register_fake("fastdense::dense_block")
def _(x: Tensor, *lists: list[Tensor], dtype: torch.dtype, save_bottleneck: bool, backend: str, **options: Any) -> Any:
    layers = DenseLayers(*lists, **options)
    n, _, *spatial = x.shape
    store = torch.promote_types(x.dtype, dtype)
    acc = accumulator_dtype(store)
    channels, width = layers.output_channels, layers.bottleneck_channels
    kept = layers.num_layers if save_bottleneck and layers.has_bottleneck else 0
    return (
        empty_channels_last((n, channels, *spatial), store, x.device),
        [x.new_empty((n * math.prod(spatial), width), dtype=dtype) for _ in range(kept)],
        x.new_empty(channels, dtype=acc),
        x.new_empty(channels, dtype=acc),
        x.new_empty((layers.num_layers, width), dtype=acc),
        x.new_empty((layers.num_layers, width), dtype=acc),
    )


@torch.library.register_fake("fastdense::dense_block_inference")
def _(x: Tensor, *lists: list[Tensor], dtype: torch.dtype, backend: str, **options: Any) -> Any:
    layers = DenseLayers(*lists, **options)
    n, _, *spatial = x.shape
    return empty_channels_last((n, layers.output_channels, *spatial), torch.promote_types(x.dtype, dtype), x.device)


@torch.library.register_fake("fastdense::dense_block_backward")
def _(
    grad_out: Tensor,
    *tensors: Any,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    need_x: bool,
    need_norm1: list[bool],
    need_conv1: list[bool],
    need_norm2: list[bool],
    need_conv2: list[bool],
    backend: str,
    **options: Any,
) -> Any:
    layers = DenseLayers(*tensors[6:], **options)
    needs = DenseBlockNeeds(need_x, need_norm1, need_conv1, need_norm2, need_conv2)
    first = needs.first_layer()
    n, _, *spatial = grad_out.shape

    def like(parameters: list[Tensor], needed: list[bool]) -> list[Tensor]:
        return [torch.empty_like(p) if need else p.new_empty(0) for p, need in zip(parameters, needed, strict=True)]

    reached = [layer >= first for layer in range(layers.num_layers)]
    reached2 = reached if layers.has_bottleneck else []
    return (
        empty_channels_last((n, layers.input_channels, *spatial), x_dtype, grad_out.device)
        if need_x
        else grad_out.new_empty(0, dtype=x_dtype),
        like(layers.norm1_weight, reached),
        like(layers.norm1_bias, reached),
        like(layers.conv1_weight, [a and b for a, b in zip(need_conv1, reached, strict=True)]),
        like(layers.norm2_weight, reached2),
        like(layers.norm2_bias, reached2),
        like(layers.conv2_weight, [a and b for a, b in zip(need_conv2, reached2, strict=True)]),
    )


@torch.library.register_fake("fastdense::transition")
def _(x: Tensor, *args: Tensor, dtype: torch.dtype, **options: Any) -> Any:
    n, _, *spatial = x.shape
    return empty_channels_last((n, args[-1].shape[0], *(size // 2 for size in spatial)), dtype, x.device)


@torch.library.register_fake("fastdense::stem_tail")
def _(x: Tensor, *norm: Tensor, **options: Any) -> Any:
    n, c, *spatial = x.shape
    return empty_channels_last((n, c, *((size + 1) // 2 for size in spatial)), x.dtype, x.device)


@torch.library.register_fake("fastdense::stem_inference")
def _(x: Tensor, *args: Tensor, stride: list[int], padding: list[int], dtype: torch.dtype, **options: Any) -> Any:
    weight = args[-1]
    sizes = conv_sizes(x.shape[2:], weight.shape[2:], stride, padding)
    return empty_channels_last((len(x), len(weight), *((size + 1) // 2 for size in sizes)), dtype, x.device)


@torch.library.register_fake("fastdense::head")
def _(x: Tensor, *norm: Tensor, **options: Any) -> Any:
    return x.new_empty(x.shape[:2])


def _fake_norm_grads(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_channels_last(x.shape, x.dtype, x.device), torch.empty_like(weight), torch.empty_like(bias)


@torch.library.register_fake("fastdense::transition_backward")
def _(grad_out: Tensor, x: Tensor, *args: Tensor, need_weight: bool, **options: Any) -> Any:
    weight = args[-1]
    dweight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    return (*_fake_norm_grads(x, args[0], args[1]), dweight)


@torch.library.register_fake("fastdense::stem_tail_backward")
@torch.library.register_fake("fastdense::head_backward")
def _(grad_out: Tensor, x: Tensor, *norm: Tensor, **options: Any) -> Any:
    return _fake_norm_grads(x, norm[0], norm[1])


# -- autograd ------------------------------------------------------------------------------------------------


def _dense_block_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]
) -> None:
    x, *lists = inputs
    out, bottleneck, *stats = output
    ctx.set_materialize_grads(False)
    ctx.options = dict(keyword_only_inputs)
    del ctx.options["save_bottleneck"]
    ctx.x_dtype = x.dtype
    ctx.lengths = [len(tensors) for tensors in (bottleneck, *lists)]
    ctx.save_for_backward(out, *stats, *itertools.chain(bottleneck, *lists))


def _pieces(flat: Iterable[Any], lengths: list[int]) -> list[list[Any]]:
    flat = iter(flat)
    return [list(itertools.islice(flat, length)) for length in lengths]


def _dense_block_gradient(
    ctx: Any, need_x: bool, need_lists: list[list[bool]], grad_out: Tensor | None, backward: Callable[..., Any]
) -> tuple[Any, ...]:
    """Of x and of each list, from what ``_dense_block_context`` kept."""
    result: list[list[Tensor | None]] = [[None] * length for length in ctx.lengths[1:]]
    if grad_out is None:
        return (None, *result)
    [out, *stats], bottleneck, *lists = _pieces(ctx.saved_tensors, [5, *ctx.lengths])
    need = dict(zip(_LIST_FIELDS, need_lists, strict=True))
    either = {
        norm: [a or b for a, b in zip(need[f"{norm}_weight"], need[f"{norm}_bias"], strict=True)]
        for norm in ("norm1", "norm2")
    }
    dx, *gradients = backward(
        grad_out,
        out,
        bottleneck,
        *stats,
        *lists,
        **ctx.options,
        x_dtype=ctx.x_dtype,
        need_x=need_x,
        need_norm1=either["norm1"],
        need_conv1=list(need["conv1_weight"]),
        need_norm2=either["norm2"],
        need_conv2=list(need["conv2_weight"]),
    )
    by_field = dict(zip(_PARAMETER_FIELDS, gradients, strict=True))
    for i, field in enumerate(_LIST_FIELDS):
        if field in by_field:
            result[i] = [g if needed else None for g, needed in zip(by_field[field], need[field], strict=True)]
    return (dx if need_x else None, *result)


def _dense_block_op_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]
) -> None:
    _, bottleneck, *stats = output
    ctx.mark_non_differentiable(*bottleneck, *stats)
    _dense_block_context(ctx, inputs, keyword_only_inputs, output)


def _dense_block_op_gradient(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Any, ...]:
    need_x, *need_lists = ctx.needs_input_grad
    return _dense_block_gradient(ctx, need_x, need_lists, grad_out, torch.ops.fastdense.dense_block_backward)


torch.library.register_autograd(
    "fastdense::dense_block", _dense_block_op_gradient, setup_context=_dense_block_op_context
)


class FusedDenseBlock(torch.autograd.Function):
    """The op and its autograd without the dispatcher, which nothing sees.

    Boxing hundreds of tensors, and flattening and unflattening their lists, takes longer than the kernels of a small
    block.
    """

    @staticmethod
    def forward(
        ctx: Any, options: dict[str, Any], lengths: list[int], outputs: list[Any], x: Tensor, *flat: Tensor
    ) -> Tensor:
        """``lengths``: of the lists in ``flat``; what the op returns goes into ``outputs``."""
        lists = _pieces(flat, lengths)
        with torch._C._AutoDispatchBelowAutograd():
            outputs += _IMPLEMENTATIONS["dense_block"](x, *lists, **options)
        _dense_block_context(ctx, (x, *lists), options, tuple(outputs))
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]  # of one output
        need_x, *need_flat = ctx.needs_input_grad[3:]
        need_lists = _pieces(need_flat, ctx.lengths[1:])
        gradient = functools.partial(_dense_block_gradient, ctx, need_x, need_lists, grad_out)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or are_observed():
            dx, *lists = gradient(torch.ops.fastdense.dense_block_backward)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                dx, *lists = gradient(_IMPLEMENTATIONS["dense_block_backward"])
        return (None, None, None, dx, *itertools.chain(*lists))


def _dense_block_directly(x: Tensor, lists: list[list[Tensor]], options: dict[str, Any]) -> DenseBlockOutput:
    outputs: list[Any] = []
    outputs[0] = FusedDenseBlock.apply(options, list(map(len, lists)), outputs, x, *itertools.chain(*lists))
    return DenseBlockOutput(*outputs)


def _register_norm_autograd(name: str) -> None:
    """Autograd of an op ``(x, norm_weight, norm_bias, norm_mean, norm_var[, conv_weight])`` with one output."""
    backward_op = getattr(torch.ops.fastdense, f"{name}_backward")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
        ctx.options = dict(keyword_only_inputs)
        ctx.save_for_backward(*inputs)

    def gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad)
        options = dict(ctx.options)
        if len(needs) == 6:
            options["need_weight"] = needs[5]
        dx, dweight, dbias, *dconv = backward_op(grad_out, *ctx.saved_tensors, **options)
        gradients = (dx, dweight, dbias, None, None, *dconv)
        return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))

    torch.library.register_autograd(f"fastdense::{name}", gradient, setup_context=setup_context)


for _name in ("transition", "stem_tail", "head"):
    _register_norm_autograd(_name)


def _refuse_gradient(name: str) -> None:
    """Have autograd end at an op with an error, not with the gradients of what happens inside it."""

    def gradient(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"fastdense::{name} is not differentiable (for second derivatives, run the model inside "
            'fastdense.use_backend("reference"))'
        )

    torch.library.register_autograd(f"fastdense::{name}", gradient)


for _name in _SCHEMAS:
    if _name.endswith("_backward") or _name in ("dense_block_inference", "stem_inference", "channel_stats"):
        _refuse_gradient(_name)
