"""The algorithm in plain PyTorch: any device, any floating-point dtype, float64 included.

It is the oracle's neighbour: tested against the naive reference, and what the other backends are tested
against. See :mod:`fastdense.kernels.contract` for what the functions compute.
"""

from .batch_norm import channel_stats
from .dense_block import dense_block, dense_block_backward, dense_block_inference
from .head import head, head_backward
from .stem import stem_tail, stem_tail_backward
from .transition import transition, transition_backward

__all__ = [
    "channel_stats",
    "dense_block",
    "dense_block_backward",
    "dense_block_inference",
    "head",
    "head_backward",
    "stem_tail",
    "stem_tail_backward",
    "transition",
    "transition_backward",
]
