"""Device arrays through real MPI, with a stand-in for CuPy: ``transports.py CASE...``."""

import os
import sys

import fake_cupy
import numpy as np
from mpi4py import MPI

import cupybn
from cupybn import distributed
from cupybn.communicators import MpiCommunicator
from cupybn.communicators.cuda_aware import VARIABLE

cupy = fake_cupy.install()
cupy.guard_memory()
world = MPI.COMM_WORLD
rank, size = world.rank, world.size
last = rank == size - 1


class Spy:
    """In place of the private duplicate: notes what MPI is given, and whether anyone had waited."""

    def __init__(self, dup):
        self.dup, self.given = dup, []

    def Allreduce(self, *args):
        assert args[0] is MPI.IN_PLACE
        self.given.append((args[1], list(cupy.happened)))
        return self.dup.Allreduce(*args)

    def Gather(self, values, parts):  # of three ranks
        self.given.append((values, list(cupy.happened)))
        assert (parts is None) == bool(rank)
        assert rank or type(parts) is type(values)
        cupy.happened.clear()
        return self.dup.Gather(values, parts)

    def Bcast(self, values):
        assert values is self.given[-1][0]
        # The sum is written by the first rank's stream.
        assert cupy.happened == (
            ["event wait"] if isinstance(values, cupy.ndarray) and not rank else []
        )
        return self.dup.Bcast(values)


def spied(transport):
    comm = MpiCommunicator(world, transport)
    comm._dup = Spy(comm._dup)
    return comm


def written_late(values):
    """A device array that a kernel on the current stream is still to fill."""
    array = cupy.asarray(np.full_like(values, -7))

    def kernel():
        array.memory[...] = values

    cupy.cuda.get_current_stream().launch(kernel)
    return array


