"""One rank, the last, does something wrong: every case in turn, each on its own communicator.

With an argument, a path that is not there yet, the communicators are process groups of gloo. Each
rank prints a line of JSON for each case: the exception's class and text, its notes, whether any
array of the layers changed, and what came of the same call without the mistake. A case has 20
seconds: past them a rank shows where it is, and ends the job.
"""

import atexit
import faulthandler
import hashlib
import json
import os
import sys
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
from mpi4py import MPI

from cupybn import Sequential, SyncBatchNorm, distributed
from cupybn.backends import numpy as backend
from cupybn.collective import CollectiveCall

world = MPI.COMM_WORLD
culprit = world.rank == world.size - 1
LIMIT = 20  # seconds
x = np.random.default_rng(world.rank).standard_normal((2, 4, 3, 3)).astype(np.float32)
wide = np.concatenate([x, x], axis=1)
CASES = {}


def case(name):
    """Of a function of a communicator: it prepares, and returns layers and ``action(wrong)``."""

    def keep(prepare):
        CASES[name] = prepare

    return keep


def network(comm, second=4):
    """Layers whose state is not the initial one."""
    net = Sequential({
        "first": SyncBatchNorm(4, comm=comm),
        "second": SyncBatchNorm(second, comm=comm),
        "third": SyncBatchNorm(4, comm=comm),
    })  # fmt: skip
    for layer in net:
        layer.backward(layer.forward(wide[:, : layer.num_features]))
    return net


# ---- what one rank alone gets wrong --------------------------------------------------------------

HUGE = np.broadcast_to(np.float32(1), (2**20, 4, 2**15, 2**15))  # 16 PiB if it has to be copied
INPUTS = {
    "three channels": x[:, :3],
    "a list": x.tolist(),
    "None": None,
    "integers": x.astype(np.int64),
    "another dtype of x": x.astype(np.float64),
    "one dimension": x.reshape(-1),
    "an x that does not fit in memory": HUGE,
}
GRADIENTS = {
    "dy of another shape": x[:1],
    "dy with three channels": x[:, :3],
    "dy of another dtype": x.astype(np.float64),
    "dy is a list": x.tolist(),
}


def with_input(value):
    def prepare(comm):
        net = network(comm)
        return net, lambda wrong: net.first.forward(value if wrong else x)

    return prepare


def with_gradient(value):
    def prepare(comm):
        net = network(comm)
        net.first.forward(x)
        return net, lambda wrong: net.first.backward(value if wrong else x)

    return prepare


for name, value in INPUTS.items():
    case(f"forward, {name}")(with_input(value))
for name, value in GRADIENTS.items():
    case(f"backward, {name}")(with_gradient(value))


@case("forward, a residual of another shape")
def _(comm):
    net = network(comm)
    return net, lambda wrong: net.first.forward(x, x[:1] if wrong else x)


@case("forward, out over x")
def _(comm):
    net = network(comm)
    return net, lambda wrong: net.first.forward(x, out=x if wrong else None)


@case("backward without a forward")
def _(comm):
    net = network(comm)
    net.first.forward(x)
    kept = net.first.saved

    def action(wrong):
        net.first.saved = None if wrong else kept
        net.first.backward(x)

    return net, action


@case("backward with the context of another layer")
def _(comm):
    net = network(comm, second=5)
    net.first.forward(x)
    net.second.forward(wide[:, :5])
    contexts = net.first.saved, net.second.saved
    return net, lambda wrong: net.first.backward(x, contexts[wrong])


def frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


