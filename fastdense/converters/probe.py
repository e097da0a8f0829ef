"""Whether a fused module computes what the original did: both run, in float64, in evaluation and in training."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from .. import reference
from ..fallback import FallbackWarning
from ..modules import FusedBlock
from ..parity import BUDGETS, relative_error

_SAME = BUDGETS[torch.float64].floor
"""Difference of two float64 evaluations in another order; a wrong algorithm differs by about one."""

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def on_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


def exact_copy(module: nn.Module) -> nn.Module:
    """In float64 on the CPU and alone, without other processes; as it is on the meta device."""
    module = copy.deepcopy(module)
    if not on_meta(module):
        module = module.cpu().double()
    dims = next((len(m.kernel_size) for m in module.modules() if isinstance(m, _ConvNd)), 2)
    for norm in module.modules():
        if type(norm) is nn.SyncBatchNorm:
            norm.__class__ = _NORMS[dims]  # type: ignore[assignment]
        elif isinstance(norm, nn.SyncBatchNorm) and "timm.layers.norm_act" in sys.modules:
            norm.__class__ = cast(Any, sys.modules["timm.layers.norm_act"]).BatchNormAct2d
    return module


def difference(original: nn.Module, fast: nn.Module) -> str | None:
    """How two copies differ on a probe, in eval mode and then in train mode, or ``None``. Changes their state."""
    try:
        probe = _probe(original)
        for train in (False, True):
            seen: list[list[Tensor]] = []
            for module in (original, fast):
                module.train(train)
                if isinstance(fast, FusedBlock) and train:
                    _drop(module)
                with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore", FallbackWarning)
                    torch.manual_seed(0)
                    seen.append([type(module).forward(module, probe), *module.buffers(), torch.rand(1)])
            error = max(relative_error(*pair) for pair in zip(*seen, strict=True))
            if error > _SAME:
                return f"on a probe in {'train' if train else 'eval'} mode it differs by {error:.2g}"
    except Exception as error:  # whatever a user's modules may raise
        return f"it cannot be run on a probe: {error}"
    return None


def _drop(block: nn.Module) -> None:
    """Have every layer drop half of its new features: a probe without dropout would not tell what the rate means."""
    for module in block.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.5
        elif "drop_rate" in vars(module):
            vars(module)["drop_rate"] = 0.5


def _probe(module: nn.Module) -> Tensor:
    """A small input for ``module``: its first convolution or norm knows the channels."""
    parts = [m for m in module.modules() if isinstance(m, _ConvNd | _BatchNorm)]
    channels = parts[0].in_channels if isinstance(parts[0], _ConvNd) else parts[0].num_features
    dims = next(len(m.kernel_size) for m in parts if isinstance(m, _ConvNd))
    size = 64 if isinstance(module, reference.DenseNet) or type(module).__name__ == "DenseNet" else 6
    generator = torch.Generator().manual_seed(0)
    shape = [size, size + 2, size + 1][:dims]
    return torch.randn(2, channels, *shape, generator=generator, dtype=torch.float64)
