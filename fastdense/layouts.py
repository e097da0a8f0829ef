"""Where implementations of DenseNet keep what the ops need: the same parts under other names, in other places."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from . import reference


class BlockLayout(NamedTuple):
    """The parts of a dense block, and what its forward makes of the features."""

    layer_class: type[nn.Module]
    parts: tuple[str, ...]  # a layer's children, in their order
    norm1: str  # names among these
    conv1: str
    norm2: str = ""  # "" for layers without bottleneck
    conv2: str = ""
    dropout: str = ""  # of the new features, where it is a module
    drop_rate: str = ""  # the layer's attribute, where it is a number
    recompute: str = ""  # the layer's attribute that asks to save memory
    layers: str = ""  # the block's child that holds its layers; "" where itself does
    holder: str = ""  # the layer's child that holds its parts; "" where itself does
    norms_activate: bool = False  # the norms carry their ReLU
    new_first: bool = False  # cat([new, x]) instead of cat([x, new])
    only_new: str = ""  # the block's attribute for leaving its input out of its output


class TransitionLayout(NamedTuple):
    """The parts of a transition."""

    parts: tuple[str, ...]  # its children, in their order
    norm: str
    conv: str
    dropout: str = ""
    norms_activate: bool = False


PLAIN = BlockLayout(
    reference.DenseLayer,
    ("norm1", "relu1", "conv1"),
    "norm1",
    "conv1",
    drop_rate="drop_rate",
    recompute="memory_efficient",
)
BOTTLENECK = PLAIN._replace(
    parts=("norm1", "relu1", "conv1", "norm2", "relu2", "conv2"),
    norm2="norm2",
    conv2="conv2",
)
TRANSITION = TransitionLayout(("norm", "relu", "conv", "pool"), "norm", "conv")
DROPPING_TRANSITION = TransitionLayout(("norm", "relu", "conv", "drop", "pool"), "norm", "conv", "drop")
"""Of :mod:`fastdense.reference` and torchvision."""
