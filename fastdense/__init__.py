"""fastdense: DenseNets near the memory roofline. Same weights, same numbers, no concatenation."""

from . import reference
from .backends import Status, status, use_backend
from .convert import Explanation, Finding, convert, explain, to_reference
from .fallback import FallbackWarning
from .freeze import freeze
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
from .modules import FastDenseBlock, FastTransition
from .weights import Loaded, load_weights

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "FallbackWarning",
    "FastDenseBlock",
    "FastDenseNet",
    "FastTransition",
    "Finding",
    "Loaded",
    "Status",
    "__version__",
    "convert",
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
    "explain",
    "freeze",
    "load_weights",
    "reference",
    "status",
    "to_reference",
    "use_backend",
]
