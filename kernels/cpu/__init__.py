"""C++ kernels for x86, chosen at run time for AVX2, AVX-512 and AMX.

See :mod:`fastdense.kernels.contract` for what the functions compute.
"""

from .chain import PreparedChain
from .dense_block import PreparedBlock, dense_block, dense_block_backward, dense_block_inference
from .pointwise import (
    PreparedHead,
    PreparedStemTail,
    PreparedTransition,
    channel_stats,
    head,
    head_backward,
    stem_tail,
    stem_tail_backward,
    transition,
    transition_backward,
)
from .stem import PreparedStem, stem_inference

PREPARED = {
    "dense_block_inference": PreparedBlock,
    "transition": PreparedTransition,
    "stem_inference": PreparedStem,
    "stem_tail": PreparedStemTail,
    "head": PreparedHead,
    "chain": PreparedChain,
}

__all__ = [
    "PREPARED",
    "channel_stats",
    "dense_block",
    "dense_block_backward",
    "dense_block_inference",
    "head",
    "head_backward",
    "stem_inference",
    "stem_tail",
    "stem_tail_backward",
    "transition",
    "transition_backward",
]
