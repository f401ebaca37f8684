"""The programs in the documents run, and the documents name files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PREAMBLE = """
import numpy as np
import cupybn
rng = np.random.default_rng(0)
x = rng.standard_normal((3, 64, 5, 5)).astype(np.float32)
dy = rng.standard_normal((3, 64, 5, 5)).astype(np.float32)
"""


EMBEDDING = ROOT / "docs" / "embedding.md"


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.mpi
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_blocks_run(path, mpirun, tmp_path):
    blocks = python_blocks(path)
    if not blocks or path == EMBEDDING:
        return
    if "import jax" in blocks[0]:
        pytest.importorskip("jax", reason="JAX is not installed")
    script = tmp_path / "blocks.py"
    # In a folder of its own, where the files that it saves go too.
    script.write_text("\n".join([f"import os; os.chdir({str(tmp_path)!r})", PREAMBLE, *blocks]))
    mpirun(2, script)


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("number", range(len(python_blocks(EMBEDDING))))
def test_each_program_of_embedding_runs_by_itself(number, n, mpirun, tmp_path):
    program = python_blocks(EMBEDDING)[number]
    if "import torch" in program:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    script = tmp_path / "program.py"
    script.write_text(program)
    mpirun(n, script)


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
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+|check_\w+)", text):
        assert name.rstrip("_.") in tests, name
