"""Transition: BatchNorm, ReLU, 2x2 average pool and 1x1 convolution, in one pass over x.

The pool and the 1x1 convolution commute exactly, so the prologue pools and the multiply has a quarter of the rows::

    z = relu(scale * x + shift)        out[p] = (mean of z over the 2x2 pixels of p) @ W^T        W: [N, K]

Backward, the products are the vendor library's: dz pooled is dout @ W, and dW is dout^T @ z pooled, which is made
again. The norm's gradient takes two passes over x, its correction being known after the first.

The batch statistics of ``out`` are made where it is copied into the next block's buffer, by the pass that reads
it anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Norm, TransitionGrads, empty_channels_last
from ..portable.batch_norm import affine, laid_out_as, rows
from . import tuning
from .conv1x1 import precision
from .gradients import average_backward
from .launch import ceil_div, on_device
from .prepared import PreparedNorm
from .tile_math import affine_relu


@triton.jit
def _pooled(x_ptrs, stride_xh, stride_xw, mask, scale, shift):
    """The mean of z over the 2x2 pixels whose first are at ``x_ptrs``."""
    z = affine_relu(tl.load(x_ptrs, mask=mask, other=0.0), scale, shift)
    z += affine_relu(tl.load(x_ptrs + stride_xw, mask=mask, other=0.0), scale, shift)
    z += affine_relu(tl.load(x_ptrs + stride_xh, mask=mask, other=0.0), scale, shift)
    z += affine_relu(tl.load(x_ptrs + stride_xh + stride_xw, mask=mask, other=0.0), scale, shift)
    return z * 0.25


@triton.jit
def _bn_relu_pool_conv1x1_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, w_ptr, out_ptr,
    M, H_OUT, W_OUT, K, N, stride_xn, stride_xc, stride_xh, stride_xw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, N], rows of pooled pixels, from x [N, K, H, W] of any strides."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    pixel = offs_m % (H_OUT * W_OUT)
    corner = offs_m // (H_OUT * W_OUT) * stride_xn
    corner += pixel // W_OUT * 2 * stride_xh + pixel % W_OUT * 2 * stride_xw
    x_ptrs = x_ptr + corner[:, None] + offs_k.to(tl.int64)[None, :] * stride_xc
    w_ptrs = w_ptr + offs_n[None, :] * K + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        w = tl.load(w_ptrs + k, mask=mask_n[None, :] & mask_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        scale = tl.load(scale_ptr + k + offs_k, mask=mask_k, other=0.0)
        shift = tl.load(shift_ptr + k + offs_k, mask=mask_k, other=0.0)
        mask = mask_m[:, None] & mask_k[None, :]
        z = _pooled(x_ptrs + k * stride_xc, stride_xh, stride_xw, mask, scale, shift)  # [BLOCK_M, BLOCK_K]
        acc = tl.dot(z.to(w.dtype), w, acc, input_precision=PRECISION)
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


class PreparedTransition(PreparedNorm):
    """A transition at given statistics: vectors made and weights packed."""

    def __init__(self, norm: Norm, weight: Tensor, x_dtype: torch.dtype, dtype: torch.dtype):
        super().__init__(norm, x_dtype)
        self._weight = weight.flatten(1).to(dtype).contiguous()

    def run(self, x: Tensor) -> Tensor:
        images, k, h, w = x.shape
        n, dtype = self._weight.shape[0], self._weight.dtype
        out = empty_channels_last((images, n, h // 2, w // 2), dtype, x.device)
        m = images * (h // 2) * (w // 2)
        config = tuning.transition_fwd(m, n, k, dtype, x.device)
        _bn_relu_pool_conv1x1_fwd_kernel[(ceil_div(m, config.BLOCK_M), ceil_div(n, config.BLOCK_N))](
            x, *self.vectors, self._weight, out,
            m, h // 2, w // 2, k, n, *x.stride(),
            PRECISION=precision(dtype), **config.arguments,
        )  # fmt: skip
        return out


def transition(x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, C, H, W], [C', C, 1, 1] -> [N, C', H//2, W//2] of ``dtype``, channels-last."""
    return PreparedTransition(norm, weight, x.dtype, dtype)(x)


@triton.jit
def _bn_relu_pool_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr,
    M, C, H_OUT, W_OUT, stride_xn, stride_xc, stride_xh, stride_xw,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """z pooled [M, C], which the forward only has in registers, from x [N, C, H, W] of any strides."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    pixel = offs_m % (H_OUT * W_OUT)
    corner = offs_m // (H_OUT * W_OUT) * stride_xn
    corner += pixel // W_OUT * 2 * stride_xh + pixel % W_OUT * 2 * stride_xw
    x_ptrs = x_ptr + corner[:, None] + offs_c.to(tl.int64)[None, :] * stride_xc
    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0)
    z = _pooled(x_ptrs, stride_xh, stride_xw, mask, scale, shift)
    tl.store(out_ptr + offs_m[:, None] * C + offs_c[None, :], z.to(out_ptr.dtype.element_ty), mask=mask)


@on_device
def transition_backward(
    grad_out: Tensor, x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype, need_weight: bool
) -> TransitionGrads:
    c = x.shape[1]
    windows = (x.shape[2] // 2, x.shape[3] // 2)
    dout, vectors = rows(grad_out).to(dtype), affine(norm, torch.float32)
    dweight = weight.new_empty(0)
    if need_weight:
        pooled = torch.empty((len(dout), c), dtype=dtype, device=x.device)
        config = tuning.elementwise(c, x.device)
        _bn_relu_pool_fwd_kernel[(ceil_div(len(dout), config.BLOCK_M), ceil_div(c, config.BLOCK_C))](
            x, vectors.scale, vectors.shift, pooled, len(dout), c, *windows, *x.stride(), **config.arguments
        )
        dweight = laid_out_as((dout.t() @ pooled).view(weight.shape), weight)
    dpooled = dout @ weight.flatten(1).to(dtype)
    return TransitionGrads(*average_backward(dpooled, x, norm, vectors, windows, (2, 2)), dweight)
