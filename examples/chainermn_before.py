"""ChainerMN, to compare with ``chainermn_after.py``. Its last version needs an old NumPy."""

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np

comm = chainermn.create_communicator("naive")
rng = np.random.default_rng(0)
network = chainer.Sequential(
    L.Linear(64, 100),
    chainermn.links.MultiNodeBatchNormalization(100, comm, decay=0.9),
    F.relu,
    L.Linear(100, 10),
)
optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.MomentumSGD(lr=0.1), comm)
optimizer.setup(network)

images = rng.standard_normal((1000, 64)).astype(np.float32)
labels = images[:, :10].argmax(axis=1).astype(np.int32)
for _ in range(5):
    order = rng.permutation(len(images))
    for batch in np.array_split(order, len(order) // 100):
        mine = np.array_split(batch, comm.size)[comm.rank]
        loss = F.softmax_cross_entropy(network(images[mine]), labels[mine])
        network.cleargrads()
        loss.backward()
        optimizer.update()

with chainer.using_config("train", False):
    if comm.rank == 0:
        right = network(images).array.argmax(axis=1) == labels
        print(f"accuracy {right.mean():.3f}")
