"""The CUDA sources and the types are found however the package is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import cupybn, importlib.util, pathlib
from cupybn.backends.cuda import source
names = sorted(path.name for path in source.source_directory().iterdir() if ".cu" in path.suffix)
print(pathlib.Path(cupybn.__file__).parent)
print(*names)
print((pathlib.Path(cupybn.__file__).parent / "py.typed").is_file())
print("batch_moments" in source.paste("batch_moments.cu"))
print(importlib.util.find_spec("benchmarks") is not None)
"""


def run(*command, cwd):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture
def checkout(tmp_path):
    """A copy of what git knows, so that a build leaves nothing in the repository."""
    copy = tmp_path / "checkout"
    for name in ("cupybn", "cuda", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def python(tmp_path):
    """The python of a fresh environment that sees this one's packages after its own."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "env" / "bin" / "python"


def pip(python, *arguments, cwd):
    run(sys.executable, "-m", "pip", "--python", python, *arguments, "--no-deps",
        "--no-build-isolation", "--no-index", cwd=cwd)  # fmt: skip


@pytest.mark.parametrize("mode", ["checkout", "install", "wheel", "sdist", "editable"])
def test_every_way_to_install(mode, checkout, python, tmp_path):
    where = tmp_path
    if mode == "checkout":
        where = checkout
    elif mode == "install":
        pip(python, "install", checkout, cwd=tmp_path)
    elif mode == "editable":
        pip(python, "install", "--editable", checkout, cwd=tmp_path)
    else:
        run(sys.executable, "-m", "build", "--no-isolation", f"--{mode}", cwd=checkout)
        (archive,) = (checkout / "dist").iterdir()
        pip(python, "install", archive, cwd=tmp_path)
    location, names, typed, pasted, bench = run(python, "-c", PROBE, cwd=where).splitlines()
    expected = checkout if mode in ("checkout", "editable") else tmp_path / "env"
    assert location.startswith(str(expected))
    assert names.split() == sorted(p.name for p in (ROOT / "cuda").glob("*.cu*"))
    assert (typed, pasted) == ("True", "True")
    assert bench == str(mode == "checkout")  # it is run there, and not installed


def test_what_needs_a_framework_is_run_with_it():
    """`make test` skips these files whole: they have to be in the list of another target."""
    tests = {path.stem[5:]: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    needs = {
        name
        for name, text in tests.items()
        if re.search(r'^\w+ = pytest\.importorskip\("(torch|jax)"', text, re.MULTILINE)
    }
    listed = re.search(r"^FRAMEWORKS = ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert listed is not None
    assert len(needs) > 8
    assert needs <= set(listed[1].replace("\\", "").split())


PROJECT = (ROOT / "pyproject.toml").read_text()
VERSIONS = (ROOT / "docs" / "versions.md").read_text()


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    version = re.search(r'^__version__ = "(.*)"$', (ROOT / "cupybn/__init__.py").read_text(), re.M)
    assert version is not None
    assert f"\nversion: {version[1]}\n" in citation
    assert "\ncff-version: 1.2.0\n" in "\n" + citation


def test_the_table_of_versions_is_the_projects():
    pythons = re.findall(r"Python :: (3\.\d+)", PROJECT)
    assert f"| {pythons[0]} to {pythons[-1]} | {', '.join(pythons)} |" in VERSIONS
    oldest = dict(re.findall(r'"(numpy|numba|mpi4py|cupy-cuda12x)>=([\d.]+)"', PROJECT))
    assert len(oldest) == 4
    for name, row in {"numpy": "NumPy", "mpi4py": "mpi4py", "numba": "Numba"}.items():
        assert re.search(rf"^\| {row} \| {oldest[name]}(\.0)* or later", VERSIONS, re.M), name
    assert f"| CuPy | {oldest['cupy-cuda12x']} or later" in VERSIONS
    torch = (ROOT / "Makefile").read_text().partition("torch==")[2].partition("\n")[0]
    assert f"| {torch}; " in VERSIONS


def test_what_the_table_of_versions_names_runs_in_ci():
    rows = [line for line in VERSIONS.splitlines() if line.startswith("| ")]
    named = set(re.findall(r"`make ([\w-]+)`", "\n".join(rows)))
    assert len(named) > 6
    run = (ROOT / ".ci" / "run").read_text()
    commands = {word for line in run.splitlines() if "make " in line for word in line.split()}
    assert named <= commands
