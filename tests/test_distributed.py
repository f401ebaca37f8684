"""Trees of layers over ranks, and which device a rank takes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
from rank_checks import Spy, bits

import cupybn
from cupybn import BatchNorm1d, Sequential, distributed, launcher
from cupybn.communicators import ThreadCommunicator
from cupybn.statistics import HEADER
from cupybn.testing import run_ranks


def raised(call, *args, **options):
    try:
        call(*args, **options)
    except Exception as error:
        return error
    return None


def different_trees(make_comm):
    """Trees whose messages would not even have the same length: an error on every rank."""
    for call in (distributed.verify_sync, distributed.broadcast_parameters):
        comm = make_comm()
        last = comm.rank == comm.size - 1
        tree = Sequential(*[BatchNorm1d(5000 if last else 3) for _ in range(300 if last else 1)])
        before = bits(tree)
        error = raised(call, tree, comm)
        assert type(error) is cupybn.CollectiveMismatchError, repr(error)
        assert f"{call.__name__}: " in str(error), error
        assert "5 arrays with 13 values" in str(error), error
        assert bits(tree) == before


@pytest.mark.parametrize("n", [2, 3])
def test_trees_of_any_size_are_told_apart(n):
    groups = [ThreadCommunicator.group(n) for _ in range(2)]

    def rank(comm):
        comms = iter([group[comm.rank] for group in groups])
        different_trees(lambda: next(comms))

    run_ranks(n, rank)


@pytest.mark.parametrize("n", [1, 3])
def test_messages(n):
    """One for gradients; two, the first short, for what is not called in every step."""

    def rank(comm):
        tree = Sequential(BatchNorm1d(500), BatchNorm1d(3))
        spy = Spy(comm)
        distributed.allreduce_gradients(tree, spy)
        distributed.verify_sync(tree, spy)
        distributed.broadcast_parameters(tree, spy)
        return spy.sent

    expected = [
        ("allreduce_gradients", 1041),
        ("verify_sync", 272),
        ("verify_sync", 272),
        ("broadcast_parameters", 272),
        ("broadcast_parameters", 2064),
    ]
    assert run_ranks(n, rank) == [expected if n > 1 else []] * n


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble"])
def test_gradients_of_any_floating_dtype(dtype):
    def rank(comm):
        layer = BatchNorm1d(3)
        layer.grads["weight"] = np.full(3, comm.rank + 0.5, dtype)
        distributed.allreduce_gradients(layer, comm, op="sum")
        return layer.grads["weight"]

    for result in run_ranks(2, rank):
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, np.full(3, 2.0))


def test_gradients_that_are_no_numbers_to_average():
    def rank(comm):
        layer = BatchNorm1d(3)
        if comm.rank == 1:
            layer.grads["weight"] = np.zeros(3, np.int32)
        return raised(distributed.allreduce_gradients, layer, comm)

    first, second = run_ranks(2, rank)
    assert isinstance(first, cupybn.PeerError)
    assert isinstance(second, cupybn.DTypeError)
    assert "the gradient of 'weight' is int32, not floating" in str(second)


FAULTS = {
    "the gradient of 'weight' is read-only": ("allreduce_gradients", "grads", "weight", None),
    "the gradient of 'bias' must be a NumPy": ("allreduce_gradients", "grads", "bias", [0.0] * 3),
    "weight is read-only": ("broadcast_parameters", "params", "weight", None),
    "num_batches_tracked is read-only": (
        "broadcast_parameters",
        "buffers",
        "num_batches_tracked",
        None,
    ),
}


@pytest.mark.parametrize("text", list(FAULTS))
def test_an_array_that_cannot_be_written_to(text):
    """One rank's: it says so before the message, and no rank writes anything."""
    call, kind, name, other = FAULTS[text]

    def rank(comm):
        layer = BatchNorm1d(3)
        for arrays in (layer.grads, layer.params, layer.buffers):
            for array in arrays.values():
                array[...] = comm.rank + 1
        before = bits(layer)
        arrays = getattr(layer, kind)
        good = arrays[name]
        if comm.rank == 1:
            arrays[name] = good.copy() if other is None else other
            if other is None:
                arrays[name].flags.writeable = False
        error = raised(getattr(distributed, call), layer, comm)
        arrays[name] = good
        assert bits(layer) == before
        return error

    first, second = run_ranks(2, rank)
    assert isinstance(first, cupybn.PeerError)
    assert isinstance(second, ValueError if other is None else cupybn.DTypeError)
    assert text in str(second)


