"""Every kernel compiles with NVRTC for every architecture; no GPU and no driver needed.

Nowhere may it spill or use a stack; of one architecture the instructions are looked at, too.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from itertools import count, cycle
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_tools import need
from cuda_variants import RESIDENT, Variant, masked_variants
from cuda_variants import variants as variants_of

from cupybn.arrays import DATA_TYPES
from cupybn.backends.cuda import source

pytestmark = pytest.mark.timeout(900)
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
LOOKED_AT = "sm_90"
SPREAD = "one each"  # of the architectures, in turn
CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
BUNDLE = 6  # modules a compilation: NVIDIA's headers cost as much as a third of a kernel
# the others only load what is wide
LOADS_AND_STORES = {"normalize", "normalize_recentred", "backward_input", *RESIDENT}
COPIES = r"\bLDGSTS\.E(\.\w+)*\.128\b"  # of sm_80 and up, into shared memory


class Compiled(NamedTuple):
    """The compiler's report on one kernel; the last two fields for LOOKED_AT only."""

    label: str  # of its module
    kernel: str
    error: str
    spills: str
    wide_loads: bool
    wide_stores: bool


@cache
def _missing() -> str | None:
    if not importlib.util.find_spec("cupy"):
        return "no cupy: pip install cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-runtime"
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
        _options()
    except Exception as error:  # CuPy raises what its loader finds
        return f"no NVRTC or no CUDA headers: {error}"
    return None


def _nvdisasm() -> str | None:
    nvidia = importlib.util.find_spec("nvidia")
    for base in (nvidia.submodule_search_locations or []) if nvidia else []:
        for found in Path(base).glob("*/bin/nvdisasm"):
            return str(found)
    return shutil.which("nvdisasm")


@pytest.fixture(autouse=True)
def _tools():
    need(_missing())


def _options() -> list[str]:
    """As RawModule passes them, which asks for a device to do so."""
    import cupy
    from cuda.pathfinder import find_nvidia_header_directory

    core = Path(cupy.__file__).parent / "_core" / "include"
    runtime = find_nvidia_header_directory("cudart")
    if runtime is None:
        raise FileNotFoundError("cuda_runtime.h: pip install nvidia-cuda-runtime")
    headers = (core / "cupy" / "_cccl" / "libcudacxx", core, runtime)
    return [
        *source.OPTIONS,
        *("--device-as-default-execution-space", "-ftz=true"),
        *(f"-I{path}" for path in headers),
    ]


