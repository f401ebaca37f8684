"""split_comm with bad arguments, and trees that differ, over real MPI and every transport."""

import numpy as np
from mpi4py import MPI
from test_distributed import different_trees, raised

import cupybn
from cupybn import SyncBatchNorm, distributed
from cupybn.communicators import MpiCommunicator

world = MPI.COMM_WORLD
last = world.rank == world.size - 1
# Open MPI numbers a machine's ranks in another order where there are more of them than cores.
local_ranks = world.allgather(distributed.local_rank())
assert sorted(local_ranks) == list(range(world.size)), local_ranks

# one rank's own error; the others know, and go on
for bad in (0, -2, 2.5, "2", None):
    error = raised(distributed.split_comm, world, bad if last else 2)
    assert type(error) is (ValueError if last else cupybn.PeerError), repr(error)
    text = "group_size must be an integer of at least 1" if last else "split_comm: rank"
    assert text in str(error), error
for size in (1, 2, np.int64(3), world.size, 100):
    group = distributed.split_comm(world, size)
    begin = world.rank // size * size
    assert group.size == min(size, world.size - begin), (size, group.size)
    assert group.rank == world.rank - begin
    group.Free()

for transport in ("host", "pinned", "auto"):
    comm = MpiCommunicator(world, transport)
    error = raised(distributed.split_comm, comm, 3 if last else 2)
    assert type(error) is cupybn.CollectiveMismatchError, repr(error)
    assert "group_size=2" in str(error), error
    assert "group_size=3" in str(error), error
    different_trees(lambda transport=transport: MpiCommunicator(world, transport))

# one rank in another call than the others; one value a rank, because 2.0 and 1.0 read as integers,
# and added, are the bits of Inf: a message of integers among theirs could leave a count of Inf
strangers = {
    "verify_sync": lambda comm: distributed.verify_sync(SyncBatchNorm(4), comm),
    "broadcast_parameters": lambda comm: distributed.broadcast_parameters(SyncBatchNorm(4), comm),
    "split_comm": lambda comm: distributed.split_comm(comm, 2),
}
for name, call in strangers.items():
    for culprit in range(world.size if world.size > 1 else 0):
        comm = MpiCommunicator(world, timeout=60)
        layer = SyncBatchNorm(4, comm=comm, name="layer")
        x = np.full((1, 4), world.rank, np.float32)
        error = raised(call, comm) if world.rank == culprit else raised(layer.forward, x)
        assert type(error) is cupybn.CollectiveMismatchError, repr(error)
        assert f"rank {culprit}: {name}: " in str(error), error
