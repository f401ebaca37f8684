"""Collective calls over threads: what is owed, what closes a communicator, what must agree."""

from __future__ import annotations

import numpy as np
import pytest
from rank_checks import Spy, normal

import cupybn
from cupybn import SyncBatchNorm, distributed
from cupybn import functional as F
from cupybn.testing import run_ranks


def outcome(call, *args, **options):
    try:
        call(*args, **options)
    except Exception as error:
        return type(error).__name__
    return "fine"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_after_a_peer_error_the_ranks_are_in_step(dtype, direction):
    """Also for float64 data, which owe two messages in forward."""

    def rank(comm):
        layer = SyncBatchNorm(3, comm=comm, dtype=dtype)
        x = normal((4, 3), np.dtype(dtype), seed=comm.rank)
        bad = x[:, :2] if comm.rank == 1 else x
        if direction == "forward":
            first = outcome(layer.forward, bad)
        else:
            layer.forward(x)
            first = outcome(layer.backward, bad)
        y = layer.forward(x)
        layer.backward(y)
        return first, layer.saved, y

    results = run_ranks(3, rank)
    assert [first for first, _, _ in results] == ["PeerError", "ShapeError", "PeerError"]
    y = np.concatenate([y for _, _, y in results])
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-6)


def test_a_rank_that_fails_between_two_messages_fails_the_second(monkeypatch):
    """Nothing there should fail; if memory runs out all the same, nobody waits."""

    def rank(comm):
        spy = Spy(comm)
        layer = SyncBatchNorm(3, comm=spy, dtype="float64")
        x = normal((4, 3), seed=comm.rank)
        before = layer.running_mean.tobytes()
        if comm.rank == 1:
            send = spy.allreduce

            def once(message, label=""):
                total = send(message, label)
                if len(spy.sent) == 1:
                    raise MemoryError
                return total

            spy.allreduce = once
        return outcome(layer.forward, x), len(spy.sent), layer.running_mean.tobytes() == before

    assert run_ranks(3, rank) == [("PeerError", 2, True), ("MemoryError", 2, True)] + [
        ("PeerError", 2, True)
    ]


def test_interrupting_a_rank_sends_no_failure():
    """After Ctrl-C a rank wants to end, not to wait for peers that may be gone."""

    class Interrupting:
        def __array__(self, *args, **options):
            raise KeyboardInterrupt

    def rank(comm):
        spy = Spy(comm)
        layer = SyncBatchNorm(3, comm=spy)
        with pytest.raises(KeyboardInterrupt):
            layer.forward(Interrupting())
        return len(spy.sent)

    assert run_ranks(2, rank) == [0, 0]


def test_an_exception_that_takes_no_note_is_told_to_the_others_too():
    class Silent(Exception):
        def add_note(self, note):
            raise TypeError("not on me")

    class Failing:
        def __array__(self, *args, **options):
            raise Silent

    def rank(comm):
        layer = SyncBatchNorm(3, comm=comm)
        x = normal((4, 3), np.float32)
        return outcome(layer.forward, Failing() if comm.rank else x), outcome(layer.forward, x)

    assert run_ranks(2, rank, timeout=20) == [("PeerError", "fine"), ("Silent", "fine")]


def test_a_rank_raises_its_own_error_even_if_its_farewell_fails():
    def rank(comm):
        if comm.rank == 0:
            return  # has left: the failure of rank 1 meets nobody
        SyncBatchNorm(3, comm=comm).forward([1.0])

    with pytest.raises(cupybn.DTypeError, match="got list"):
        run_ranks(2, rank)


@pytest.mark.parametrize(
    "call",
    [
        lambda comm, r: distributed.allreduce_gradients(SyncBatchNorm(3 + r, comm=comm), comm),
        lambda comm, r: distributed.verify_sync(SyncBatchNorm(3 + r, comm=comm), comm),
        lambda comm, r: distributed.broadcast_parameters(SyncBatchNorm(3 + r, comm=comm), comm),
        lambda comm, r: SyncBatchNorm(3 + r, comm=comm)(np.ones((2, 3 + r), np.float32)),
    ],
)
def test_a_mismatch_closes_the_communicator(call):
    def rank(comm):
        spy = Spy(comm)
        first = outcome(call, spy, comm.rank)
        sent = len(spy.sent)
        again = outcome(call, spy, 0)
        return first, again, len(spy.sent) == sent

    assert run_ranks(2, rank) == [("CollectiveMismatchError",) * 2 + (True,)] * 2


