"""Networks for inference alone: every stage read, checked and packed once, as its weights are now.

A module that may be trained, hooked or written to has to look at all of its children and at every byte of its weights
in each forward; of one image, that is a tenth of the time. What is frozen has neither children nor parameters:
nothing is left that could change behind its back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .chain import steps
from .convert import convert
from .ends import stem_arguments
from .frozen import Frozen
from .models import FastDenseNet
from .modules import FusedBlock, FusedTransition
from .norms import running_norm
from .served import DIMS, BatchNorm, hooked, unusual


def freeze(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of ``model`` for inference alone, in evaluation, as its weights are now.

    Frozen are dense blocks, and of a :class:`FastDenseNet`, which torchvision's DenseNet converts to, transitions and
    the stem, or its tail. Whatever has hooks, biases, norms without running statistics, or another order of its
    features, stays as :func:`convert` makes it.

    Args:
        model: any model that :func:`convert` takes, converted or not. It stays as it is and may be trained on; freeze
            it again for what it has learnt.
        dtype: what convolutions and linear layers compute in, as under autocast to it, but with their weights cast once
            and inputs of any dtype. Default: as the model, and autocast, would.

    Returns:
        The copy. None of its parameters requires a gradient. To train it is an error, and so is a forward that would
        need a gradient; its state_dict lacks what is frozen.
    """
    model = convert(model).eval().requires_grad_(False)
    if isinstance(model, FusedBlock):
        model = _block(model, dtype) or model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FusedBlock) and (block := _block(child, dtype)) is not None:
                parent.add_module(name, block)
        if isinstance(parent, FastDenseNet) and not parent.is_rebuilt():
            _freeze_others(parent.features, dtype)
    if dtype is not None:
        for module in model.modules():
            if isinstance(module, _ConvNd | nn.Linear):
                module.to(dtype)
        model.register_forward_pre_hook(functools.partial(_cast, dtype))
    return model


def _cast(dtype: torch.dtype, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _block(block: FusedBlock, dtype: torch.dtype | None) -> Frozen | None:
    """Frozen, or ``None`` where it has to stay as it is."""
    arguments = None if hooked(block) else block.inference_arguments()
    if arguments is None:
        return None
    weight = arguments[0].conv1_weight[0]
    return Frozen(block.inference_op, arguments, weight, weight.dim(), dtype, block.new_channels)


def _freeze_others(features: nn.Sequential, dtype: torch.dtype | None) -> None:
    """The transitions and the stem of a FastDenseNet, in place; of a stem that has to stay, its tail."""
    for whole_stem in (True, False):
        for names, modules, _ in steps(features, whole_stem):
            frozen = _frozen(modules, dtype)
            if frozen is not None:
                for fused in names[:-1]:
                    delattr(features, fused)
                features.add_module(names[-1], frozen)


def _frozen(modules: Sequence[nn.Module], dtype: torch.dtype | None) -> Frozen | None:
    """A transition, stem or stem's tail frozen; ``None`` for what is none, or has to stay as it is."""
    stage: Any = modules[0]
    if isinstance(stage, FusedTransition):
        arguments = None if hooked(stage) else stage.inference_arguments()
        return arguments and Frozen(stage.inference_op, arguments, arguments[1], arguments[1].dim(), dtype)
    if len(modules) == 1:
        return None
    if isinstance(stage, BatchNorm):
        norm = None if any(map(unusual, modules)) else running_norm(stage)
        return norm and Frozen("stem_tail", (norm,), norm.weight, DIMS[type(modules[-1])])
    of_stem = stem_arguments(modules)
    return of_stem and Frozen("stem_inference", of_stem, of_stem[1], of_stem[1].dim(), dtype)