SWAPPED = {
    "forward, a read-only running mean": ("buffers", "running_mean", frozen),
    "forward, a running variance of another shape": ("buffers", "running_var", lambda a: a[:1]),
    "forward, a read-only counter": ("buffers", "num_batches_tracked", frozen),
    "backward, a read-only gradient": ("grads", "weight", frozen),
    "backward, a gradient of another dtype": ("grads", "bias", lambda a: a.astype(np.float64)),
    "backward, a gradient that is a list": ("grads", "bias", list),
}
for name, swapped in SWAPPED.items():

    def prepare(comm, name=name, swapped=swapped):
        kind, key, spoil = swapped
        net = network(comm)
        net.first.forward(x)
        arrays = getattr(net.first, kind)
        good = arrays[key]

        def action(wrong):
            arrays[key] = spoil(good) if wrong else good
            try:
                getattr(net.first, name.split(",")[0])(x)
            finally:
                arrays[key] = good

        return net, action

    case(name)(prepare)


SUMS = {"forward": "batch_moments", "backward": "backward_reduce"}
MESSAGE = {"forward": "payload", "backward": "payload"}
PREPARE = {"forward": "prepare_forward", "backward": "prepare_backward"}


def failing(name, where, targets, error, text):
    """Both directions, with the target in `where` raising on the culprit."""
    for direction, target in targets.items():

        def prepare(comm, direction=direction, target=target):
            net = network(comm)
            if direction == "backward":
                net.first.forward(x)
            call = getattr(net.first, direction)

            def action(wrong):
                broken = patch.object(where, target, side_effect=error(text))
                with broken if wrong else nullcontext():
                    call(x)

            return net, action

        case(f"{direction}, no {name}")(prepare)


failing("memory for the sums", backend, SUMS, MemoryError, "no room")
failing("memory for the message", CollectiveCall, MESSAGE, MemoryError, "no room")
failing("compiler", backend, PREPARE, RuntimeError, "the kernel does not compile")


# ---- what one rank brings and all refuse ---------------------------------------------------------

for dtype in ("float32", "float64"):
    for value in ("nan", "inf"):

        def prepare(comm, dtype=dtype, value=value):
            layer = SyncBatchNorm(4, comm=comm, dtype=dtype, check_finite=True, name="layer")
            good = x.astype(dtype)
            bad = good.copy()
            bad[0, 2, 1, 1] = value
            layer.backward(layer.forward(good))
            return layer, lambda wrong: layer.forward(bad if wrong else good)

        case(f"forward, {value} in {dtype}, check_finite")(prepare)


# ---- ranks that are not at the same call ---------------------------------------------------------


def pair(comm, **options):
    """Two layers of one name that differ in a setting; forward of both has been."""
    layers = [
        SyncBatchNorm(4, comm=comm, name="layer"),
        SyncBatchNorm(4, comm=comm, name="layer", **options),
    ]
    inputs = [x.astype(layer.dtype) for layer in layers]
    for layer, value in zip(layers, inputs, strict=True):
        layer.forward(value)
    net = Sequential(*layers)
    return net, lambda direction, wrong: getattr(layers[wrong], direction)(inputs[wrong])


SETTINGS = {
    "eps": {"eps": 1e-3},
    "momentum": {"momentum": 0.2},
    "dtype": {"dtype": "float64"},
    "activation": {"activation": "relu"},
    "affine": {"affine": False},
}
for name, options in SETTINGS.items():
    for direction in ("forward", "backward"):

        def prepare(comm, options=options, direction=direction):
            net, call = pair(comm, **options)
            return net, lambda wrong: call(direction, wrong)

        case(f"{direction}, another {name}")(prepare)


@case("forward, layers swapped")
def _(comm):
    net = network(comm)
    return net, lambda wrong: (net.second if wrong else net.first).forward(x)


@case("forward, layers of neighbouring C swapped")
def _(comm):
    net = network(comm, second=5)
    return net, lambda wrong: (
        net.second.forward(wide[:, :5]) if wrong else net.first.forward(x)
    )  # fmt: skip


@case("backward, layers swapped")
def _(comm):
    net = network(comm)
    net.forward(x)
    contexts = {layer.label: context for layer, context in net.saved}

    def action(wrong):
        layer = net.first if wrong else net.third
        layer.backward(x, contexts[layer.label])

    return net, action


