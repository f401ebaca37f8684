"""What messages cost by layer and rank, and that it is found out without changing them."""

from __future__ import annotations

import copy
import pickle
import sys
import time
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
from rank_checks import Spy, bits, normal

import cupybn
from cupybn import Sequential, SyncBatchNorm, distributed
from cupybn.communicators import SelfCommunicator, ThreadCommunicator, Timed
from cupybn.communicators.base import first_values
from cupybn.communicators.timed import Total, table
from cupybn.testing import run_ranks

X = normal((4, 3), np.float32)


def net(comm):
    return Sequential({"a": SyncBatchNorm(3, comm=comm), "b": SyncBatchNorm(3, comm=comm)})


def test_messages_bytes_and_seconds_by_call():
    def rank(comm):
        timed = Timed(comm)
        layers = net(timed)
        for _ in range(3):
            layers.backward(layers.forward(X + comm.rank))
        distributed.allreduce_gradients(layers, timed)
        return timed.totals

    for totals in run_ranks(2, rank):
        calls = [
            f"{direction} of {name!r}" for direction in ("forward", "backward") for name in "ab"
        ]
        assert set(totals) == {*calls, "allreduce_gradients"}
        for call in calls:
            assert totals[call].messages == 3
            assert totals[call].bytes == 3 * 8 * (16 + 256)
            assert totals[call].seconds > 0
        assert totals["allreduce_gradients"][:2] == (1, 4 * (1 + 16 + 256))


def test_results_have_the_same_bits():
    def rank(comm, wrap):
        layers = net(wrap(comm))
        layers.backward(layers.forward(X + comm.rank))
        return bits(layers)

    assert run_ranks(3, rank, Timed) == run_ranks(3, rank, lambda comm: comm)


def test_the_report_names_the_rank_that_the_others_wait_for(capsys):
    def rank(comm):
        timed = Timed(comm)
        layers = net(timed)
        for _ in range(4):
            y = layers.a.forward(X)
            if comm.rank == 1:
                time.sleep(0.1)  # something slow between the layers
            layers.b.forward(y)
        timed.report()
        timed.report()  # it changes nothing
        timed.totals.clear()
        timed.report()
        return timed.totals

    assert run_ranks(3, rank) == [{}, {}, {}]
    first, second, cleared = capsys.readouterr().out.split("messages")[1:]
    assert first == second
    lines = {line.split("  ")[-1]: line.split() for line in first.splitlines()[1:]}
    for call, count in (("forward of 'a'", 4), ("forward of 'b'", 4), ("all", 8)):
        assert int(lines[call][0]) == count
        assert float(lines[call][1]) == round(count * 8 * 272 / 1e6, 3)
    mean, least, who, most = lines["forward of 'b'"][2:6]
    assert who == "(1)"
    assert float(least) < 0.1 < float(mean) < float(most) < 3
    assert float(most) >= 0.4
    assert first.splitlines()[-1] == "rank 1 waited least: the others waited for it"
    assert cleared.splitlines()[1].split()[:2] == ["0", "0.000"]


def test_calls_that_only_some_ranks_made_are_in_the_report():
    lines = table([{"a": [1, 8, 0.5]}, {"b": [2, 16, 1.5]}])
    assert lines[1].split() == ["1", "0.000", "0.250", "0.000", "(1)", "0.500", "(0)", "a"]
    assert lines[2].split() == ["2", "0.000", "0.750", "0.000", "(0)", "1.500", "(1)", "b"]
    assert lines[3].split() == ["2", "0.000", "1.000", "0.500", "(0)", "1.500", "(1)", "all"]


def test_a_report_of_some_ranks_alone_is_a_mismatch_on_all():
    """``if rank == 0: timed.report()`` is the first mistake that anyone makes."""

    def rank(comm):
        timed = Timed(comm)
        layers = net(timed)
        layers.forward(X)
        try:
            if comm.rank == 0:
                timed.report()
            layers.forward(X)
        except cupybn.CollectiveMismatchError as error:
            with pytest.raises(cupybn.CollectiveMismatchError, match="this communicator is closed"):
                timed.report()
            return str(error)

    for text in run_ranks(3, rank, timeout=20):
        assert text.splitlines()[1] == "  rank 0: Timed.report"
        assert text.splitlines()[2].startswith("  ranks 1, 2: forward of 'a'")


def test_a_rank_that_fails_meets_a_report():
    def rank(comm):
        timed = Timed(comm)
        layer = SyncBatchNorm(3, comm=timed)
        if comm.rank == 0:
            with pytest.raises(cupybn.PeerError, match=r"Timed.report: rank 1 failed"):
                timed.report()
        else:
            with pytest.raises(cupybn.ShapeError):
                layer.forward(X[:, :2])
        layer.forward(X)

    run_ranks(2, rank, timeout=20)


def test_one_rank_sends_nothing(capsys):
    timed = Timed(SelfCommunicator())
    layer = SyncBatchNorm(3, comm=timed)
    layer.backward(layer.forward(X))
    assert timed.totals == {}
    timed.report()
    assert "all" in capsys.readouterr().out


def test_what_the_other_communicator_can_do_is_handed_on():
    class Staged(Spy):
        def first_values(self, total, n):
            return "at hand"

    group = ThreadCommunicator.group(1)[0]
    fake_cupy.install()
    try:
        total = sys.modules["cupy"].zeros(4)
        assert first_values(Timed(Staged(group)), total, 2) == "at hand"
        assert list(first_values(Timed(Spy(group)), total, 2)) == [0, 0]
    finally:
        sys.modules.pop("cupy")
    timed = Timed(group)
    assert copy.deepcopy(timed) is timed
    with pytest.raises(TypeError, match="a Timed belongs to its process and cannot be pickled"):
        pickle.dumps(timed)
    with pytest.raises(TypeError, match="comm must be an mpi4py communicator"):
        Timed("world")
    assert Total() == (0, 0, 0.0)


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3])
def test_over_mpi(mpirun, n):
    process = mpirun(n, Path(__file__).parent / "mpi" / "timed.py")
    lines = process.stdout.splitlines()
    assert len(lines) == (6 if n > 1 else 3)
    assert lines[0].startswith("messages")
    if n > 1:
        assert lines[1].split()[:2] == ["3", str(round(3 * 8 * 272 / 1e6, 3))]
        assert lines[-1] == f"rank {n - 1} waited least: the others waited for it"
