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
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..contract import (
    ChannelStats,
    Norm,
    NormGrads,
    accumulator_dtype,
    empty_channels_last,
    in_channels_last,
)
from ..group import Group, join
from .chunks import Chunk, Scratch, chunks

_threshold_backward = torch.ops.aten.threshold_backward.grad_input
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_ALL, _PARAMETERS = [True, True, True], [False, True, True]  # the gradients that it is asked for

# Offsets, in multiples of gamma, with which a norm's output shows its input; what is least, so that gamma is not zero.
_MOST, _TINY = 8, 1e-12


def rows(x: Tensor) -> Tensor:
    """[N, C, *spatial] as [M, C]; without a copy where it lies in channels-last memory."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def images(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Dense [M, C] as [N, C, *spatial] in channels-last memory, without a copy; ``shape`` is (N, *spatial)."""
    return x.view(*shape, x.shape[1]).movedim(-1, 1)


def channels_of(x: Tensor, channels: slice) -> Tensor:
    """Some channels of [N, C, *spatial], or of rows."""
    return x.narrow(1, channels.start, channels.stop - channels.start)


def per_channel(vector: Tensor, dims: int) -> Tensor:
    """[C] as it goes with [N, C, *spatial] of that many dimensions."""
    return vector.view(-1, *[1] * (dims - 2))


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


def is_pytorchs_own(dims: int, group: Group | None) -> bool:
    """Whether PyTorch's own norm is all of one, for inputs of so many dimensions: it is fast for images, alone."""
    return dims == 4 and group is None


def passed_dtype(dtype: torch.dtype, dims: int, group: Group | None) -> torch.dtype:
    """What one pass hands to the next, where tensors of ``dtype`` are stored.

    PyTorch's own norms read and write bfloat16 and compute wider. float16's gradients may overflow before they are
    corrected.
    """
    return dtype if dtype == torch.bfloat16 and is_pytorchs_own(dims, group) else accumulator_dtype(dtype)


class Affine(NamedTuple):
    """A BatchNorm with known statistics; all [C], of the accumulator dtype."""

    weight: Tensor  # gamma
    bias: Tensor  # beta
    scale: Tensor  # gamma * rstd
    shift: Tensor  # beta - mean * scale
    mean: Tensor
    rstd: Tensor

    def of_output(self) -> Affine:
        """What is to xhat and ``z = relu(gamma * xhat + beta) > 0`` as this is to xhat and x, if it shows its input."""
        return self._replace(mean=self.bias, rstd=self.weight.reciprocal())


def affines(norms: list[Norm], dtype: torch.dtype) -> list[Affine]:
    """The vectors of some BatchNorms, computed and returned in ``dtype``."""
    if not norms:
        return []
    weights, biases, means, variances = (
        _cast_all([getattr(norm, name) for norm in norms], dtype) for name in ("weight", "bias", "mean", "var")
    )
    rstds = torch._foreach_rsqrt(torch._foreach_add(variances, [norm.eps for norm in norms]))
    scales = torch._foreach_mul(weights, rstds)
    shifts = torch._foreach_addcmul(biases, means, scales, value=-1)
    return list(map(Affine, weights, biases, scales, shifts, means, rstds))


