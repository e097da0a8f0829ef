"""Launching on the tensors' own device, whichever is current."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def on_device(function: F) -> F:
    """Run ``function(tensor, ...)`` with the tensor's GPU current: Triton launches on the current one."""

    @functools.wraps(function)
    def run(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.float64:
            raise TypeError("the Triton kernels compute in float32, bfloat16 and float16, got float64")
        with current(tensor.device):
            return function(tensor, *args, **kwargs)

    return run  # type: ignore[return-value]


def current(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Have a GPU be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def ceil_div(value: int, by: int) -> int:
    """``triton.cdiv`` for the host: that is made for kernels too, and takes many times as long."""
    return -(-value // by)


def next_power_of_2(value: int) -> int:
    """The least that is not below ``value``, for the host."""
    return 1 << (value - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; an H100's where there is no GPU to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
