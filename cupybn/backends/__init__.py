"""Which module computes: the backends offer the same five primitives under the same names."""

from __future__ import annotations

from types import ModuleType

from ..arrays import Array, is_cupy
from . import cuda as cuda_backend
from . import numpy as numpy_backend


def backend_for(x: Array) -> ModuleType:
    """The backend for the array's device."""
    return cuda_backend if is_cupy(x) else numpy_backend