@case("backward, layers of neighbouring C swapped")
def _(comm):
    net = network(comm, second=5)
    net.first.forward(x)
    net.second.forward(wide[:, :5])
    return net, lambda wrong: (
        net.first.backward(x) if wrong else net.second.backward(wide[:, :5])
    )  # fmt: skip


@case("forward, a layer skipped")
def _(comm):
    """The culprit is at the third layer when the others are at the second."""
    net = network(comm)
    net.first.forward(x)
    return net, lambda wrong: (net.third if wrong else net.second).forward(x)


@case("backward, a layer skipped")
def _(comm):
    net = network(comm)
    for layer in net:
        layer.forward(x)
    net.third.backward(x)
    return net, lambda wrong: (net.first if wrong else net.second).backward(x)


@case("the last layer skipped: backward meets forward")
def _(comm):
    net = network(comm)
    net.first.forward(x)
    net.second.forward(x)
    return net, lambda wrong: net.second.backward(x) if wrong else net.third.forward(x)


@case("the last backward skipped: the next forward meets it")
def _(comm):
    net = network(comm)
    net.first.forward(x)
    return net, lambda wrong: (net.first.forward if wrong else net.first.backward)(x)


@case("gradients of another tree")
def _(comm):
    net = network(comm)
    return net, lambda wrong: distributed.allreduce_gradients(net.first if wrong else net, comm)


@case("verify_sync meets forward")
def _(comm):
    net = network(comm)
    return net, lambda wrong: (
        distributed.verify_sync(net, comm) if wrong else net.first.forward(x)
    )  # fmt: skip


# ---- what cannot be seen -------------------------------------------------------------------------


def with_evaluation(layers):
    """Five steps: the culprit evaluates in the second, then trains again."""

    def prepare(comm):
        net = Sequential(*(SyncBatchNorm(4, comm=comm) for _ in range(layers)))
        steps = [np.full((2, 4), i, np.float32) + x[:, :, 0, 0] for i in range(5)]
        means = []
        for i, batch in enumerate(steps if culprit else steps[:-1]):
            net.train(not (culprit and i == 1))
            net.forward(batch)
            if net.training:
                means.append(float(net.saved[0][1].mean.mean()))
                net.backward(batch)
        state = b"".join(array.tobytes() for _, array in net.named_buffers())
        digest = hashlib.sha256(state).hexdigest()
        report(case=f"so far, {layers}", means=means, loops=i + 1, buffers=digest)
        return net, lambda wrong: (
            distributed.verify_sync(net, comm) if wrong else net.forward(steps[-1])
        )  # fmt: skip

    return prepare


for layers in (1, 2):
    case(f"evaluation for one step, {layers}")(with_evaluation(layers))


# ---- running them --------------------------------------------------------------------------------


def bits(net):
    arrays = [*net.named_parameters(), *net.named_gradients(), *net.named_buffers()]
    return [array.tobytes() for _, array in arrays]


def report(**line):
    os.write(1, (json.dumps({"rank": world.rank, **line}) + "\n").encode())


def outcome(action, wrong):
    try:
        action(wrong)
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        return {"error": type(error).__name__, "text": str(error), "notes": notes}
    return {"error": None, "text": "", "notes": []}


def process_groups(path):
    """A function that makes a communicator over a process group of its own."""
    from torch import distributed

    from cupybn.interop.torch import ProcessGroupCommunicator

    distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=world.rank, world_size=world.size
    )
    atexit.register(distributed.destroy_process_group)
    return lambda: ProcessGroupCommunicator(distributed.new_group())


def main():
    new_comm = process_groups(sys.argv[1]) if sys.argv[1:] else world.Dup
    for name, prepare in CASES.items():
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        comm = new_comm()
        net, action = prepare(comm)
        before = bits(net)
        first = outcome(action, culprit)
        unchanged = bits(net) == before
        report(case=name, **first, unchanged=unchanged, again=outcome(action, False))


if __name__ == "__main__":
    main()
