"""Training over ranks that can stop at any step and go on later, and its checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from network import SGD, Array, array_namespace, softmax_cross_entropy

import cupybn
from cupybn.communicators import Communicator
from cupybn.distributed import allreduce_gradients, broadcast_parameters

RATE = 0.02


@dataclass(frozen=True)
class Data:
    """Images (N, 1, 8, 8) from -1 to 1 and labels (N,), as NumPy arrays."""

    images: Array
    labels: Array
    test_images: Array
    test_labels: Array


class Training:
    """Gradient descent, and everything that its next step depends on.

    A step takes ``batch * comm.size`` images, shared out among the ranks. All ranks make the same
    number of steps: in the last one of an epoch some may have fewer images, or none.

    Attributes:
        epoch: the number of this epoch, from 0.
        order: (N,) the images in the order of this epoch.
        used: how many of them the steps of this epoch have taken.
        loss: this rank's part of the losses of these steps, added up.
    """

    def __init__(
        self, network: cupybn.Layer, data: Data, comm: Communicator, *, batch: int, seed: int
    ) -> None:
        broadcast_parameters(network, comm)
        network.train()
        self.network = network
        self.data = data
        self.comm = comm
        self.batch = batch
        self.optimizer = SGD(network, RATE)
        self.rng = np.random.default_rng(seed)
        self.epoch = 0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.order = self.rng.permutation(len(self.data.images))
        self.used = 0
        self.loss = 0.0

    @property
    def steps_in_epoch(self) -> int:
        return -(-len(self.order) // (self.batch * self.comm.size))

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_in_epoch - (-self.used // (self.batch * self.comm.size))

    def steps(self, epochs: int) -> Iterator[bool]:
        """Steps until so many epochs are over; yields after each whether it was an epoch's last."""
        while self.steps_done < epochs * self.steps_in_epoch:
            if self.used == len(self.order):
                self.epoch += 1
                self.begin_epoch()
            chosen = self.order[self.used : self.used + self.batch * self.comm.size]
            self.step(chosen)
            self.used += len(chosen)
            yield self.used == len(self.order)

    def step(self, chosen: Array) -> None:
        """A step with these images, of which every rank takes a share."""
        mine = np.array_split(chosen, self.comm.size)[self.comm.rank]
        asarray = namespace_of(self.network).asarray
        logits = self.network(asarray(self.data.images[mine]))
        labels = asarray(self.data.labels[mine])
        # Divided by the count of all ranks: losses and gradients are then summed, not averaged.
        loss, dlogits = softmax_cross_entropy(logits, labels, count=len(chosen))
        self.network.zero_grad()
        self.network.backward(dlogits)
        allreduce_gradients(self.network, self.comm, op="sum")
        self.optimizer.step()
        self.loss += float(loss)

    def pooled_loss(self) -> float:
        """The sum of the losses of this epoch's steps over all ranks; all must call it."""
        return float(self.comm.allreduce(np.array([self.loss]), "loss")[0])

    def state_dict(self) -> cupybn.StateDict:
        """The content of a checkpoint: the same on all ranks, and for any number of ranks.

        All ranks must call it. The network must be synchronised, so that running statistics are
        those of all ranks.
        """
        network = self.network.state_dict()
        return cupybn.StateDict(
            {f"network.{name}": array for name, array in network.items()}
            | {f"velocity.{name}": array for name, array in self.optimizer.velocities.items()}
            | {"order": self.order},
            metadata={f"network.{path}": entry for path, entry in network.metadata.items()}
            | {
                "training": {
                    "epoch": self.epoch,
                    "used": self.used,
                    "loss": self.pooled_loss(),
                    "rng": self.rng.bit_generator.state,
                }
            },
        )

    def load_state_dict(self, state: cupybn.StateDict) -> None:
        """Goes on where ``state_dict`` was called, with this or another number of ranks."""
        self.network.load_state_dict(part_of(state, "network."))
        asarray = namespace_of(self.network).asarray
        for name, velocity in self.optimizer.velocities.items():
            velocity[...] = asarray(state[f"velocity.{name}"])
        self.order = state["order"]
        progress = state.metadata["training"]
        self.epoch = progress["epoch"]
        self.used = progress["used"]
        self.loss = progress["loss"] if self.comm.rank == 0 else 0.0
        self.rng.bit_generator.state = progress["rng"]


class StopRequest:
    """A wish to stop, by SIGTERM or SIGUSR1 to any rank: the same answer on all of them."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.received = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.receive)

    def receive(self, *_: object) -> None:
        self.received = 1.0

    def made(self) -> bool:
        """Whether any rank has got a signal, by one small message; all ranks must call it."""
        return bool(self.comm.allreduce(np.array([self.received]), "stop request")[0] > 0)


def part_of(state: cupybn.StateDict, prefix: str) -> cupybn.StateDict:
    """The entries whose names begin with the prefix, without it."""
    return cupybn.StateDict(
        {k.removeprefix(prefix): array for k, array in state.items() if k.startswith(prefix)},
        metadata={
            k.removeprefix(prefix): entry
            for k, entry in state.metadata.items()
            if k.startswith(prefix)
        },
    )


def accuracy(network: cupybn.Layer, data: Data) -> float:
    """The share of the test images that are recognised, with this rank's running statistics."""
    asarray = namespace_of(network).asarray
    network.eval()
    logits = network(asarray(data.test_images))
    network.train()
    return float((logits.argmax(axis=1) == asarray(data.test_labels)).mean())


def namespace_of(network: cupybn.Layer) -> Any:
    """The module that the network's arrays come from."""
    return array_namespace(next(network.named_parameters())[1])
