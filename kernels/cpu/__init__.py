"""C++ kernels for x86: forward at given statistics, chosen at run time for AVX2, AVX-512 and AMX.

What needs a batch's statistics or a gradient is the portable algorithm's. See
:mod:`fastdense.kernels.contract` for what the functions compute.
"""

from __future__ import annotations

from ctypes import Array, c_void_p, sizeof

import torch
from torch import Tensor

from ..contract import DenseLayers, Norm, empty_channels_last
from ..portable import (
    channel_stats,
    dense_block,
    dense_block_backward,
    head_backward,
    stem_tail_backward,
    transition_backward,
)
from .library import DTYPES, DenseBlockArgs, Library, NormArgs, PoolArgs, TransitionArgs, load
from .packing import packed

__all__ = [
    "channel_stats",
    "dense_block",
    "dense_block_backward",
    "dense_block_inference",
    "head",
    "head_backward",
    "stem_tail",
    "stem_tail_backward",
    "transition",
    "transition_backward",
]


def dense_block_inference(x: Tensor, layers: DenseLayers, dtype: torch.dtype) -> Tensor:
    """Forward with running statistics: X alone, [N, C_L, H, W]."""
    library = _library()
    n, c0, h, w = x.shape
    store = torch.promote_types(x.dtype, dtype)
    pixels = _pixels(x, store)
    out = empty_channels_last((n, layers.output_channels, h, w), store, x.device)
    weights = packed(library, layers.conv1_weight + layers.conv2_weight, dtype)
    first, second = weights[: layers.num_layers], weights[layers.num_layers :]
    norm_args = _NormArgs(
        layers.norm1_weight + layers.norm2_weight,
        layers.norm1_bias + layers.norm2_bias,
        layers.norm1_running_mean + layers.norm2_running_mean,
        layers.norm1_running_var + layers.norm2_running_var,
        layers.norm1_eps + layers.norm2_eps,
    )
    library.run(
        "dense_block",
        DenseBlockArgs(
            images=n,
            height=h,
            width=w,
            input_channels=c0,
            growth_rate=layers.growth_rate,
            bottleneck_channels=layers.bottleneck_channels,
            layers=layers.num_layers,
            x=pixels.data_ptr(),
            out=out.data_ptr(),
            norm1=norm_args.array,
            norm2=norm_args.array_from(layers.num_layers),
            conv1=_pointers(first if second else []),
            conv3=_pointers(second or first),
            store=DTYPES[store],
            compute=DTYPES[dtype],
            norm_dtype=norm_args.dtype,
        ),
    )
    return out


def transition(x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, C, H, W], [C', C, 1, 1] -> [N, C', H//2, W//2] of ``dtype``, channels-last."""
    library = _library()
    n, c, h, w = x.shape
    pixels = _pixels(x, x.dtype)
    out = empty_channels_last((n, len(weight), h // 2, w // 2), dtype, x.device)
    (conv,) = packed(library, [weight], dtype)
    norm_args = _NormArgs.of(norm)
    library.run(
        "transition",
        TransitionArgs(
            images=n,
            height=h,
            width=w,
            channels=c,
            out_channels=len(weight),
            x=pixels.data_ptr(),
            out=out.data_ptr(),
            norm=norm_args.array[0],
            conv=conv.data_ptr(),
            store=DTYPES[x.dtype],
            compute=DTYPES[dtype],
            norm_dtype=norm_args.dtype,
        ),
    )
    return out


def stem_tail(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)], of x's dtype."""
    n, c, h, w = x.shape
    out = empty_channels_last((n, c, (h + 1) // 2, (w + 1) // 2), x.dtype, x.device)
    _pool("stem_tail", x, norm, out)
    return out


def head(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, H, W] -> [N, C], of x's dtype."""
    out = x.new_empty(x.shape[:2])
    _pool("head", x, norm, out)
    return out


def _pool(name: str, x: Tensor, norm: Norm, out: Tensor) -> None:
    n, c, h, w = x.shape
    pixels, norm_args = _pixels(x, x.dtype), _NormArgs.of(norm)
    _library().run(
        name,
        PoolArgs(
            images=n,
            height=h,
            width=w,
            channels=c,
            x=pixels.data_ptr(),
            out=out.data_ptr(),
            norm=norm_args.array[0],
            store=DTYPES[x.dtype],
            norm_dtype=norm_args.dtype,
        ),
    )


def _library() -> Library:
    library = load()
    if isinstance(library, str):
        raise RuntimeError(f"backend 'cpu' cannot run: {library}")
    return library


def _pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dense channels-last memory, of ``dtype``; itself where it is so already."""
    x = x.detach().to(dtype)
    n, c, h, w = x.shape
    if x.stride() == (h * w * c, 1, w * c, c):
        return x
    return torch.empty((n, h, w, c), dtype=dtype, device=x.device).copy_(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _pointers(tensors: list[Tensor]) -> Array[c_void_p] | None:
    return (c_void_p * len(tensors))(*[t.data_ptr() for t in tensors]) if tensors else None


class _NormArgs:
    """BatchNorms as C++ takes them; keeps alive what the pointers point to.

    Attributes:
        array: one entry a norm.
        dtype: the number of the dtype of all their vectors.
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor],
        means: list[Tensor],
        variances: list[Tensor],
        eps: list[float],
    ):
        columns = [weights, biases, means, variances]
        dtypes = {vector.dtype for vectors in columns for vector in vectors}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        if dtype not in DTYPES:
            dtype = torch.float32
        self._columns = [
            [v if v.dtype == dtype and v.is_contiguous() else v.to(dtype).contiguous() for v in vectors]
            for vectors in columns
        ]
        self.dtype = DTYPES[dtype]
        pointers = [[vector.data_ptr() for vector in vectors] for vectors in self._columns]
        self.array = (NormArgs * len(eps))(*map(NormArgs, *pointers, eps))

    @staticmethod
    def of(norm: Norm) -> _NormArgs:
        return _NormArgs([norm.weight], [norm.bias], [norm.mean], [norm.var], [norm.eps])

    def array_from(self, start: int) -> Array[NormArgs] | None:
        count = len(self.array) - start
        return (NormArgs * count).from_buffer(self.array, start * sizeof(NormArgs)) if count else None
