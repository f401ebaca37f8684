"""How the machine itself is compiled: by Numba, once; kept on disk beside the PTX (``nvrtc.py``).

Numba looks at one file to see whether what it kept is out of date. Here the folder's name is a
digest of all files that are compiled, or whose constants are: other checkouts of the same find it.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

from .nvrtc import kept

_options = {"nogil": True, "error_model": "numpy"}

inside = numba.njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_options)
"""For small functions, which become part of those that call them."""

pasted = numba.njit(inline="always", **_options)
"""For large functions with one caller: compiled as a part of it alone."""


def _folder() -> Path:
    found = sha256(numba.__version__.encode())
    for name in ("compiled", "lanes", "machine", "memory", "program", "words"):
        found.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    folder = kept() / f"machine-{found.hexdigest()[:20]}"
    folder.mkdir(exist_ok=True)
    return folder


class _Cache(FunctionCache):
    def __init__(self, function):
        super().__init__(function)
        self._cache_path = str(_folder())
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path, filename_base=self._impl.filename_base, source_stamp=0
        )


def entry(function):
    """For the function that Python calls."""
    made = numba.njit(**_options)(function)
    made._cache = _Cache(function)
    return made
