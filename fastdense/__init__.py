"""fastdense: DenseNets near the memory roofline. Same weights, same numbers, no concatenation."""

from . import reference
from .backends import Status, status, use_backend
from .models import (
    FastDenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_40_12,
    densenet_100_12,
    densenet_100_24,
    densenet_bc_100_12,
    densenet_bc_190_40,
    densenet_bc_250_24,
    densenet_cifar,
)
from .modules import FallbackWarning, FastDenseBlock, FastTransition

__version__ = "0.1.0"

__all__ = [
    "FallbackWarning",
    "FastDenseBlock",
    "FastDenseNet",
    "FastTransition",
    "Status",
    "__version__",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_40_12",
    "densenet_100_12",
    "densenet_100_24",
    "densenet_bc_100_12",
    "densenet_bc_190_40",
    "densenet_bc_250_24",
    "densenet_cifar",
    "reference",
    "status",
    "use_backend",
]
