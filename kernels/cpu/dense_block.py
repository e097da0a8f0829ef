"""A dense block: at given statistics; in training, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contract import (
    ChannelStats,
    DenseBlockGrads,
    DenseBlockNeeds,
    DenseBlockOutput,
    DenseLayers,
    empty_channels_last,
)
from ..group import join
from ..portable.batch_norm import cast, laid_out_as, zero_stats
from .arguments import Norms, Shares, Weights, extents, loaded, pixels, pointers, taps
from .library import DTYPES, DenseBlockArgs, FeaturesArgs, TrainingArgs, TrainingLayerArgs
from .packing import Prepared


class PreparedBlock(Prepared):
    """A block at given statistics, ready to be called with x of ``x_dtype``: weights packed, arguments gathered."""

    kernel = "dense_block"

    def __init__(self, layers: DenseLayers, x_dtype: torch.dtype, dtype: torch.dtype, changeable: bool = True):
        norms = Norms(
            layers.norm1_weight + layers.norm2_weight,
            layers.norm1_bias + layers.norm2_bias,
            layers.norm1_running_mean + layers.norm2_running_mean,
            layers.norm1_running_var + layers.norm2_running_var,
            layers.norm1_eps + layers.norm2_eps,
        )
        super().__init__(norms, layers.conv1_weight + layers.conv2_weight, dtype, changeable)
        self.in_dtype = self.out_dtype = torch.promote_types(x_dtype, dtype)
        self._channels = layers.output_channels
        conv3_depth, conv3_height, _ = taps(layers.growth_weight[0])
        first, second = self.packed[: layers.num_layers], self.packed[layers.num_layers :]
        self.args = DenseBlockArgs(
            **_widths(layers),
            norm1=norms.array,
            norm2=norms.array_from(layers.num_layers),
            conv1=pointers(first if second else []),
            conv3=pointers(second or first),
            conv3_depth=conv3_depth,
            conv3_height=conv3_height,
            store=DTYPES[self.out_dtype],
            compute=DTYPES[dtype],
            norm_dtype=norms.dtype,
        )

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """X alone: [N, C_0, *spatial] -> [N, C_L, *spatial]."""
        return (shape[0], self._channels, *shape[2:])


def dense_block_inference(x: Tensor, layers: DenseLayers, dtype: torch.dtype) -> Tensor:
    """Forward with running statistics: X alone, [N, C_L, *spatial]."""
    return PreparedBlock(layers, x.dtype, dtype, changeable=False)(x)


def dense_block(x: Tensor, layers: DenseLayers, dtype: torch.dtype, save_bottleneck: bool) -> DenseBlockOutput:
    """Forward with whichever statistics the norms ask for."""
    store = torch.promote_types(x.dtype, dtype)
    source = pixels(x, store)
    output = DenseBlockOutput(
        empty_channels_last((len(x), layers.output_channels, *x.shape[2:]), store, x.device),
        _bottlenecks(x, layers, dtype, layers.num_layers if save_bottleneck else 1),
        *zero_stats((layers.output_channels,), store, x.device),
        *zero_stats((layers.num_layers, layers.bottleneck_channels), store, x.device),
    )
    _Training(output, layers, dtype).run("training_forward", x=source.data_ptr())
    return output if save_bottleneck else output._replace(bottleneck=[])


def dense_block_backward(
    grad_out: Tensor,
    output: DenseBlockOutput,
    layers: DenseLayers,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    needs: DenseBlockNeeds,
) -> DenseBlockGrads:
    """Gradients from that of X, for an input of ``x_dtype``. Bottlenecks that were not kept are made again."""
    n, channels, *spatial = output.out.shape
    device, first_layer = output.out.device, needs.first_layer()
    grad_dtype = torch.bfloat16 if output.out.dtype == torch.bfloat16 else torch.float32
    source = pixels(grad_out, grad_dtype)
    grad = torch.empty((n, *spatial, channels), dtype=grad_dtype, device=device)
    dx = torch.empty(0, dtype=x_dtype, device=device)
    if needs.x:
        dx = empty_channels_last((n, layers.input_channels, *spatial), x_dtype, device)

    keeps_bottlenecks = bool(output.bottleneck)
    if not keeps_bottlenecks:
        output = output._replace(bottleneck=_bottlenecks(output.out, layers, dtype, 1))
    training = _Training(output, layers, dtype)
    reached = [i >= first_layer for i in range(layers.num_layers)]
    reached2 = reached if layers.has_bottleneck else []
    conv1 = [a and b for a, b in zip(needs.conv1, reached, strict=True)]
    conv2 = [a and b for a, b in zip(needs.conv2, reached2, strict=True)]
    wanted = [
        ("norm1_weight", layers.norm1_weight, reached),
        ("norm1_bias", layers.norm1_bias, reached),
        ("conv1_weight" if layers.has_bottleneck else "conv3_weight", layers.conv1_weight, conv1),
        ("norm2_weight", layers.norm2_weight, reached2),
        ("norm2_bias", layers.norm2_bias, reached2),
        ("conv3_weight", layers.conv2_weight, conv2),
    ]
    gradients = [training.gradients(*each) for each in wanted]
    training.run(
        "training_backward",
        grad_out=source.data_ptr(),
        grad=grad.data_ptr(),
        dx=dx.data_ptr() if needs.x else None,
        dx_dtype=DTYPES[x_dtype],
        first_layer=first_layer,
        keeps_bottlenecks=keeps_bottlenecks,
    )
    return DenseBlockGrads(
        dx,
        *(
            [laid_out_as(g, p) if g.numel() else cast(g, p.dtype) for g, p in zip(made, parameters, strict=True)]
            for made, (_, parameters, _) in zip(gradients, wanted, strict=True)
        ),
    )


def _widths(layers: DenseLayers) -> dict[str, Any]:
    """What ``DenseBlockArgs`` and ``TrainingArgs`` begin with, after the extents."""
    features = FeaturesArgs(layers.input_channels, layers.growth_rate, layers.num_layers, layers.new_first)
    return {"features": features, "bottleneck_channels": layers.bottleneck_channels}


def _bottlenecks(like: Tensor, layers: DenseLayers, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Room for ``count`` layers' bottlenecks, [M, B]; none for a block without."""
    shape = (like.numel() // like.shape[1], layers.bottleneck_channels)
    return [like.new_empty(shape, dtype=dtype) for _ in range(count if layers.has_bottleneck else 0)]


def _used(batch_stats: list[bool], batch: Iterable[Tensor], running: list[Tensor]) -> list[Tensor]:
    """Of each layer, the batch's vector, of which it may read the first channels alone, or the running one."""
    return [own if from_batch else kept for from_batch, own, kept in zip(batch_stats, batch, running, strict=False)]


class _Training:
    """A training call's arguments; keeps alive what their pointers point to."""

    def __init__(self, output: DenseBlockOutput, layers: DenseLayers, dtype: torch.dtype):
        num_layers = layers.num_layers
        batch = [ChannelStats(output.mean, output.var)] * num_layers
        if layers.new_first:  # else a layer reads the first of them
            batch = [stats.part(layers.reads(i)) for i, stats in enumerate(batch)]
        means, variances = zip(*batch, strict=True)
        self._norm1 = Norms(
            layers.norm1_weight,
            layers.norm1_bias,
            _used(layers.norm1_batch_stats, means, layers.norm1_running_mean),
            _used(layers.norm1_batch_stats, variances, layers.norm1_running_var),
            layers.norm1_eps,
            torch.float32,
        )
        self._norm2 = Norms(
            layers.norm2_weight,
            layers.norm2_bias,
            _used(layers.norm2_batch_stats, output.bottleneck_mean.unbind(), layers.norm2_running_mean),
            _used(layers.norm2_batch_stats, output.bottleneck_var.unbind(), layers.norm2_running_var),
            layers.norm2_eps,
            torch.float32,
        )
        self._conv1, self._conv3 = Weights(layers.conv1_weight), Weights(layers.growth_weight)
        self._masks = [
            [mask.movedim(1, -1).contiguous() for mask in masks]
            for masks in (layers.bottleneck_mask, layers.growth_mask)
        ]
        self._output = output
        self._shares = Shares(join(layers.group, output.out.numel() // layers.output_channels, output.out.device))
        self._layers = (TrainingLayerArgs * num_layers)()
        for i, args in enumerate(self._layers):
            args.norm1, args.batch1 = self._norm1.array[i], layers.norm1_batch_stats[i]
            args.conv1, args.conv3 = self._conv1.array[i], self._conv3.array[i]
            if layers.has_bottleneck:
                args.norm2, args.batch2 = self._norm2.array[i], layers.norm2_batch_stats[i]
                args.bottleneck = output.bottleneck[i if len(output.bottleneck) > 1 else 0].data_ptr()
            for field, masks in zip(("bottleneck_mask", "growth_mask"), self._masks, strict=True):
                if masks:
                    setattr(args, field, masks[i].data_ptr())
        self._args = TrainingArgs(
            **extents(output.out),
            **_widths(layers),
            out=output.out.data_ptr(),
            layer=self._layers,
            mean=output.mean.data_ptr(),
            var=output.var.data_ptr(),
            bottleneck_mean=output.bottleneck_mean.data_ptr(),
            bottleneck_var=output.bottleneck_var.data_ptr(),
            keep_scale=layers.keep_scale,
            merge=self._shares.merge,
            add_up=self._shares.add_up,
            store=DTYPES[output.out.dtype],
            compute=DTYPES[dtype],
        )

    def gradients(self, field: str, parameters: list[Tensor], needed: list[bool]) -> list[Tensor]:
        """Room for a parameter's gradients, float32 and dense, in every layer; empty where it is not needed."""
        made = []
        for args, parameter, need in zip(self._layers, parameters, needed, strict=False):
            gradient = parameter.new_empty(parameter.shape if need else 0, dtype=torch.float32)
            made.append(gradient)
            if need:
                setattr(args, field, gradient.data_ptr())
        return made

    def run(self, name: str, **more: object) -> None:
        for field, value in more.items():
            setattr(self._args, field, value)
        loaded().run(name, self._args)
        self._shares.check()
