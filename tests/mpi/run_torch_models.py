"""Trains a ResNet over ranks in one way, and by itself on rank 0, which prints how far apart.

    mpiexec -n RANKS python run_torch_models.py KIND PATH WAY...

KIND is basic or bottleneck; PATH is a file that is not there yet, for a process group of gloo. Each
WAY is a function below; a line of JSON for each.
"""

import json
import sys
import time

import torch
from mpi4py import MPI
from rank_checks import Two
from torch import distributed
from torch_models import build, difference, train

from cupybn.communicators import MpiCommunicator, SelfCommunicator
from cupybn.interop import torch as interop

torch.set_num_threads(1)
world = MPI.COMM_WORLD
comm = MpiCommunicator(world)
SIZES = {1: [8], 2: [6, 2], 4: [3, 0, 1, 4]}[world.size]
UNEQUAL = ("unsynchronised", "autocast")  # whose results are not the same bits on every rank
FULL = {4: [3, 2, 5, 2]}.get(world.size, SIZES)  # without a rank that has nothing


def wait_asleep():
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(0.01)


def alone(kind, sizes, **options):
    """One process of plain PyTorch, on rank 0; None on the others."""
    dtype = options.get("dtype", torch.float64)
    result = train(build(kind, dtype), sizes, **options) if world.rank == 0 else None
    wait_asleep()
    return result


def synchronised(kind, over, dtype=torch.float64):
    return interop.convert_sync_batchnorm(build(kind, dtype), over)


def mpi(kind):
    return train(synchronised(kind, comm), SIZES, comm=comm), alone(kind, SIZES)


def gloo(kind):
    over = interop.ProcessGroupCommunicator()
    return train(synchronised(kind, over), SIZES, comm=over), alone(kind, SIZES)


def unsynchronised(kind):
    """What the others are not: each rank with its own statistics."""
    return train(build(kind, torch.float64), FULL, comm=comm), alone(kind, FULL)


def ddp(kind):
    """DistributedDataParallel over gloo, the statistics over MPI."""
    model = torch.nn.parallel.DistributedDataParallel(synchronised(kind, comm))
    return train(model, SIZES, comm=comm, averaged=world.size), alone(kind, SIZES)


def sharded(kind):
    """fully_shard over gloo, the statistics over MPI."""
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.device_mesh.init_device_mesh("cpu", (world.size,))
    # Its parameters must be contiguous; what goes through it is channels-last all the same.
    model = build(kind, torch.float64, torch.contiguous_format)
    model = interop.convert_sync_batchnorm(model, comm)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, SIZES, comm=comm, averaged=world.size), alone(kind, SIZES)


def inductor(kind):
    # Rank 0 compiles for a step; the others find in its cache what they need.
    if world.rank == 0:
        train(torch.compile(synchronised(kind, Two()), dynamic=True), FULL[:1], steps=1)
    wait_asleep()
    over = interop.ProcessGroupCommunicator()  # whose ranks sleep while they wait for compilers
    model = torch.compile(synchronised(kind, over), dynamic=True)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = [train(model, FULL, comm=over)]
    model.load_state_dict(start)
    for module in model.modules():  # and over MPI, with what was compiled
        if isinstance(module, interop.SyncBatchNorm):
            module.comm = comm
    states.append(train(model, FULL, comm=comm))
    assert all(m.communicator() is comm for m in model.modules() if hasattr(m, "communicator"))
    return torch.stack(states), alone(kind, FULL)


def autocast(kind):
    """In bf16: how far states are from plain PyTorch's after 2 steps, and after 20.

    Of one process with our batch norms, beside plain PyTorch with its batches permuted. Of the
    ranks, which round the gradients of their parts to bf16 each, before these are added up, beside
    plain PyTorch that does so too, with its batches permuted.
    """
    options = {"dtype": torch.float32, "autocast": True}
    runs = [("plain", {}), ("one process", {"ours": True})]
    runs += [("permuted", {"order": order}) for order in range(1, 9)]
    runs += [("in parts", {"order": order, "parts": SIZES}) for order in range(1, 9)]
    distances = {}
    for steps in (2, 20):
        shares = synchronised(kind, comm, torch.float32)
        states = [("ranks", train(shares, SIZES, comm=comm, steps=steps, **options))]
        for name, more in runs[world.rank :: world.size]:  # each rank has some of them
            model = build(kind, torch.float32)
            if more.get("ours"):
                model = interop.convert_sync_batchnorm(model, SelfCommunicator())
            more = {key: value for key, value in more.items() if key != "ours"}
            states.append((name, train(model, SIZES, steps=steps, **more, **options)))
        wait_asleep()
        states = world.gather(states)
        if world.rank == 0:
            states = [states[0][0], *(pair for some in states for pair in some[1:])]
            plain = dict(states)["plain"]
            of = {name: [] for name, _ in states}
            for name, state in states:
                of[name].append(float((state - plain).norm()))
            distances[steps] = of
    return distances or None, None


kind, path, *ways = sys.argv[1:]
distributed.init_process_group(
    "gloo", init_method=f"file://{path}", rank=world.rank, world_size=world.size
)
for way in ways:
    begin = time.perf_counter()
    state, expected = globals()[way](kind)
    texts = world.allgather(state.numpy().tobytes() if way not in UNEQUAL else "")
    assert len(set(texts)) == 1, way
    if world.rank == 0:
        result = difference(state, expected) if expected is not None else state
        seconds = time.perf_counter() - begin
        print(json.dumps({"way": way, "result": result, "seconds": seconds}), flush=True)
distributed.destroy_process_group()
