"""The table of the model for up to 4096 ranks, and the merging that the all_gather scheme needs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from ...arrays import Array
from .cases import EPS
from .model import (
    CLUSTER,
    RANKS,
    Network,
    Point,
    all_gather_seconds,
    allreduce_seconds,
    fit,
    gathered_bytes,
    message_bytes,
)
from .report import Report, Table
from .threads import limited

_CHANNELS = (64, 256, 2048)


def merge(table: Array, channels: int) -> tuple[Array, Array]:
    """Mean and invstd of all ranks from a table of (mean, invstd, count), a line for each."""
    counts = table[:, -1]
    total = counts.sum()
    means, invstds = table[:, :channels], table[:, channels:-1]
    mean = counts @ means / total
    second = 1 / (invstds * invstds) - np.float32(EPS) + (means - mean) ** 2
    return mean, 1 / np.sqrt(counts @ second / total + np.float32(EPS))


def model(runs: list[dict[str, Any]], quick: bool = False) -> dict[str, Any]:
    """Microseconds of both schemes, with the network of the runs and with a cluster's."""
    points = [
        Point(run["ranks"], message["bytes"], message["fastest fifth us"]["allreduce"] * 1e-6)
        for run in runs
        if run["ranks"] > 1 and not run["crowded"]
        for message in run["messages"]
    ]
    networks = {"of a cluster, assumed": CLUSTER}
    if points:
        networks = {"fitted to this run": fit(points), **networks}
    with limited(1):
        merging = {
            (ranks, c): _merging_seconds(ranks, c, 3 if quick else 9)
            for c in _CHANNELS
            for ranks in RANKS
            if not quick or ranks * c <= 1 << 18
        }
    return {
        "fitted points": len(points),
        "networks": [
            {
                "name": name, "alpha us": network.alpha * 1e6, "beta ns": network.beta * 1e9,
                "rows": [
                    _row(network, ranks, c, merging.get((ranks, c)))
                    for c in _CHANNELS
                    for ranks in RANKS
                ],
            }
            for name, network in networks.items()
        ],
    }  # fmt: skip


def _row(network: Network, ranks: int, channels: int, merging: float | None) -> dict[str, Any]:
    gather = all_gather_seconds(network, ranks, gathered_bytes(channels))
    allreduce = allreduce_seconds(network, ranks, message_bytes(channels))
    return {
        "ranks": ranks, "channels": channels, "allreduce us": allreduce * 1e6,
        "all_gather us": gather * 1e6, "gathered bytes": ranks * gathered_bytes(channels),
        "merging us, measured": None if merging is None else merging * 1e6,
    }  # fmt: skip


def _merging_seconds(ranks: int, channels: int, repeat: int) -> float:
    table = np.ones((ranks, 2 * channels + 1), np.float32)
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        merge(table, channels)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def say_model(report: Report, found: dict[str, Any]) -> None:
    if not found["fitted points"]:
        report.say("\nno fit: there is no run of several ranks with a core each")
    for network in found["networks"]:
        values = Network(network["alpha us"] * 1e-6, network["beta ns"] * 1e-9)
        report.say(f"\nmodelled, us, with the network {network['name']}: {values}")
        table = Table(
            ("C", ">4d"), ("ranks", ">5d"), ("allreduce", ">9.1f"), ("all_gather", ">10.1f"),
            ("all_gather / allreduce", ">6.1f"), ("gathered KB", ">9.1f"),
            ("merging, measured here", ">9.1f"),
        )  # fmt: skip
        report.say(table.header())
        for row in network["rows"]:
            ours, theirs = row["allreduce us"], row["all_gather us"]
            report.say(table.line(
                row["channels"], row["ranks"], ours, theirs, theirs / ours if ours else None,
                row["gathered bytes"] / 1e3, row["merging us, measured"],
            ))  # fmt: skip
