"""When the reference runs instead of an op: on request, for an obstacle, or where the op would not do as stock PyTorch.

An obstacle is warned of, so nothing is silently bypassed.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import backends
from .norms import groups
from .served import DIMS, BatchNorm, Conv, parameter


class FallbackWarning(UserWarning):
    """A fast module ran its reference definition instead."""


def fast_backend(module: nn.Module, x: Tensor, obstacle: str | None = None) -> str | None:
    """The backend for ``x``, or ``None`` where the reference must run: on request, or for an obstacle, warned of."""
    if not isinstance(x, Tensor) or x.dim() not in (3, 4, 5) or x.numel() == 0 or is_transformed():
        if groups([m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]) - {""}:
            # the other processes would wait for what the reference does not send
            raise ValueError(
                "SyncBatchNorm over several processes needs images [N, C, *spatial] on each, N >= 1, outside "
                f"torch.func's transforms; got {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        return None  # the reference knows what PyTorch does with these
    backend = backends.select(x.device, x.dtype, x.dim() - 2)
    if backend == backends.REFERENCE:
        return None
    if obstacle is None:
        return backend
    if not getattr(module, "_warned_of_fallback", False):
        module.__dict__["_warned_of_fallback"] = True
        _warn(f"{type(module).__name__} runs the reference implementation, without its savings: {obstacle}")
    return None


def _warn(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=4)


# Dynamo cannot trace a warning, and need not: this is torch.compiler.assume_constant_result without importing Dynamo
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_transformed() -> bool:
    """Inside torch.func's vmap, grad or jvp, or forward-mode differentiation, of which the ops know nothing."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What a stock convolution casts x to, ``None`` where it does not."""
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch 2.11's Dynamo cannot trace it


def conv_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What a stock convolution of x computes in."""
    return autocast_dtype(x) or weight.dtype


def stock_computes(x: Tensor, norm: BatchNorm, conv: Conv | None = None) -> bool:
    """Whether stock PyTorch takes x in this norm and this convolution; where not, the reference raises its error."""
    weight = None if conv is None else parameter(conv, "weight")
    if x.dim() != DIMS.get(type(norm), x.dim()) or (weight is not None and x.dim() != weight.dim()):
        return False
    if weight is not None and (weight.dtype == torch.float64 if autocast_dtype(x) else x.dtype != weight.dtype):
        return False
    vector = norm.weight if norm.weight is not None else norm.running_mean
    if any(tensor is not None and tensor.device != x.device for tensor in (weight, vector)):
        return False
    half = x.dtype in (torch.bfloat16, torch.float16)
    return vector is None or vector.dtype == x.dtype or (half and vector.dtype == torch.float32)


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch's convolutions take [N, C, *spatial] for channels-last; ambiguous strides count as contiguous.

    Sequences never are: PyTorch's norms make them contiguous.
    """
    if not isinstance(x, Tensor):  # a proxy of torch.fx
        return False
    return x.dim() in (4, 5) and x.stride(1) == 1 and x.stride(-1) == x.shape[1] > 1
