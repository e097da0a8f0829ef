"""BatchNorm and ReLU as the fused passes need them: an affine map per channel, its statistics, its gradient.

With ``xhat = (x - mean) * rstd`` and ``rstd = 1 / sqrt(var + eps)``::

    z  = relu(gamma * xhat + beta) = relu(scale * x + shift)
    da = dz * 1[z > 0]         s1 = sum(da) = dbeta          s2 = sum(da * xhat) = dgamma
    dx = scale * da + p + q * (x - mean)        p = -scale * s1 / M        q = -scale * rstd * s2 / M

where M counts the pixels; p = q = 0 for running statistics, which do not depend on x.

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167); merging of statistics: Chan et al. 1979.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import ChannelStats, Norm, NormGrads, accumulator_dtype
from ..group import Group, join
from .chunks import Chunk, Scratch, chunks


def rows(x: Tensor) -> Tensor:
    """[N, C, *spatial] as [M, C]; without a copy where it lies in channels-last memory."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        n, channels, height, width = x.shape
        return x.as_strided((n * height * width, channels), (channels, 1))
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def images(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Dense [M, C] as [N, C, *spatial] in channels-last memory, without a copy; ``shape`` is (N, *spatial)."""
    if len(shape) == 3:
        (n, height, width), channels = shape, x.shape[1]
        strides = (height * width * channels, 1, width * channels, channels)
        return x.as_strided((n, channels, height, width), strides)
    return x.view(*shape, x.shape[1]).movedim(-1, 1)


def prefix(x: Tensor, channels: int) -> Tensor:
    """The first channels of [M, C] or [C]."""
    return x.narrow(-1, 0, channels)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, but free where there is nothing to do: a pass has many small vectors."""
    return x if x.dtype == dtype else x.to(dtype)


def laid_out_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A parameter's gradient in the parameter's dtype and strides, so that accumulating it moves nothing.

    Also in the strides of dimensions of one element, which mean nothing, but which DistributedDataParallel compares.
    """
    gradient = cast(gradient, parameter.dtype)
    if gradient.stride() == parameter.stride():
        return gradient
    strides = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    if all(ours == theirs for size, ours, theirs in strides if size > 1):
        return gradient.as_strided(parameter.shape, parameter.stride())
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

    weight: Tensor  # gamma
    scale: Tensor  # gamma * rstd
    shift: Tensor  # beta - mean * scale
    mean: Tensor
    rstd: Tensor


def affines(norms: list[Norm], dtype: torch.dtype) -> list[Affine]:
    """The vectors of some BatchNorms, computed and returned in ``dtype``."""
    if not norms:
        return []
    weights, biases, means, variances = (
        [cast(getattr(norm, name), dtype) for norm in norms] for name in ("weight", "bias", "mean", "var")
    )
    rstds = torch._foreach_rsqrt(torch._foreach_add(variances, [norm.eps for norm in norms]))
    scales = torch._foreach_mul(weights, rstds)
    shifts = torch._foreach_addcmul(biases, means, scales, value=-1)
    return list(map(Affine, weights, scales, shifts, means, rstds))


def affine(norm: Norm, dtype: torch.dtype) -> Affine:
    """The vectors of one BatchNorm."""
    weight, bias = cast(norm.weight, dtype), cast(norm.bias, dtype)
    mean, var = cast(norm.mean, dtype), cast(norm.var, dtype)
    rstd = var.add(norm.eps).rsqrt_()
    scale = weight * rstd
    return Affine(weight, scale, torch.addcmul(bias, mean, scale, value=-1), mean, rstd)


def affine_map(x: Tensor, vectors: Affine, out: Tensor) -> Tensor:
    """scale * x + shift of [M, C], in the dtype of the vectors."""
    return torch.addcmul(vectors.shift, cast(x, vectors.scale.dtype), vectors.scale, out=out)


def affine_relu(x: Tensor, vectors: Affine, out: Tensor) -> Tensor:
    """relu(scale * x + shift) of [M, C], in the dtype of the vectors. NaN propagates."""
    return affine_map(x, vectors, out).relu_()


def _as_norms_see(x: Tensor, chunk: Chunk) -> Tensor:
    """A chunk's [M, C] in the layout that PyTorch's own norms would have it in, whose kernels differ in exactness.

    As one image [1, C, M, 1] in channels-last memory; of sequences and volumes on CPUs contiguous, [1, C, M], whose
    sums are exacter there.
    """
    if x.device.type == "cpu" and not chunk.is_of_images:
        return x.t().contiguous().unsqueeze(0)
    (pixels, channels), (step, inner) = x.shape, x.stride()
    return x.as_strided((1, channels, pixels, 1), (pixels * step, inner, step, step))


def row_stats(x: Tensor, chunk: Chunk) -> ChannelStats:
    """Mean and biased variance of each channel of a chunk's [M, C], in the accumulator dtype."""
    x = _as_norms_see(cast(x, accumulator_dtype(x.dtype)), chunk)
    return ChannelStats(*torch.batch_norm_update_stats(x, None, None, 0.0))


def channel_stats(x: Tensor) -> ChannelStats:
    """Mean and biased variance of each channel of [N, C, *spatial], in the accumulator dtype."""
    source, parts = rows(x), chunks(x.shape, x.device)
    return merge_stats([row_stats(chunk.of(source).contiguous(), chunk) for chunk in parts], parts)


def zero_stats(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> ChannelStats:
    """Room for the statistics of a tensor of ``dtype``."""
    zeros = [torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device) for _ in range(2)]
    return ChannelStats(*zeros)


def merge_stats(stats: list[ChannelStats], parts: Sequence[Chunk]) -> ChannelStats:
    """Statistics of the whole from those of its parts, in the order given (Chan's formula)."""
    if len(stats) == 1:
        return stats[0]
    means, variances = (torch.stack(vectors) for vectors in zip(*stats, strict=True))  # [parts, C]
    counts = torch.tensor([chunk.pixels for chunk in parts], dtype=means.dtype, device=means.device)
    share = counts.div_(counts.sum()).unsqueeze_(1)
    mean = (means * share).sum(0)
    return ChannelStats(mean, ((variances + (means - mean).square_()) * share).sum(0))


def mask_by_relu(dz: Tensor, z: Tensor, out: Tensor) -> Tensor:
    """da = dz * 1[z > 0], into ``out``, which may be dz."""
    return torch.ops.aten.threshold_backward.grad_input(dz, z, 0, grad_input=out)


def norm_sums(da: Tensor, x: Tensor, vectors: Affine, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """s1 = sum(da) and s2 = sum(da * xhat), both [C], of a chunk's dense [M, C] of the accumulator dtype."""
    _, s1, s2 = _native_backward(_as_norms_see(da, chunk), _as_norms_see(x, chunk), vectors, need_x=False)
    return s1, s2


def norms_at_once(x: Tensor, acc: torch.dtype, parts: Sequence[Chunk], group: Group | None) -> bool:
    """Whether :func:`norm_backward` serves x [M, C], cut into ``parts``."""
    return x.dtype == acc and x.is_contiguous() and parts[0].is_of_images and group is None


def norm_backward(da: Tensor, x: Tensor, vectors: Affine) -> tuple[Tensor, Tensor, Tensor]:
    """dx [M, C], s1 and s2 of a norm with the statistics of its batch, which is all of da and x, dense [M, C]."""
    dx, s1, s2 = _native_backward(images(da, (1, da.shape[0], 1)), images(x, (1, x.shape[0], 1)), vectors, need_x=True)
    return rows(dx), s1, s2


def _native_backward(da: Tensor, x: Tensor, vectors: Affine, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx of a norm with the statistics of its batch, if needed, s1 and s2, in one pass of PyTorch's own."""
    dx, s2, s1 = torch.ops.aten.native_batch_norm_backward(
        da, x, vectors.weight, None, None, vectors.mean, vectors.rstd, True, 0.0, [need_x, True, True]
    )
    return dx, s1, s2


def add_up(sums: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """s1 and s2 of the whole from those of its chunks."""
    if len(sums) == 1:
        return sums[0]
    s1, s2 = (torch.stack(vectors).sum(0) for vectors in zip(*sums, strict=True))
    return s1, s2


class Correction(NamedTuple):
    """What flows to the input of norms through their batch statistics: ``p + q * (x - mean)``, all [C].

    Norms that share their statistics add up their p and q, so that one correction serves all of them.
    """

    mean: Tensor
    p: Tensor
    q: Tensor

    @staticmethod
    def none(mean: Tensor) -> Correction:
        """To add to."""
        return Correction(mean, torch.zeros_like(mean), torch.zeros_like(mean))

    @staticmethod
    def of(norm: Affine, s1: Tensor, s2: Tensor, count: int, group: Group | None) -> Correction:
        """Of one norm, in a batch of ``count`` pixels on this process of ``group``."""
        through = Correction.none(norm.mean)
        through.add(norm, s1, s2, count)
        if group:
            group.add_up(through.p, through.q)
        return through

    def add(self, norm: Affine, s1: Tensor, s2: Tensor, count: int) -> None:
        """Of one more norm, of a batch of ``count`` pixels, that reads the first of these channels."""
        channels = s1.shape[0]
        self.p[:channels].addcmul_(norm.scale, s1, value=-1 / count)
        self.q[:channels].addcmul_(norm.scale * norm.rstd, s2, value=-1 / count)


def input_gradient(
    da: Tensor, scale: Tensor, x: Tensor, through: Correction | None, out: Tensor | None = None
) -> Tensor:
    """scale * da + p + q * (x - mean) of [M, C], of da's dtype; ``None`` for running statistics."""
    if through is None:
        return torch.mul(da, scale, out=out)
    centred = torch.sub(cast(x, da.dtype), through.mean, out=out)
    return torch.addcmul(through.p, centred, through.q, out=centred).addcmul_(da, scale)


def normed(x: Tensor, norm: Norm) -> Iterator[tuple[Chunk, Tensor]]:
    """BatchNorm of [N, C, *spatial], chunk by chunk in channels-last memory: a, to write to, good until the next."""
    source, vectors = rows(x), affine(norm, accumulator_dtype(x.dtype))
    scratch = Scratch(vectors.scale.dtype, x.device)
    for chunk in chunks(x.shape, x.device):
        a = affine_map(chunk.of(source), vectors, scratch("a", chunk.pixels, x.shape[1]))
        yield chunk, images(a, chunk.shape)


def normed_backward(write_da: Callable[[Chunk, Tensor, Tensor], None], x: Tensor, norm: Norm) -> NormGrads:
    """Gradients of ``a = norm(x)`` of [N, C, *spatial], where ``write_da(chunk, a, da)`` makes that of each chunk's a.

    That of x is of its dtype and in channels-last memory.
    """
    source, vectors = rows(x), affine(norm, accumulator_dtype(x.dtype))
    parts, acc = chunks(x.shape, x.device), vectors.scale.dtype
    scratch = Scratch(acc, x.device)
    group = join(norm.group, len(source), x.device)
    at_once = norm.batch_stats and norms_at_once(source, acc, parts, group)
    da, sums = torch.empty(source.shape, dtype=acc, device=x.device), []
    for chunk in parts:
        size = (chunk.pixels, x.shape[1])
        x_chunk = chunk.of(source) if at_once else scratch("x", *size).copy_(chunk.of(source))
        a, part = affine_map(x_chunk, vectors, scratch("a", *size)), chunk.of(da)
        write_da(chunk, images(a, chunk.shape), images(part, chunk.shape))
        if not at_once:
            sums.append(norm_sums(part, x_chunk, vectors, chunk))
    if at_once:
        dx, s1, s2 = norm_backward(da, source, vectors)
    else:
        dx = da if x.dtype == acc else torch.empty(source.shape, dtype=x.dtype, device=x.device)
        s1, s2 = add_up(sums)
        through = Correction.of(vectors, s1, s2, len(source), group) if norm.batch_stats else None
        for chunk in parts:
            out = scratch("x", chunk.pixels, x.shape[1])
            chunk.of(dx).copy_(input_gradient(chunk.of(da), vectors.scale, chunk.of(source), through, out))
    dx = images(dx, (x.shape[0], *x.shape[2:]))
    return NormGrads(dx, cast(s2, norm.weight.dtype), cast(s1, norm.bias.dtype))
