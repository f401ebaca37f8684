"""How the loops are compiled: Numba's options, and the cache on disk that outlives a process.

Numba compiles a kernel when it is first called for a dtype, and stores the result beside this
package, or in ``NUMBA_CACHE_DIR``. Numba's own index trusts what it reads, and looks for changes
only in the file that defines the kernel. Kernels here consist of functions from several files, and
damaged machine code would crash the process. So each signature has a file of its own, which begins
with a digest of its content and of everything it was compiled from. A file that cannot be read or
written only costs time: the kernel is compiled again.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache

from ...arrays import DATA_TYPES
from ...launcher import local_rank

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

# Only sums may be reassociated, so that they vectorize (`plus` in ``intrinsics.py``). Differences
# from a pivot or mean are computed as written, and values may be NaN or Inf.
_options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
_NAMES = {dtype.bits: name for name, dtype in DATA_TYPES.items()}  # those that Numba sees as bits
_kernels: list[Any] = []
announced: set[str] = set()
"""Names of the dtypes whose compilation was announced."""
_warned = False  # whether the user was warned that the cache cannot be written

inside = numba.njit(inline="always", **_options)
"""For functions that are inlined into a kernel and compiled with it."""


shared = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_options)
"""For functions that kernels call in several places: compiled once, not inlined."""

summed = numba.njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_options)


def kernel(function):
    """Decorates a loop that Python calls: compiled once per signature, and cached on disk."""
    made = numba.njit(**_options)(function)
    try:
        made._cache = _Cache(function)
    except (RuntimeError, OSError):  # no folder for the cache
        made._cache = _Nowhere()
    _kernels.append(made)
    return made


def compiled() -> int:
    """The number of kernels that this process compiled and did not read from disk."""
    return sum(sum(made.stats.cache_misses.values()) for made in _kernels)


def folder() -> str:
    """The folder of the compiled kernels; empty if there is none."""
    return str(_kernels[0].stats.cache_path or "")


def _digest() -> bytes:
    """The digest of what kernels are compiled from: the files here, the compilers' versions."""
    found = sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.digest()


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """One file per signature and type of processor; a damaged file counts as absent."""

    def __init__(self, cache_path, filename_base, source_stamp):
        super().__init__(cache_path, filename_base, source_stamp)
        self._filename_base = filename_base

    def _place(self, key):
        name = self._filename_base + "." + sha256(repr(key[:2]).encode()).hexdigest()[:16]
        return self._data_path(f"{name}.nbc")

    def _seal(self, key, data):
        return sha256(self._source_stamp + repr(key).encode() + data).digest()

    def load(self, key):
        try:
            content = Path(self._place(key)).read_bytes()
        except OSError:
            return None
        seal, data = content[:32], content[32:]
        return pickle.loads(data) if seal == self._seal(key, data) else None

    def save(self, key, data):
        data = self._dump(data)
        with self._open_for_write(self._place(key)) as file:
            file.write(self._seal(key, data) + data)


class _Cache(FunctionCache):  # type: ignore[misc]
    def __init__(self, function):
        super().__init__(function)
        self._cache_file = _Files(self.cache_path, self._impl.filename_base, _digest())

    def load_overload(self, sig, target_context):
        try:
            kept = super().load_overload(sig, target_context)
        except Exception:  # whatever is wrong with the file, the kernel can be compiled again
            kept = None
        if kept is None:
            _announce(sig, f"once; kept in {self.cache_path}")
        return kept

    def save_overload(self, sig, data):
        global _warned
        try:
            super().save_overload(sig, data)
        except OSError as error:
            if not _warned:
                _warned = True
                warnings.warn(
                    f"what Numba compiled for cupybn cannot be kept in {self.cache_path} "
                    f"({error}): this process has it, others compile it again. NUMBA_CACHE_DIR "
                    "names another folder",
                    RuntimeWarning,
                    stacklevel=2,
                )


class _Nowhere(NullCache):  # type: ignore[misc]
    def load_overload(self, sig, target_context):
        _announce(sig, "in this process alone: there is no folder to keep it in (NUMBA_CACHE_DIR)")


def _announce(sig: Any, kept: str) -> None:
    """Prints one line per dtype on stderr, on one rank per machine, before kernels compile."""
    for kind in sig:
        if not isinstance(kind, types.Array) or kind.ndim != 3:
            continue
        name = _NAMES.get(kind.dtype.name, kind.dtype.name)
        if name not in announced and local_rank() == 0:
            print(f"cupybn: compiling for {name}, {kept}", file=sys.stderr, flush=True)
        announced.add(name)
