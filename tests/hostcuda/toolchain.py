"""g++, the CUDA headers, and a folder of compiled objects."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
_LOCK = threading.Lock()
COMMON = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-march=native", "-DCUPYBN_HOST"),
    *("-ffp-contract=fast", "-fno-strict-aliasing", "-fno-exceptions"),
    *("-Wall", "-Wno-unused", "-Wno-unknown-pragmas", "-Werror=return-type"),
)
VARIANTS = {
    "plain": (),
    "shuffle": ("-DHOSTCUDA_SHUFFLE",),
    "count": ("-DHOSTCUDA_COUNT",),
    "portable": ("-DHOSTCUDA_PORTABLE",),  # fibres as on other processors than x86-64
    "sanitize": (
        *("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "-fno-omit-frame-pointer",
    ),
}


class CompileError(RuntimeError):
    """g++ refused the text, or is not there."""


@cache
def missing() -> str | None:
    """Why nothing can be built here; None if it can."""
    if not shutil.which("g++"):
        return "no g++"
    if not cuda_headers():
        return (
            "no CUDA headers: install a toolkit, or the wheels nvidia-cuda-runtime,"
            " nvidia-cuda-crt and nvidia-cuda-cccl"
        )
    return None


@cache
def cuda_headers() -> tuple[str, ...]:
    """Folders with cuda_fp16.h, crt/ and nv/target: those of the wheels, else of a toolkit."""
    candidates = []
    nvidia = importlib.util.find_spec("nvidia")
    for base in (nvidia.submodule_search_locations or []) if nvidia else []:
        wheels = sorted(Path(base).glob("*/include"))
        candidates.append([*wheels, *(p / "cccl" for p in wheels), *_cupy_headers()])
    toolkits = os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"
    includes = [Path(toolkit) / "include" for toolkit in toolkits if toolkit]
    candidates += [[include, include / "cccl"] for include in includes]
    wanted = ("cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h", "nv/target")
    for folders in candidates:
        if all(any((folder / name).is_file() for folder in folders) for name in wanted):
            return tuple(str(folder) for folder in folders if folder.is_dir())
    return ()


def _cupy_headers() -> list[Path]:
    cupy = importlib.util.find_spec("cupy")
    if not cupy or not cupy.origin:
        return []
    return [Path(cupy.origin).parent / "_core/include/cupy/_cccl/libcudacxx"]


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


@cache
def _fingerprint() -> str:
    """What the objects depend on besides the texts: the compiler, the CPU, the headers."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    cpu = Path("/proc/cpuinfo")
    flags = re.search(r"^flags.*$", cpu.read_text(), re.M) if cpu.exists() else None
    return version.stdout + str(cuda_headers()) + (flags.group() if flags else "")


@cache
def folder() -> Path:
    """Compiled objects, kept from run to run; a user's own, because they are loaded as code."""
    path = Path(tempfile.gettempdir()) / f"cupybn-hostcuda-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to someone else")
    return path


def make(path: Path, command: Sequence[str], text: str | None = None) -> Path:
    """Run a compiler, and put its output in place in one step: others may build the same."""
    # not LD_PRELOAD: a compiler under AddressSanitizer takes several times as long
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        out = Path(scratch) / path.name
        done = subprocess.run(
            [*command, "-o", str(out)], input=text, capture_output=True, text=True, env=env
        )
        if done.returncode:
            raise CompileError(f"{' '.join(command)}:\n{done.stderr}")
        os.replace(out, path)
    return path


def runtime(variant: str) -> tuple[Path, list[str]]:
    """The scheduler's library, and the flags it and the precompiled shim were made with.

    Both lie in one folder; objects of kernels go there too, so a change to either leaves them.
    """
    with _LOCK:
        return _runtime(variant)


@cache
def _runtime(variant: str) -> tuple[Path, list[str]]:
    if missing():
        raise CompileError(f"the kernels cannot be built for the CPU: {missing()}")
    texts = [p.read_text() for p in sorted(HERE.iterdir()) if p.suffix in (".h", ".cpp")]
    flags = [*COMMON, *VARIANTS[variant], f"-I{HERE}"]
    flags += [f"-isystem{path}" for path in cuda_headers()]
    home = folder() / f"{variant}-{digest(*texts, *flags, _fingerprint())}"
    home.mkdir(exist_ok=True)
    library = home / "libhostcuda.so"
    if not library.exists():
        make(library, ["g++", *flags, *(str(p) for p in sorted(HERE.glob("*.cpp")))])
    if not (home / "shim.h.gch").exists():
        make(home / "shim.h.gch", ["g++", *flags, "-x", "c++-header", str(HERE / "shim.h")])
    return library, flags
