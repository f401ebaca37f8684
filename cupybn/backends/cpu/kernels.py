"""The kernels that Python calls. Importing this imports Numba.

Data are C-contiguous (N, C, L) arrays, everything per channel is (C,), absent arrays are empty.
"""

from .backward import backward
from .channels import add_gradients, finalize_moments, merge_moments, merge_sums
from .compiler import announced, compiled, folder
from .forward import forward, pack_bits

__all__ = [
    "add_gradients",
    "announced",
    "backward",
    "compiled",
    "finalize_moments",
    "folder",
    "merge_moments",
    "merge_sums",
    "forward",
    "pack_bits",
]
