"""BatchNorm and ReLU as the fused passes need them: an affine map per channel, its statistics, its gradient.

With ``xhat = (x - mean) * rstd`` and ``rstd = 1 / sqrt(var + eps)``::

    z  = relu(gamma * xhat + beta) = relu(scale * x + shift)
    da = dz * 1[z > 0]         s1 = sum(da) = dbeta          s2 = sum(da * xhat) = dgamma
    dx = rstd * gamma * (da - (s1 + xhat * s2) / M)          (M -> infinity for running statistics)

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167); merging of statistics: Chan et al. 1979.
Tensors are [M, C] rows of pixels unless said otherwise; C may be a channel prefix of a wider buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import ChannelStats, Norm, NormGrads, accumulator_dtype


def rows(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels-last memory as [M, C], without a copy (an error where that is impossible)."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(n * h * w, c)


def images(x: Tensor, n: int, h: int, w: int) -> Tensor:
    """[M, C] as [N, C, H, W] in channels-last memory, without a copy."""
    return x.view(n, h, w, x.shape[1]).permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """[N, C, H, W] in dense channels-last memory; a copy only where it is not."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What convolutions of ``dtype`` compute in: itself, or float32 on CPUs that only emulate it, slowly."""
    if device.type == "cpu" and (
        (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported())
        or (dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported())
    ):
        return torch.float32
    return dtype


def affine(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale [C] and shift [C] of a BatchNorm, computed and returned in ``dtype``."""
    scale = norm.weight.to(dtype) * torch.rsqrt(norm.var.to(dtype) + norm.eps)
    return scale, torch.addcmul(norm.bias.to(dtype), norm.mean.to(dtype), scale, value=-1)


def affine_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(scale * x + shift) of [M, C], in the dtype of the vectors. NaN propagates."""
    return torch.addcmul(shift, x.to(scale.dtype), scale).relu_()


def norm_relu(x: Tensor, norm: Norm) -> Tensor:
    """BatchNorm and ReLU of [N, C, H, W], in the accumulator dtype and channels-last memory."""
    n, _, h, w = x.shape
    scale, shift = affine(norm, accumulator_dtype(x.dtype))
    return images(affine_relu(rows(channels_last(x)), scale, shift), n, h, w)


def row_stats(x: Tensor) -> ChannelStats:
    """Mean and biased variance of dense [M, C], in the accumulator dtype."""
    image = x.to(accumulator_dtype(x.dtype)).t()[None, :, :, None]  # one channels-last image of M rows
    return ChannelStats(*torch.batch_norm_update_stats(image, None, None, 0.0))


def channel_stats(x: Tensor) -> ChannelStats:
    """Mean and biased variance of each channel of [N, C, H, W]."""
    return row_stats(rows(channels_last(x)))


def zero_stats(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> ChannelStats:
    """Room for the statistics of a tensor of ``dtype``."""
    zeros = [torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device) for _ in range(2)]
    return ChannelStats(*zeros)


def merge_stats(parts: list[ChannelStats], counts: list[int]) -> ChannelStats:
    """Statistics of the whole from those of its parts, in the order given (Chan's formula)."""
    if len(parts) == 1:
        return parts[0]
    means = torch.stack([part.mean for part in parts])  # [parts, C]
    variances = torch.stack([part.var for part in parts])
    share = torch.tensor(counts, dtype=means.dtype, device=means.device).div_(sum(counts)).unsqueeze_(1)
    mean = (means * share).sum(0)
    return ChannelStats(mean, ((variances + (means - mean).square_()) * share).sum(0))


def norm_sums(da: Tensor, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Over the rows: s1 = sum(da) [C], and sum(da * (x - mean)) = s2 / rstd [C]."""
    return da.sum(0), (x.to(da.dtype) - norm.mean.to(da.dtype)).mul_(da).sum(0)


def norm_gradients(sums: tuple[Tensor, Tensor], norm: Norm, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dgamma, dbeta, and what flows to the input through the batch statistics as ``-p - q * (x - mean)``.

    From the two sums over ``count`` rows; all [C]. p and q are zero where the statistics are running ones.
    For norms that share their batch statistics they add up, so that one correction serves all of them.
    """
    s1, centred = sums
    rstd = torch.rsqrt(norm.var.to(s1.dtype) + norm.eps)
    through_stats = norm.weight.to(s1.dtype) * rstd * (norm.batch_stats / count)
    p, q = through_stats * s1, through_stats * rstd.square() * centred
    return (centred * rstd).to(norm.weight.dtype), s1.to(norm.bias.dtype), p, q


def corrected(raw: Tensor, x: Tensor, mean: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """raw - p - q * (x - mean), in the dtype of ``raw``."""
    return torch.addcmul(raw, x.to(raw.dtype) - mean.to(raw.dtype), q, value=-1).sub_(p)


def norm_relu_backward(dz: Tensor, z: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    """Gradient of ``z = relu(norm(x))``, all [N, C, H, W]; dx of x's dtype, in channels-last memory."""
    n, _, h, w = x.shape
    da = rows(channels_last(torch.ops.aten.threshold_backward(dz, z, 0)))
    x_rows = rows(channels_last(x))
    dweight, dbias, p, q = norm_gradients(norm_sums(da, x_rows, norm), norm, len(x_rows))
    scale, _ = affine(norm, da.dtype)
    dx = corrected(da.mul_(scale), x_rows, norm.mean, p, q).to(x.dtype)
    return NormGrads(images(dx, n, h, w), dweight, dbias)
