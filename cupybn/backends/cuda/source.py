"""The CUDA sources: finds them, pastes their headers in, compiles a kernel when first used.

CuPy's cache on disk knows a kernel by its text and its options, not by the headers that the text
includes. So our headers are pasted into the text, and a changed header is a changed text. ``#line``
keeps the true places in compiler messages.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS = ("-std=c++17",)
# The kernels of one pass are compiled together: headers, and all that the compiler does before it
# comes to a kernel, take some of a module's time.
TOGETHER = (("batch_moments", "normalize"), ("backward_reduce", "backward_input"))

_OWN_INCLUDE = re.compile(r'^#include "([\w.]+)"$')
_kernels: dict[tuple[Any, ...], Any] = {}
_lock = threading.Lock()


def source_directory() -> Path:
    """The folder of the .cu files: package data of an installed cupybn, or the checkout's cuda/.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).resolve().parents[2]
    for directory in (package / "_cuda", package.parent / "cuda"):
        if (directory / "numeric.cuh").is_file():
            return directory
    raise FileNotFoundError(
        f"the CUDA sources of cupybn are neither in {package / '_cuda'} nor beside the package; "
        "install cupybn again"
    )


def module_text(kernels: tuple[str, ...], defines: tuple[tuple[str, str | int], ...]) -> str:
    """The text of a module: kernels with their choices made, by macros and their values."""
    lines = (f"#define {name} {value}\n" for name, value in defines)
    return "".join(lines) + paste(*(f"{kernel}.cu" for kernel in kernels))


def paste(*names: str) -> str:
    """The text of source files, one after the other, with every own header in it once."""
    seen: set[str] = set()
    root = source_directory()

    def lines_of(file: str) -> Iterator[str]:
        seen.add(file)
        yield f'#line 1 "cuda/{file}"'
        text = (root / file).read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            include = _OWN_INCLUDE.match(line)
            if include and include[1] not in seen:
                yield from lines_of(include[1])
                yield f'#line {number + 1} "cuda/{file}"'
            else:
                yield "" if include or line == "#pragma once" else line

    return "\n".join(line for name in names for line in lines_of(name)) + "\n"


def get_kernel(kernel: str, **defines: str | int) -> Any:
    """The compiled kernel with these macros, from this process' memory if it was used before."""
    choices = tuple(sorted(defines.items()))
    with _lock:
        if (kernel, choices) not in _kernels:
            together = next((names for names in TOGETHER if kernel in names), (kernel,))
            module = compile_module(module_text(together, choices), together)
            for name in together:
                _kernels[name, choices] = module.get_function(name)
        return _kernels[kernel, choices]


def compile_module(text: str, kernels: tuple[str, ...]) -> Any:
    """The compiled module of these kernels. Tests replace this function."""
    import cupy  # type: ignore[import-not-found, unused-ignore]

    module = cupy.RawModule(code=text, options=OPTIONS, name_expressions=None)
    module.compile()
    return module
