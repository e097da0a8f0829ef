"""Small networks of every library and of users' own files, for the tests of conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdense.benchmarks import wild


@dataclass(frozen=True)
class Source:
    """Where a network comes from, and how to make a small one."""

    package: str | None
    make: Callable[..., nn.Module]
    size: int = 64
    spatial_dims: int = 2
    dropout: str = ""  # the argument that drops new features, if there is one
    dropout_rate: float = 0.4
    without_gradient: tuple[str, ...] = ()  # biases before a norm, whose gradient in training is zero

    def build(self, **options: Any) -> nn.Module:
        """With norms that have learned something. Skips the test where the package is missing."""
        if self.package is not None:
            pytest.importorskip(self.package, reason=f"needs {self.package}")
        torch.manual_seed(0)
        model = self.make(**options)
        for name in self.without_gradient:
            model.get_parameter(name).requires_grad_(False)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
        return model

    def images(self, count: int = 2, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, *[self.size] * self.spatial_dims, generator=generator)


def _torchvision(**options: Any) -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(**dict(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=5) | options)


def _timm(**options: Any) -> nn.Module:
    from timm.models.densenet import DenseNet

    return DenseNet(**dict(growth_rate=8, block_config=(2, 3), num_classes=5) | options)


def _monai(**options: Any) -> nn.Module:
    from monai.networks.nets import DenseNet

    small = dict(spatial_dims=2, in_channels=3, out_channels=5, init_features=16, growth_rate=8, block_config=(2, 3))
    return DenseNet(**small | options)


def _torchxrayvision(**options: Any) -> nn.Module:
    from torchxrayvision.models import DenseNet

    small = dict(in_channels=3, num_classes=5, num_init_features=16, growth_rate=8, block_config=(2, 3))
    return DenseNet(**small | options)


class Taps(nn.Module):
    """What an encoder of segmentation_models_pytorch returns, as one tensor."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        from segmentation_models_pytorch.encoders.densenet import DenseNetEncoder

        small = dict(num_init_features=16, growth_rate=8, block_config=(2, 2, 2, 2))
        self.encoder = DenseNetEncoder(out_channels=[3, 16, 32, 32, 32, 32], **small | options)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([tap.square().mean((2, 3)) for tap in self.encoder(x)], 1)


SOURCES = {
    "torchvision": Source("torchvision", _torchvision, dropout="drop_rate"),
    "timm": Source("timm", _timm, dropout="proj_drop_rate"),
    "timm deep stem": Source("timm", lambda **options: _timm(stem_type="deep", **options)),
    "MONAI": Source("monai", _monai, dropout="dropout_prob"),
    "MONAI of signals": Source(
        "monai", lambda **options: _monai(spatial_dims=1, **options), 256, 1, dropout="dropout_prob"
    ),
    "MONAI of volumes": Source(
        "monai", lambda **options: _monai(spatial_dims=3, **options), 40, 3, dropout="dropout_prob"
    ),
    "torchxrayvision": Source("torchxrayvision", _torchxrayvision, dropout="drop_rate"),
    "segmentation_models_pytorch": Source("segmentation_models_pytorch", Taps, dropout="drop_rate"),
    "gpleiss": Source(None, wild.EfficientDenseNet, size=16, dropout="drop_rate"),
    "gpleiss ImageNet": Source(None, lambda **options: wild.EfficientDenseNet(small_inputs=False, **options)),
    "FC-DenseNet": Source(
        None,
        lambda drop_rate=0.0: wild.FCDenseNet(drop_rate=drop_rate),
        size=16,
        dropout="drop_rate",
        without_gradient=("firstconv.bias", "transUpBlocks.0.convTrans.bias", "transUpBlocks.1.convTrans.bias"),
    ),
    "kuangliu": Source(None, wild.KuangliuDenseNet, size=16),
    "phlippe": Source(None, wild.PhlippeDenseNet, size=16, without_gradient=("input_net.0.bias",)),
}
