"""Compile CUDA C++ with g++ and run it on NumPy arrays: the same text that NVRTC gets.

    module = host_module(source, ["scale"])
    module.get_function("scale")((blocks,), (256,), (y, x, np.int64(n)))

Variants: "plain"; "sanitize" (address and undefined behaviour; `sanitized` gives the environment
of the process it needs); "shuffle" (fibres and blocks in a seeded order); "count" (global memory
traffic). CUPYBN_HOST_VARIANT is the default, CUPYBN_HOST_SEED the seed of the first launch.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from . import traffic
from .toolchain import digest, make, missing, runtime

__all__ = ["HostKernelError", "host_module", "host_modules", "missing", "sanitized"]

_GRID = (2**31 - 1, 65535, 65535)
_BLOCK = (1024, 1024, 64)
_DYNAMIC_SHARED = 48 << 10  # what a kernel gets without asking for more
_ONE_AT_A_TIME = threading.Lock()  # the scheduler and static shared memory are global

# One name a declaration. Anything else still compiles, but starts without the poison.
_SHARED = re.compile(r"(?<!extern )\b__shared__\s+([\w:<>, ()]+?)\s+(\w+)\s*((?:\[[^\]]*\]\s*)*);")
_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:(?:alignas|__align__)\s*\([^)]*\)\s*)?"
    r"([\w:<>, ]+?)\s+(\w+)\s*\[\s*\];"
)


class HostKernelError(RuntimeError):
    """What a GPU would answer with a hang, garbage, or an error at the next synchronisation."""


def _translate(source: str, names: Sequence[str]) -> str:
    source = _DYNAMIC.sub(r"\1* \2 = (\1*)hostcuda::dynamic_shared;", source)
    source = _SHARED.sub(
        r"static \1 \2\3; static uint64_t \2_serial;"
        r" [[maybe_unused]] bool \2_poisoned = hostcuda::poisoned(\2, \2_serial);",
        source,
    )
    exports = "".join(
        f"const char* hostcuda_signature_{i}() {{ return hostcuda::signature(&{name}); }}\n"
        f"int hostcuda_sizes_{i}(int* out) {{ return hostcuda::sizes(&{name}, out); }}\n"
        f"const char* hostcuda_call_{i}(const hostcuda::Launch* l, void** a)"
        f" {{ return hostcuda::call(&{name}, *l, a); }}\n"
        for i, name in enumerate(names)
    )
    # In a namespace without a name the sanitizer puts red zones round templates' shared arrays.
    return (
        f'namespace {{\n#line 1 "source.cu"\n{source}\n}}\n'
        f'#line 1 "exports"\nextern "C" {{\n{exports}}}\n'
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_uint),
        ("seed", ctypes.c_uint),
        ("ranges", ctypes.c_void_p),
        ("arguments", ctypes.c_int),
    )


def _three(dims: Sequence[int], limits: Sequence[int], what: str) -> tuple[int, int, int]:
    x, y, z = (*map(int, dims), 1, 1)[:3]
    if len(dims) > 3 or any(not 1 <= d <= top for d, top in zip((x, y, z), limits, strict=True)):
        raise HostKernelError(f"invalid configuration argument: {what} {tuple(dims)}")
    return x, y, z


def _scalar(value: Any) -> np.generic:
    """As CuPy takes Python's own numbers."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int64(value)
    return np.float64(value) if isinstance(value, float) else value


