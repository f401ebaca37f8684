"""A compiled model over ranks: four branches side by side, batches of very different sizes.

Every rank compiles for itself, and may order by memory what does not depend on each other. The
messages come in one order all the same, and the training is that of one process and plain PyTorch.
"""

import sys
import warnings

import torch
from mpi4py import MPI
from rank_checks import Spy

from cupybn.communicators import MpiCommunicator
from cupybn.interop import torch as interop

warnings.simplefilter("ignore")
torch.set_num_threads(1)
comm = Spy(MpiCommunicator(MPI.COMM_WORLD))


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(2, 3, 1, bias=False)
        self.widths = [1, 7, 2, 5]
        for i, width in enumerate(self.widths):
            conv = torch.nn.Conv2d(3, width, 1, bias=False)
            self.add_module(f"branch{i}", torch.nn.Sequential(conv, torch.nn.BatchNorm2d(width)))
        self.bn = torch.nn.BatchNorm2d(sum(self.widths))

    def forward(self, x):
        x = self.stem(x)
        outs = [torch.relu_(getattr(self, f"branch{i}")(x)) for i in range(len(self.widths))]
        return self.bn(torch.cat(outs, 1))


def train(model, run, x, total, n):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(n):
        optimizer.zero_grad()
        run(x).sin().sum().div(total).backward()
        if run is not model:
            interop.allreduce_gradients(model, comm.comm, op="sum")
        optimizer.step()
    return torch.cat([values.double().reshape(-1) for values in model.state_dict().values()])


sizes = [2, 90, 0, 33][: comm.size]
generator = torch.Generator().manual_seed(0)
whole = torch.randn(sum(sizes), 2, 4, 3, generator=generator, dtype=torch.float64)
start = sum(sizes[: comm.rank])
mine = whole[start : start + sizes[comm.rank]].to(memory_format=torch.channels_last)
torch.manual_seed(0)
reference = Branches().double()
models = [Branches().double() for _ in sys.argv[1:]]
for model in models:
    model.load_state_dict(reference.state_dict())
expected = train(reference, reference, whole, whole.numel(), 3)
for model, backend in zip(models, sys.argv[1:], strict=True):
    interop.convert_sync_batchnorm(model, comm)
    comm.sent.clear()
    states = train(model, torch.compile(model, backend=backend), mine, whole.numel(), 3)
    assert (states - expected).abs().max() < 1e-10, (states - expected).abs().max()
    labels = [label for label, _ in comm.sent]
    every = MPI.COMM_WORLD.allgather(labels)
    assert all(other == labels for other in every), every
    names = [f"branch{i}.1" for i in range(4)] + ["bn"]
    per_step = [f"forward of '{name}'" for name in names for _ in range(2)]
    per_step += [f"backward of '{name}'" for name in reversed(names)]
    assert labels == 3 * per_step, labels
    if comm.rank == 0:
        print(backend, len(labels), flush=True)
