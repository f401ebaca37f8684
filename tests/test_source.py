"""The CUDA sources: found, pasted, and never stale."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_tools import need
from cuda_variants import variants
from ptx.launch import compile_module, missing
from ptx.nvrtc import CompileError

from cupybn.arrays import DATA_TYPES
from cupybn.backends.cuda import plan, source

KERNELS = ["batch_moments", "finalize_moments", "normalize", "backward_reduce", "backward_input"]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of cuda/, where kernels come from during a test."""
    directory = shutil.copytree(source.source_directory(), tmp_path / "cuda")
    monkeypatch.setattr(source, "source_directory", lambda: directory)
    source._kernels.clear()
    yield directory
    source._kernels.clear()


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_header_is_pasted_once(kernel):
    text = source.paste(f"{kernel}.cu")
    assert '#include "' not in text
    assert "#pragma once" not in text
    starts = [line for line in text.splitlines() if line.startswith("#line 1 ")]
    assert len(starts) == len(set(starts)) > 2


def test_every_line_keeps_its_place():
    files = {p.name: p.read_text().splitlines() for p in source.source_directory().glob("*.cu*")}
    for kernel in KERNELS:
        file, number, compared = "", 0, 0
        for line in source.paste(f"{kernel}.cu").splitlines():
            if line.startswith("#line "):
                number, file = int(line.split()[1]), line.split('"')[1].removeprefix("cuda/")
                continue
            original = files[file][number - 1]
            assert line == original or (line == "" and original.startswith(("#include", "#pragma")))
            number, compared = number + 1, compared + 1
        assert compared > 30


def test_compiler_messages_name_the_true_line(copied):
    need(missing())
    header = copied / "reduce.cuh"
    text = header.read_text()
    header.write_text(text + "\nint broken = no_such_name;\n")
    variant = next(v for v in variants("float32") if "batch_moments" in v.kernels)
    with pytest.raises(CompileError, match=rf"cuda/reduce.cuh\({text.count(chr(10)) + 2}\b"):
        compile_module(variant.source, variant.kernels)


def test_a_changed_header_is_a_changed_kernel(copied, monkeypatch):
    need(missing())
    monkeypatch.setattr(source, "compile_module", compile_module)

    def invstd():
        source._kernels.clear()
        kernel = source.get_kernel("finalize_moments", SCALAR="float")
        out, one, m2 = np.zeros((3, 1)), np.ones(1), np.full(1, 4.0)
        null = np.uint64(0)
        numbers = (np.float64(1), np.float64(0), np.float64(0), np.int64(0), np.int64(1))
        kernel((1,), (32,), (out[0], out[1], out[2], null, null, one, m2, *numbers))
        return out[2, 0]

    assert invstd() == 0.5
    header = copied / "memory.cuh"
    text = header.read_text()
    changed = text.replace("if (active) *address = value;", "if (active) *address = value + 1;")
    assert changed != text
    header.write_text(changed)
    assert invstd() == 1.5


def test_kernels_are_compiled_once_by_any_number_of_threads(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    class Module:
        def get_function(self, name):
            return object()

    compiled = []
    monkeypatch.setattr(source, "_kernels", {})
    monkeypatch.setattr(source, "compile_module", lambda *a: compiled.append(a) or Module())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: source.get_kernel("normalize", VECTOR=4), range(32)))
    assert len(set(map(id, found))) == len(compiled) == 1
    assert source.get_kernel("normalize", VECTOR=2) is not found[0]
    assert len(compiled) == 2


def test_sources_are_found_in_an_installed_package(tmp_path):
    package = tmp_path / "cupybn"
    folder = package / "backends" / "cuda"
    folder.mkdir(parents=True)
    for module in (source, plan):
        shutil.copy(module.__file__, folder)
    for directory in (package, folder.parent, folder):
        (directory / "__init__.py").touch()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "from cupybn.backends.cuda import source; print(source.source_directory())"
    )
    python = {"cwd": tmp_path, "env": {}, "capture_output": True, "text": True}
    failed = subprocess.run([sys.executable, "-c", code], **python)
    assert "FileNotFoundError" in failed.stderr
    assert "install cupybn again" in failed.stderr
    shutil.copytree(source.source_directory(), package / "_cuda")
    found = subprocess.run([sys.executable, "-c", code], **python, check=True)
    assert Path(found.stdout.strip()) == package / "_cuda"


def test_importing_the_backend_imports_no_cupy():
    code = "import sys, cupybn.backends.cuda; assert 'cupy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_variants_are_distinct_and_named_after_their_kernel():
    everything = [v for dtype in DATA_TYPES for v in variants(dtype)]
    assert len({v.label for v in everything}) == len(everything)
    assert len({v.source for v in everything}) == len(everything)
    assert {kernel for v in everything for kernel in v.kernels} > set(KERNELS)
    assert all(f"{kernel}(" in v.source for v in everything for kernel in v.kernels)