class HostKernel:
    """Called like a CuPy RawKernel; every argument is checked against the kernel's signature."""

    max_dynamic_shared_size_bytes = _DYNAMIC_SHARED

    def __init__(self, library: ctypes.CDLL, index: int, name: str, variant: str) -> None:
        self.name = name
        self._variant = variant
        signature = getattr(library, f"hostcuda_signature_{index}")
        signature.restype = ctypes.c_char_p
        self._kinds = signature().decode()
        sizes = (ctypes.c_int * max(1, len(self._kinds)))()
        getattr(library, f"hostcuda_sizes_{index}")(sizes)
        self._sizes = list(sizes)
        self._call = getattr(library, f"hostcuda_call_{index}")
        self._call.restype = ctypes.c_char_p

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any],
        *, shared_mem: int = 0,
    ) -> None:  # fmt: skip
        if len(args) != len(self._kinds):
            raise TypeError(f"{self.name} takes {len(self._kinds)} arguments, got {len(args)}")
        dims = _three(grid, _GRID, "grid"), _three(block, _BLOCK, "block")
        if np.prod(dims[1]) > 1024:
            raise HostKernelError(f"invalid configuration argument: block {block}")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise HostKernelError(
                f"{shared_mem} bytes of dynamic shared memory: set max_dynamic_shared_size_bytes"
            )
        values = [self._pack(i, value) for i, value in enumerate(args)]
        pointers = (ctypes.c_void_p * len(args))(*(v.ctypes.data for v in values))
        ranges = np.array(
            [(a.ctypes.data, a.nbytes) if isinstance(a, np.ndarray) else (0, 0) for a in args],
            np.uint64,
        )
        with _ONE_AT_A_TIME:
            launch = _Launch(
                *(self.name.encode(), (ctypes.c_uint * 3)(*dims[0]), (ctypes.c_uint * 3)(*dims[1])),
                *(shared_mem, _next_seed(), ranges.ctypes.data, len(args)),
            )
            error = self._call(ctypes.byref(launch), pointers)
            if error:
                raise HostKernelError(error.decode())
            if self._variant == "count":
                traffic.record(runtime(self._variant)[0], self.name, *dims, args)

    def _pack(self, i: int, value: Any) -> np.ndarray[Any, Any]:
        """The argument's bytes, as an array that owns them."""
        kind, size = self._kinds[i], self._sizes[i]
        if isinstance(value, np.ndarray):
            packed, ok = np.array(value.ctypes.data, np.uint64), kind == "p"
        else:
            packed = np.array(_scalar(value))
            given = packed.dtype.kind
            ok = packed.dtype.itemsize == size and (
                kind == "s" or given == kind or (given in "iu" and kind in "pi")
            )
        if not ok:
            wanted = {"p": "pointer", "i": "integer", "f": "float", "b": "bool", "s": "struct"}
            raise TypeError(
                f"{self.name}, argument {i}: {type(value).__name__} for a {wanted[kind]}"
                f" of {size} bytes"
            )
        return packed


class HostModule:
    def __init__(self, library: Path, names: Sequence[str], variant: str) -> None:
        loaded = ctypes.CDLL(str(library))
        self._kernels = {name: HostKernel(loaded, i, name, variant) for i, name in enumerate(names)}

    def get_function(self, name: str) -> HostKernel:
        return self._kernels[name]


_seed = int(os.environ.get("CUPYBN_HOST_SEED", "0"))


def seed(value: int) -> None:
    """The shuffled order of the next launch; each launch after it takes the next seed."""
    global _seed
    _seed = value


def _next_seed() -> int:
    seed(_seed + 1)
    return (_seed - 1) & 0xFFFFFFFF


def host_modules(
    wanted: Sequence[tuple[str, Sequence[str]]], *, variant: str | None = None
) -> list[HostModule]:
    """Several modules, (source, names) each, as many compilers at once as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: host_module(*pair, variant=variant), wanted))


def host_module(
    source: str, names: Sequence[str], *, options: Sequence[str] = (), variant: str | None = None
) -> HostModule:
    """Compile `source` and return its kernels `names`: extern "C" names or name expressions.

    Of `options`, those that define macros count; the rest speak to NVRTC.
    """
    variant = variant or os.environ.get("CUPYBN_HOST_VARIANT", "plain")
    defines = tuple(o for o in options if o.startswith(("-D", "-U", "--define-macro")))
    return _module(source, tuple(names), defines, variant)


@cache
def _module(
    source: str, names: tuple[str, ...], defines: tuple[str, ...], variant: str
) -> HostModule:
    library, flags = runtime(variant)
    home = library.parent
    text = _translate(source, names)
    path = home / f"{digest(text, *defines)}.so"
    if not path.exists():
        command = ["g++", *flags, *defines, "-include", str(home / "shim.h"), "-x", "c++", "-"]
        make(path, [*command, "-x", "none", str(library), f"-Wl,-rpath,{home}"], text)
    return HostModule(path, names, variant)


def sanitized() -> dict[str, str]:
    """The environment of a process that runs the "sanitize" variant, its default there.

    AddressSanitizer must be loaded before Python, so that NumPy's arrays get red zones.
    """
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "CUPYBN_HOST_VARIANT": "sanitize",
    }
