"""Networks for inference alone: every stage read, checked and packed once, as its weights are now.

A module that may be trained, hooked or written to has to look at all of its children and at every byte of its weights
in each forward; of one image, that is a quarter of the time. What is frozen has neither children nor parameters:
nothing is left that could change behind its back.
"""

from __future__ import annotations

from torch import nn

from .convert import convert
from .frozen import Frozen
from .models import FastDenseNet
from .modules import FusedBlock, FusedTransition
from .norms import running_norm
from .served import hooked, unusual
from .stages import stem_tail_size


def freeze(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference alone, in evaluation, as its weights are now.

    Frozen are dense blocks, and of a :class:`FastDenseNet`, which torchvision's DenseNet converts to, transitions and
    the stem's tail. Whatever has hooks, biases, norms without running statistics, or another order of its features,
    stays as :func:`convert` makes it.

    Args:
        model: any model that :func:`convert` takes, converted or not. It stays as it is and may be trained on; freeze
            it again for what it has learnt.

    Returns:
        The copy. None of its parameters requires a gradient. To train it is an error, and so is a forward that would
        need a gradient; its state_dict lacks what is frozen.
    """
    model = convert(model).eval().requires_grad_(False)
    if isinstance(model, FusedBlock):
        return _block(model) or model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FusedBlock) and (block := _block(child)) is not None:
                parent.add_module(name, block)
        if isinstance(parent, FastDenseNet) and not parent.is_rebuilt():
            _freeze_others(parent.features)
    return model


def _block(block: FusedBlock) -> Frozen | None:
    """Frozen, or ``None`` where it has to stay as it is."""
    layers = None if hooked(block) else block.inference_layers()
    if layers is None:
        return None
    return Frozen("dense_block_inference", (layers,), layers.conv1_weight[0], block.new_channels)


def _freeze_others(features: nn.Sequential) -> None:
    """The transitions and the stem's tail of a FastDenseNet, in place."""
    stages = list(features.named_children())
    for i, (name, stage) in enumerate(stages):
        if isinstance(stage, FusedTransition):
            parts = stage.inference_parts()
            if parts is not None and not hooked(stage):
                features.add_module(name, Frozen("transition", parts, parts[1]))
        size = stem_tail_size(stages[i:])
        if size:
            names, parts = zip(*stages[i : i + size], strict=True)
            norm = None if any(map(unusual, parts)) else running_norm(parts[0])
            if norm is not None:
                for fused in names[:-1]:
                    delattr(features, fused)
                features.add_module(names[-1], Frozen("stem_tail", (norm,), norm.weight))
