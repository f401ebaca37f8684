"""Wall-clock times of things that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Parts = Mapping[str, Callable[[], object]]
Turn = Callable[[int, float], dict[str, float]]
"""``turn(calls, warm)``: seconds that each part took in so many rounds of all parts, after `warm`
seconds of rounds that are not timed; after one such round where there are several calls."""
Times = dict[str, dict[str, list[float]]]

_BLOCK = 0.002  # seconds that one timed block should take at least
_LEAST = 3  # repetitions, however long they take


def nothing() -> None:
    """What is to be done where there is nothing to do."""


def turn_of(
    parts: Parts,
    *,
    begin: Callable[[], object] = nothing,
    ready: Callable[[], object] = nothing,
    finish: Callable[[], object] = nothing,
) -> Turn:
    """The turn of calls in this process.

    Args:
        parts: what to call, in their order, e.g. {"forward": f, "backward": b}.
        begin: called first.
        ready: called right before the clock starts.
        finish: called right before it stops, its time is part of the last part's.
    """

    def turn(calls: int, warm: float) -> dict[str, float]:
        begin()
        end = time.perf_counter() + warm
        if calls > 1 or warm:
            _rounds(parts, 1)
        while time.perf_counter() < end:
            _rounds(parts, 1)
        ready()
        return _rounds(parts, calls, finish)

    return turn


def _rounds(parts: Parts, calls: int, finish: Callable[[], object] = nothing) -> dict[str, float]:
    spent = dict.fromkeys(parts, 0.0)
    now = time.perf_counter()
    for _ in range(calls):
        for part, call in parts.items():
            call()
            began, now = now, time.perf_counter()
            spent[part] += now - began
    finish()
    spent[part] += time.perf_counter() - now
    return spent


def interleave(
    turns: Mapping[str, Turn],
    repeat: int,
    *,
    seconds: float = float("inf"),
    rest: float = 0.0,
    warm: float = 0.0,
    calls: int | None = None,
) -> Times:
    """{path: {part: [seconds of one call, one for each repetition]}}.

    In each repetition every path has its turn, in every other one in the reverse order: after
    whom a path comes would tell.

    Args:
        turns: by the name of the path.
        repeat: how many repetitions.
        seconds: after which no further repetition begins, but three there are.
        rest: seconds of pause before a turn, in which the threads of the one before come to rest.
        warm: seconds of calls that are not timed before a block: after others' turns, and more so
            after a rest, processor, caches and heap are not what they are in a loop of training.
        calls: in a block; None: as many as take 2 ms.
    """
    many = {name: calls or _calls_in_a_block(turn) for name, turn in turns.items()}
    times: Times = {name: {} for name in turns}
    end = time.perf_counter() + seconds
    for repetition in range(repeat):
        if repetition >= _LEAST and time.perf_counter() > end:
            break
        order = [*turns] if repetition % 2 == 0 else [*turns][::-1]
        for name in order:
            if rest:
                time.sleep(rest)
            for part, spent in turns[name](many[name], warm).items():
                times[name].setdefault(part, []).append(spent / many[name])
    return times


def _calls_in_a_block(turn: Turn) -> int:
    turn(1, 0)
    once = sum(turn(1, 0).values())
    return max(1, min(1000, int(_BLOCK / once)))


def working(turns: Mapping[str, Turn]) -> tuple[dict[str, Turn], dict[str, str]]:
    """The paths that take a case, and the first line of what the others say."""
    found, failed = dict(turns), {}
    for name, turn in turns.items():
        try:
            turn(1, 0)
        except (RuntimeError, NotImplementedError, MemoryError) as error:  # noqa: PERF203
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del found[name]
    return found, failed


def figures(times: Times, pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Medians in us of the parts and of their sum, with its extremes; and ratios of the pairs.

    A ratio is the median, over the repetitions, of one path's time over that of another.
    """
    sums = {n: [sum(all_) for all_ in zip(*p.values(), strict=True)] for n, p in times.items()}
    us = {
        name: {part: statistics.median(spent) * 1e6 for part, spent in parts.items()}
        | {"both": statistics.median(sums[name]) * 1e6, "repetitions": len(sums[name])}
        | {"fastest": min(sums[name]) * 1e6, "slowest": max(sums[name]) * 1e6}
        for name, parts in times.items()
    }
    ratios = {
        f"{a} / {b}": statistics.median(x / y for x, y in zip(sums[a], sums[b], strict=True))
        for a, b in pairs
        if a in sums and b in sums
    }
    return {"us": us, "ratio": ratios}
