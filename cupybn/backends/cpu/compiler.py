"""How the loops are compiled: Numba's options, and the cache on disk that outlives a process.

Numba compiles a kernel for a dtype when it is first called, and keeps the result beside this
package, or where ``NUMBA_CACHE_DIR`` says. It takes what it kept for out of date when the one file
changes that the kernel is in. A kernel here is made of functions from several files, so the stamp
in the index is a digest of every file of the package.
"""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache

from ...arrays import DATA_TYPES
from ...launcher import local_rank

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

# Only adding up may be reassociated, to make it a vector loop (`plus` of ``intrinsics.py``).
# Differences from a pivot or mean are taken as written; nothing may assume that no value is NaN or
# Inf.
_options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
_NAMES = {dtype.bits: name for name, dtype in DATA_TYPES.items()}  # where Numba sees the bits
_kernels: list[Any] = []
announced: set[str] = set()
"""Names of the dtypes whose compiling the user was told of."""

inside = numba.njit(inline="always", **_options)
"""For functions of kernels: their statements become the kernel's, which is compiled as one."""


shared = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_options)
"""For functions that kernels call in several places: compiled once, as a function."""

summed = numba.njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_options)


def kernel(function):
    """A loop that Python calls. Compiled for the types of its arguments, once, and kept on disk."""
    made = numba.njit(**_options)(function)
    try:
        made._cache = _Cache(function)
    except RuntimeError:  # there is nowhere to keep it
        made._cache = _Nowhere()
    _kernels.append(made)
    return made


def compiled() -> int:
    """How many kernels this process has compiled, as opposed to read from disk."""
    return sum(sum(made.stats.cache_misses.values()) for made in _kernels)


def folder() -> str:
    """Where the compiled kernels are kept; empty where there is no such place."""
    return str(_kernels[0].stats.cache_path or "")


def _digest() -> bytes:
    found = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.digest()


class _Cache(FunctionCache):  # type: ignore[misc]
    def __init__(self, function):
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(
            cache_path=self.cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=_digest(),
        )

    def load_overload(self, sig, target_context):
        kept = super().load_overload(sig, target_context)
        if kept is None:
            _announce(sig, f"once; kept in {self.cache_path}")
        return kept


class _Nowhere(NullCache):  # type: ignore[misc]
    def load_overload(self, sig, target_context):
        _announce(sig, "in this process alone: there is no folder to keep it in (NUMBA_CACHE_DIR)")


def _announce(sig: Any, kept: str) -> None:
    """One line on stderr for each dtype, from one rank of a machine, before the long kernels."""
    for kind in sig:
        if not isinstance(kind, types.Array) or kind.ndim != 3:
            continue
        name = _NAMES.get(kind.dtype.name, kind.dtype.name)
        if name not in announced and local_rank() == 0:
            print(f"cupybn: compiling for {name}, {kept}", file=sys.stderr, flush=True)
        announced.add(name)
