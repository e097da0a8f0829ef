"""The ends of a network, whose parts are stock modules: stem and head, each in one op where that computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, checks, ops, reference
from .backends import Prepared
from .fallback import conv_dtype, fast_backend, stock_computes
from .kernels.contract import Norm, conv_sizes, in_channels_last
from .norms import BatchStats, norm_for, running_norm
from .served import DIMS, BatchNorm, Conv, parameter, unusual, unusual_stem

StemArguments = tuple[Norm, Tensor, tuple[int, ...], tuple[int, ...]]


def stem_tail(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    """``pool(relu(norm(x)))`` in one pass where the parts are a stem's, else one by one.

    ``parts``: norm, ReLU and pool, without the ReLU where the norm carries it.
    """
    norm, backend = cast(BatchNorm, parts[0]), _backend_of(parts, x)
    if backend is None:
        for part in parts:
            x = part(x)
        return x
    x = in_channels_last(x)  # once for the statistics, the pool and the backward
    return ops.stem_tail(x, norm_for(norm, x, None, backend), backend=backend)


def stem(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    """``pool(relu(norm(conv(x))))``: in one pass in evaluation without autograd where a backend has that, else in two.

    ``parts``: the convolution, then as of :func:`stem_tail`.
    """
    found = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else _stem(parts, x)
    if found is None:
        if _backend_of(parts[1:], x) is not None:
            x = ops.before_stem(x)
        return stem_tail(parts[1:], parts[0](x))
    arguments, dtype, backend = found
    return ops.stem_inference(x, *arguments, dtype=dtype, backend=backend)


def prepared_stem(parts: Sequence[nn.Module], x: Tensor) -> Prepared | None:
    """What makes :func:`stem` of x, and of tensors like it, without autograd; ``None`` for no such."""
    found = _stem(parts, x)
    if found is None:
        return None
    arguments, dtype, backend = found
    prepare = backends.preparation(backend, "stem_inference")
    checks.check_stem(x, *arguments)
    return prepare and prepare(*arguments, x_dtype=x.dtype, dtype=dtype)


def stem_arguments(parts: Sequence[nn.Module]) -> StemArguments | None:
    """Of ``ops.stem_inference``, after x; ``None`` where it would not reproduce the parts."""
    conv, norm = cast(Conv, parts[0]), cast(BatchNorm, parts[1])
    running = running_norm(norm)
    if unusual_stem(conv) or any(map(unusual, parts[1:])) or running is None:
        return None
    weight = parameter(conv, "weight")
    if len(weight) != len(running.weight) or weight.dim() != DIMS[type(parts[-1])]:
        return None  # stock PyTorch raises its error
    return running, weight, conv.stride, cast(tuple[int, ...], conv.padding)


def _stem(parts: Sequence[nn.Module], x: Tensor) -> tuple[StemArguments, torch.dtype, str] | None:
    """The same, with the dtype and backend for x, where that has such an op."""
    conv, norm = cast(Conv, parts[0]), cast(BatchNorm, parts[1])
    arguments, backend = stem_arguments(parts), fast_backend(conv, x)
    if arguments is None or backend is None or backends.preparation(backend, "stem_inference") is None:
        return None
    running, weight, stride, padding = arguments
    if not stock_computes(x, norm, conv) or x.shape[1] != weight.shape[1] or not ops.are_plain([*running[:4], weight]):
        return None
    if min(conv_sizes(x.shape[2:], weight.shape[2:], stride, padding)) < 1:
        return None
    return arguments, conv_dtype(x, weight), backend


def prepared_stem_tail(parts: Sequence[nn.Module], x: Tensor) -> Prepared | None:
    """What makes :func:`stem_tail` of x, and of tensors like it, without autograd; ``None`` for no such."""
    return _prepared_from_norm("stem_tail", parts, x)


def head(norm: BatchNorm, x: Tensor, stats: BatchStats | None) -> Tensor:
    """norm, ReLU and global average pool of [N, C, *spatial] in one pass where possible: [N, C]."""
    backend = _backend_of([norm], x)
    if backend is None:
        return reference.global_avg_pool(F.relu(norm(x), inplace=True))
    return ops.head(x, norm_for(norm, x, stats, backend), backend=backend)


def prepared_head(norm: BatchNorm, x: Tensor) -> Prepared | None:
    """What makes :func:`head` of x, and of tensors like it, without autograd; ``None`` for no such."""
    return _prepared_from_norm("head", [norm], x)


def _prepared_from_norm(op: str, parts: Sequence[nn.Module], x: Tensor) -> Prepared | None:
    running, backend = running_norm(cast(BatchNorm, parts[0])), _backend_of(parts, x)
    prepare = None if backend is None else backends.preparation(backend, op)
    if prepare is None or running is None or not ops.are_plain(running[:4]):
        return None
    checks.check_norm(op, x, running)
    return prepare(running, x_dtype=x.dtype)


def _backend_of(parts: Sequence[nn.Module], x: Tensor) -> str | None:
    """The backend for stock modules from a norm on; ``None`` where they must run one by one."""
    norm = cast(BatchNorm, parts[0])
    backend = None if any(map(unusual, parts)) else fast_backend(norm, x)
    return backend if backend is not None and stock_computes(x, norm) else None
