"""Where the tests' kernels run: in the machine for PTX, or in the host build (CUPYBN_TEST_KERNELS).

``compile_module(text, kernels)`` takes the place of the function of that name in source.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

BUILD = os.environ.get("CUPYBN_TEST_KERNELS", "host")
if BUILD == "ptx":
    from ptx.launch import compile_module
    from ptx.launch import missing as missing
    from ptx.nvrtc import CompileError as CompileError

    def compile_modules(wanted: Sequence[tuple[str, Sequence[str]]]) -> list[Any]:
        return [compile_module(*each) for each in wanted]
else:
    from hostcuda.build import host_module as compile_module
    from hostcuda.build import host_modules as compile_modules
    from hostcuda.build import missing as missing
    from hostcuda.toolchain import CompileError as CompileError

__all__ = ["BUILD", "CompileError", "compile_module", "compile_modules", "missing"]
