"""Triton kernels, for GPUs. Importing this needs Triton; running it needs a GPU, or TRITON_INTERPRET=1.

See :mod:`fastdense.kernels.contract` for what the functions compute.
"""

from .dense_block import PreparedBlock, dense_block, dense_block_inference
from .dense_block_backward import dense_block_backward
from .head import head, head_backward
from .statistics import channel_stats
from .stem import PreparedStem, PreparedStemTail, stem_tail, stem_tail_backward
from .transition import PreparedTransition, transition, transition_backward

FROZEN = {
    "dense_block_inference": PreparedBlock,
    "transition": PreparedTransition,
    "stem_inference": PreparedStem,
    "stem_tail": PreparedStemTail,
}

__all__ = [
    "FROZEN",
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
