"""The programs in the documents run, and the documents name files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COUNTED = [ROOT / "README.md", ROOT / "cuda/README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*COUNTED, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
MOST_WORDS = 11_000


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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_paths_exist(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    files = re.findall(r"`((?:tests|examples|docs|cupybn|cuda|benchmarks|\.ci)/[\w./]+)`", text)
    for name in links:
        assert (path.parent / name).exists(), name
    for name in files:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_tests_that_a_document_names_are_there(path):
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`((?:test|check)_\w+)", path.read_text()):
        assert name in {"check_finite", "check_gradients"} or name.rstrip("_.") in tests, name


def test_the_documents_stay_short():
    """As ``wc -w`` counts, the bars of tables too."""
    words = {str(path.relative_to(ROOT)): len(path.read_text().split()) for path in COUNTED}
    assert len(words) == len(COUNTED) > 15
    assert sum(words.values()) <= MOST_WORDS, words
