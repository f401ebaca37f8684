"""The CUDA sources: finds them, pastes their headers in, compiles a kernel when first used.

CuPy's cache on disk knows a kernel by its text and its options, not by the headers which the text
includes. So the text has no headers of ours to include: they are pasted in, and a changed one is a
changed text. ``#line`` keeps the true places in compiler messages.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .launch import geometries

OPTIONS = ("-std=c++17",)
SCALARS = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}
_ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_OVER_TENSORS = ("batch_moments", "normalize", "backward_reduce", "backward_input")

_OWN_INCLUDE = re.compile(r'^#include "([\w.]+)"$')
_kernels: dict[tuple[Any, ...], Any] = {}
_lock = threading.Lock()


def source_directory() -> Path:
    """Where the .cu files are: package data of an installed cupybn, or the checkout's cuda/.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "_cuda", package.parent / "cuda"):
        if (directory / "numeric.cuh").is_file():
            return directory
    raise FileNotFoundError(
        f"the CUDA sources of cupybn are neither in {package / '_cuda'} nor beside the package; "
        "install cupybn again"
    )


@dataclass(frozen=True)
class Variant:
    """One kernel with its choices made; `defines` are macros and their values."""

    kernel: str
    defines: tuple[tuple[str, str | int], ...]

    @property
    def source(self) -> str:
        lines = [f"#define {name} {value}" for name, value in self.defines]
        return "\n".join(lines) + "\n" + paste(f"{self.kernel}.cu")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.kernel,)

    @property
    def options(self) -> tuple[str, ...]:
        return OPTIONS

    @property
    def label(self) -> str:
        return " ".join([self.kernel, *(f"{name}={value}" for name, value in self.defines)])


def paste(name: str, directory: Path | None = None) -> str:
    """The text of a source file with every own header in it once."""
    seen: set[str] = set()
    root = source_directory() if directory is None else directory

    def lines_of(file: str) -> Iterator[str]:
        seen.add(file)
        yield f'#line 1 "cuda/{file}"'
        text = (root / file).read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            include = _OWN_INCLUDE.match(line)
            if include is None:
                yield "" if line == "#pragma once" else line
            elif include[1] in seen:
                yield ""
            else:
                yield from lines_of(include[1])
                yield f'#line {number + 1} "cuda/{file}"'

    return "\n".join(lines_of(name)) + "\n"


def get_kernel(kernel: str, **defines: str | int) -> Any:
    """The compiled kernel of these choices, from this process' memory if it was used before."""
    key = (kernel, *sorted(defines.items()))
    found = _kernels.get(key)
    if found is None:
        with _lock:
            found = _kernels.get(key)
            if found is None:
                variant = Variant(kernel, tuple(sorted(defines.items())))
                found = compile_module(variant.source, kernel).get_function(kernel)
                _kernels[key] = found
    return found


def compile_module(text: str, name: str) -> Any:
    """A compiled module of one kernel. Tests put the host build in the place of this function."""
    import cupy  # type: ignore[import-not-found, unused-ignore]

    module = cupy.RawModule(code=text, options=OPTIONS, name_expressions=None)
    module.compile()
    return module


def clear() -> None:
    """Forgets every kernel."""
    with _lock:
        _kernels.clear()


def variants(dtype: str) -> Iterator[Variant]:
    """Every kernel that there is for data of a dtype, or for parameters of it."""
    scalar = ("SCALAR", SCALARS[dtype])
    for rows, vector, ragged in geometries(_ITEMSIZES[dtype]):
        shape = ("RAGGED_VECTORS", int(ragged)), ("ROWS", int(rows)), scalar, ("VECTOR", vector)
        for kernel in _OVER_TENSORS:
            # one tensor alone is never read by the element for the sake of the others
            if kernel != "batch_moments" or not rows or vector > 1:
                yield Variant(kernel, shape)
        if dtype == "float64":
            yield Variant("normalize_recentred", shape)
    yield Variant("normalize_flat", (scalar,))
    if dtype in ("float32", "float64"):
        yield Variant("finalize_moments", (scalar,))
    if dtype == "float64":
        yield Variant("normalize_recentred_flat", (scalar,))
        yield Variant("recentre_moments", ())
