"""How messages grow with the number of ranks: the alpha-beta model of both schemes.

A message of b bytes takes alpha + b * beta seconds from rank to rank. Over P ranks, by recursive
doubling::

    allreduce of b bytes:              ceil(log2 P) * (alpha + b * beta)
    all_gather of b bytes a rank:      ceil(log2 P) * alpha + (P - 1) * b * beta

Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH"
(2005); the time of adding numbers up is left out. cupybn sends an allreduce of float64 numbers;
PyTorch's SyncBatchNorm gathers mean, invstd and count of every rank, 2 C + 1 float32 numbers each,
which every rank then merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...statistics import message_length

RANKS = (2, 4, 8, 16, 64, 256, 512, 1024, 4096)


class Network(NamedTuple):
    """Seconds a message, and seconds a byte."""

    alpha: float
    beta: float

    def __str__(self) -> str:
        rate = f"{1e-9 / self.beta:.3g} GB/s" if self.beta else "no time a byte"
        return f"alpha {self.alpha * 1e6:.3g} us, {rate}"


CLUSTER = Network(3e-6, 1 / 25e9)
"""Of a fast network between nodes: assumed, not measured."""


class Point(NamedTuple):
    """A measured allreduce."""

    ranks: int
    bytes: int
    seconds: float


def fit(points: Sequence[Point]) -> Network:
    """The network whose allreduces differ least, relatively, from the measured ones."""
    steps = np.array([_steps(point.ranks) for point in points], np.float64)
    sizes = np.array([point.bytes for point in points], np.float64)
    seconds = np.array([point.seconds for point in points])
    terms = np.stack([steps, steps * sizes], axis=1) / seconds[:, None]
    scale = np.linalg.norm(terms, axis=0)
    (alpha, beta), *_ = np.linalg.lstsq(terms / scale, np.ones(len(points)), rcond=None)
    return Network(max(0.0, float(alpha / scale[0])), max(0.0, float(beta / scale[1])))


def message_bytes(channels: int) -> int:
    """Of a forward or backward message of cupybn."""
    return 8 * message_length(channels)


def gathered_bytes(channels: int) -> int:
    """Of one rank's part of what PyTorch gathers."""
    return 4 * (2 * channels + 1)


def allreduce_seconds(network: Network, ranks: int, size: int) -> float:
    return _steps(ranks) * (network.alpha + size * network.beta)


def all_gather_seconds(network: Network, ranks: int, size: int) -> float:
    return _steps(ranks) * network.alpha + (ranks - 1) * size * network.beta


def _steps(ranks: int) -> int:
    return (ranks - 1).bit_length()