W = np.ones(3, np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": W},
        {"bias": W},
        {"eps": 1e-3},
        {"activation": "relu"},
        {"name": "another"},
    ],
    ids=str,
)
def test_what_must_agree_in_forward(options):
    x = normal((4, 3), np.float32)

    def rank(comm):
        return outcome(F.batch_norm_forward, x, comm=comm, **(options if comm.rank == 1 else {}))

    assert run_ranks(3, rank) == ["CollectiveMismatchError"] * 3


def test_contexts_of_different_layers_do_not_meet_in_backward():
    x = normal((4, 3), np.float32)

    def rank(comm):
        contexts = [F.batch_norm_forward(x, eps=eps, comm=comm)[1] for eps in (1e-5, 1e-3)]
        return outcome(F.batch_norm_backward, x, contexts[comm.rank])

    assert run_ranks(2, rank) == ["CollectiveMismatchError"] * 2


def test_another_momentum_is_seen():
    def rank(comm):
        layer = SyncBatchNorm(3, momentum=[0.1, None][comm.rank], comm=comm)
        return outcome(layer, np.ones((2, 3), np.float32))

    assert run_ranks(2, rank) == ["CollectiveMismatchError"] * 2


def test_ranks_must_pool_gradients_in_the_same_way():
    def rank(comm):
        layer = SyncBatchNorm(3, comm=comm)
        return outcome(distributed.allreduce_gradients, layer, comm, op=["sum", "mean"][comm.rank])

    assert run_ranks(2, rank) == ["CollectiveMismatchError"] * 2


def test_a_context_of_evaluation_needs_no_other_rank():
    def rank(comm):
        if comm.rank == 0:
            layer = SyncBatchNorm(3, comm=comm).eval()
            x = normal((4, 3), np.float32)
            layer.forward(x, save_for_backward=True)
            layer.train().backward(x)

    run_ranks(2, rank)


def test_a_sequence_without_a_forward_tells_the_ranks_that_have_one():
    def rank(comm):
        net = cupybn.Sequential(SyncBatchNorm(3, comm=comm), SyncBatchNorm(3, comm=comm), Negate())
        x = normal((4, 3), np.float32, seed=comm.rank)
        if comm.rank == 0:
            net.forward(x)
        else:
            net.forward(x)
            net.saved = None
        return outcome(net.backward, x)

    assert run_ranks(2, rank) == ["PeerError", "RuntimeError"]


class Negate(cupybn.Layer):
    def compute_forward(self, x):
        return -x, None

    def compute_backward(self, dy, context):
        assert context is None
        return -dy


def test_a_communicator_need_not_be_hashable():
    class Unhashable(Spy):
        __slots__ = ()
        __hash__ = None

    def rank(comm):
        spy = Unhashable(comm)
        layer = SyncBatchNorm(3, comm=spy, name=str(comm.rank))
        x = np.ones((2, 3), np.float32)
        return outcome(layer, x), outcome(layer, x)

    assert run_ranks(2, rank) == [("CollectiveMismatchError",) * 2] * 2


@pytest.mark.parametrize("where", ["batches", "check_finite", "track_running_stats"])
def test_what_the_layers_must_agree_on(where):
    def rank(comm):
        odd = comm.rank == 1
        options = {where: not odd} if where != "batches" else {"momentum": None}
        layer = SyncBatchNorm(3, comm=comm, **options)
        if where == "batches" and odd:
            layer.num_batches_tracked = 5
        return outcome(layer, normal((4, 3), np.float32))

    assert run_ranks(2, rank) == ["CollectiveMismatchError"] * 2


def test_an_x_without_a_shape_is_this_ranks_own_error():
    class Strange:
        shape = None

    def rank(comm):
        x = normal((4, 3), np.float32) if comm.rank else Strange()
        return outcome(F.batch_norm_forward, x, comm=comm)

    assert run_ranks(2, rank) == ["DTypeError", "PeerError"]
