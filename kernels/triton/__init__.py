"""Triton kernels, for GPUs. Importing this needs Triton; running it needs a GPU, or TRITON_INTERPRET=1.

See :mod:`fastdense.kernels.contract` for what the functions compute.
"""

from .dense_block import dense_block, dense_block_inference
from .dense_block_backward import dense_block_backward
from .head import head, head_backward
from .statistics import channel_stats
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
