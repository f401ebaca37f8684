"""``chainermn_before.py`` with cupybn.

mpiexec -n 4 python -m mpi4py examples/chainermn_after.py
"""

import numpy as np
from mpi4py import MPI
from network import SGD, Linear, ReLU, softmax_cross_entropy

import cupybn
from cupybn.distributed import allreduce_gradients, broadcast_parameters

comm = MPI.COMM_WORLD
rng = np.random.default_rng(0)
network = cupybn.Sequential(
    Linear(64, 100, rng=rng),
    cupybn.SyncBatchNorm(100, eps=2e-5, momentum=0.1),
    ReLU(),
    Linear(100, 10, rng=rng),
)
broadcast_parameters(network)
optimizer = SGD(network, rate=0.1)

images = rng.standard_normal((1000, 64)).astype(np.float32)
labels = images[:, :10].argmax(axis=1)
for _ in range(5):
    order = rng.permutation(len(images))  # the same on every rank
    for batch in np.array_split(order, len(order) // 100):
        mine = np.array_split(batch, comm.size)[comm.rank]
        logits = network(images[mine])
        loss, dlogits = softmax_cross_entropy(logits, labels[mine], count=len(batch))
        network.zero_grad()
        network.backward(dlogits)
        allreduce_gradients(network, op="sum")
        optimizer.step()

network.eval()
if comm.rank == 0:
    print(f"accuracy {(network(images).argmax(axis=1) == labels).mean():.3f}")
