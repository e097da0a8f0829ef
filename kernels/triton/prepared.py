"""What a kernel at given statistics reads of a module, made once and run many times.

What is written to a GPU's memory nobody sees: such things serve one call, or tensors that will not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Norm
from .launch import current, on_device
from .statistics import norm_vectors


class Prepared:
    """A function of x, of the dtype that it was prepared for."""

    def run(self, x: Tensor) -> Tensor:
        """On x's device, which is current."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """From any thread."""
        return _run(x, self)


class PreparedNorm(Prepared):
    """What begins with a norm.

    Attributes:
        vectors: of the norm.
    """

    def __init__(self, norm: Norm, x_dtype: torch.dtype):
        with current(norm.weight.device):
            self.vectors = norm_vectors(norm)


@on_device
def _run(x: Tensor, prepared: Prepared) -> Tensor:
    return prepared.run(x)
