"""NVIDIA's compiler as a function: CUDA C++ to PTX. From its wheel, by ctypes; no CuPy, no driver.

PTX is kept on disk, by all that it depends on: a second run of the tests compiles nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

# As CuPy's RawModule passes them; lines are kept for messages and change no instruction.
OPTIONS = (
    *("-std=c++17", "--device-as-default-execution-space", "-ftz=true", "--generate-line-info"),
)
ARCHITECTURE = os.environ.get("CUPYBN_PTX_ARCH", "compute_90")
_WHEEL = "pip install nvidia-cuda-nvrtc"
_one_at_a_time = threading.Lock()  # NVRTC's own rule for one process


class CompileError(RuntimeError):
    """NVRTC refused the text; its log is the message."""


@cache
def missing() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        version()
    except OSError as error:
        return f"no NVRTC ({error}): {_WHEEL}"
    return None


def _folder() -> Path:
    nvidia = importlib.util.find_spec("nvidia")
    for base in (nvidia.submodule_search_locations or []) if nvidia else []:
        for found in sorted(Path(base).glob("**/libnvrtc.so.*"), reverse=True):
            return found.parent
    raise OSError("its wheel is not installed")


@cache
def _library() -> ctypes.CDLL:
    folder = _folder()
    for builtins in sorted(folder.glob("libnvrtc-builtins.so.*")):
        if ".alt." not in builtins.name:
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    (library,) = (f for f in folder.glob("libnvrtc.so.*") if ".alt." not in f.name)
    return ctypes.CDLL(str(library))


@cache
def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_text(
    text: str, architecture: str = ARCHITECTURE, options: Sequence[str] = OPTIONS
) -> str:
    """The PTX of a text, for a virtual architecture such as "compute_90".

    Raises:
        CompileError: NVRTC refuses the text.
        OSError: NVRTC's wheel is not installed.
    """
    parts = (text, architecture, *options, *map(str, version()))
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = kept() / f"{name}.ptx"
    if path.exists():
        return path.read_text(encoding="utf-8")
    with _one_at_a_time:
        ptx = _compile(text, (f"--gpu-architecture={architecture}", *options))
    descriptor, scratch = tempfile.mkstemp(dir=path.parent)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(ptx)
    os.replace(scratch, path)  # in one step: others may make the same
    return ptx


@cache
def kept() -> Path:
    """A folder of the user's own, from run to run: what lies in it is executed."""
    path = Path(tempfile.gettempdir()) / f"cupybn-ptx-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to someone else")
    return path


def _compile(text: str, options: Sequence[str]) -> str:
    nvrtc, program = _library(), ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"text.cu", 0, None, None
    )
    if created:
        raise CompileError(f"nvrtcCreateProgram: error {created}")
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            raise CompileError(_text(nvrtc, program, "ProgramLog"))
        return _text(nvrtc, program, "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode()
