"""The choice of a backend: a module that offers the primitives, under the same names everywhere.

NumPy arrays go to the package ``cpu`` if Numba is installed (extra ``cpu``), else to ``numpy.py``.
The environment variable ``CUPYBN_CPU_BACKEND``, read at the first call, forces one: "numpy" or
"numba"; "auto" is the default.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from importlib.util import find_spec
from types import ModuleType

import numpy as np

from ..arrays import Array, is_cupy
from . import cpu as compiled_backend
from . import cuda as cuda_backend
from . import numpy as numpy_backend

_VARIABLE = "CUPYBN_CPU_BACKEND"
by_type: dict[type, ModuleType] = {}
"""The backends in use, by the type of the arrays: NumPy's, and CuPy's once there was one."""
_problem = ""


def backend_for(x: Array) -> ModuleType:
    """The backend for the array's type."""
    found = by_type.get(type(x))
    if found is not None:
        return found
    if not is_cupy(x):
        return cpu_backend()
    by_type[type(x)] = cuda_backend
    return cuda_backend


def cpu_backend() -> ModuleType:
    """The backend for NumPy arrays. The first call may import Numba.

    Raises:
        ImportError: Numba was asked for and cannot be imported.
        ValueError: ``CUPYBN_CPU_BACKEND`` names no backend.
    """
    found = by_type.get(np.ndarray)
    return found if found is not None else use_cpu_backend(os.environ.get(_VARIABLE) or "auto")


def numba_problem() -> str:
    """Why NumPy has to take the place of an installed Numba; "" if Numba works.

    For ranks that agree on a backend before the first call: it chooses as that call will, without
    a warning, and leaves errors to that call.
    """
    with warnings.catch_warnings(), suppress(ImportError, ValueError):
        warnings.simplefilter("ignore")
        cpu_backend()
    return _problem


def use_cpu_backend(name: str | ModuleType) -> ModuleType:
    """Sets the backend for NumPy arrays: "numpy", "numba", "auto", or a module. Returns it.

    Raises:
        As :func:`cpu_backend`.
    """
    global _problem
    if isinstance(name, ModuleType):
        by_type[np.ndarray] = name
        return name
    if name not in ("auto", "numba", "numpy"):
        raise ValueError(f"{_VARIABLE} must be 'auto', 'numba' or 'numpy', got {name!r}")
    found: ModuleType = numpy_backend
    if name == "numba" or (name == "auto" and find_spec("numba") is not None):
        try:
            compiled_backend.load()
            found = compiled_backend
        except ImportError as error:
            if name == "numba":
                raise ImportError(
                    f"the CPU backend 'numba' cannot be used ({error}): pip install --upgrade "
                    f"numba, or {_VARIABLE}=numpy"
                ) from error
            _problem = str(error)
            warnings.warn(
                f"Numba is installed, but cannot be used ({error}); NumPy computes instead. "
                f"{_VARIABLE}=numpy says that this is meant",
                RuntimeWarning,
                stacklevel=2,
            )
    by_type[np.ndarray] = found
    return found
