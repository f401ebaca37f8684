"""Which module computes: the backends offer the same five primitives under the same names."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from ..arrays import Array, device_of
from ..errors import DeviceError
from . import numpy as numpy_backend


def backend_for(x: Array) -> ModuleType:
    """The backend for the array's device.

    Raises:
        DeviceError: no backend computes there.
    """
    if isinstance(x, np.ndarray):
        return numpy_backend
    raise DeviceError(f"no backend computes on {device_of(x)}: this version has NumPy's only")
