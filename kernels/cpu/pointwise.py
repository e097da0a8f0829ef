"""Statistics, transition, stem tail and head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import ChannelStats, Norm, NormGrads, TransitionGrads, empty_channels_last
from ..group import join
from ..portable.batch_norm import cast, laid_out_as
from .arguments import Norms, Shares, Weights, extents, loaded, pixels
from .library import DTYPES, PointwiseGradArgs, PoolArgs, StatsArgs, TransitionArgs
from .packing import Prepared


def channel_stats(x: Tensor) -> ChannelStats:
    """Mean and biased variance of each channel of [N, C, *spatial], float32."""
    c = x.shape[1]
    source = pixels(x, x.dtype)
    stats = ChannelStats(x.new_empty(c, dtype=torch.float32), x.new_empty(c, dtype=torch.float32))
    loaded().run(
        "channel_stats",
        StatsArgs(
            rows=x.numel() // c,
            channels=c,
            x=source.data_ptr(),
            mean=stats.mean.data_ptr(),
            var=stats.var.data_ptr(),
            store=DTYPES[x.dtype],
        ),
    )
    return stats


class PreparedTransition(Prepared):
    """A transition at given statistics, ready to be called with x of ``x_dtype``."""

    kernel = "transition"

    def __init__(self, norm: Norm, weight: Tensor, x_dtype: torch.dtype, dtype: torch.dtype, changeable: bool = True):
        super().__init__(Norms.of([norm]), [weight], dtype, changeable)
        self.in_dtype, self.out_dtype = x_dtype, dtype
        self.args = TransitionArgs(
            channels=weight.shape[1],
            out_channels=weight.shape[0],
            norm=self.norms.array[0],
            conv=self.packed[0].data_ptr(),
            store=DTYPES[x_dtype],
            compute=DTYPES[dtype],
            norm_dtype=self.norms.dtype,
        )

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[N, C, *spatial] -> [N, C', *(size // 2)]."""
        return (shape[0], self.args.out_channels, *(size // 2 for size in shape[2:]))


class _PreparedPool(Prepared):
    def __init__(self, norm: Norm, x_dtype: torch.dtype, changeable: bool = True):
        super().__init__(Norms.of([norm]), [], x_dtype, changeable)
        self.in_dtype = self.out_dtype = x_dtype
        self.args = PoolArgs(
            channels=len(norm.weight), norm=self.norms.array[0], store=DTYPES[x_dtype], norm_dtype=self.norms.dtype
        )


class PreparedStemTail(_PreparedPool):
    """A stem's tail at given statistics, ready to be called with x of ``x_dtype``."""

    kernel = "stem_tail"

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[N, C, *spatial] -> [N, C, *ceil(size / 2)]."""
        return (*shape[:2], *((size + 1) // 2 for size in shape[2:]))


class PreparedHead(_PreparedPool):
    """A head at given statistics, ready to be called with x of ``x_dtype``."""

    kernel = "head"

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[N, C, *spatial] -> [N, C], or [N, 0] where there are no pixels."""
        return (shape[0], shape[1] if min(shape[2:]) > 0 else 0)


def transition(x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, C, *spatial], [C', C, 1, ...] -> [N, C', *(size // 2)] of ``dtype``, channels-last."""
    return PreparedTransition(norm, weight, x.dtype, dtype, changeable=False)(x)


def stem_tail(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, *spatial] -> [N, C, *ceil(size / 2)], of x's dtype."""
    return PreparedStemTail(norm, x.dtype, changeable=False)(x)


def head(x: Tensor, norm: Norm) -> Tensor:
    """[N, C, *spatial] -> [N, C], of x's dtype."""
    return PreparedHead(norm, x.dtype, changeable=False)(x)


def transition_backward(
    grad_out: Tensor, x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype, need_weight: bool
) -> TransitionGrads:
    """Gradients from that of the output, of ``dtype``."""
    weights = Weights([weight])
    dweight = weight.new_empty(weight.shape if need_weight else 0, dtype=torch.float32)
    grads = _backward(
        "transition_backward",
        pixels(grad_out, dtype),
        x,
        norm,
        out_channels=len(weight),
        conv=weights.array[0],
        conv_weight=dweight.data_ptr() if need_weight else None,
        compute=DTYPES[dtype],
    )
    return TransitionGrads(*grads, laid_out_as(dweight, weight) if need_weight else cast(dweight, weight.dtype))


def stem_tail_backward(grad_out: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    """Gradients from that of the output."""
    return _backward("stem_tail_backward", pixels(grad_out, x.dtype), x, norm)


def head_backward(grad_out: Tensor, x: Tensor, norm: Norm) -> NormGrads:
    """Gradients from that of the output."""
    return _backward("head_backward", grad_out.to(x.dtype).contiguous(), x, norm)


def _backward(name: str, grad_out: Tensor, x: Tensor, norm: Norm, **others: object) -> NormGrads:
    c = x.shape[1]
    source, norms = pixels(x, x.dtype), Norms.of([norm], torch.float32)
    dx = empty_channels_last(x.shape, x.dtype, x.device)
    dweight, dbias = (x.new_empty(c, dtype=torch.float32) for _ in range(2))
    shares = Shares(join(norm.group, x.numel() // c, x.device))
    loaded().run(
        name,
        PointwiseGradArgs(
            **extents(x),
            channels=c,
            grad_out=grad_out.data_ptr(),
            x=source.data_ptr(),
            dx=dx.data_ptr(),
            norm=norms.array[0],
            norm_weight=dweight.data_ptr(),
            norm_bias=dbias.data_ptr(),
            add_up=shares.add_up,
            batch=norm.batch_stats,
            store=DTYPES[x.dtype],
            **others,
        ),
    )
    shares.check()
    return NormGrads(dx, cast(dweight, norm.weight.dtype), cast(dbias, norm.bias.dtype))
