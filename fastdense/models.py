"""FastDenseNet and the constructors of every network of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .architectures import cifar_config, constructor
from .ends import head
from .frozen import Frozen
from .modules import FastDenseBlock, FastTransition
from .served import BatchNorm, hooked
from .stages import FastSequential, through


class FastDenseNet(reference.DenseNet):
    """:class:`fastdense.reference.DenseNet`, same arguments and state_dict, run by the fused ops.

    Its ``features`` hold stock modules and fast blocks and may be changed as in torchvision's DenseNet:
    the forward fuses what it recognises (stem, blocks, transitions, head), hands batch statistics from a
    block to the norm after it, and calls everything else.

    Args:
        growth_rate: channels that each layer adds, k.
        block_config: layers of each block.
        num_init_features: channels of the first convolution.
        bn_size: width of a bottleneck in growth rates; ``None`` for plain layers without one.
        drop_rate: dropout of the new features of each layer.
        num_classes: outputs of the classifier.
        memory_efficient: recompute the bottlenecks in backward, keeping about a third of the memory.
        **kwargs: ``in_channels``, ``compression``, ``small_inputs``, ``drop_every_conv``, ``init``, ``spatial_dims``
            of the reference.

    Shapes: [N, in_channels, *spatial] -> [N, num_classes].
    """

    block_class = FastDenseBlock
    transition_class = FastTransition

    def forward(self, x: Tensor) -> Tensor:
        if self.is_rebuilt():
            return super().forward(x)
        x, stats, norm, pooled = through(self.features, x, may_pool=True)
        if pooled:
            return self.classifier(x)
        if norm is not None:
            return self.classifier(head(norm, x, stats))
        return self.forward_head(F.relu(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """What the head pools: the last features, normalised and through the ReLU, [N, num_features, ...]."""
        if self.is_rebuilt():
            return F.relu(self.features(x))
        x, _, norm, _ = through(self.features, x)
        return F.relu(x if norm is None else norm(x))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """What :meth:`forward_features` returned -> [N, num_classes], or the pooled [N, num_features]."""
        pooled = reference.global_avg_pool(features)
        return pooled if pre_logits else self.classifier(pooled)

    def forward_intermediates(self, x: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The outputs of stages and of layers in one forward, differentiable.

        Args:
            x: [N, in_channels, H, W].
            names: of children of ``features``, such as ``"denseblock2"`` or ``"transition1"``, and of layers, such as
                ``"denseblock2.denselayer3"``: the channels that it added, [N, k, H', W'], a view of its block's
                output. Default: every dense block.

        Returns:
            The outputs by name, in the order of the forward. What goes through a fused op as a whole, such as a stem's
            ``norm0``, has none of its own; the last norm is of the head and does not run.

        Raises:
            ValueError: a name is none of these.
        """
        stages = self.features.named_children()
        blocks = {name: block.new_channels for name, block in stages if isinstance(block, FastDenseBlock | Frozen)}
        blocks = {name: new for name, new in blocks.items() if new}
        wanted = set(blocks if names is None else names)
        passed: list[str] = []
        found: dict[str, Tensor] = {}

        def visit(name: str, out: Tensor) -> None:
            outputs = {name: out}
            if name in blocks:
                new = blocks[name].values()
                parts = out.split([out.shape[1] - sum(new), *new], 1)[1:]
                outputs |= {f"{name}.{layer}": part for layer, part in zip(blocks[name], parts, strict=True)}
            passed.extend(outputs)
            found.update({name: out for name, out in outputs.items() if name in wanted})

        through(self.features, x, visit)
        if len(found) < len(wanted):
            unknown = ", ".join(sorted(wanted - set(found)))
            raise ValueError(f"no intermediate {unknown}; there are {', '.join(passed)}")
        return found

    @property
    def num_features(self) -> int:
        """Channels that the head pools."""
        return next(m for m in reversed(list(self.features.children())) if isinstance(m, BatchNorm)).num_features

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier for ``num_classes``, where the old one is; for 0 none: the pooled features come out."""
        weight = next(self.parameters())
        classifier: nn.Module = nn.Identity()
        if num_classes:
            classifier = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            nn.init.zeros_(classifier.bias)
        self.add_module("classifier", classifier)

    def is_rebuilt(self) -> bool:
        """The features are not a plain sequence any more, and are called as a whole."""
        return type(self.features) not in (nn.Sequential, FastSequential) or hooked(self.features) is not None


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
