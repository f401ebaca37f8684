"""Wall-clock times of things that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Parts = Mapping[str, Callable[[], object]]
Times = dict[str, dict[str, list[float]]]

_BLOCK = 0.002  # seconds that one timed block should take at least
_LEAST = 3  # repetitions, however long they take


def interleave(
    paths: Mapping[str, Parts],
    repeat: int,
    *,
    seconds: float = float("inf"),
    rest: float = 0.0,
    warm: float = 0.0,
    calls: int | None = None,
    before: Callable[[], object] | None = None,
    after: Callable[[], object] | None = None,
) -> Times:
    """{path: {part: [seconds of one call, one for each repetition]}}.

    In each repetition every path has its turn: a block of calls of all its parts in their order.
    Blocks of short calls are preceded by a call that is not timed, or by `warm` seconds of them.

    Args:
        paths: what to call, by path and part, e.g. {"torch": {"forward": f, "backward": b}}.
        repeat: how many repetitions.
        seconds: after which no further repetition begins, but three there are.
        rest: seconds of pause before a turn, in which the threads of the one before come to rest.
        warm: seconds of calls that are not timed before a block: after others' turns, and more so
            after a rest, processor, caches and heap are not what they are in a loop of training.
        calls: in a block; None: as many as take 2 ms.
        before: called before each block, not timed.
        after: called at the end of each block, its time is part of the last part's.
    """
    times: Times = {name: {part: [] for part in parts} for name, parts in paths.items()}
    many = {name: calls or _calls_in_a_block(parts, after) for name, parts in paths.items()}
    end = time.perf_counter() + seconds
    for repetition in range(repeat):
        if repetition >= _LEAST and time.perf_counter() > end:
            break
        for name, parts in paths.items():
            if rest:
                time.sleep(rest)
            end_of_warming = time.perf_counter() + warm
            while time.perf_counter() < end_of_warming:
                _block(parts, 1, after)
            if many[name] > 1 and not warm:
                _block(parts, 1, after)
            if before is not None:
                before()
            for part, spent in _block(parts, many[name], after).items():
                times[name][part].append(spent / many[name])
    return times


def _block(parts: Parts, calls: int, after: Callable[[], object] | None) -> dict[str, float]:
    spent = dict.fromkeys(parts, 0.0)
    now = time.perf_counter()
    for _ in range(calls):
        for part, call in parts.items():
            call()
            began, now = now, time.perf_counter()
            spent[part] += now - began
    if after is not None:
        after()
        spent[part] += time.perf_counter() - now
    return spent


def _calls_in_a_block(parts: Parts, after: Callable[[], object] | None) -> int:
    _block(parts, 1, after)
    once = sum(_block(parts, 1, after).values())
    return max(1, min(1000, int(_BLOCK / once)))


def in_microseconds(parts: Mapping[str, list[float]]) -> dict[str, float]:
    """Medians of the parts and, where there are several, of their sum; and its extremes."""
    found = {f"{part} us": statistics.median(times) * 1e6 for part, times in parts.items()}
    both = [sum(times) * 1e6 for times in zip(*parts.values(), strict=True)]
    if len(parts) > 1:
        found["both us"] = statistics.median(both)
    found |= {"fastest us": min(both), "slowest us": max(both), "repetitions": len(both)}
    return found
