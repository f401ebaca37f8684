"""Synchronised batch norm, step by step: run it as a script, or cell by cell in an editor.

    python examples/tutorial.py

Its four ranks are threads of one process, so that no MPI is needed to see what they do. In a job
the same lines run with ``comm=None``, as the last cell says.
"""

# %% [markdown]
# # 1. One process
# Eight samples of three channels, one of them with a large mean. A batch norm in training mode
# gives each channel of the batch a mean of 0 and a variance of 1.

# %%
import tempfile
from pathlib import Path

import numpy as np

import cupybn
from cupybn.distributed import allreduce_gradients, broadcast_parameters, verify_sync
from cupybn.testing import run_ranks

rng = np.random.default_rng(0)
x = (rng.standard_normal((8, 3)) * [1.0, 2.0, 0.1] + [0.0, 5.0, 100.0]).astype(np.float32)

alone = cupybn.BatchNorm1d(3)
y = alone(x)
print("of each channel, mean", y.mean(axis=0).round(3) + 0.0, "std", y.std(axis=0).round(3))

# %% [markdown]
# Backward takes the gradient of the loss by y, returns the one by x, and adds the gradients of
# weight and bias to ``grads``.

# %%
dy = rng.standard_normal(y.shape).astype(np.float32)
dx = alone.backward(dy)
print("dx", dx.shape, "gradients", sorted(alone.grads))

# %% [markdown]
# # 2. Four ranks that do not synchronise
# Each has two of the eight samples. Two samples become about -1 and 1, whatever they were: a plain
# batch norm on each rank throws away nearly all that the samples say.


# %%
def share(array, comm):
    """This rank's rows; ranks may have different numbers of them, or none."""
    return np.array_split(array, comm.size)[comm.rank]


def without_synchronisation(comm):
    return cupybn.BatchNorm1d(3)(share(x, comm))


apart = np.concatenate(run_ranks(4, without_synchronisation))
print("largest difference from one process:", np.abs(apart - y).max().round(2))
assert np.abs(np.abs(apart) - 1).max() < 0.1

# %% [markdown]
# # 3. Four ranks that synchronise
# The same line with ``SyncBatchNorm``: one message forward and one backward, and every rank
# normalises with the statistics of all eight samples.


# %%
def with_synchronisation(comm):
    layer = cupybn.SyncBatchNorm(3, comm=comm)
    part = layer(share(x, comm))
    dpart = layer.backward(share(dy, comm))
    allreduce_gradients(layer, comm, op="sum")  # weight and bias have this rank's sums until here
    return part, dpart, layer.grads["weight"], layer.running_mean


ranks = run_ranks(4, with_synchronisation)
together = np.concatenate([part for part, *_ in ranks])
print("largest difference from one process:", np.abs(together - y).max())
assert np.allclose(together, y, atol=1e-5)
assert np.allclose(np.concatenate([dpart for _, dpart, *_ in ranks]), dx, atol=1e-4)
for _, _, dweight, running_mean in ranks:
    assert np.allclose(dweight, alone.grads["weight"], rtol=1e-4, atol=1e-5)
    assert np.allclose(running_mean, alone.running_mean)

# %% [markdown]
# # 4. A network
# ``convert_sync_batchnorm`` does that to all batch norms of a tree. A training loop adds two calls:
# the ranks start from the same parameters, and sum their gradients before each step. The loss is
# divided by the number of samples on all ranks, so that sums are right for any sizes.


# %%
class Linear(cupybn.Layer):
    """``y = x @ weight``."""

    def __init__(self, features, features_out, seed):
        super().__init__()
        weight = np.random.default_rng(seed).standard_normal((features, features_out))
        self.register_parameter("weight", weight.astype(np.float32))

    def compute_forward(self, x):
        return x @ self.weight, x

    def compute_backward(self, dy, context):
        self.grads["weight"] += context.T @ dy
        return dy @ self.weight.T


target = np.tanh(x[:, :1] - x[:, 1:2] / 5)