def _cast_all(vectors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each one's :func:`cast`, in three calls where there is something to do."""
    if all(vector.dtype == dtype for vector in vectors):
        return vectors
    return list(torch.cat(vectors).to(dtype).split([vector.shape[0] for vector in vectors]))


def affine(norm: Norm, dtype: torch.dtype) -> Affine:
    """The vectors of one BatchNorm."""
    return affines([norm], dtype)[0]


def show_inputs(norms: list[Affine]) -> list[bool]:
    """Whether the outputs of each norm, where not cut by the ReLU, show its inputs as exactly as those are stored.

    xhat = (z - beta) / gamma has lost the digits in which ``z = scale * x + shift`` is rounded: those below beta's
    and shift's last. Only CPUs are asked, others would have to wait for the answer.
    """
    if not norms or norms[0].weight.device.type != "cpu":
        return [False] * len(norms)
    offsets = torch._foreach_add(
        torch._foreach_abs([norm.bias for norm in norms]), torch._foreach_abs([norm.shift for norm in norms])
    )
    ratios = torch._foreach_div(
        torch._foreach_clamp_min(offsets, _TINY), torch._foreach_abs([norm.weight for norm in norms])
    )
    return torch.stack(torch._foreach_max(ratios)).lt(_MOST).tolist()


class AffineMap:
    """``scale * x + shift`` of [N, C, *spatial] with as many dimensions as given; scale and shift are [C]."""

    def __init__(self, scale: Tensor, shift: Tensor, dims: int):
        self._vectors = scale, shift
        self.scale, self.shift = per_channel(scale, dims), per_channel(shift, dims)

    def into(self, out: Tensor) -> Callable[[Tensor], Tensor]:
        """What writes that of x to ``out`` and returns it.

        x is of any dtype and ``out`` of the vectors', or both are dense and of a narrower one.
        """
        if out.dtype == self.scale.dtype:
            return partial(torch.addcmul, self.shift, tensor2=self.scale, out=out)
        norm, *unused = self._as_norm
        return lambda x: torch.native_batch_norm(x, *norm, out=(out, *unused))[0]  # one pass, in the vectors' dtype

    @cached_property
    def _as_norm(self) -> tuple[tuple[Any, ...], Tensor, Tensor]:
        """What makes this of PyTorch's own norm, and what that has no use for."""
        scale, shift = self._vectors
        norm = (scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0)
        return norm, scale.new_empty(0), scale.new_empty(0)


class LateAffineMap(AffineMap):
    """That of a BatchNorm whose statistics are not known yet, only where they will be."""

    def __init__(self, norm: Norm, dtype: torch.dtype, dims: int):
        self._norm, self._eps = [cast(vector, dtype) for vector in norm[:4]], norm.eps
        scale, shift = torch.empty((2, len(norm.weight)), dtype=dtype, device=norm.weight.device)
        super().__init__(scale, shift, dims)

    def read(self) -> None:
        """To be called when they are known, and before it is used."""
        weight, bias, mean, var = self._norm
        scale, shift = self._vectors
        torch.add(var, self._eps, out=scale).rsqrt_().mul_(weight)
        torch.addcmul(bias, mean, scale, value=-1, out=shift)


def _as_norms_see(x: Tensor) -> Tensor:
    """[N, C, *spatial] in the layout that PyTorch's own norms would have it in, whose kernels differ in exactness.

    Images as they are; volumes and sequences on CPUs contiguous, [1, C, M], whose sums are exacter there, and
    elsewhere as an image [1, C, M, 1] in channels-last memory.
    """
    if x.dim() == 4:
        return x
    if x.device.type == "cpu":
        return x.movedim(1, 0).reshape(1, x.shape[1], -1).contiguous()
    pixels = rows(x)
    return images(pixels, (1, len(pixels), 1))


def tensor_stats(x: Tensor) -> ChannelStats:
    """Mean and biased variance of each channel of [N, C, *spatial], in one pass, in the accumulator dtype."""
    acc = accumulator_dtype(x.dtype)
    if x.dtype != acc and x.dim() == 4:  # of the running statistics' dtype, which are left as they are
        return ChannelStats(*torch.batch_norm_update_stats(x, *zero_stats((x.shape[1],), x.dtype, x.device), 0.0))
    return ChannelStats(*torch.batch_norm_update_stats(_as_norms_see(cast(x, acc)), None, None, 0.0))


def channel_stats(x: Tensor) -> ChannelStats:
    """Mean and biased variance of each channel of [N, C, *spatial], in the accumulator dtype."""
    source, parts = in_channels_last(x), chunks(x.shape, x.device)
    return merge_stats([tensor_stats(chunk.of(source)) for chunk in parts], parts)


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
    return _threshold_backward(dz, z, 0, grad_input=out)


def norm_backward(
    vectors: Affine, gives: Literal["sums", "scaled", "dx"]
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Of a norm: what takes da and the norm's input x, and returns a gradient, s1 and s2.

    da and x are dense [N, C, *spatial] of one dtype; s1 = sum(da) and s2 = sum(da * xhat) are [C]. The gradient, where
    the norm :func:`is_pytorchs_own`, is ``"dx"`` through batch statistics, ``"scaled"``, scale * da, or nothing.
    """
    known = (vectors.mean, vectors.rstd.pow(-2)) if gives == "scaled" else (None, None)
    mask = _PARAMETERS if gives == "sums" else _ALL
    rest = (vectors.weight, *known, vectors.mean, vectors.rstd, gives != "scaled", 0.0, mask)

    def backward(da: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dx, s2, s1 = _batch_norm_backward(_as_norms_see(da), _as_norms_see(x), *rest)
        return dx, s1, s2

    return backward


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

    def part(self, channels: slice) -> Correction:
        """That of some channels, in the same memory."""
        return Correction(*(vector[channels] for vector in self))

    def add(self, norm: Affine, s1: Tensor, s2: Tensor, count: int) -> None:
        """Of one more norm, of a batch of ``count`` pixels."""
        self.p.addcmul_(norm.scale, s1, value=-1 / count)
        self.q.addcmul_(norm.scale * norm.rstd, s2, value=-1 / count)

    def per_channel(self, dims: int) -> Correction:
        """As it goes with [N, C, *spatial] of that many dimensions."""
        return Correction(*(per_channel(vector, dims) for vector in self))


def input_gradient(da: Tensor, scale: Tensor, x: Tensor, through: Correction | None, out: Tensor) -> Tensor:
    """scale * da + (p - q * mean) + q * x of [N, C, *spatial], in ``out``.

    The vectors are as they go with x; ``None`` for running statistics.
    """
    if through is None:
        return torch.mul(da, scale, out=out)
    mean, p, q = through
    return torch.addcmul(torch.addcmul(p, q, mean, value=-1), x, q, out=out).addcmul_(da, scale)


def normed(x: Tensor, norm: Norm) -> Iterator[tuple[Chunk, Tensor]]:
    """BatchNorm of [N, C, *spatial], chunk by chunk in channels-last memory: a, to write to, good until the next."""
    vectors = affine(norm, accumulator_dtype(x.dtype))
    affine_map = AffineMap(vectors.scale, vectors.shift, x.dim())
    scratch = Scratch(passed_dtype(x.dtype, x.dim(), None), x.device)
    source = x if scratch.dtype == vectors.scale.dtype else in_channels_last(x)
    for chunk in chunks(x.shape, x.device):
        part = chunk.of(source)
        yield chunk, affine_map.into(scratch("a", part.shape))(part)


def normed_backward(write_da: Callable[[Chunk, Tensor, Tensor], None], x: Tensor, norm: Norm) -> NormGrads:
    """Gradients of ``a = norm(x)`` of [N, C, *spatial], where ``write_da(chunk, a, da)`` makes that of each chunk's a.

    That of x is of its dtype and in channels-last memory.
    """
    dims = x.dim()
    source, vectors = in_channels_last(x), affine(norm, accumulator_dtype(x.dtype))
    affine_map = AffineMap(vectors.scale, vectors.shift, dims)
    count = x.numel() // x.shape[1]
    group = join(norm.group, count, x.device)
    passed = passed_dtype(x.dtype, dims, group)
    scratch, parts = Scratch(passed, x.device), chunks(x.shape, x.device)
    at_once = x.dtype == passed and norm.batch_stats and is_pytorchs_own(dims, group)
    da, sums = empty_channels_last(x.shape, passed, x.device), []
    backward = norm_backward(vectors, "dx" if at_once else "sums")
    for chunk in parts:
        x_chunk, da_chunk = chunk.of(source), chunk.of(da)
        if x.dtype != passed:
            x_chunk = scratch("x", x_chunk.shape).copy_(x_chunk)
        write_da(chunk, affine_map.into(scratch("a", x_chunk.shape))(x_chunk), da_chunk)
        if not at_once:
            sums.append(backward(da_chunk, x_chunk)[1:])
    if at_once:
        dx, s1, s2 = backward(da, source)
    else:
        dx = da if x.dtype == passed else empty_channels_last(x.shape, x.dtype, x.device)
        s1, s2 = add_up(sums)
        through = Correction.of(vectors, s1, s2, count, group).per_channel(dims) if norm.batch_stats else None
        for chunk in parts:
            x_chunk = chunk.of(source)
            out = scratch("x", x_chunk.shape)
            chunk.of(dx).copy_(input_gradient(chunk.of(da), affine_map.scale, x_chunk, through, out))
    return NormGrads(dx, cast(s2, norm.weight.dtype), cast(s1, norm.bias.dtype))
