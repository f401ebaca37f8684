"""Communicators over real MPI: private duplicates, the user's traffic, groups, bad arguments."""

import copy
import pickle
import time

import numpy as np
from mpi4py import MPI

import cupybn
from cupybn import SyncBatchNorm, distributed
from cupybn.communicators import MpiCommunicator, resolve
from cupybn.communicators.mpi import kept_with
from cupybn.communicators.watchdog import watchdog

world = MPI.COMM_WORLD
rank, size = world.rank, world.size
whole = np.random.default_rng(0).standard_normal((4 * size, 3)).astype(np.float32)
mine = whole[4 * rank : 4 * rank + 4]


def raises(exception, message, call, *args, **options):
    try:
        call(*args, **options)
    except exception as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"{call} did not raise {exception}")


# making a layer and evaluating it does not touch the communicator
layer = SyncBatchNorm(3)
layer.eval()(mine)
assert "dup" not in kept_with(world)
layer.train()(mine)
assert "dup" in kept_with(world)
assert (
    layer.communicator()
    is resolve(None)
    is resolve(world)
    is SyncBatchNorm(3, comm=world).communicator()
)
assert layer.communicator()._dup != world
assert MpiCommunicator(world)._dup is layer.communicator()._dup
assert repr(MpiCommunicator(world, timeout=7)) == (
    f"MpiCommunicator(rank {rank} of {size}, transport='pinned', timeout=7)"
)

# the user's own traffic between and around calls
expected = (whole - whole.mean(0)) / np.sqrt(whole.var(0) + 1e-5)
left, right = (rank - 1) % size, (rank + 1) % size
requests = [world.isend({"from": rank}, right, tag=3), world.irecv(source=left, tag=3)]
part, total = np.array([float(rank)]), np.zeros(1)
everyone = world.Iallreduce(part, total)
y = layer(mine)
assert np.abs(y - expected[4 * rank : 4 * rank + 4]).max() < 1e-5
assert world.allreduce(1) == size
layer.backward(y)
everyone.Wait()
assert total[0] == size * (size - 1) / 2, total
requests[0].wait()
assert requests[1].wait() == {"from": left}

raises(ValueError, "group_size must be an integer of at least 1", distributed.split_comm, world, 0)
raises(
    TypeError, "must be a communicator of MPI", distributed.split_comm, cupybn.SelfCommunicator(), 2
)

# duplicates are freed with the communicator they belong to: MPI's ids would run out
for _ in range(3000 if size <= 2 else 30):  # more ranks than cores take long to agree on an id
    comm = world.Dup()
    resolve(comm)
    comm.Free()

# a layer whose communicator was freed, says so on every rank
comm = world.Dup()
orphan, freed = SyncBatchNorm(3, comm=comm), MpiCommunicator(comm)
y = orphan(mine)
comm.Free()
for call in (orphan.backward, orphan.forward) if size > 1 else ():
    raises(RuntimeError, "of 'SyncBatchNorm': the MPI communicator was freed", call, y)
raises(RuntimeError, "the MPI communicator was freed", freed.allreduce, np.ones(1))
orphan.comm = world
orphan.forward(mine)

# no timeout, no watchdog
patient = MpiCommunicator(world, timeout=0)
assert patient.timeout == 0
assert patient._watch not in watchdog
assert MpiCommunicator(world)._watch in watchdog
assert patient.allreduce(np.ones(1))[0] == size

# a call that returned is no longer watched: what follows may take as long as it likes
world.Barrier()
hasty = MpiCommunicator(world, timeout=3)  # for ranks that a busy machine lets arrive late
hasty.allreduce(np.ones(1))
time.sleep(4)
hasty.allreduce(np.ones(1))

# bad arguments
raises(ValueError, "COMM_NULL", SyncBatchNorm, 3, comm=MPI.COMM_NULL)
raises(TypeError, "comm must be", SyncBatchNorm, 3, comm=MPI.DOUBLE)
raises(ValueError, "transport must be one of", MpiCommunicator, world, transport="pigeon")
raises(ValueError, "timeout must be", MpiCommunicator, world, timeout=-2)
raises(
    cupybn.DTypeError, "a message is an array, got list", MpiCommunicator(world).allreduce, [1.0]
)
raises(ValueError, "op must be", distributed.allreduce_gradients, layer, op="max")
raises(ValueError, "root must be a rank", distributed.broadcast_parameters, layer, root=size)
raises(TypeError, "cannot be pickled", pickle.dumps, resolve(world))
distributed.verify_sync(layer)

# copies
layer.comm = world
other = copy.deepcopy(layer)
assert other.comm is world
assert other.weight is not layer.weight
other(mine)
restored = pickle.loads(pickle.dumps(SyncBatchNorm(3)))
restored(mine)  # comm was None: still COMM_WORLD
restored = pickle.loads(pickle.dumps(layer))
raises(RuntimeError, "set layer.comm", restored, mine)
restored.comm = world
restored(mine)
