"""Sequences of different lengths, padded to the longest of their batch, with and without a mask.

    mpiexec -n 2 python -m mpi4py examples/masked_sequences.py

A network of convolutions and batch norms classifies noisy sine waves of 8 to 128 values by their
loudness. (a) The batch norms get the mask of valid values: statistics are those of the values
alone, on all ranks, however much padding each has. (b) They get none: zeros of the padding count,
more in one batch than in another, and the padding is set to 0 again behind them. All else is the
same. At the end ``recalibrate`` sets the running statistics to those of all training
sequences, and the first variance is compared with that of the values. ``--help`` lists the options.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from network import SGD, Linear, initial_weight, softmax_cross_entropy
from report import Course, plot, table

import cupybn
from cupybn.communicators import Communicator, MpiCommunicator
from cupybn.distributed import allreduce_gradients

SHORTEST, LONGEST = 8, 128
SEQUENCES = 1200  # of which the last third is for testing
BATCH = 24  # on all ranks together
Array = Any


class Conv1d(cupybn.Layer):
    """Cross-correlation along the last axis, zeros beyond its ends: (N, C, L) to (N, C_out, L)."""

    def __init__(self, channels: int, channels_out: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.register_parameter("weight", initial_weight(rng, (channels_out, channels, 5), "f"))

    def compute_forward(self, x: Array) -> tuple[Array, Any]:
        padded = np.pad(x, ((0, 0), (0, 0), (2, 2)))
        patches = np.stack([padded[..., k : k + x.shape[2]] for k in range(5)], axis=2)
        columns = patches.reshape(len(x), x.shape[1] * 5, x.shape[2])
        return self.weight.reshape(len(self.weight), -1) @ columns, columns

    def compute_backward(self, dy: Array, columns: Any) -> Array:
        dweight = (dy @ columns.swapaxes(1, 2)).sum(axis=0)
        self.grads["weight"] += dweight.reshape(self.weight.shape)
        dcolumns = self.weight.reshape(len(self.weight), -1).T @ dy
        dpatches = dcolumns.reshape(len(dy), self.weight.shape[1], 5, dy.shape[2])
        dpadded = np.zeros((*dpatches.shape[:2], dy.shape[2] + 4), np.float32)
        for k in range(5):
            dpadded[..., k : k + dy.shape[2]] += dpatches[:, :, k]
        return dpadded[..., 2:-2]


class Mean(cupybn.Layer):
    """The mean over the valid positions: (N, C, L) to (N, C)."""

    def compute_forward(self, x: Array, *, mask: Array) -> tuple[Array, Any]:
        share = (mask / mask.sum(axis=1, keepdims=True)).astype(np.float32)
        return np.einsum("ncl,nl->nc", x, share), share

    def compute_backward(self, dy: Array, share: Any) -> Array:
        return dy[:, :, None] * share[:, None]


class Unmasked(cupybn.Layer):
    """A layer that gets no mask; the padding is set to 0 behind it."""

    def __init__(self, inner: cupybn.Layer) -> None:
        super().__init__()
        self.inner = inner

    def compute_forward(
        self, x: Array, *, mask: Array, save_for_backward: bool = True
    ) -> tuple[Array, Any]:
        y, context = self.inner.run_forward(x, save_for_backward)
        return y * mask[:, None], (context, mask)

    def compute_backward(self, dy: Array, context: Any) -> Array:
        inner, mask = context
        return self.inner.compute_backward(dy * mask[:, None], inner)


def load_data() -> tuple[list[Array], Array]:
    """Sequences of (1, length) and their labels, in an order that is always the same."""
    rng = np.random.default_rng(0)
    sequences, labels = [], rng.integers(4, size=SEQUENCES)
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST + 1), SEQUENCES)).astype(int)
    for label, length in zip(labels, lengths, strict=True):
        loudness, speed = 1.4**label, rng.uniform(0.4, 0.8)
        wave = loudness * np.sin(speed * np.arange(length) + rng.uniform(0, 2 * np.pi))
        sequences.append((wave + 0.1 * rng.standard_normal(length)).astype(np.float32)[None])
    return sequences, labels


def padded(sequences: list[Array]) -> tuple[Array, Array]:
    """A batch (N, 1, the longest), and its mask (N, the longest), True where values are valid."""
    lengths = np.array([s.shape[1] for s in sequences], int)
    mask = np.arange(max(lengths, default=1)) < lengths[:, None]
    x = np.zeros((len(sequences), 1, mask.shape[1]), np.float32)
    x[:, 0][mask] = np.concatenate([np.zeros(0), *(s[0] for s in sequences)])
    return x, mask


def build_network(comm: Communicator, masked: bool) -> cupybn.Sequential:
    rng = np.random.default_rng(1)
    layers: list[cupybn.Layer] = []
    for channels, channels_out in ((1, 16), (16, 16), (16, 16)):
        norm = cupybn.SyncBatchNorm(channels_out, comm=comm, activation="relu")
        layers += [Conv1d(channels, channels_out, rng), norm if masked else Unmasked(norm)]
    return cupybn.Sequential(*layers, Mean(), Linear(16, 4, rng=rng))


def train(title: str, masked: bool, comm: Communicator, epochs: int) -> tuple[Course, float]:
    """The course of a training, and the error of the first variance of all sequences."""
    sequences, labels = load_data()
    end = 2 * SEQUENCES // 3
    network, course, began = build_network(comm, masked), Course(title), time.perf_counter()
    optimizer, rng = SGD(network, rate=0.03), np.random.default_rng(2)
    for _ in range(epochs):
        loss = 0.0
        for chosen in np.array_split(rng.permutation(end), end // BATCH):
            mine = np.array_split(chosen, comm.size)[comm.rank]
            x, mask = padded([sequences[i] for i in mine])
            part, dlogits = softmax_cross_entropy(
                network.forward(x, mask=mask), labels[mine], len(chosen)
            )
            network.zero_grad()
            network.backward(dlogits)
            allreduce_gradients(network, comm, op="sum")
            optimizer.step()
            loss += float(part)
        losses = comm.allreduce(np.array([loss]), "loss")
        course.losses.append(float(losses[0]) / (end // BATCH))
        logits = evaluate(network, sequences[end:])
        course.accuracies.append(float((logits.argmax(axis=1) == labels[end:]).mean()))
    course.seconds = time.perf_counter() - began
    mine = np.array_split(np.arange(end), comm.size)[comm.rank]
    batches = [padded([sequences[i] for i in part]) for part in np.array_split(mine, 8)]
    cupybn.recalibrate(network, batches, comm, masked=True)
    return course, variance_error(network, sequences[:end])


def evaluate(network: cupybn.Layer, sequences: list[Array]) -> Array:
    x, mask = padded(sequences)
    network.eval()
    logits = network.forward(x, mask=mask)
    network.train()
    return logits


def variance_error(network: cupybn.Sequential, sequences: list[Array]) -> float:
    """The largest relative error of the first batch norm's running variance."""
    x, mask = padded(sequences)
    norm = getattr(network[1], "inner", network[1])
    values = np.moveaxis(network[0](x, save_for_backward=False), 1, -1)[mask]
    return float(np.abs(norm.running_var / values.var(axis=0, ddof=1) - 1).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="loss and accuracy")
    args = parser.parse_args()
    from mpi4py import MPI

    comm = MpiCommunicator(MPI.COMM_WORLD)
    ways = (("(a) with the mask", True), ("(b) without it", False))
    courses, errors = zip(*(train(*way, comm, args.epochs) for way in ways), strict=True)
    if comm.rank == 0:
        print(f"{comm.size} ranks, {args.epochs} epochs")
        print(table(list(courses)))
        for course, error in zip(courses, errors, strict=True):
            print(f"{course.title:30}variance of all sequences off by {error:.2%}")
        if args.plot is not None:
            plot(list(courses), args.plot)


if __name__ == "__main__":
    main()
