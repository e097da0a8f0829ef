"""Statistics, transition, stem tail and head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import ChannelStats, Norm, NormGrads, TransitionGrads, empty_channels_last
from ..group import join
from ..portable.batch_norm import cast, laid_out_as
from .arguments import Norms, Shares, Weights, loaded, pixels
from .library import DTYPES, PointwiseGradArgs, PoolArgs, StatsArgs, TransitionArgs
from .packing import packed


def channel_stats(x: Tensor) -> ChannelStats:
    """Mean and biased variance of each channel of [N, C, H, W], float32."""
    n, c, h, w = x.shape
    source = pixels(x, x.dtype)
    stats = ChannelStats(x.new_empty(c, dtype=torch.float32), x.new_empty(c, dtype=torch.float32))
    loaded().run(
        "channel_stats",
        StatsArgs(
            rows=n * h * w,
            channels=c,
            x=source.data_ptr(),
            mean=stats.mean.data_ptr(),
            var=stats.var.data_ptr(),
            store=DTYPES[x.dtype],
        ),
    )
    return stats


def transition(x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, C, H, W], [C', C, 1, 1] -> [N, C', H//2, W//2] of ``dtype``, channels-last."""
    library = loaded()
    n, c, h, w = x.shape
    source, norms = pixels(x, x.dtype), Norms.of([norm])
    out = empty_channels_last((n, len(weight), h // 2, w // 2), dtype, x.device)
    (conv,) = packed(library, [weight], dtype)
    library.run(
        "transition",
        TransitionArgs(
            images=n,
            height=h,
            width=w,
            channels=c,
            out_channels=len(weight),
            x=source.data_ptr(),
            out=out.data_ptr(),
            norm=norms.array[0],
            conv=conv.data_ptr(),
            store=DTYPES[x.dtype],
            compute=DTYPES[dtype],
            norm_dtype=norms.dtype,
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


def _pool(name: str, x: Tensor, norm: Norm, out: Tensor) -> None:
    n, c, h, w = x.shape
    source, norms = pixels(x, x.dtype), Norms.of([norm])
    loaded().run(
        name,
        PoolArgs(
            images=n,
            height=h,
            width=w,
            channels=c,
            x=source.data_ptr(),
            out=out.data_ptr(),
            norm=norms.array[0],
            store=DTYPES[x.dtype],
            norm_dtype=norms.dtype,
        ),
    )


def _backward(name: str, grad_out: Tensor, x: Tensor, norm: Norm, **others: object) -> NormGrads:
    n, c, h, w = x.shape
    source, norms = pixels(x, x.dtype), Norms.of([norm], torch.float32)
    dx = empty_channels_last((n, c, h, w), x.dtype, x.device)
    dweight, dbias = (x.new_empty(c, dtype=torch.float32) for _ in range(2))
    shares = Shares(join(norm.group, n * h * w, x.device))
    loaded().run(
        name,
        PointwiseGradArgs(
            images=n,
            height=h,
            width=w,
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
