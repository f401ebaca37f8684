"""What Numba compiled, on disk: damaged, not to be written, not to be imported. It computes."""

from __future__ import annotations

import ast
import shutil
import warnings
from pathlib import Path

import pytest
from conftest import NUMBA
from test_pool import run

import cupybn.backends.cpu

if not NUMBA:
    pytest.skip("Numba is not installed", allow_module_level=True)

import numba

from cupybn.backends.cpu import compiler

PACKAGE = Path(cupybn.backends.cpu.__file__).parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_kernels", [])
    monkeypatch.setattr(compiler, "_warned", False)
    return tmp_path


def add_one(x):
    return x + 1


def compiled_again():
    """Whether a process that starts now compiles."""
    made = compiler.kernel(add_one)
    assert made(2) == 3
    return bool(made.stats.cache_misses)


def altered(place):
    def damage(content):
        i = int(place * len(content))
        return content[:i] + bytes([content[i] ^ 8]) + content[i + 1 :]

    return damage


DAMAGES = {
    "empty": lambda content: b"",
    "cut in the digest": lambda content: content[:20],
    "nothing but a digest": lambda content: content[:32],
    "cut off": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "longer": lambda content: content + b"more",
    "zeros": lambda content: bytes(len(content)),
    **{f"altered at {i}%": altered(i / 100) for i in (0, 1, 20, 40, 60, 80, 99)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_again_and_mended(folder, damage):
    assert compiled_again()
    assert not compiled_again()
    (file,) = folder.glob("*/*.nbc")
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert compiled_again()
    assert not compiled_again()


def test_a_whole_file_that_cannot_be_used_is_compiled_again(folder, monkeypatch):
    """Numba's own objects in the file may have changed, even between equal version numbers."""
    assert compiled_again()
    monkeypatch.setattr(compiler.pickle, "loads", lambda data: ("not", "what", "it", "was"))
    assert compiled_again()


def test_a_file_that_cannot_be_read_is_compiled_again(folder):
    assert compiled_again()
    (file,) = folder.glob("*/*.nbc")
    file.unlink()
    file.mkdir()
    with pytest.warns(RuntimeWarning, match="cannot be kept in"):
        assert compiled_again()


@pytest.mark.parametrize("version", ["numba", "llvmlite"])
def test_other_versions_compile_again(monkeypatch, version):
    assert compiled_again()
    monkeypatch.setattr(getattr(compiler, version), "__version__", "0.1")
    assert compiled_again()
    assert not compiled_again()


def test_a_folder_that_cannot_be_written_any_more_is_told_once(folder):
    made = compiler.kernel(add_one)
    shutil.rmtree(compiler.folder())
    Path(compiler.folder()).write_text("in its place")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert made(2) == 3
        assert made(2.5) == 3.5
    (one,) = told
    assert one.category is RuntimeWarning
    assert "NUMBA_CACHE_DIR names another folder" in str(one.message)


def test_a_limit_on_files_is_told_and_leaves_nothing(folder):
    """As a full disk: the write fails half-way."""
    pytest.importorskip("resource", reason="no limits on this system")
    (folder / "some_kernels.py").write_text("def add_one(x):\n    return x + 1\n")
    code = """
        import resource, sys, warnings
        import cupybn
        from cupybn.backends.cpu import compiler
        sys.path.append(FOLDER)
        from some_kernels import add_one
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            made = compiler.kernel(add_one)
            print(made(2), made(2.5), len(told), "File too large" in str(told[0].message))
    """
    code = code.replace("FOLDER", repr(str(folder)))
    assert run(code, NUMBA_CACHE_DIR=str(folder / "cache")) == ["3 3.5 1 True"]
    assert not [path for path in (folder / "cache").rglob("*") if path.is_file()]


def test_with_no_folder_at_all_it_compiles(monkeypatch):
    def nowhere(function):
        raise OSError("Read-only file system")

    monkeypatch.setattr(compiler, "_Cache", nowhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled_again()
        assert compiled_again()


def test_the_digest_is_of_all_that_kernels_are_made_of():
    """The modules with kernels take functions from this package, Numba and NumPy alone."""
    decorators, own = {"kernel", "inside", "shared", "summed", "intrinsic"}, set()
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found = {n.id for n in node.decorator_list if isinstance(n, ast.Name)}
                own |= {path} if found & decorators else set()
    assert {path.stem for path in own} >= {"forward", "backward", "intrinsics", "channels"}
    for path in own:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, path
                assert (PACKAGE / f"{node.module}.py").exists(), path
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in ("__future__", "llvmlite", "numba"), path
            elif isinstance(node, ast.Import):
                assert {n.name for n in node.names} <= {"inspect", "sys", "numpy"}, path


@pytest.mark.mpi
@pytest.mark.parametrize("ranks, broken", [(2, "1"), (3, "0"), (3, "0 1 2")])
def test_ranks_of_which_some_have_a_broken_numba(mpirun, broken_numba, ranks, broken):
    """Left to choose, all compute with NumPy, and rank 0 says why, once and for all."""
    said = mpirun(ranks, broken_numba, broken, env={"CUPYBN_CPU_BACKEND": "auto"}).stdout
    for rank, line in enumerate(sorted(said.splitlines())):
        assert line.startswith(f"{rank} | computed with numpy"), said
        if rank == 0:
            assert line.count(" | ") == 2, line
            assert "not all ranks can use it, so NumPy computes on all of them" in line
            for i in range(ranks):
                problem = "SystemError: bad code object" if str(i) in broken else "no problem"
                assert f"rank {i}: host{i}, {problem}" in line
        else:
            assert line.count(" | ") == 1, line


@pytest.mark.mpi
def test_ranks_that_have_computed_before_they_hear_of_a_broken_numba(mpirun, broken_numba):
    """NumPy finishes what Numba began; the rank without Numba has warned before."""
    said = mpirun(2, broken_numba, "1", "earlier", env={"CUPYBN_CPU_BACKEND": "auto"}).stdout
    first, second = sorted(said.splitlines())
    assert first.startswith("0 | computed with numpy | Numba is installed, but not all ranks can")
    assert second.startswith(
        "1 | computed with numpy | Numba is installed, but cannot be used (SystemError: bad code "
    )


@pytest.mark.mpi
def test_ranks_of_which_all_can_use_numba(mpirun, broken_numba):
    said = mpirun(2, broken_numba, "", env={"CUPYBN_CPU_BACKEND": "auto"}).stdout
    assert sorted(said.splitlines()) == ["0 | computed with cpu", "1 | computed with cpu"]


@pytest.mark.mpi
def test_ranks_that_ask_for_a_numba_that_one_of_them_cannot_use(mpirun, broken_numba):
    said = mpirun(2, broken_numba, "1", env={"CUPYBN_CPU_BACKEND": "numba"}).stdout
    first, second = sorted(said.splitlines())
    assert first.startswith("0 | PeerError: forward of 'bn': rank 1 failed")
    assert second.startswith("1 | ImportError: the CPU backend 'numba' cannot be used (Syst")


@pytest.fixture
def broken_numba(tmp_path):
    """A program that trains on several ranks; those in its argument cannot import Numba."""
    script = tmp_path / "some_are_broken.py"
    script.write_text(
        """
import os, platform, sys, warnings
from mpi4py import MPI
rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
if str(rank) in sys.argv[1]:
    sys.path.insert(0, os.path.dirname(__file__) + "/broken")
platform.node = lambda: f"host{rank}"
import numpy as np
import cupybn
from cupybn import backends
x = np.arange(24 * size, dtype="f").reshape(4 * size, 3, 2) ** 2
own = slice(4 * rank, 4 * rank + 4)
other = cupybn.BatchNorm1d(3)
layer = cupybn.SyncBatchNorm(3, name="bn")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    try:
        if "earlier" in sys.argv:  # this process has computed before it met the others
            y = other.forward(x)
        for _ in range(3):
            y = layer.forward(x[own])
            dx = layer.backward(y)
        if "earlier" in sys.argv:
            other.backward(x)
        alone = cupybn.SyncBatchNorm(3, comm=cupybn.SelfCommunicator())
        np.testing.assert_allclose(y, alone.forward(x)[own], 1e-5, 1e-6)
        assert cupybn.distributed.verify_sync(layer) is None
        found = "computed with " + backends.cpu_backend().__name__.rpartition(".")[2]
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
found = " | ".join([str(rank), found, *(str(t.message) for t in told)])
sys.stdout.write(found.replace("\\n", " ") + "\\n")
"""
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "numba.py").write_text("raise SystemError('bad code object')\n")
    return script
