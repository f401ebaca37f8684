"""A PyTorch model over MPI ranks, whose batches need not be equal.

mpiexec -n 2 python -m mpi4py examples/torch_mpi.py
"""

import torch
from mpi4py import MPI

from cupybn.interop import torch as sync

comm = MPI.COMM_WORLD
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 4, 3),
    torch.nn.BatchNorm2d(4),
    torch.nn.ReLU(),
    torch.nn.Flatten(),
    torch.nn.Linear(36, 2),
)
model = sync.convert_sync_batchnorm(model, comm)
sync.broadcast_parameters(model, comm)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

x = torch.randn(6, 1, 5, 5)[comm.rank :]  # batches need not be equal
labels = torch.arange(len(x)) % 2
total = comm.allreduce(len(x))
for _ in range(3):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), labels, reduction="sum") / total
    loss.backward()
    sync.allreduce_gradients(model, comm, op="sum")  # one message for all gradients
    optimizer.step()
sync.verify_sync(model, comm)  # the same bits on every rank
model.eval()  # never communicates
