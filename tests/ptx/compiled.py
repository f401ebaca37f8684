"""How the machine itself is compiled: by Numba, once; kept on disk beside this file.

Numba looks at one file to see whether what it kept is out of date. The stamp here is a digest of
all files that are compiled, or whose constants are.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

_options = {"nogil": True, "error_model": "numpy"}

inside = numba.njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_options)
"""For small functions, which become part of those that call them."""

apart = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_options)
"""For functions that are called."""


class _Cache(FunctionCache):
    def __init__(self, function):
        super().__init__(function)
        found = sha256()
        for name in ("compiled", "lanes", "machine", "memory", "program", "words"):
            found.update(Path(__file__).with_name(f"{name}.py").read_bytes())
        self._cache_file = IndexDataCacheFile(
            cache_path=self.cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=found.digest(),
        )


def entry(function):
    """For the function that Python calls."""
    made = numba.njit(**_options)(function)
    made._cache = _Cache(function)
    return made