def train(comm, steps=20):
    net = cupybn.Sequential(
        Linear(3, 16, seed=comm.rank),  # each rank starts elsewhere
        cupybn.BatchNorm1d(16, activation="relu"),
        Linear(16, 1, seed=1),
    )
    net = cupybn.convert_sync_batchnorm(net, comm)
    broadcast_parameters(net, comm)
    losses = []
    for _ in range(steps):
        error = net(share(x, comm)) - share(target, comm)
        losses.append(float((error**2).sum() / len(x)))
        net.zero_grad()
        net.backward(2 * error / len(x))
        allreduce_gradients(net, comm, op="sum")
        for (_, parameter), (_, gradient) in zip(
            net.named_parameters(), net.named_gradients(), strict=True
        ):
            parameter -= 0.05 * gradient
    verify_sync(net, comm)  # the same bits on every rank
    return net, losses


trained = run_ranks(4, train)
losses = np.sum([losses for _, losses in trained], axis=0)
one_process, alone_losses = train(cupybn.SelfCommunicator())
print("loss of 4 ranks:", losses[0].round(3), "to", losses[-1].round(4))
print("of one process: ", round(alone_losses[0], 3), "to", round(alone_losses[-1], 4))
assert np.allclose(losses, alone_losses, rtol=1e-3, atol=1e-4)
assert losses[-1] < losses[0] / 4

# %% [markdown]
# # 5. Evaluation
# In evaluation mode a layer uses the running statistics, and sends nothing: any rank may evaluate,
# alone, and one sample is enough.

# %%
net = trained[0][0].eval()
print("one sample:", net(x[:1]).shape)
assert np.allclose(net(x[:1]), net(x)[:1], atol=1e-5)

# %% [markdown]
# After few steps running statistics are still close to 0 and 1. ``recalibrate`` sets them
# to those of a data set. ``revert_sync_batchnorm`` makes the network one of a single process again.

# %%
net = cupybn.revert_sync_batchnorm(net)
cupybn.recalibrate(net, [x], comm=cupybn.SelfCommunicator())
print("batches behind the statistics:", int(net.children["1"].num_batches_tracked))

# %% [markdown]
# # 6. A checkpoint
# The state has no trace of the number of ranks: one rank saves, any number of ranks goes on. A file
# is replaced as a whole, and checked when it is read.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "net.npz"
    cupybn.save(net.state_dict(), path)
    other = cupybn.Sequential(
        Linear(3, 16, seed=5), cupybn.BatchNorm1d(16, activation="relu"), Linear(16, 1, seed=6)
    )
    print(other.load_state_dict(cupybn.load(path)))
assert np.array_equal(other.eval()(x), net(x))

# %% [markdown]
# # 7. Errors
# A rank that passes bad data raises its own error, the others ``PeerError``; no rank waits for
# ever, and nothing has changed in any layer.


# %%
def with_a_mistake(comm):
    layer = cupybn.SyncBatchNorm(3, comm=comm)
    batch = share(x, comm)
    try:
        layer(batch[:, :2] if comm.rank == 2 else batch)
    except cupybn.CupyBNError as error:
        assert int(layer.num_batches_tracked) == 0
        return type(error).__name__
    return "nothing"


said = run_ranks(4, with_a_mistake)
print(said)
assert said == ["PeerError", "PeerError", "ShapeError", "PeerError"]

# %% [markdown]
# # 8. Masks
# Sequences of different lengths, padded to the longest. With a mask only the valid positions count,
# whatever the others hold: y is 0 there, and the statistics are those of the valid values of all
# ranks.

# %%
lengths = np.array([5, 2, 4, 1, 5, 3, 2, 2])
mask = np.arange(5) < lengths[:, None]  # (N, L): x's shape without the channels
sequences = rng.standard_normal((8, 3, 5)).astype(np.float32)
sequences[np.broadcast_to(~mask[:, None], sequences.shape)] = np.nan  # padding of any kind


def with_a_mask(comm):
    layer = cupybn.SyncBatchNorm(3, comm=comm)
    return layer(share(sequences, comm), mask=share(mask, comm))


masked = np.concatenate(run_ranks(4, with_a_mask))
valid = sequences.transpose(0, 2, 1)[mask]  # (24, 3): the same values without the padding
expected = cupybn.BatchNorm1d(3)(valid)
padding = masked.transpose(0, 2, 1)[~mask]
print("valid positions:", len(valid), "largest value in the padding:", abs(padding).max())
assert np.allclose(masked.transpose(0, 2, 1)[mask], expected, atol=1e-5)
assert not padding.any()

# %% [markdown]
# # 9. With MPI
# Leave ``comm`` out, or pass an mpi4py communicator, and start the script with
#
#     mpiexec -n 4 python -m mpi4py script.py
