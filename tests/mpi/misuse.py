"""Messages that may not be sent: ``misuse.py CASE``. Each is an error before anything is sent."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time

import mpi4py

case = sys.argv[1]
mpi4py.rc.initialize = "not initialised" not in case
mpi4py.rc.finalize = True

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

import cupybn  # noqa: E402
from cupybn import SyncBatchNorm, distributed  # noqa: E402
from cupybn import functional as F  # noqa: E402
from cupybn.communicators import MpiCommunicator  # noqa: E402

world = MPI.COMM_WORLD
TIMEOUT = 10


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def raised(call, *args, **options):
    try:
        call(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}" + "".join(getattr(error, "__notes__", ()))
    return "nothing"


def in_a_fork(call, *args):
    """What the call raised in a forked child."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(raised(call, *args)))
    child.start()
    try:
        return queue.get(timeout=TIMEOUT)
    except Exception:
        return f"nothing for {TIMEOUT} s"
    finally:
        child.kill()
        child.join()


def forked():
    """The child of one rank calls what the other rank waits for."""
    layer = SyncBatchNorm(3, comm=MpiCommunicator(world, timeout=2 * TIMEOUT))
    x = normal((8, 3, 5, 5), world.rank)
    layer.forward(x)
    world.Barrier()
    if world.rank == 0:
        other = SyncBatchNorm(3)
        for call in (
            lambda: layer.forward(x + 100),
            lambda: layer.backward(x),
            lambda: other.forward(x),  # over a communicator that nobody has made yet
            lambda: MpiCommunicator(world),
            lambda: distributed.split_comm(layer.comm, 1),
            lambda: distributed.verify_sync(layer),
        ):
            said = in_a_fork(call)
            assert said.startswith("RuntimeError: "), said
            assert "this process was forked from a rank" in said, said
        assert "forward of 'SyncBatchNorm': this process was forked" in in_a_fork(layer.forward, x)
        alone = SyncBatchNorm(3, comm=cupybn.SelfCommunicator())
        assert in_a_fork(alone.forward, x) == "nothing"  # the advice works as printed
        assert in_a_fork(copy.deepcopy(layer).eval().forward, x) == "nothing"
    layer.forward(x)  # the parent goes on
    assert abs(layer.running_mean).max() < 0.5
    distributed.verify_sync(layer)


def not_running(text):
    x = normal((4, 3, 5, 5), 0)
    layer = SyncBatchNorm(3, name="bn")
    for call in (
        lambda: layer.forward(x),
        lambda: SyncBatchNorm(3, comm=world).forward(x),
        lambda: distributed.verify_sync(cupybn.BatchNorm2d(3)),
        lambda: distributed.allreduce_gradients(cupybn.BatchNorm2d(3), world),
        lambda: distributed.split_comm(None, 1),
        lambda: MpiCommunicator(world),
        lambda: F.batch_norm_forward(x, comm=world),
    ):
        said = raised(call)
        assert said.startswith("RuntimeError: "), said
        assert text in said, said
    said = raised(layer.forward, x)
    assert said.startswith(f"RuntimeError: bn: {text}"), said
    layer.eval().forward(x)


def not_initialised():
    assert not MPI.Is_initialized()
    not_running("MPI is not initialised: call mpi4py.MPI.Init()")
    MPI.Init()  # the advice works as printed
    layer = SyncBatchNorm(3)
    layer.forward(normal((4, 3), world.rank))
    distributed.verify_sync(layer)


def finalised():
    used = SyncBatchNorm(3, name="used")
    x = normal((4, 3), world.rank)
    used.forward(x)
    comm = used.communicator()
    MPI.Finalize()
    not_running("MPI is finalised")
    said = raised(comm.allreduce, np.ones(1), "forward of 'a'")
    assert said == (
        "RuntimeError: forward of 'a': MPI is finalised: no message can be sent any more"
    )
    if comm.size > 1:
        for call in (used.forward, used.backward):
            said = raised(call, x)
            assert "of 'used': MPI is finalised" in said, said


