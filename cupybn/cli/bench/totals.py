"""The 53 batch norms of ResNet-50, from the records of their 12 shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .report import Report, Table

Record = dict[str, Any]


def best_of(record: Record, peers: Sequence[str], key: str = "both us") -> float | None:
    """The smallest time of those of the peers that have one."""
    found = [record["paths"][name][key] for name in peers if key in record["paths"].get(name, {})]
    return min(found) if found else None


def totals(
    records: Sequence[Record],
    rates: Mapping[str, float],
    names: Sequence[str],
    peers: Sequence[str],
) -> list[Record]:
    """One entry for each batch size, dtype, layout and number of threads.

    Args:
        records: of all shapes; those of other groups are left out.
        rates: copy rates in bytes a second, by number of threads.
        names: of the paths to add up; the first is cupybn's.
        peers: the paths whose best is what `speedup` is against: its time over ours.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record["group"] == "resnet" and "both us" in record["paths"].get(names[0], {}):
            key = (record["shape"][0], record["dtype"], record["layout"], record.get("threads", 0))
            groups.setdefault(key, []).append(record)
    return [_total(key, members, rates, names, peers) for key, members in groups.items()]


def _total(
    key: tuple[Any, ...],
    members: list[Record],
    rates: Mapping[str, float],
    names: Sequence[str],
    peers: Sequence[str],
) -> Record:
    total = dict(zip(("N", "dtype", "layout", "threads"), key, strict=True))
    total["layers"] = sum(record["layers"] for record in members)
    moved = sum(record["layers"] * 8 * record["bytes"] for record in members)
    total["floor us"] = moved / rates[str(total["threads"])] * 1e6
    for name in names:
        for what in ("both us", "issued us"):
            if all(what in record["paths"].get(name, {}) for record in members):
                total[f"{name} {what}"] = sum(
                    record["layers"] * record["paths"][name][what] for record in members
                )
    gains = []
    for record in members:
        best = best_of(record, peers)
        if best is not None:
            gains.append((best / record["paths"][names[0]]["both us"], record["layers"]))
    if gains:
        weights = sum(count for _, count in gains)
        logs = sum(count * math.log(gain) for gain, count in gains)
        total["geometric mean of speedups"] = math.exp(logs / weights)
        total["lowest speedup"] = min(gain for gain, _ in gains)
    return total


def print_totals(report: Report, found: Sequence[Record], names: Sequence[str]) -> None:
    """The table of them, if there are any."""
    if not found:
        return
    report.say("\nResNet-50, weighted to its 53 batch norms, forward + backward, ms; speedup: the "
               f"best of PyTorch over {names[0]}")  # fmt: skip
    table = Table(
        ("N", ">4d"), ("dtype", "<8s"), ("layout", "<7s"), ("threads", ">7d"), ("layers", ">6d"),
        ("8 B / copy rate", ">9.3f"), *((name, ">9.3f") for name in names),
        ("speedup (geometric mean)", ">8.2f"), ("lowest", ">6.2f"),
    )  # fmt: skip
    report.say(table.header())
    for total in found:
        times = [total.get(f"{name} both us") for name in names]
        report.say(table.line(
            total["N"], total["dtype"], total["layout"], total["threads"] or None, total["layers"],
            total["floor us"] / 1e3, *(None if t is None else t / 1e3 for t in times),
            total.get("geometric mean of speedups"), total.get("lowest speedup"),
        ))  # fmt: skip
