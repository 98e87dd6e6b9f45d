"""How kernels want to be launched: a module for each file of `kernels/`, under the same name.

Addresses are numbers, structures abi's. A norm without a weight is none, a matrix without segments is not there.
Sizes that a kernel and its launch share stand in the kernel's file, where `abi.constants` reads them.
"""

from kvrun.cuda.launch import attention, attention_chunk, bandwidth, cache, chunk, experts, matrix, step
from kvrun.cuda.launch.common import NO_MATRIX, NO_NORM

__all__ = [
    "NO_MATRIX",
    "NO_NORM",
    "attention",
    "attention_chunk",
    "bandwidth",
    "cache",
    "chunk",
    "experts",
    "matrix",
    "step",
]
