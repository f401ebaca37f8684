"""The backend for CuPy arrays.

``plan`` says how a kernel covers a tensor, ``source`` compiles kernels, ``launch`` keeps what calls
of one signature have in common, and ``primitives`` are the functions that every backend offers.
They rely on the current device being the one of their arrays.
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
