"""The naive DenseNet of the paper in stock ``nn`` modules, concatenating at every layer.

It is the definition that everything else is tested against, the "naive concat" side of the benchmarks, and
the path that the fast modules take whenever they cannot be sure of being equal to it. Parameter names and
state_dict keys are torchvision's.

Source: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017
(arXiv 1608.06993), section 3 and tables 1 and 2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .architectures import cifar_config, constructor

SpatialDims = Literal[1, 2, 3]
"""Of sequences [N, C, L], images [N, C, H, W] and volumes [N, C, D, H, W]."""

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_AVG_POOL: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_MAX_POOL: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_GLOBAL_POOL = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}


def global_avg_pool(x: Tensor) -> Tensor:
    """[N, C, *spatial] -> [N, C]."""
    return torch.flatten(_GLOBAL_POOL[x.dim()](x, 1), 1)


class DenseLayer(nn.Module):
    """One layer H_l: norm1-ReLU-conv1 (1x1) -norm2-ReLU-conv2 (3x3), or norm1-ReLU-conv1 (3x3) alone.

    Kernels are as wide in each of the ``spatial_dims``.

    Args:
        num_input_features: channels of all features before this layer, C_l.
        growth_rate: channels that it adds, k.
        bn_size: width of the bottleneck in growth rates; ``None`` for a layer without one.
        drop_rate: probability of dropping an element of the new features.
        memory_efficient: recompute the concatenation and the bottleneck in backward.
        drop_every_conv: drop after conv1 too, as the paper does without data augmentation.
        spatial_dims: 1, 2 or 3.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        drop_every_conv: bool = False,
        spatial_dims: SpatialDims = 2,
    ) -> None:
        super().__init__()
        norm, conv = _NORM[spatial_dims], _CONV[spatial_dims]
        self.norm1 = norm(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        if bn_size is None:
            self.conv1 = conv(num_input_features, growth_rate, kernel_size=3, padding=1, bias=False)
        else:
            width = bn_size * growth_rate
            self.conv1 = conv(num_input_features, width, kernel_size=1, bias=False)
            self.norm2 = norm(width)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = conv(width, growth_rate, kernel_size=3, padding=1, bias=False)
        self.has_bottleneck = bn_size is not None
        self.drop_rate = float(drop_rate)
        self.drop_every_conv = drop_every_conv
        self.memory_efficient = memory_efficient

    @property
    def growth_conv(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """The 3x3 whose output are the new features."""
        return self.conv2 if self.has_bottleneck else self.conv1

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """All features so far, [N, C_l, *spatial] or a list of what they concatenate -> [N, k, *spatial]."""
        features = [features] if isinstance(features, Tensor) else list(features)
        if self.memory_efficient and torch.is_grad_enabled() and any(f.requires_grad for f in features):
            y = checkpoint(self._first, *features, use_reentrant=False, context_fn=self._contexts)
        else:
            y = self._first(*features)
        if self.has_bottleneck:
            if self.drop_every_conv:
                y = self._drop(y)
            y = self.conv2(self.relu2(self.norm2(y)))
        return self._drop(y)

    def _first(self, *features: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Of forward and recomputation; torchvision lets the latter update norm1's statistics once more."""
        return nullcontext(), _without_update(self.norm1)

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else y


@contextmanager
def _without_update(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> Iterator[None]:
    momentum, norm.momentum = norm.momentum, 0.0
    try:
        yield
    finally:
        norm.momentum = momentum
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.sub_(1)


class DenseBlock(nn.ModuleDict):
    """``num_layers`` layers, each reading the concatenation of the block's input and all before it.

    Args:
        num_layers: L.
        num_input_features: channels of the input, C_0.
        bn_size, growth_rate, drop_rate, memory_efficient, drop_every_conv, spatial_dims: of every
            :class:`DenseLayer`.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None = 4,
        growth_rate: int = 32,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
        *,
        drop_every_conv: bool = False,
        spatial_dims: SpatialDims = 2,
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = DenseLayer(
                num_input_features + i * growth_rate,
                growth_rate,
                bn_size,
                drop_rate,
                memory_efficient,
                drop_every_conv=drop_every_conv,
                spatial_dims=spatial_dims,
            )

    def forward(self, init_features: Tensor) -> Tensor:
        """[N, C_0, *spatial] -> [N, C_0 + L*k, *spatial]."""
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """Between two blocks: norm-ReLU-conv (1x1) and an average pool of 2 in each dimension.

    Args:
        num_input_features: channels in.
        num_output_features: channels out.
        drop_rate: probability of dropping an element of the convolution's output, before the pool.
        spatial_dims: 1, 2 or 3.
    """

    def __init__(
        self,
        num_input_features: int,
        num_output_features: int,
        *,
        drop_rate: float = 0.0,
        spatial_dims: SpatialDims = 2,
    ) -> None:
        super().__init__()
        self.norm = _NORM[spatial_dims](num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = _CONV[spatial_dims](num_input_features, num_output_features, kernel_size=1, bias=False)
        if drop_rate > 0:
            self.drop = nn.Dropout(drop_rate)
        self.pool = _AVG_POOL[spatial_dims](kernel_size=2, stride=2)


class DenseNet(nn.Module):
    """DenseNet-BC and plain DenseNet, for ImageNet-sized and CIFAR-sized images.

    Args:
        growth_rate: channels that each layer adds, k.
        block_config: layers of each block.
        num_init_features: channels of the first convolution.
        bn_size: width of a bottleneck in growth rates; ``None`` for plain layers without one.
        drop_rate: dropout of the new features of each layer.
        num_classes: outputs of the classifier.
        memory_efficient: recompute in backward instead of storing.
        in_channels: channels of the images.
        compression: theta, the share of its channels that a transition keeps.
        small_inputs: the CIFAR stem, one 3x3 convolution of stride 1, instead of 7x7/2-norm-ReLU-pool.
        drop_every_conv: dropout after every convolution but the first, as in the paper.
        init: He initialisation by ``"fan_in"`` (torchvision) or ``"fan_out"`` (the authors' code).
        spatial_dims: 1 for sequences [N, C, L], 2 for images, 3 for volumes [N, C, D, H, W].

    Shapes: [N, in_channels, *spatial] -> [N, num_classes].
    """

    block_class: type[DenseBlock] = DenseBlock
    transition_class: type[Transition] = Transition

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        *,
        in_channels: int = 3,
        compression: float = 0.5,
        small_inputs: bool = False,
        drop_every_conv: bool = False,
        init: Literal["fan_in", "fan_out"] = "fan_in",
        spatial_dims: SpatialDims = 2,
    ) -> None:
        super().__init__()
        if not 0 < compression <= 1:
            raise ValueError(f"compression must be in (0, 1], got {compression}")
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"drop_rate must be in [0, 1], got {drop_rate}")
        if init not in ("fan_in", "fan_out"):
            raise ValueError(f"init must be 'fan_in' or 'fan_out', got {init!r}")
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")

        self.features = nn.Sequential(_stem(in_channels, num_init_features, small_inputs, spatial_dims))
        channels = num_init_features
        for i, num_layers in enumerate(block_config, start=1):
            block = self.block_class(
                num_layers,
                channels,
                bn_size,
                growth_rate,
                drop_rate,
                memory_efficient,
                drop_every_conv=drop_every_conv,
                spatial_dims=spatial_dims,
            )
            self.features.add_module(f"denseblock{i}", block)
            channels += num_layers * growth_rate
            if i < len(block_config):
                kept = int(channels * compression)
                transition = self.transition_class(
                    channels, kept, drop_rate=drop_rate if drop_every_conv else 0.0, spatial_dims=spatial_dims
                )
                self.features.add_module(f"transition{i}", transition)
                channels = kept
        self.features.add_module("norm5", _NORM[spatial_dims](channels))
        self.classifier = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, _CONV[spatial_dims]):
                nn.init.kaiming_normal_(module.weight, mode=init, nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.features(x), inplace=True)
        return self.classifier(global_avg_pool(features))


def _stem(in_channels: int, channels: int, small_inputs: bool, dims: SpatialDims) -> OrderedDict[str, nn.Module]:
    conv = _CONV[dims]
    if small_inputs:
        return OrderedDict(conv0=conv(in_channels, channels, kernel_size=3, padding=1, bias=False))
    return OrderedDict(
        conv0=conv(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=False),
        norm0=_NORM[dims](channels),
        relu0=nn.ReLU(inplace=True),
        pool0=_MAX_POOL[dims](kernel_size=3, stride=2, padding=1),
    )


def densenet_cifar(
    depth: int = 100,
    growth_rate: int = 12,
    bottleneck: bool = True,
    compression: float = 0.5,
    num_classes: int = 10,
    *,
    num_init_features: int | None = None,
    **kwargs: Any,
) -> DenseNet:
    """A DenseNet of the paper for 32x32 images; ``kwargs`` are further arguments of :class:`DenseNet`.

    See :func:`fastdense.architectures.cifar_config` for the arguments.
    """
    config = cifar_config(depth, growth_rate, bottleneck, compression, num_init_features)
    return DenseNet(**config | dict(num_classes=num_classes) | kwargs)


densenet121 = constructor(DenseNet, "densenet121")
densenet161 = constructor(DenseNet, "densenet161")
densenet169 = constructor(DenseNet, "densenet169")
densenet201 = constructor(DenseNet, "densenet201")
densenet264 = constructor(DenseNet, "densenet264")
densenet_40_12 = constructor(DenseNet, "densenet_40_12")
densenet_100_12 = constructor(DenseNet, "densenet_100_12")
densenet_100_24 = constructor(DenseNet, "densenet_100_24")
densenet_bc_100_12 = constructor(DenseNet, "densenet_bc_100_12")
densenet_bc_250_24 = constructor(DenseNet, "densenet_bc_250_24")
densenet_bc_190_40 = constructor(DenseNet, "densenet_bc_190_40")
