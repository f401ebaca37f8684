"""Several calls in one message: what may be among them, and what is left after each fault."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import reference
from rank_checks import Spy, bits, branches, normal

import cupybn
from cupybn import BatchNorm1d, SyncBatchNorm, coalesce, joint, passes
from cupybn import functional as F
from cupybn.backends import cpu_backend
from cupybn.statistics import padded_length
from cupybn.testing import run_ranks

NAMES = "forward of 'a', forward of 'b', forward of 'c'"


def outcome(calls):
    try:
        F.coalesce(calls)
    except BaseException as error:
        return type(error).__name__, "\n".join([str(error), *getattr(error, "__notes__", ())])
    return "fine", ""


def names_of(results):
    return [name for name, _ in results]


def forwards(layers, xs):
    return [partial(layer.forward, x) for layer, x in zip(layers, xs, strict=True)]


def test_the_message():
    """16 words of all; then 16 and 2C numbers a call, as long as the next power of two."""

    def rank(comm):
        spy = Spy(comm)
        layers, xs, dys = branches(spy)
        F.coalesce(forwards(layers, xs))
        F.coalesce([partial(m.backward, dy) for m, dy in zip(layers, dys, strict=True)])
        return spy.sent

    length = padded_length(3 * 16 + 2 * (4 + 64 + 130))
    assert length == 16 + 512
    for sent in run_ranks(2, rank):
        assert sent == [
            (f"3 calls in one message ({NAMES})", length),
            (f"3 calls in one message ({NAMES.replace('forward', 'backward')})", length),
        ]


def test_both_directions_and_functional_calls_share_a_message():
    """A backward, a double backward and a forward of what they do not depend on."""
    x, dy, other = normal((6, 3)), normal((6, 3), seed=1), normal((6, 5), seed=2)
    weight = normal(3, seed=3)

    def rank(comm):
        mine = slice(*[(0, 2), (2, 2), (2, 6)][comm.rank])
        spy = Spy(comm)
        layer = SyncBatchNorm(5, comm=spy, dtype="float64")
        _, saved = F.batch_norm_forward(x[mine], weight, comm=spy)
        del spy.sent[:]
        grads, double, y = F.coalesce([
            partial(F.batch_norm_backward, dy[mine], saved),
            partial(F.batch_norm_double_backward, x[mine], weight, None, saved, dy[mine]),
            partial(layer.forward, other[mine]),
        ])  # fmt: skip
        assert len(spy.sent) == 2  # the second for the float64 forward
        expected = F.batch_norm_backward(dy[mine], saved)
        assert grads.dx.tobytes() == expected.dx.tobytes()
        assert grads.dweight.tobytes() == expected.dweight.tobytes()
        alone = F.batch_norm_double_backward(x[mine], weight, None, saved, dy[mine])
        assert [a.tobytes() for a in double] == [a.tobytes() for a in alone]
        assert layer.num_batches_tracked == 1
        return y

    y = np.concatenate(run_ranks(3, rank))
    assert reference.error(y, reference.forward(other).y) < 1e-12


def test_what_sends_nothing_may_be_among_them():
    """A layer in evaluation, one that is not synchronised, one over a single rank."""

    def rank(comm):
        spy = Spy(comm)
        layers, xs, dys = branches(spy)
        layers[1].eval()
        plain, alone = BatchNorm1d(4), SyncBatchNorm(4, comm=cupybn.SelfCommunicator())
        calls = [
            *forwards(layers, xs),
            partial(plain.forward, xs[0]),
            partial(alone.forward, xs[0]),
        ]
        calls[1] = partial(layers[1].forward, xs[1], save_for_backward=True)
        ys = F.coalesce(calls)
        np.testing.assert_array_equal(ys[3], ys[4])
        assert layers[1].num_batches_tracked == 0
        assert plain.num_batches_tracked == 1
        F.coalesce([partial(m.backward, dy) for m, dy in zip(layers, dys, strict=True)])
        return len(spy.sent)

    assert run_ranks(2, rank) == [2, 2]


def test_one_process():
    layers, xs, _ = branches(cupybn.SelfCommunicator())
    others, _, _ = branches(cupybn.SelfCommunicator())
    ys = F.coalesce(forwards(layers, xs))
    for y, other, x, layer in zip(ys, others, xs, layers, strict=True):
        assert y.tobytes() == other.forward(x).tobytes()
        assert bits(layer) == bits(other)
    assert F.coalesce([]) == []
    with pytest.raises(cupybn.ShapeError):
        F.coalesce(forwards(layers, [xs[0], xs[1], xs[1]]))
    assert layers[0].num_batches_tracked == 1


def test_residual_out_and_contexts_are_passed_on():
    def rank(comm):
        layer = SyncBatchNorm(4, comm=comm, activation="relu")
        x, r, out = (normal((3, 4), np.float32, seed) for seed in range(3))
        other = SyncBatchNorm(4, comm=comm, activation="relu", name="other")
        [y] = F.coalesce([partial(layer.forward, x, r, out=out)])
        assert y is out
        saved, layer.saved = layer.saved, None
        [(dx, dr)] = F.coalesce([partial(layer.backward, x, saved, out=out)])
        assert dx is out
        assert y.tobytes() == dx.tobytes()
        other.forward(x, r)
        expected = other.backward(x)
        assert dr.tobytes() == expected[1].tobytes()
        assert dx.tobytes() == expected[0].tobytes()

    run_ranks(2, rank)


class Own(SyncBatchNorm):
    def compute_forward(self, x, *args, **options):
        return super().compute_forward(x, *args, **options)


def refused(comm, others):
    layers, xs, _ = branches(comm)
    x = xs[0]
    return {
        "a function": (TypeError, "call 2 of 2 is <function", lambda: None),
        "a layer": (TypeError, "only functools.partial", partial(layers[0], x)),
        "nested": (TypeError, "only functools.partial", partial(F.coalesce, [])),
        "a container": (
            TypeError, "only functools.partial", partial(cupybn.Sequential().forward, x)
        ),
        "own code": (
            TypeError, "Own has a compute_forward of its own",
            partial(Own(4, comm=comm, name="o").forward, x),
        ),
        "twice": (ValueError, "a: forward stands twice", partial(layers[0].forward, x)),
        "another communicator": (
            ValueError, "different communicators", partial(SyncBatchNorm(4, comm=others).forward, x)
        ),
    }, partial(layers[0].forward, x), layers  # fmt: skip


@pytest.mark.parametrize("what", list(refused(cupybn.SelfCommunicator(), None)[0]))
def test_what_is_refused_before_anything_is_sent(what):
    def rank(comm):
        spy = Spy(comm)
        bad, good, layers = refused(spy, Spy(comm))
        before = bits(layers[0])
        error, text, call = bad[what]
        with pytest.raises(error, match=text):
            F.coalesce([good, call])
        assert spy.sent == []
        assert bits(layers[0]) == before

    run_ranks(2, rank)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_mismatch_in_any_branch_is_seen_by_all(odd):
    def rank(comm):
        layers, xs, _ = branches(comm)
        if comm.rank == 1:
            layers[odd].eps = 1e-3
        before = [bits(layer) for layer in layers]
        name, text = outcome(forwards(layers, xs))
        assert f"ranks 0, 2: call {odd + 1} of 3 in one message: forward of '{'abc'[odd]}'" in text
        assert f"rank 1: call {odd + 1} of 3 in one message" in text
        assert "eps=0.001" in text
        assert [bits(layer) for layer in layers] == before
        return name, outcome(forwards(layers, xs))[0]

    assert run_ranks(3, rank) == [("CollectiveMismatchError",) * 2] * 3


@pytest.mark.parametrize("how", ["order", "fewer", "apart"])
def test_other_calls_in_a_message_of_the_same_length(how):
    def rank(comm):
        layers, xs, _ = branches(comm, channels=(4, 4, 4))
        calls = forwards(layers, xs)
        if comm.rank == 1:
            calls = {"order": calls[::-1], "fewer": calls[:2], "apart": calls[:1]}[how]
        if how == "apart" and comm.rank == 1:
            with pytest.raises(cupybn.CollectiveMismatchError):
                calls[0]()
            return "CollectiveMismatchError"
        return outcome(calls)[0]

    assert run_ranks(2, rank) == ["CollectiveMismatchError"] * 2


@pytest.mark.parametrize("undone", [True, False])
@pytest.mark.parametrize("options", [{}, {"check_finite": True}], ids=["one value", "not finite"])
def test_what_all_ranks_refuse_after_the_message(options, undone, monkeypatch):
    """The last branch cannot be normalised: the first must not have been written.

    Device arrays are not put back: they must not be written before all branches are accepted.
    """
    if not undone:
        monkeypatch.setattr(passes, "_restored_on_error", lambda state: nullcontext())

    def rank(comm):
        layers, xs, _ = branches(comm, ("float32", "float64", "float32"), **options)
        if options:
            xs[2][0, 7] = np.nan
        else:
            xs[2] = np.ones((comm.rank, 130), np.float32)
        before = [bits(layer) for layer in layers]
        name, _ = outcome(forwards(layers, xs))
        assert [bits(layer) for layer in layers] == before
        assert all(layer.saved is None for layer in layers)
        F.coalesce(forwards(layers[:2], xs[:2]))  # the ranks are in step
        return name

    expected = "FloatingPointError" if options else "ShapeError"
    assert run_ranks(2, rank) == [expected] * 2


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_failure_while_the_branches_are_written_undoes_them(direction, monkeypatch):
    """On the rank where it happens; nothing is left to tell the others, who have gone on."""
    primitive = "normalize" if direction == "forward" else "backward_input"
    backend = cpu_backend()
    real, failing = getattr(backend, primitive), []

    def once(dy_or_x, x, *args, **options):
        x3 = dy_or_x if direction == "forward" else x
        if failing and x3.shape[1] == 130 and x3.base is failing[0].base:
            raise MemoryError
        return real(dy_or_x, x, *args, **options)

    monkeypatch.setattr(backend, primitive, once)

    def rank(comm):
        spy = Spy(comm)
        layers, xs, dys = branches(spy)
        if direction == "backward":
            F.coalesce(forwards(layers, xs))
        if comm.rank == 1:
            owned = xs[2].copy()
            xs[2] = owned[:]
            failing.append(xs[2].reshape(xs[2].shape))
            if direction == "backward":
                layers[2].saved.x3 = failing[0]
        before = [bits(layer) for layer in layers]
        del spy.sent[:]
        calls = [
            partial(getattr(m, direction), a)
            for m, a in zip(layers, xs if direction == "forward" else dys, strict=True)
        ]
        name = "fine"
        try:
            F.coalesce(calls)
        except MemoryError as error:
            name = type(error).__name__
            # Here, where the traceback still keeps the frames that did it.
            unchanged = [bits(layer) for layer in layers] == before
        else:
            unchanged = [bits(layer) for layer in layers] == before
        return name, unchanged, len(spy.sent)

    assert run_ranks(2, rank) == [("fine", False, 1), ("MemoryError", True, 1)]


def test_calls_in_one_message_are_on_one_device(monkeypatch):
    monkeypatch.setattr(coalesce, "device_of", lambda a: f"cuda:{int(a.shape[1:2] == (64,))}")

    def rank(comm):
        layers, xs, _ = branches(comm)
        before = [bits(layer) for layer in layers]
        name, text = outcome(forwards(layers, xs))
        assert "forward of 'b' is on cuda:1, the calls before it are on cuda:0" in text
        assert [bits(layer) for layer in layers] == before
        return name

    assert run_ranks(2, rank) == ["DeviceError"] * 2


def test_a_rank_that_fails_between_two_messages_poisons_the_second():
    def rank(comm):
        spy = Spy(comm)
        layers, xs, _ = branches(spy, ("float32", "float64", "float32"))
        before = [bits(layer) for layer in layers]
        if comm.rank == 1:
            send = spy.allreduce

            def once(message, label=""):
                total = send(message, label)
                if len(spy.sent) == 1:
                    raise MemoryError
                return total

            spy.allreduce = once
        name, _ = outcome(forwards(layers, xs))
        return name, len(spy.sent), [bits(layer) for layer in layers] == before

    results = run_ranks(3, rank)
    assert results == [("PeerError", 2, True), ("MemoryError", 2, True), ("PeerError", 2, True)]


def test_interrupting_a_rank_sends_nothing():
    class Interrupting:
        shape = (2, 64, 3)

        def __array__(self, *args, **options):
            raise KeyboardInterrupt

    def rank(comm):
        spy = Spy(comm)
        layers, xs, _ = branches(spy)
        before = [bits(layer) for layer in layers]
        name, _ = outcome(forwards(layers, [xs[0], Interrupting(), xs[2]]))
        assert [bits(layer) for layer in layers] == before
        return name, spy.sent

    assert run_ranks(2, rank) == [("KeyboardInterrupt", [])] * 2


def test_a_backward_without_a_forward_tells_the_others():
    def rank(comm):
        layers, xs, dys = branches(comm)
        F.coalesce(forwards(layers, xs))
        if comm.rank == 1:
            layers[1].saved = None
        before = [bits(layer) for layer in layers]
        calls = [partial(m.backward, dy) for m, dy in zip(layers, dys, strict=True)]
        name, text = outcome(calls)
        assert [bits(layer) for layer in layers] == before
        assert ("backward without a saved forward" in text) == (comm.rank == 1)
        assert ("failed in backward of 'b'" in text) == (comm.rank == 0)
        return name

    assert run_ranks(2, rank) == ["PeerError", "RuntimeError"]


def test_the_calls_may_fail_in_different_branches_on_different_ranks():
    def rank(comm):
        layers, xs, _ = branches(comm)
        if comm.rank < 2:
            xs[comm.rank] = [1.0]
        return outcome(forwards(layers, xs))

    results = run_ranks(3, rank)
    assert names_of(results) == ["DTypeError", "DTypeError", "PeerError"]
    if sys.version_info >= (3, 11):  # notes of exceptions
        assert "forward of 'b', rank 1 of 3" in results[1][1]
    assert "2 of 3 ranks failed in forward of 'a', forward of 'b'" in results[2][1]


def test_steps_leave_the_callers_device_current_between_them(monkeypatch):
    """Calls take turns: one that kept its device current would hand it to the next."""
    current = [0]

    @contextmanager
    def on_device_of(x):
        before, current[0] = current[0], x
        try:
            yield
        finally:
            current[0] = before

    monkeypatch.setattr(joint, "is_cupy", lambda x: True)
    monkeypatch.setattr(joint, "on_device_of", on_device_of)
    seen = []

    def steps():
        try:
            seen.append(current[0])
            assert (yield 1) == "answer"
            seen.append(current[0])
            yield None
        finally:
            seen.append(current[0])

    for device in (1, 2):
        call = joint.on_its_device(device, steps())
        assert next(call) == 1
        assert current == [0]
        assert call.send("answer") is None
        call.close()
    assert seen == [1] * 3 + [2] * 3
    assert current == [0]
