"""Ranks of a gloo group, of which the last has a Numba that cannot be imported.

    mpiexec -n 3 python broken_numba.py PATH KIND

PATH is a file that is not there yet, in a folder with a folder ``broken`` that has another Numba.
KIND is "module" or "layer". Each rank prints a line: its number, the calls of the compiled backend,
a digest of what was computed, and the warnings.
"""

import os
import sys
import warnings
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

from mpi4py import MPI

path, kind = sys.argv[1:]
rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
if rank == size - 1:
    sys.path.insert(0, str(Path(path).parent / "broken"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import distributed  # noqa: E402

import cupybn  # noqa: E402
from cupybn import backends  # noqa: E402
from cupybn.interop.torch import ProcessGroupCommunicator, SyncBatchNorm  # noqa: E402

calls = []


def counted(function):
    def call(*args, **options):
        calls.append(function.__name__)
        return function(*args, **options)

    return call


compiled = backends.compiled_backend
for name in ("batch_moments", "finish_forward", "backward_reduce", "backward_input"):
    setattr(compiled, name, counted(getattr(compiled, name)))
distributed.init_process_group(
    "gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
)
x = np.random.default_rng(rank).standard_normal((4 + rank, 3, 50)).astype(np.float32)
found = sha256()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    if kind == "layer":
        layer = cupybn.SyncBatchNorm(3, comm=ProcessGroupCommunicator(), name="bn")
        for _ in range(2):
            y = layer.forward(x)
            for array in (y, layer.backward(y * y), layer.running_var):
                found.update(array.tobytes())
    else:
        module, given = SyncBatchNorm(3, name="bn"), torch.from_numpy(x).requires_grad_()
        module.comm = distributed.group.WORLD
        for _ in range(2):
            y = module(given)
            given.grad = None
            y.backward(y.detach() ** 2)
            for tensor in (y.detach(), given.grad, module.running_var):
                found.update(tensor.numpy().tobytes())
texts = [" ".join(str(each.message).split()) for each in told]
print(
    " | ".join([str(rank), ",".join(calls), found.hexdigest(), *texts]) + "\n", end="", flush=True
)
MPI.COMM_WORLD.Barrier()
os._exit(0)
