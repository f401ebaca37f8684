"""One rank, the last, does what the others wait for in vain: ``endings.py CASE [DIRECTION]``.

Each rank prints a line of JSON when it is about to act: its number, process, MPI, and the time.
"""

import json
import os
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

from cupybn import Sequential, SyncBatchNorm, distributed

comm = MPI.COMM_WORLD
culprit = comm.rank == comm.size - 1
case, direction = (*sys.argv[1:], "forward")[:2]
x = np.random.default_rng(comm.rank).standard_normal((2, 4)).astype(np.float32)
net = Sequential({"first": SyncBatchNorm(4), "second": SyncBatchNorm(4)})
comm.Barrier()  # a busy machine lets some start late, and the timeout is short
net.backward(net.forward(x))  # messages 1 to 4: 'first', 'second', 'second', 'first'


def waits():
    """What every rank should do: in forward message 5, of 'first'; else message 7, of 'second'."""
    net.forward(x) if direction == "forward" else net.backward(x)


def leaves():
    """What the culprit does instead; it takes a moment, so that the others are waiting."""
    time.sleep(0.5)
    if case == "raises":
        raise RuntimeError("a bug in the user's own code")
    if case == "misspells an argument":
        net.first.forward(x, residaul=x)
    if case == "exits":
        sys.exit(0)
    elif case == "exits at once":
        os._exit(3)
    if case == "exits at once with 0":
        os._exit(0)
    elif case == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif case == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:  # sleeps
        time.sleep(60)


def skips_the_last_backward():
    """It is at the end of its program, in MPI_Finalize; the others in message 8."""
    for layer, context in reversed(net.saved):
        if not (culprit and layer is net.first):
            layer.backward(x, context)


def stays_in_evaluation():
    net.train(not culprit)
    for _ in range(3):
        net.forward(x)


def evaluates_for_one_step():
    """A single synchronised layer: nobody notices, until the others lack its last message, 11."""
    for i in range(4):
        net.first.train(not (culprit and i == 1))
        y = net.first.forward(x)
        if net.first.training:
            net.first.backward(y)


def sends_another_length():
    """A longer one: its layer has 200 channels, that of the others 4."""
    wide = SyncBatchNorm(200, name="wide")
    layer = wide if culprit else net.first
    batch = np.ones((2, layer.num_features), np.float32)
    if direction == "forward":
        layer.forward(batch)
    else:
        net.first.forward(x)
        wide.forward(np.ones((2, 200), np.float32))
        begin()
        layer.backward(batch)


def is_at_the_gradients():
    """It skipped the backward, and pools gradients, in a message of float32."""
    distributed.allreduce_gradients(net) if culprit else net.backward(x)


def begin():
    library = MPI.get_vendor()[0]
    line = {"rank": comm.rank, "pid": os.getpid(), "time": time.time(), "library": library}
    os.write(1, (json.dumps(line) + "\n").encode())


others = {
    "skips the last backward": skips_the_last_backward,
    "stays in evaluation": stays_in_evaluation,
    "evaluates for one step": evaluates_for_one_step,
    "sends another length": sends_another_length,
    "is at the gradients": is_at_the_gradients,
}
if case == "sleeps, nobody listens":
    sys.__stderr__.close()
if direction == "backward" or case in ("skips the last backward", "is at the gradients"):
    net.forward(x)  # messages 5 and 6
begin()
others.get(case, leaves if culprit else waits)()
