"""The scripts that the pages show: those of docs/migration.md compute the same before and after."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import rank_environment

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def loss_of(process):
    found = re.findall(r"^loss (\d\.\d{6})$", process.stdout, re.MULTILINE)
    assert len(found) == 1, process.stdout + process.stderr
    return float(found[0])


def run_alone(script):
    process = subprocess.run(
        [sys.executable, str(script)],
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    return process


def test_the_tutorial():
    output = run_alone(EXAMPLES / "tutorial.py").stdout
    assert "['PeerError', 'PeerError', 'ShapeError', 'PeerError']" in output
    assert "batches behind the statistics: 1" in output


def test_the_tutorials_cells_are_those_of_a_notebook():
    text = (EXAMPLES / "tutorial.py").read_text()
    kinds = re.findall(r"^# %%( \[markdown\])?$", text, re.MULTILINE)
    assert len(kinds) > 12
    assert kinds[0] == " [markdown]"
    titles = re.findall(r"^# # (\d)\. ", text, re.MULTILINE)
    assert titles == [str(number) for number in range(1, len(titles) + 1)]


@pytest.mark.mpi
def test_from_ddp(torchrun):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    before = loss_of(torchrun(1, EXAMPLES / "ddp_before.py", timeout=200))
    after = loss_of(torchrun(2, EXAMPLES / "ddp_after.py", timeout=200))
    assert after == pytest.approx(before, abs=2e-6)


def test_from_ddp_changes_two_lines():
    before, after = (
        (EXAMPLES / f"ddp_{when}.py").read_text().partition('"""\n\nimport os')[2].splitlines()
        for when in ("before", "after")
    )
    changed = [
        line[2:].strip() for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ")
    ]
    assert [line for line in changed if line] == [
        "from cupybn.interop import torch as cupybn_torch",
        "if cuda:  # on the CPU there is none",
        "model = nn.SyncBatchNorm.convert_sync_batchnorm(model)",
        "model = cupybn_torch.convert_sync_batchnorm(model)",
    ]


@pytest.mark.mpi
def test_from_flax(mpirun):
    pytest.importorskip("flax", reason="Flax is not installed")
    before = loss_of(run_alone(EXAMPLES / "flax_before.py"))
    after = mpirun(2, EXAMPLES / "flax_after.py", env={"JAX_PLATFORMS": "cpu"})
    assert loss_of(after) == pytest.approx(before, abs=2e-6)


@pytest.mark.mpi
def test_from_chainermn(mpirun):
    output = mpirun(3, EXAMPLES / "chainermn_after.py").stdout
    accuracy = re.search(r"^accuracy (\d\.\d+)$", output, re.MULTILINE)
    assert accuracy is not None, output
    assert float(accuracy[1]) > 0.9


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_of_your_own(mpirun, ranks):
    output = mpirun(ranks, EXAMPLES / "own_layer.py").stdout
    # Of two ranks both texts may come before both ends of lines.
    assert output.count("(8, 64, 5, 5) ['scale.factor', 'bn.weight', 'bn.bias']") == ranks


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", ["functions", "torch", "jax"])
def test_what_embeds_it(mpirun, name, ranks):
    if name != "functions":
        pytest.importorskip(name)
    mpirun(ranks, EXAMPLES / f"{name}_mpi.py", env={"JAX_PLATFORMS": "cpu"})


def test_an_upgraded_state():
    run_alone(EXAMPLES / "upgrade_state.py")


def test_the_pages_show_these_scripts():
    shown = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    included = re.findall(r"\{literalinclude\} (\S+)", shown)
    assert len(included) == 12
    for name in included:
        assert os.path.exists(ROOT / "docs" / name), name
