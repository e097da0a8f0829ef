"""FastDenseNet and the constructors of every network of the paper."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .architectures import cifar_config, constructor
from .modules import BatchNorm, BatchStats, FastDenseBlock, FastTransition, head, hooked, is_channels_last, stem_tail


class FastDenseNet(reference.DenseNet):
    """:class:`fastdense.reference.DenseNet`, same arguments and state_dict, run by the fused ops.

    Its ``features`` hold stock modules and fast blocks and may be changed as in torchvision's DenseNet:
    the forward fuses what it recognises (stem tail, blocks, transitions, head), hands batch statistics from a
    block to the norm after it, and calls everything else.

    Args:
        growth_rate: channels that each layer adds, k.
        block_config: layers of each block.
        num_init_features: channels of the first convolution.
        bn_size: width of a bottleneck in growth rates; ``None`` for plain layers without one.
        drop_rate: dropout of the new features of each layer.
        num_classes: outputs of the classifier.
        memory_efficient: recompute the bottlenecks in backward, keeping about a third of the memory.
        **kwargs: ``in_channels``, ``compression``, ``small_inputs``, ``drop_every_conv``, ``init`` of the
            reference.

    Shapes: [N, in_channels, H, W] -> [N, num_classes].
    """

    block_class = FastDenseBlock
    transition_class = FastTransition

    def forward(self, x: Tensor) -> Tensor:
        if type(self.features) is not nn.Sequential or hooked(self.features):
            return super().forward(x)
        stages = list(self.features.children())
        stats: BatchStats | None = None  # of x, where known
        channels_last = is_channels_last(x)  # as the reference's features would be; ours always are
        while stages:
            stage = stages.pop(0)
            if isinstance(stage, BatchNorm) and not stages:
                return self.classifier(head(stage, x, stats))
            if isinstance(stage, BatchNorm) and [type(s) for s in stages[:2]] == [nn.ReLU, nn.MaxPool2d]:
                x, stats = stem_tail(stage, stages.pop(0), stages.pop(0), x), None
            elif isinstance(stage, FastDenseBlock) and not hooked(stage):
                x, stats = stage.forward_with_stats(x, channels_last)
            elif isinstance(stage, FastTransition) and not hooked(stage):
                x, stats = stage.forward(x, stats, channels_last), None
            else:
                x, stats = stage(x), None
                channels_last = is_channels_last(x)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(F.relu(x), (1, 1)), 1))


def densenet_cifar(
    depth: int = 100,
    growth_rate: int = 12,
    bottleneck: bool = True,
    compression: float = 0.5,
    num_classes: int = 10,
    *,
    num_init_features: int | None = None,
    **kwargs: Any,
) -> FastDenseNet:
    """A DenseNet of the paper for 32x32 images; ``kwargs`` are further arguments of :class:`FastDenseNet`.

    See :func:`fastdense.architectures.cifar_config` for the arguments.
    """
    config = cifar_config(depth, growth_rate, bottleneck, compression, num_init_features)
    return FastDenseNet(**config | dict(num_classes=num_classes) | kwargs)


densenet121 = constructor(FastDenseNet, "densenet121")
densenet161 = constructor(FastDenseNet, "densenet161")
densenet169 = constructor(FastDenseNet, "densenet169")
densenet201 = constructor(FastDenseNet, "densenet201")
densenet264 = constructor(FastDenseNet, "densenet264")
densenet_40_12 = constructor(FastDenseNet, "densenet_40_12")
densenet_100_12 = constructor(FastDenseNet, "densenet_100_12")
densenet_100_24 = constructor(FastDenseNet, "densenet_100_24")
densenet_bc_100_12 = constructor(FastDenseNet, "densenet_bc_100_12")
densenet_bc_250_24 = constructor(FastDenseNet, "densenet_bc_250_24")
densenet_bc_190_40 = constructor(FastDenseNet, "densenet_bc_190_40")