def compile_text(text: str, arch: str, *more: str) -> tuple[bytes, str]:
    """A cubin and the compiler's log."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(text, "bundle.cu", [], [])
    try:
        nvrtc.compileProgram(program, [*_options(), f"-arch={arch}", *more])
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)


def bundle(variants: Sequence[Variant]) -> str:
    """One text with all of them, each in a namespace; the kernels are kernel_0, kernel_1 ..."""
    parts, number = [], count()
    for i, variant in enumerate(variants):
        parts += [f"#define {kernel} kernel_{next(number)}" for kernel in variant.kernels]
        parts.append(f"namespace variant_{i} {{\n{variant.source}}}")
        parts += [f"#undef {name}" for name in (*variant.kernels, *dict(variant.defines))]
    return "\n".join(parts) + "\n"


def _sections(text: str, heading: str) -> dict[int, str]:
    """The text after each heading, by the number of the kernel that the heading names."""
    pieces = re.split(heading + r"kernel_(\d+)\b", text)
    return {int(number): body for number, body in zip(pieces[1::2], pieces[2::2], strict=True)}


def disassemble(cubin: bytes) -> dict[str, str]:
    """The SASS of each kernel, by its name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin + b"\0")  # the last byte of the file, which CuPy takes off as of a string
        file.flush()
        command = [str(_nvdisasm()), "-c", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pieces = re.split(r"\.section\s+\.text\.(\w+)", sass)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def compile_bundle(variants: Sequence[Variant], arch: str) -> list[Compiled]:
    """Run in a process of its own: NVRTC takes one compilation at a time in each."""
    try:
        cubin, log = compile_text(bundle(variants), arch, "--ptxas-options=-v")
    except RuntimeError as error:
        if len(variants) == 1:
            return [Compiled(variants[0].label, "", str(error), "", False, False)]
        return [one for v in variants for one in compile_bundle([v], arch)]
    reports = _sections(log, r"Function properties for ")
    code = disassemble(cubin) if arch == LOOKED_AT and _nvdisasm() else {}
    return [
        Compiled(
            variant.label,
            kernel,
            "",
            re.search(r"\d+ bytes stack frame.*", reports[i]).group(),
            bool(re.search(rf"\bLDG\.E(\.\w+)*\.128\b|{COPIES}", code.get(f"kernel_{i}", ""))),
            bool(re.search(r"\bSTG\.E(\.\w+)*\.128\b", code.get(f"kernel_{i}", ""))),
        )
        for i, (variant, kernel) in enumerate((v, k) for v in variants for k in v.kernels)
    ]


def _is_wide(variant: Variant, dtype: str) -> bool:
    """Whether tensors are read and written 16 bytes at a time."""
    widest = max(dict(v.defines).get("VECTOR", 0) for v in variants_of(dtype))
    return dict(variant.defines).get("VECTOR") == widest


Results = dict[tuple[str, str], list["Future[list[Compiled]]"]]


@pytest.fixture(scope="module")
def compiled(request) -> Iterator[Results]:
    """All compilations, under way in two processes; what the chosen tests want of them."""
    wanted = {
        (item.callspec.params["dtype"], item.callspec.params.get("arch", LOOKED_AT))
        for item in request.session.items
        if item.module is request.module and "compiled" in item.fixturenames
    }
    masked = {(d, SPREAD) for d, arch in wanted if arch == SPREAD}
    if _missing():
        yield {}
        return
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        futures: Results = {}
        for dtype, _ in sorted(masked):
            variants = list(masked_variants(dtype))
            futures[dtype, SPREAD] = [
                pool.submit(compile_bundle, variants[i : i + BUNDLE], arch)
                for i, arch in zip(range(0, len(variants), BUNDLE), cycle(ARCHITECTURES))
            ]
        for dtype, arch in sorted(wanted - masked):
            variants = list(variants_of(dtype))
            futures[dtype, arch] = [
                pool.submit(compile_bundle, variants[i : i + BUNDLE], arch)
                for i in range(0, len(variants), BUNDLE)
            ]
        yield futures
        pool.shutdown(cancel_futures=True)


def _of(compiled: Results, dtype: str, arch: str = LOOKED_AT) -> list[Compiled]:
    return [one for future in compiled[dtype, arch] for one in future.result()]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", sorted(DATA_TYPES))
def test_every_variant_compiles(compiled, dtype, arch):
    results = _of(compiled, dtype, arch)
    assert len(results) == sum(len(variant.kernels) for variant in variants_of(dtype))
    assert not [(one.label, one.error) for one in results if one.error]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", sorted(DATA_TYPES))
def test_nothing_spills(compiled, dtype, arch):
    results = _of(compiled, dtype, arch)
    assert not [(one.label, one.kernel, one.spills) for one in results if one.spills != CLEAN]


@pytest.mark.parametrize("dtype", sorted(DATA_TYPES))
def test_wide_variants_load_and_store_128_bits(compiled, dtype):
    need(None if _nvdisasm() else "no nvdisasm: pip install nvidia-cuda-nvdisasm")
    wide = {v.label for v in variants_of(dtype) if _is_wide(v, dtype)}
    results = [one for one in _of(compiled, dtype) if one.label in wide]
    assert len(results) == (24 if dtype == "float64" else 20)
    assert not [(one.label, one.kernel) for one in results if not one.wide_loads]
    stores = [one for one in results if one.kernel in LOADS_AND_STORES]
    assert not [(one.label, one.kernel) for one in stores if not one.wide_stores]


@pytest.mark.parametrize("dtype", sorted(DATA_TYPES))
@pytest.mark.parametrize("arch", [SPREAD])
def test_nothing_spills_with_a_mask(compiled, dtype, arch):
    """The same kernels with a mask; so many architectures that CI asks each of them for some."""
    results = _of(compiled, dtype, arch)
    assert len(results) == sum(len(variant.kernels) for variant in masked_variants(dtype))
    assert not [(one.label, one.error) for one in results if one.error]
    assert not [(one.label, one.kernel, one.spills) for one in results if one.spills != CLEAN]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", sorted(DATA_TYPES))
def test_nothing_spills_with_a_mask_anywhere(dtype, arch):
    variants = list(masked_variants(dtype))
    for i in range(0, len(variants), BUNDLE):
        for one in compile_bundle(variants[i : i + BUNDLE], arch):
            assert one.spills == CLEAN, (one.label, one.kernel, one.error)


MODULES = {v.kernels: v for dtype in DATA_TYPES for v in variants_of(dtype)}


@pytest.mark.parametrize("kernels", sorted(MODULES), ids="+".join)
def test_text_as_cupy_gets_it(kernels):
    """A module has its kernels under their own names."""
    cubin, _ = compile_text(MODULES[kernels].source, LOOKED_AT)
    assert all(f".text.{kernel}\0".encode() in cubin for kernel in kernels)


def test_planted_spill_and_error_are_reported():
    """The checks above can fail."""

    class Planted(NamedTuple):
        label: str
        kernels: tuple
        source: str
        defines: tuple = ()

    text = """extern "C" __global__ void planted(float* y, int n) {
        float kept[64];
        for (int i = 0; i < 64; i++) kept[(i * n) % 64] = y[i];
        for (int i = 0; i < 64; i++) y[i] = kept[(i + n) % 64];
    }
    """
    bad = Planted("wrong", ("wrong",), '#line 7 "cuda/wrong.cu"\nno such type;\n')
    fine, failed = compile_bundle([Planted("planted", ("planted",), text), bad], LOOKED_AT)
    assert not fine.error
    assert not fine.spills.startswith("0 bytes stack frame")
    assert not fine.wide_stores
    assert "cuda/wrong.cu(7)" in failed.error
