"""BatchNorm and ReLU as the fused passes need them: an affine map per channel, its statistics, its gradient.

With ``xhat = (x - mean) * rstd`` and ``rstd = 1 / sqrt(var + eps)``::

    z  = relu(gamma * xhat + beta) = relu(scale * x + shift)
    da = dz * 1[z > 0]         s1 = sum(da) = dbeta          s2 = sum(da * xhat) = dgamma
    dx = scale * da + p + q * (x - mean)        p = -scale * s1 / M        q = -scale * rstd * s2 / M

where M counts the pixels; p = q = 0 for running statistics, which do not depend on x.

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167); merging of statistics: Chan et al. 1979.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import ChannelStats, Norm, NormGrads, accumulator_dtype


def rows(x: Tensor) -> Tensor:
    """[N, C, H, W] as [M, C]; without a copy where it lies in channels-last memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images(x: Tensor, n: int, h: int, w: int) -> Tensor:
    """Dense [M, C] as [N, C, H, W] in channels-last memory, without a copy."""
    return x.view(n, h, w, x.shape[1]).permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """[N, C, H, W] in dense channels-last memory; a copy only where it is not."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, but free where there is nothing to do: a pass has many small vectors."""
    return x if x.dtype == dtype else x.to(dtype)


def laid_out_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A parameter's gradient in the parameter's dtype and strides, so that accumulating it moves nothing."""
    gradient = cast(gradient, parameter.dtype)
    strides = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    if all(ours == theirs for size, ours, theirs in strides if size > 1):
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What convolutions of ``dtype`` compute in: itself, or float32 on CPUs that only emulate it, slowly."""
    if device.type == "cpu" and (
        (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported())
        or (dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported())
    ):
        return torch.float32
    return dtype


class Affine(NamedTuple):
    """A BatchNorm with known statistics; all [C], of the accumulator dtype."""

    scale: Tensor  # gamma * rstd
    shift: Tensor  # beta - mean * scale
    mean: Tensor
    rstd: Tensor


def affine(norm: Norm, dtype: torch.dtype) -> Affine:
    """The vectors of a BatchNorm, computed and returned in ``dtype``."""
    mean, rstd = cast(norm.mean, dtype), torch.rsqrt(cast(norm.var, dtype) + norm.eps)
    scale = cast(norm.weight, dtype) * rstd
    return Affine(scale, torch.addcmul(cast(norm.bias, dtype), mean, scale, value=-1), mean, rstd)


def affine_relu(x: Tensor, vectors: Affine) -> Tensor:
    """relu(scale * x + shift) of [M, C], in the dtype of the vectors. NaN propagates."""
    return torch.addcmul(vectors.shift, cast(x, vectors.scale.dtype), vectors.scale).relu_()


def row_stats(x: Tensor) -> ChannelStats:
    """Mean and biased variance over the rows of [M, C], in the accumulator dtype.

    PyTorch adds up rows pairwise, so no digits are lost in long sums; what the rounded mean is off, for a channel
    whose mean is far larger than its deviation, the deviations themselves tell.
    """
    x = cast(x, accumulator_dtype(x.dtype))
    mean = x.mean(0)
    deviation = x - mean
    off = deviation.mean(0)
    return ChannelStats(mean + off, deviation.square_().mean(0).addcmul_(off, off, value=-1))


def channel_stats(x: Tensor) -> ChannelStats:
    """Mean and biased variance of each channel of [N, C, H, W], in the accumulator dtype."""
    return row_stats(rows(x))


def zero_stats(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> ChannelStats:
    """Room for the statistics of a tensor of ``dtype``."""
    zeros = [torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device) for _ in range(2)]
    return ChannelStats(*zeros)


def merge_stats(parts: list[ChannelStats], counts: list[int]) -> ChannelStats:
    """Statistics of the whole from those of its parts, in the order given (Chan's formula)."""
    if len(parts) == 1:
        return parts[0]
    means, variances = (torch.stack(vectors) for vectors in zip(*parts, strict=True))  # [parts, C]
    share = torch.tensor(counts, dtype=means.dtype, device=means.device).div_(sum(counts)).unsqueeze_(1)
    mean = (means * share).sum(0)
    return ChannelStats(mean, ((variances + (means - mean).square_()) * share).sum(0))


def mask_by_relu_(dz: Tensor, z: Tensor) -> Tensor:
    """da = dz * 1[z > 0], in place."""
    return torch.ops.aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)


def norm_sums(da: Tensor, x: Tensor, vectors: Affine) -> tuple[Tensor, Tensor]:
    """s1 = sum(da) [C] and s2 = sum(da * xhat) [C] over the rows of [M, C], both of the accumulator dtype."""
    return da.sum(0), (x - vectors.mean).mul_(da).sum(0).mul_(vectors.rstd)


class Correction(NamedTuple):
    """What flows to the input of a norm through its batch statistics: ``p + q * (x - mean)``, all [C].

    Norms that share their statistics add up their p and q, so that one correction serves all of them.
    """

    mean: Tensor
    p: Tensor
    q: Tensor


def correction(s1: Tensor, s2: Tensor, vectors: Affine, count: int) -> Correction:
    """Of a norm that uses the statistics of its batch of ``count`` pixels."""
    share = vectors.scale * (-1 / count)
    return Correction(vectors.mean, share * s1, share.mul_(vectors.rstd).mul_(s2))


def input_gradient(da: Tensor, scale: Tensor, x: Tensor, through: Correction | None) -> Tensor:
    """scale * da + p + q * (x - mean) of [M, C], of da's dtype; ``None`` for running statistics."""
    if through is None:
        return da * scale
    centred = cast(x, da.dtype) - through.mean
    return torch.addcmul(through.p, centred, through.q, out=centred).addcmul_(da, scale)


def norm_relu(x: Tensor, norm: Norm) -> Tensor:
    """BatchNorm and ReLU of [N, C, H, W], in the accumulator dtype and channels-last memory."""
    n, _, h, w = x.shape
    return images(affine_relu(rows(x), affine(norm, accumulator_dtype(x.dtype))), n, h, w)


def norm_relu_backward(dz: Tensor, z: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    """Gradient of ``z = relu(norm(x))``, all [N, C, H, W]; overwrites dz; dx of x's dtype, in channels-last memory."""
    n, _, h, w = x.shape
    vectors = affine(norm, z.dtype)
    da, x_rows = rows(mask_by_relu_(channels_last(dz), z)), rows(cast(x, z.dtype)).contiguous()
    s1, s2 = norm_sums(da, x_rows, vectors)
    through = correction(s1, s2, vectors, len(x_rows)) if norm.batch_stats else None
    dx = input_gradient(da, vectors.scale, x_rows, through)
    return NormGrads(images(cast(dx, x.dtype), n, h, w), cast(s2, norm.weight.dtype), cast(s1, norm.bias.dtype))