class Ones:
    """The second of two ranks that agree, where the sums of all that is sent are 1."""

    rank, size = 1, 2

    def allreduce(self, message, label=""):
        message[:HEADER] *= 2
        message[HEADER:] = 1
        return message


def interrupted(call, instruction):
    """Calls it with an interrupt before that instruction; whether there are so many.

    Python takes interrupts between two instructions: here between those of the modules that write.
    """
    left = [instruction]

    def trace(frame, event, _):
        if frame.f_code.co_filename not in (distributed.__file__, cupybn.arrays.__file__):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left[0] <= 0


@pytest.mark.parametrize("name", ["allreduce_gradients", "broadcast_parameters"])
def test_an_interrupt_leaves_all_as_it_was_or_all_done(name):
    tree = Sequential(BatchNorm1d(3), BatchNorm1d(2))
    before = bits(tree)
    getattr(distributed, name)(tree, Ones())
    done = bits(tree)
    assert done != before
    seen, instruction, more = [], 0, True
    while more:
        tree = Sequential(BatchNorm1d(3), BatchNorm1d(2))
        instruction += 1
        more = interrupted(partial(getattr(distributed, name), tree, Ones()), instruction)
        seen.append(bits(tree))
    assert all(state in (before, done) for state in seen)
    assert seen[0] == before
    assert seen[-2:] == [done] * 2


@pytest.mark.parametrize("name", ["allreduce_gradients", "broadcast_parameters", "verify_sync"])
def test_what_is_no_layer(name):
    class Module:  # as PyTorch's
        def named_parameters(self):
            return iter(())

        named_buffers = named_parameters

    call = getattr(distributed, name)
    with pytest.raises(TypeError, match=r"expected a Layer, got Module.*cupybn\.interop\.torch"):
        call(Module(), cupybn.SelfCommunicator())


@pytest.mark.parametrize("root", [-1, 2, 0.5, "0", None])
def test_the_root_is_a_rank(root):
    def rank(comm):
        layer = BatchNorm1d(3)
        error = raised(distributed.broadcast_parameters, layer, comm, root)
        assert (layer.weight == 1).all()
        return error

    for error in run_ranks(2, rank):
        assert isinstance(error, ValueError)
        assert f"root must be a rank from 0 to 1, got {root!r}" in str(error)


@pytest.mark.mpi
@pytest.mark.parametrize("n", [2, 4])
def test_over_mpi(mpirun, n):
    mpirun(n, Path(__file__).parent / "mpi" / "trees.py", env={"CUPYBN_TIMEOUT": "20"})


@pytest.fixture
def no_launcher(monkeypatch):
    for variable in launcher.LOCAL_RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("variable", launcher.LOCAL_RANK_VARIABLES)
def test_local_rank(no_launcher, monkeypatch, variable):
    assert distributed.local_rank() == 0
    monkeypatch.setenv(variable, "3")
    assert distributed.local_rank() == 3
    monkeypatch.setenv(variable, "three")
    with pytest.raises(ValueError, match=f"{variable} must be the number of a rank, got 'three'"):
        distributed.local_rank()


def test_local_device(no_launcher, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(cupybn.DeviceError, match="need CuPy: pip install"):
        distributed.local_device()
    cupy = fake_cupy.install()
    for devices, expected in ((1, "cuda:0"), (2, "cuda:1"), (8, "cuda:5")):
        monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda n=devices: n)
        monkeypatch.setenv("SLURM_LOCALID", "5")
        assert distributed.local_device() == expected
    monkeypatch.setattr(cupy.cuda, "is_available", lambda: False)
    with pytest.raises(cupybn.DeviceError, match="CuPy sees no CUDA device"):
        distributed.local_device()
