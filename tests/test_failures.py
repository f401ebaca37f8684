"""The errors on every rank when one of them makes a mistake, in real MPI jobs.

``mpi/failures.py`` runs all cases in one job, each on a communicator of its own and in 20 seconds
at most; every test here looks at one of them. A rank that waits for more than 10 seconds in a case
ends the job. What ends a job has to end it alone: that is in ``test_endings.py``.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).parent / "mpi" / "failures.py"
pytestmark = pytest.mark.mpi
RANKS = [2, 3, 4]

OWN_ERROR = {
    "forward, three channels": ("ShapeError", "expected 4 channels on axis 1, got 3"),
    "forward, a list": ("DTypeError", "got list"),
    "forward, None": ("DTypeError", "got NoneType"),
    "forward, integers": ("DTypeError", "unsupported dtype int64"),
    "forward, another dtype of x": ("DTypeError", "input is float64"),
    "forward, one dimension": ("ShapeError", "expected at least 2D input (got 1D input)"),
    "forward, a residual of another shape": ("ShapeError", "residual has shape (1, 4, 3, 3)"),
    "forward, out over x": ("ValueError", "out overlaps x"),
    "forward, an x that does not fit in memory": ("MemoryError", "Unable to allocate 16"),
    "forward, a read-only running mean": ("ValueError", "running_mean is read-only"),
    "forward, a running variance of another shape": (
        "ShapeError", "running_var has shape (1,), expected (4,)"
    ),
    "forward, a read-only counter": ("ValueError", "num_batches_tracked is read-only"),
    "forward, no memory for the sums": ("MemoryError", "no room"),
    "forward, no memory for the message": ("MemoryError", "no room"),
    "forward, no compiler": ("RuntimeError", "the kernel does not compile"),
    "backward, dy of another shape": ("ShapeError", "dy has shape (1, 4, 3, 3)"),
    "backward, dy with three channels": ("ShapeError", "dy has shape (2, 3, 3, 3)"),
    "backward, dy of another dtype": ("DTypeError", "dy is float64, expected float32"),
    "backward, dy is a list": ("DTypeError", "got list"),
    "backward, a read-only gradient": ("ValueError", "the gradient of weight is read-only"),
    "backward, a gradient of another dtype": (
        "DTypeError", "the gradient of bias is float64, but float32 input"
    ),
    "backward, a gradient that is a list": ("DTypeError", "the gradient of bias must be a NumPy"),
    "backward without a forward": ("RuntimeError", "first: backward without a saved forward"),
    "backward with the context of another layer": ("TypeError", "first: saved must be a context"),
    "backward, no memory for the sums": ("MemoryError", "no room"),
    "backward, no memory for the message": ("MemoryError", "no room"),
    "backward, no compiler": ("RuntimeError", "the kernel does not compile"),
}  # fmt: skip
TEXT_OF_ITS_OWN = ["forward, an x that does not fit in memory"]  # NumPy's MemoryError
NOT_FINITE = [
    f"forward, {value} in {dtype}, check_finite"
    for value in ("nan", "inf")
    for dtype in ("float32", "float64")
]
# What the others did, and what the culprit did.
MISMATCH = {
    "forward, layers swapped": ("forward of 'first': C=4", "forward of 'second': C=4"),
    "forward, layers of neighbouring C swapped": (
        "forward of 'first': C=4", "forward of 'second': C=5"
    ),
    "forward, a layer skipped": ("forward of 'second'", "forward of 'third'"),
    "the last layer skipped: backward meets forward": (
        "forward of 'third'", "backward of 'second'"
    ),
    "the last backward skipped: the next forward meets it": (
        "backward of 'first'", "forward of 'first'"
    ),
    "backward, layers swapped": ("backward of 'third': C=4", "backward of 'first': C=4"),
    "backward, layers of neighbouring C swapped": (
        "backward of 'second': C=5", "backward of 'first': C=4"
    ),
    "backward, a layer skipped": ("backward of 'second'", "backward of 'first'"),
    "gradients of another tree": ("6 arrays with 24 values", "2 arrays with 8 values"),
    "verify_sync meets forward": ("forward of 'first'", "verify_sync"),
    "evaluation for one step, 1": ("forward of '0'", "verify_sync"),
    "evaluation for one step, 2": ("forward of '0'", "verify_sync"),
}  # fmt: skip
SETTINGS = {
    "eps": ("eps=1e-05", "eps=0.001"),
    "momentum": ("momentum=0.1", "momentum=0.2"),
    "dtype": ("float32", "float64"),
    "activation": ("activation=None", "activation=relu"),
    "affine": ("weight=True, bias=True", "weight=False, bias=False"),
}
for setting, texts in SETTINGS.items():
    for direction in ("forward", "backward"):
        MISMATCH[f"{direction}, another {setting}"] = tuple(
            f"{direction} of 'layer'|{text}" for text in texts
        )


@pytest.fixture(scope="module")
def outcomes(mpirun):
    """``outcomes(n, case)``: what each rank said of the case, in the order of the ranks."""
    told = {}

    def of(n, case=None):
        if n not in told:
            process = mpirun(n, PROGRAM, timeout=240, env={"CUPYBN_TIMEOUT": "60"})
            told[n] = defaultdict(dict)
            for line in map(json.loads, process.stdout.splitlines()):
                told[n][line["case"]][line["rank"]] = line
        if case is None:
            return told[n]
        return [line for _, line in sorted(told[n][case].items())]

    return of


@pytest.mark.parametrize("n", RANKS)
def test_every_case_is_looked_at(outcomes, n):
    seen = {case for case in outcomes(n) if not case.startswith("so far")}
    assert seen == OWN_ERROR.keys() | MISMATCH.keys() | set(NOT_FINITE)


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("case", list(OWN_ERROR))
def test_the_rank_raises_its_own_error_and_the_others_peer_error(outcomes, n, case):
    lines = outcomes(n, case)
    name, message = OWN_ERROR[case]
    assert [line["error"] for line in lines] == ["PeerError"] * (n - 1) + [name]
    assert [line["unchanged"] for line in lines] == [True] * n
    *others, own = lines
    assert message in own["text"]
    direction = case.split()[0].strip(",")
    for line in others:
        assert f"{direction} of 'first': rank {n - 1} failed" in line["text"]
    where = f"{direction} of 'first', rank {n - 1} of {n}"
    if sys.version_info >= (3, 11):
        assert own["notes"] == [where]
    else:
        assert own["text"].endswith("\n" + where) == (case not in TEXT_OF_ITS_OWN)
    assert [line["again"]["error"] for line in lines] == [None] * n  # without the mistake it works


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("case", NOT_FINITE)
def test_with_check_finite_every_rank_raises(outcomes, n, case):
    lines = outcomes(n, case)
    text = "forward of 'layer': NaN or Inf in the statistics of the batch, in channel 2"
    assert [(line["error"], line["text"]) for line in lines] == [("FloatingPointError", text)] * n
    assert [line["unchanged"] for line in lines] == [True] * n
    assert [line["again"]["error"] for line in lines] == [None] * n


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("case", list(MISMATCH))
def test_every_rank_raises_mismatch_and_says_what_each_did(outcomes, n, case):
    lines = outcomes(n, case)
    assert [line["error"] for line in lines] == ["CollectiveMismatchError"] * n
    assert [line["unchanged"] for line in lines] == [True] * n
    theirs, culprits = MISMATCH[case]
    names = {2: "rank 0", 3: "ranks 0, 1", 4: "ranks 0, 1, 2"}[n]
    for line in lines:
        _, others, culprit = line["text"].split("\n")
        assert others.startswith(f"  {names}: ")
        assert culprit.startswith(f"  rank {n - 1}: ")
        assert all(part in others for part in theirs.split("|"))
        assert all(part in culprit for part in culprits.split("|"))
        assert line["again"]["error"] == "CollectiveMismatchError"
        assert "this communicator is closed" in line["again"]["text"]


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("layers", [1, 2])
def test_one_step_of_evaluation_cannot_be_seen_until_the_messages_end(outcomes, n, layers):
    """Every message of the culprit meets the others' of the step before.

    All ranks pool the same numbers, so their state is the same, and wrong: the culprit's batch of
    one step went with the others' of another. `verify_sync` finds the culprit ahead of them.
    """
    lines = outcomes(n, f"so far, {layers}")
    assert [line["loops"] for line in lines] == [4] * (n - 1) + [5]
    assert len({line["buffers"] for line in lines}) == 1
    assert len({tuple(line["means"]) for line in lines}) == 1
    steps = np.diff(lines[0]["means"])
    assert steps == pytest.approx([1 + 1 / n, 1, 1])  # each batch is 1 above the one before it
    errors = [line["error"] for line in outcomes(n, f"evaluation for one step, {layers}")]
    assert errors == ["CollectiveMismatchError"] * n
