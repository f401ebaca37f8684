"""The programs in the documents run, and the documents name files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


PROGRAMS = [(path, i) for path in DOCUMENTS for i in range(len(python_blocks(path)))]


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("path, number", PROGRAMS, ids=lambda p: getattr(p, "name", p))
def test_each_program_runs_as_it_is_pasted(path, number, ranks, mpirun, tmp_path, monkeypatch):
    """Nothing is added, not even an import; in a folder of its own, where its files go too."""
    program = python_blocks(path)[number]
    for module, name in (("torch", "PyTorch"), ("jax", "JAX")):
        if re.search(rf"^import {module}\b", program, re.MULTILINE):
            pytest.importorskip(module, reason=f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(program)
    mpirun(ranks, "program.py")


def test_the_program_with_a_process_group_runs_under_torchrun(torchrun, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    (program,) = (
        text
        for text in python_blocks(ROOT / "docs" / "embedding.md")
        if "init_process_group" in text
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    torchrun(2, script)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_paths_exist(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    files = re.findall(r"`((?:tests|examples|docs|cupybn|cuda|benchmarks|\.ci)/[\w./]+)`", text)
    for name in links:
        assert (path.parent / name).exists(), name
    for name in files:
        assert (ROOT / name).exists(), name


def test_the_faults_in_the_documents_have_their_tests():
    text = (ROOT / "docs" / "distributed.md").read_text()
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+|check_\w+)", text):
        assert name.rstrip("_.") in tests, name
