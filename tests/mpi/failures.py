"""One rank, the last, does something wrong: ``failures.py CASE``. Each rank prints what it got."""

import os
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

from cupybn import BatchNorm2d, Sequential, SyncBatchNorm, convert_sync_batchnorm

comm = MPI.COMM_WORLD
culprit = comm.rank == comm.size - 1
case = sys.argv[1]
x = np.random.default_rng(comm.rank).standard_normal((2, 4, 3, 3)).astype(np.float32)


def make(second=4):
    return Sequential({
        "first": BatchNorm2d(4),
        "second": BatchNorm2d(second, eps=1e-3 if culprit and case == "eps" else 1e-5),
    })  # fmt: skip


net = convert_sync_batchnorm(make(4 if case != "swapped, neighbouring C" else 5))
net.first.backward(net.first.forward(x))  # a step that works: the state is not the initial one
net.zero_grad()


def bits():
    arrays = [*net.named_parameters(), *net.named_gradients(), *net.named_buffers()]
    return [array.tobytes() for _, array in arrays]


def wrong_input():
    inputs = {
        "three channels": x[:, :3],
        "a list": x.tolist(),
        "integers": x.astype(np.int64),
        "None": None,
        "float64": x.astype(np.float64),
        "one dimension": x.reshape(-1),
    }
    net.first.forward(inputs[case] if culprit else x)


def swapped():
    wide = np.concatenate([x, x], axis=1)[:, : net.second.num_features]
    (net.second if culprit else net.first).forward(wide if culprit else x)


def forward_meets_backward():
    net.first.forward(x)
    global before
    before = bits()
    (net.first.forward if culprit else net.first.backward)(x)


def bad_dy():
    net.first.forward(x)
    global before
    before = bits()
    net.first.backward(x[:1] if culprit else x)


def backward_without_forward():
    if not culprit:
        net.first.forward(x)
    else:
        net.first.forward(x)
        net.first.saved = None
    global before
    before = bits()
    net.first.backward(x)


def gradients_of_another_tree():
    from cupybn import distributed

    tree = net.first if culprit else net
    distributed.allreduce_gradients(tree)


def other_dtype():
    layer = SyncBatchNorm(4, dtype="float64" if culprit else "float32", name="layer")
    layer.forward(x.astype(np.float64) if culprit else x)


def other_momentum():
    net.first.momentum = 0.2 if culprit else 0.1
    net.first.forward(x)


def user_code_raises():
    if culprit:
        raise RuntimeError("a bug in the user's own code")
    net.first.forward(x)


def exits():
    if culprit:
        sys.exit(0)
    net.first.forward(x)


def killed():
    if culprit:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    net.first.forward(x)


def sleeps():
    if case == "sleeps, nobody listens":
        sys.__stderr__.close()
    if culprit:
        time.sleep(60)
    net.second.forward(x)


actions = {
    "swapped": swapped,
    "swapped, neighbouring C": swapped,
    "forward meets backward": forward_meets_backward,
    "dy": bad_dy,
    "backward without forward": backward_without_forward,
    "gradients of another tree": gradients_of_another_tree,
    "another dtype": other_dtype,
    "eps": lambda: net.second.forward(x),
    "momentum": other_momentum,
    "user code raises": user_code_raises,
    "exits": exits,
    "killed": killed,
    "sleeps": sleeps,
    "sleeps, nobody listens": sleeps,
}
before = bits()
try:
    actions.get(case, wrong_input)()
except Exception as error:
    if case == "user code raises" and culprit:
        raise
    state = "unchanged" if bits() == before else "CHANGED"
    text = f"{comm.rank}|{type(error).__name__}|{state}|{str(error)!r}"
else:
    text = f"{comm.rank}|nothing|{'unchanged' if bits() == before else 'CHANGED'}|"
os.write(1, (text + "\n").encode())

if case in ("a list", "dy"):  # after PeerError the communicator goes on working
    net.first.forward(x)
    os.write(1, f"{comm.rank}|went on||\n".encode())
elif case == "swapped":  # after a mismatch it is closed, without communicating
    try:
        net.first.forward(x)
    except Exception as error:
        os.write(1, f"{comm.rank}|closed {type(error).__name__}||{str(error)!r}\n".encode())