def threads():
    """While one thread of the first rank waits, another calls a layer over the same comm."""
    layers = {name: SyncBatchNorm(4, comm=MpiCommunicator(world), name=name) for name in "ab"}
    x = normal((8, 4, 5, 5), world.rank)
    for layer in layers.values():
        layer.forward(x)
    world.Barrier()
    before = layers["b"].running_mean.tobytes()
    if world.rank == 0:
        waiting = threading.Thread(target=layers["a"].forward, args=(x,))
        waiting.start()
        time.sleep(0.5)
        said = raised(layers["b"].forward, x)
        assert said.startswith(
            "RuntimeError: forward of 'b': another thread of this rank is in forward of 'a' over "
            "the same communicator"
        ), said
        assert "another thread of this rank" in raised(MpiCommunicator, world)
        assert layers["b"].running_mean.tobytes() == before
        assert waiting.is_alive()
    else:
        time.sleep(2)
        layers["a"].forward(x)
    if world.rank == 0:
        waiting.join()
    distributed.verify_sync(layers["a"])  # it was in time and went through
    layers["b"].forward(x)  # and the communicator can be used
    distributed.verify_sync(layers["b"])
    # The advice works as printed: a communicator each, and threads do not meet.
    apart = [SyncBatchNorm(4, comm=world.Dup(), name=name) for name in "ab"]
    for layer in apart:
        layer.forward(x)

    def work(layer):
        for _ in range(100):
            layer.forward(x)
            layer.backward(x)

    workers = [threading.Thread(target=work, args=(layer,)) for layer in apart]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for layer in apart:
        assert layer.num_batches_tracked == 101
        distributed.verify_sync(layer)


def threads_at_random():
    """Nothing is arranged: errors of Python, or right results, and never MPI's own end."""
    layers = [SyncBatchNorm(4, comm=world, name=f"bn{i}") for i in range(2)]
    x = normal((8, 4, 5, 5), world.rank)
    for layer in layers:
        layer.forward(x)
    done = []

    def work(layer):
        said = "nothing"
        for _ in range(100):
            said = raised(lambda: layer.backward(layer.forward(x)))
            if said != "nothing":
                break
        done.append(said)

    workers = [threading.Thread(target=work, args=(layer,), daemon=True) for layer in layers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(3)
    kinds = {said.partition(":")[0] for said in done}
    assert kinds <= {"nothing", "RuntimeError", "PeerError", "CollectiveMismatchError"}, done
    print(world.rank, "is there", done, flush=True)
    world.Barrier()
    os._exit(0)  # threads may be left that wait for the other ranks


def subprocess_alone():
    """A subprocess of a rank inherits the launcher's variables, and is alone all the same."""
    code = (
        "import numpy as np, cupybn; from mpi4py import MPI; assert MPI.COMM_WORLD.size == 1\n"
        "own = cupybn.SyncBatchNorm(3, comm=MPI.COMM_SELF)\n"
        "own(np.ones((2, 3), 'f')); print('alone')\n"  # one process is what it asked for
        "layer = cupybn.SyncBatchNorm(3)\n"
        "layer.eval()(np.ones((2, 3), 'f'))\n"
        "layer.train()(np.ones((2, 3), 'f'))"
    )
    # Without what MPI finds the other ranks by: a library that finds it takes the rank's place.
    connection = ("PMI_FD", "PMI_RANK", "PMI_PORT", "PMIX_", "HYDI_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(connection)}
    world.Barrier()
    step = {"SLURM_STEP_NUM_TASKS": str(world.size), "SLURM_PROCID": str(world.rank)}
    without = {k: v for k, v in kept.items() if not k.endswith("_SIZE")}
    for env, variable in ((kept, "_SIZE"), (without | step, "SLURM_STEP_NUM_TASKS")):
        command = [sys.executable, "-c", code]
        refused = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50)
        assert refused.returncode == 1, refused
        assert refused.stdout == "alone\n", refused
        last = refused.stderr.splitlines()[-1] if sys.version_info < (3, 11) else refused.stderr
        assert f"the launcher started {world.size} processes" in last, refused.stderr
        assert variable in last, refused.stderr
        assert "set CUPYBN_ALLOW_SINGLETON=1" in last, refused.stderr
        env = env | {"CUPYBN_ALLOW_SINGLETON": "1"}
        subprocess.run(command, env=env, check=True, timeout=50)


def pickled():
    """The context of a forward stays in its process; the error says what to pickle instead."""
    layer = SyncBatchNorm(3, comm=world)
    x = normal((4, 3), world.rank)
    layer.forward(x)
    said = raised(pickle.dumps, layer.saved)
    assert "an MpiCommunicator belongs to its process and cannot be pickled" in said, said
    assert "Pickle the layer" in said, said
    restored = pickle.loads(pickle.dumps(layer))
    restored.comm = world
    restored.load_state_dict(pickle.loads(pickle.dumps(layer.state_dict())))
    restored.forward(x)  # again, where the context is needed
    np.testing.assert_array_equal(restored.backward(x), layer.backward(x))


cases = [
    forked, not_initialised, finalised, threads, threads_at_random, subprocess_alone, pickled,
]  # fmt: skip
{function.__name__.replace("_", " "): function for function in cases}[case]()