def check_sums(comm, check_given):
    for dtype in (np.float64, np.float32, np.int64):
        for length in (256, 300, 4096, 256):
            mine = (np.arange(length) % 97 + rank).astype(dtype)
            total = (np.arange(length) % 97 * size + size * (size - 1) // 2).astype(dtype)
            message = written_late(mine)
            cupy.happened.clear()
            comm._dup.given.clear()
            result = comm.allreduce(message, "forward of 'a'")
            assert result is message
            ((given, before),) = comm._dup.given
            assert "event wait" in before
            check_given(given, message)
            np.testing.assert_array_equal(comm.first_values(result, 16), total[:16])
            np.testing.assert_array_equal(message.get(), total)
            # NumPy arrays go as they are
            np.testing.assert_array_equal(comm.allreduce(mine), total)
            assert comm._dup.given[-1][0] is mine


def pinned():
    for comm in (spied("pinned"), spied("auto")):
        assert comm.transport == "pinned"
        assert "transport='pinned'" in repr(comm)

        def given(array, message):
            assert type(array) is np.ndarray
            assert cupy.is_pinned(array)

        check_sums(comm, given)
        # no further trip to the device for the header
        message = written_late(np.ones(256))
        cupy.happened.clear()
        comm.first_values(comm.allreduce(message), 16)
        assert "get" not in cupy.happened
    assert comm.cuda_aware.aware is False
    assert "not known to be CUDA-aware" in comm.why


def device():
    os.environ[VARIABLE] = "1"
    cupy.open_memory()
    for comm in (spied("device"), spied("auto")):
        assert comm.transport == "device"

        def given(array, message):
            assert array is message

        check_sums(comm, given)
        assert "pinned" not in cupy.happened
    assert comm.why == f"MPI is CUDA-aware on every rank ({VARIABLE}=1 on this one)"


def host():
    comm = MpiCommunicator(world, "host")
    for length in (256, 300):
        message = written_late(np.arange(length, dtype=float))
        assert comm.allreduce(message) is message
        np.testing.assert_array_equal(message.get(), np.arange(length) * size)


def lie():
    """The device pointer reaches an MPI that cannot follow it."""
    comm = MpiCommunicator(world)
    assert comm.transport == "device"
    comm.allreduce(written_late(np.ones(256)))
    print("survived", flush=True)


def raised(call, *args, **options):
    try:
        call(*args, **options)
    except Exception as error:
        return error
    return None


def agreement():
    """Arguments and variables that differ by rank: the same on every rank, or an error on all."""

    def everywhere(kind, text, **options):
        error = raised(MpiCommunicator, world, **options)
        assert type(error) is kind, repr(error)
        assert text in str(error), error
        assert MpiCommunicator(world).transport == "pinned"

    everywhere(cupybn.DeviceError, "not known to be CUDA-aware", transport="device")
    os.environ[VARIABLE] = "1" if rank == 0 else "auto"  # what some ranks say is not enough
    if size > 1:
        assert MpiCommunicator(world).transport == "pinned"
        text = "not known to be CUDA-aware on rank 1" if rank == 0 else "CUDA-aware (MPIX_"
        everywhere(cupybn.DeviceError, text, transport="device")
        assert raised(MpiCommunicator, world, "device")
        text = "the ranks ask for different transports"
        everywhere(cupybn.CollectiveMismatchError, text, transport="host" if last else "auto")
    os.environ[VARIABLE] = "auto"

    def here(kind, text, **options):
        text = text if last else f"rank {size - 1} failed"
        everywhere(kind if last else cupybn.PeerError, text, **options)

    here(ValueError, "transport must be one of", transport="pigeon" if last else "auto")
    here(ValueError, "timeout must be", timeout=-1 if last else None)
    for name in (VARIABLE, "CUPYBN_TIMEOUT"):
        before = os.environ.get(name, "")
        os.environ[name] = "perhaps" if last else before
        error = raised(MpiCommunicator, world)
        os.environ[name] = before
        assert type(error) is (ValueError if last else cupybn.PeerError), repr(error)
        assert name in str(error) if last else f"rank {size - 1} failed" in str(error)
        assert MpiCommunicator(world).transport == "pinned"


def net():
    layers = {"a": cupybn.BatchNorm2d(4), "b": cupybn.BatchNorm2d(3, dtype="float64")}
    layers["c"] = cupybn.BatchNorm2d(5)
    return cupybn.Sequential(layers)


def layers():
    """cupybn.distributed with arrays on the device, on some, and on every transport."""
    for transport, everything in (
        ("pinned", True), ("host", True), ("pinned", False), ("device", True), ("device", False),
    ):  # fmt: skip
        if transport == "device":
            os.environ[VARIABLE] = "1"
            cupy.open_memory()
        comm = MpiCommunicator(world, transport)
        tree = net().to("cuda") if everything else net()
        tree.b.to("cuda")
        for i, (_, grad) in enumerate(tree.named_gradients()):
            grad[...] = i + rank
        cupy.happened.clear()
        distributed.allreduce_gradients(tree, comm)
        # all on the device: nothing is fetched but, where MPI sums there, the header
        fetched = {"pinned": 0, "device": int(size > 1)}
        if everything and transport in fetched:
            assert cupy.happened.count("get") == fetched[transport], cupy.happened
        for i, (name, grad) in enumerate(tree.named_gradients()):
            host = grad.get() if everything or name[0] == "b" else grad
            np.testing.assert_array_equal(host, np.full(host.shape, i + (size - 1) / 2))
            assert host.dtype == (np.float64 if name[0] == "b" else np.float32)
        distributed.verify_sync(tree, comm)
        tree.b.weight[...] = rank
        if size > 1:
            error = raised(distributed.verify_sync, tree, comm)
            assert "'b.weight' of" in str(error), error
        distributed.broadcast_parameters(tree, comm, root=size - 1)
        np.testing.assert_array_equal(tree.b.weight.get(), np.full(3, size - 1))
        distributed.verify_sync(tree, comm)
        group = distributed.split_comm(comm, 3)
        assert group.size == min(3, size - rank // 3 * 3)
        group.Free()


cases = {
    "pinned": pinned, "device": device, "host": host, "lie": lie, "agreement": agreement,
    "layers": layers,
}  # fmt: skip
for case in sys.argv[1:]:
    cases[case]()
