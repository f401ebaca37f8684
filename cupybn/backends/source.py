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
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

OPTIONS = ("-std=c++17",)
SCALARS = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}
_WIDTHS = {"float16": 8, "bfloat16": 8, "float32": 4, "float64": 2}

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
        return "\n".join(lines) + "\n" + paste(f"{_FILES.get(self.kernel, self.kernel)}.cu")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.kernel,)

    @property
    def options(self) -> tuple[str, ...]:
        return OPTIONS

    @property
    def label(self) -> str:
        return " ".join([self.kernel, *(f"{name}={value}" for name, value in self.defines)])

    @property
    def wide(self) -> bool:
        """Whether tensors are read and written 16 bytes at a time."""
        chosen = dict(self.defines)
        names = {scalar: dtype for dtype, scalar in SCALARS.items()}
        return chosen.get("VECTOR") == _WIDTHS[names[str(chosen["SCALAR"])]]


_FILES = {"recentre_moments": "finalize_moments"}


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


Choices = dict[str, str | int]


@lru_cache(maxsize=1)
def _flags() -> tuple[tuple[str, Choices], ...]:
    """What each kernel over tensors comes with."""
    forward: list[Choices] = [
        {"RELU": relu, "RESIDUAL": residual, "MASK": mask}
        for relu, residual, mask in product((0, 1), repeat=3)
        if not mask or (relu and residual)
    ]
    activations: list[Choices] = [
        {"RELU": 0, "MASK": 0},
        {"RELU": 1, "MASK": 0},
        {"RELU": 1, "MASK": 1},
    ]
    backward: list[Choices] = [
        {**activation, "RESIDUAL": activation["MASK"], "CONSTANT": constant}
        for activation in activations
        for constant in (0, 1)
    ]
    return (
        ("batch_moments", {}),
        *(("normalize", {**flags, "FLAT": 0}) for flags in forward),
        *(("backward_reduce", flags) for flags in activations),
        *(("backward_input", flags) for flags in backward),
    )


def variants(dtype: str, widths: tuple[int, ...] | None = None) -> Iterator[Variant]:
    """Every kernel which data of a dtype can come to, of the given vector widths or of all."""
    scalar = SCALARS[dtype]
    powers = [1 << i for i in range(_WIDTHS[dtype].bit_length())]
    for width, rows, ragged in product(widths or powers, (0, 1), (0, 1)):
        if width == 1 and rows and ragged:
            continue
        shape: Choices = {"ROWS": rows, "RAGGED_VECTORS": ragged, "VECTOR": width, "SCALAR": scalar}
        for kernel, flags in _flags():
            if flags.get("MASK") and rows and ragged and kernel == "normalize":
                continue
            yield Variant(kernel, tuple(sorted({**shape, **flags}.items())))
    flat: Choices = {"FLAT": 1, "MASK": 1, "RAGGED_VECTORS": 1, "RELU": 1, "RESIDUAL": 1, "ROWS": 0}
    yield Variant("normalize", tuple(sorted({**flat, "SCALAR": scalar, "VECTOR": 1}.items())))
    for form in (0, 1, 2):
        yield Variant("finalize_moments", (("FORM", form), ("SCALAR", scalar)))
    if dtype == "float64":
        yield Variant("recentre_moments", (("FORM", 0), ("SCALAR", scalar)))
