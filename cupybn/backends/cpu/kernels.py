"""The kernels that Python calls. Importing this imports Numba.

Data are C-contiguous (N, C, L) arrays, everything per channel is (C,), absent arrays are empty.
"""

from .backward import column_backward, row_backward
from .channels import add_gradients, finalize_moments, merge_moments, merge_sums
from .compiler import announced, compiled, folder
from .forward import column_forward, pack_mask, row_forward

__all__ = [
    "add_gradients",
    "announced",
    "column_backward",
    "column_forward",
    "compiled",
    "finalize_moments",
    "folder",
    "merge_moments",
    "merge_sums",
    "pack_mask",
    "row_backward",
    "row_forward",
]
