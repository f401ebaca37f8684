"""The backend for CuPy arrays.

``plan`` says how a kernel covers a tensor, ``source`` compiles kernels, ``launch`` keeps what calls
of one signature have in common, and ``primitives`` are the functions that every backend offers.
Those take for granted that the current device is the one of their arrays.
"""

from .primitives import (
    backward_input,
    backward_reduce,
    batch_moments,
    count_valid,
    finalize_moments,
    finish_forward,
    given_statistics,
    local_backward,
    local_forward,
    normalize,
    prepare_backward,
    prepare_forward,
    recentre_moments,
    update_running,
)

__all__ = [
    "backward_input",
    "backward_reduce",
    "batch_moments",
    "count_valid",
    "finalize_moments",
    "finish_forward",
    "given_statistics",
    "local_backward",
    "local_forward",
    "normalize",
    "prepare_backward",
    "prepare_forward",
    "recentre_moments",
    "update_running",
]
