"""DenseNets as they lie in users' own files: nothing of them can be imported from a library.

Written for tests and benchmarks after the contracts of gpleiss/efficient_densenet_pytorch, FC-DenseNet (arXiv
1611.09326), kuangliu's and phlippe's networks: the same names, structure and order of features, at any size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# -- gpleiss: a layer takes *features ----------------------------------------------------------------------------------


class _DenseLayer(nn.Module):
    def __init__(self, channels: int, growth_rate: int, bn_size: int, drop_rate: float, efficient: bool) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, bn_size * growth_rate, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(bn_size * growth_rate), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.drop_rate, self.efficient = drop_rate, efficient

    def bottleneck(self, *features: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

    def forward(self, *features: Tensor) -> Tensor:
        if self.efficient and any(feature.requires_grad for feature in features):
            y = checkpoint(self.bottleneck, *features, use_reentrant=False)
        else:
            y = self.bottleneck(*features)
        y = self.conv2(self.relu2(self.norm2(y)))
        return F.dropout(y, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else y


class _DenseBlock(nn.Module):
    def __init__(
        self, num_layers: int, channels: int, bn_size: int, growth_rate: int, drop_rate: float, efficient: bool
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            layer = _DenseLayer(channels + i * growth_rate, growth_rate, bn_size, drop_rate, efficient)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(*features))
        return torch.cat(features, 1)


class _Transition(nn.Sequential):
    def __init__(self, channels: int, kept: int) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv, self.pool = nn.Conv2d(channels, kept, 1, bias=False), nn.AvgPool2d(2, 2)


class EfficientDenseNet(nn.Module):
    """gpleiss's: growth_rate, block_config, drop_rate, small_inputs and efficient mean what they mean there."""

    def __init__(
        self,
        growth_rate: int = 12,
        block_config: Sequence[int] = (2, 3),
        num_init_features: int = 24,
        bn_size: int = 4,
        drop_rate: float = 0,
        num_classes: int = 5,
        small_inputs: bool = True,
        efficient: bool = False,
    ) -> None:
        super().__init__()
        stem: OrderedDict[str, nn.Module]
        if small_inputs:
            stem = OrderedDict(conv0=nn.Conv2d(3, num_init_features, 3, padding=1, bias=False))
        else:
            stem = OrderedDict(
                conv0=nn.Conv2d(3, num_init_features, 7, stride=2, padding=3, bias=False),
                norm0=nn.BatchNorm2d(num_init_features),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(3, 2, 1, ceil_mode=False),
            )
        self.features = nn.Sequential(stem)
        channels = num_init_features
        for i, num_layers in enumerate(block_config, start=1):
            block = _DenseBlock(num_layers, channels, bn_size, growth_rate, drop_rate, efficient)
            self.features.add_module(f"denseblock{i}", block)
            channels += num_layers * growth_rate
            if i < len(block_config):
                self.features.add_module(f"transition{i}", _Transition(channels, channels // 2))
                channels //= 2
        self.features.add_module("norm_final", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(F.relu(self.features(x), inplace=True), (1, 1))
        return self.classifier(torch.flatten(pooled, 1))


# -- FC-DenseNet: biases, whole channels dropped, and blocks that return only what is new ------------------------------


class DenseLayer(nn.Sequential):
    def __init__(self, channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(channels), nn.ReLU(True)
        self.conv, self.drop = nn.Conv2d(channels, growth_rate, 3, padding=1, bias=True), nn.Dropout2d(drop_rate)


class DenseBlock(nn.Module):
    def __init__(self, channels: int, growth_rate: int, num_layers: int, drop_rate: float, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample
        layers = [DenseLayer(channels + i * growth_rate, growth_rate, drop_rate) for i in range(num_layers)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        new = []
        for layer in self.layers:
            new.append(layer(x))
            x = torch.cat([x, new[-1]], 1)
        return torch.cat(new, 1) if self.upsample else x


class TransitionDown(nn.Sequential):
    def __init__(self, channels: int, drop_rate: float) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv, self.drop = nn.Conv2d(channels, channels, 1, bias=True), nn.Dropout2d(drop_rate)
        self.maxpool = nn.MaxPool2d(2)


class TransitionUp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convTrans = nn.ConvTranspose2d(channels, channels, 3, stride=2, bias=True)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([self.convTrans(x)[:, :, : skip.shape[2], : skip.shape[3]], skip], 1)


class FCDenseNet(nn.Module):
    """A segmenter: [N, 3, H, W] -> [N, num_classes, H, W]."""

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2),
        bottleneck_layers: int = 2,
        growth_rate: int = 6,
        num_init_features: int = 12,
        drop_rate: float = 0.2,
        num_classes: int = 4,
    ) -> None:
        super().__init__()
        channels = num_init_features
        self.firstconv = nn.Conv2d(3, channels, 3, padding=1, bias=True)
        self.denseBlocksDown, self.transDownBlocks = nn.ModuleList(), nn.ModuleList()
        skips = []
        for num_layers in blocks:
            self.denseBlocksDown.append(DenseBlock(channels, growth_rate, num_layers, drop_rate, upsample=False))
            channels += num_layers * growth_rate
            skips.append(channels)
            self.transDownBlocks.append(TransitionDown(channels, drop_rate))
        self.bottleneck = DenseBlock(channels, growth_rate, bottleneck_layers, drop_rate, upsample=True)
        channels = bottleneck_layers * growth_rate
        self.transUpBlocks, self.denseBlocksUp = nn.ModuleList(), nn.ModuleList()
        for num_layers, skip in zip(blocks[::-1], skips[::-1], strict=True):
            last = len(self.denseBlocksUp) == len(blocks) - 1
            self.transUpBlocks.append(TransitionUp(channels))
            self.denseBlocksUp.append(
                DenseBlock(channels + skip, growth_rate, num_layers, drop_rate, upsample=not last)
            )
            channels = num_layers * growth_rate + (channels + skip) * last
        self.finalConv = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        out, skips = self.firstconv(x), []
        for block, down in zip(self.denseBlocksDown, self.transDownBlocks, strict=True):
            skips.append(block(out))
            out = down(skips[-1])
        out = self.bottleneck(out)
        for up, block in zip(self.transUpBlocks, self.denseBlocksUp, strict=True):
            out = block(up(out, skips.pop()))
        return self.finalConv(out)


# -- kuangliu: new features first, functional ReLU and pool ------------------------------------------------------------


class Bottleneck(nn.Module):
    def __init__(self, channels: int, growth_rate: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth_rate, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([out, x], 1)


class Transition(nn.Module):
    def __init__(self, channels: int, kept: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, kept, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class KuangliuDenseNet(nn.Module):
    def __init__(self, blocks: Sequence[int] = (2, 3), growth_rate: int = 8, num_classes: int = 5) -> None:
        super().__init__()
        channels = 2 * growth_rate
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        for i, num_layers in enumerate(blocks):
            if i:
                stages.append(Transition(channels, channels // 2))
                channels //= 2
            layers = [Bottleneck(channels + j * growth_rate, growth_rate) for j in range(num_layers)]
            stages.append(nn.Sequential(*layers))
            channels += num_layers * growth_rate
        self.stages = nn.ModuleList(stages)
        self.bn, self.linear = nn.BatchNorm2d(channels), nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for stage in self.stages:
            out = stage(out)
        out = F.adaptive_avg_pool2d(F.relu(self.bn(out)), 1)
        return self.linear(out.flatten(1))


# -- phlippe: the same order, everything in Sequentials ----------------------------------------------------------------


class PhlippeLayer(nn.Module):
    def __init__(self, channels: int, bn_size: int, growth_rate: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm2d(channels),
            act(),
            nn.Conv2d(channels, bn_size * growth_rate, 1, bias=False),
            nn.BatchNorm2d(bn_size * growth_rate),
            act(),
            nn.Conv2d(bn_size * growth_rate, growth_rate, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x), x], dim=1)


class PhlippeDenseBlock(nn.Module):
    def __init__(self, channels: int, num_layers: int, bn_size: int, growth_rate: int, act: type[nn.Module]) -> None:
        super().__init__()
        layers = [PhlippeLayer(channels + i * growth_rate, bn_size, growth_rate, act) for i in range(num_layers)]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class PhlippeTransitionLayer(nn.Module):
    def __init__(self, channels: int, kept: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.transition = nn.Sequential(
            nn.BatchNorm2d(channels), act(), nn.Conv2d(channels, kept, 1, bias=False), nn.AvgPool2d(2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.transition(x)


class PhlippeDenseNet(nn.Module):
    def __init__(
        self, blocks: Sequence[int] = (2, 3), growth_rate: int = 8, bn_size: int = 2, act: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        channels = bn_size * growth_rate
        self.input_net = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1))
        stages: list[nn.Module] = []
        for i, num_layers in enumerate(blocks):
            if i:
                stages.append(PhlippeTransitionLayer(channels, channels // 2, act))
                channels //= 2
            stages.append(PhlippeDenseBlock(channels, num_layers, bn_size, growth_rate, act))
            channels += num_layers * growth_rate
        self.blocks = nn.Sequential(*stages)
        head = [nn.BatchNorm2d(channels), act(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(channels, 5)]
        self.output_net = nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_net(self.blocks(self.input_net(x)))
