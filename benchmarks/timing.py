"""Times of calls that take turns, in this process or in another one."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

Parts = Mapping[str, Callable[[], object]]
Turn = Callable[[int], dict[str, float]]
"""``turn(calls)``: seconds that each part took in so many rounds of all parts."""
Times = dict[str, dict[str, list[float]]]

_BLOCK = 0.002  # seconds that one timed block should take at least
_LEAST = 3  # repetitions, however long they take


class Worker:
    """A process with the cupybn of a checkout, and with this bench."""

    def __init__(self, checkout: Path) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        if (found := self.ask(_import_cupybn, str(checkout.resolve()))) != checkout.resolve():
            raise RuntimeError(f"{checkout} was meant, but cupybn was found in {found}")

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of a module in that process; its exceptions are raised here."""
        return self.pool.submit(function, *arguments).result()


def _import_cupybn(checkout: str) -> Path:
    sys.path.insert(0, checkout)
    return Path(import_module("cupybn").__file__ or "").parent.parent


def nothing() -> None:
    """Does nothing."""


def turn_of(
    parts: Parts,
    ready: Callable[[], object] = nothing,
    finish: Callable[[], object] = nothing,
    *,
    warm: float = 0.0,
) -> Turn:
    """The turn of calls in this process.

    The rounds of the first `warm` seconds are not timed: after others' turns, processor, caches and
    heap differ from those of a training loop. `ready` is called right before the clock starts,
    `finish` right before it stops.
    """

    def turn(calls: int) -> dict[str, float]:
        end = time.perf_counter() + warm
        if calls > 1 or warm:
            _rounds(parts, 1, nothing)
        while time.perf_counter() < end:
            _rounds(parts, 1, nothing)
        ready()
        return _rounds(parts, calls, finish)

    return turn


def _rounds(parts: Parts, calls: int, finish: Callable[[], object]) -> dict[str, float]:
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
    turns: Mapping[str, Turn], repeat: int, seconds: float = 1e9, rest: float = 0, calls: int = 0
) -> Times:
    """{path: {part: [seconds of one call, one for each repetition]}}.

    In each repetition every path has its turn of so many calls, or of 2 ms; every other repetition
    is in reverse order, since the path before matters. After some seconds no further repetition
    begins, but there are at least three. In the rest before a turn others' threads stop spinning.
    """
    many = {name: calls or _calls_in_a_block(turn) for name, turn in turns.items()}
    times: Times = {name: {} for name in turns}
    end = time.perf_counter() + seconds
    for repetition in range(repeat):
        if repetition >= _LEAST and time.perf_counter() > end:
            break
        for name in [*turns] if repetition % 2 == 0 else [*turns][::-1]:
            time.sleep(rest)
            for part, spent in turns[name](many[name]).items():
                times[name].setdefault(part, []).append(spent / many[name])
    return times


def _calls_in_a_block(turn: Turn) -> int:
    turn(1)
    return max(1, min(1000, int(_BLOCK / sum(turn(1).values()))))


def without_failing(turns: dict[str, Turn]) -> dict[str, str]:
    """Removes the paths that cannot be called; returns the first lines of their errors."""
    failed = {}
    for name in [*turns]:
        try:
            turns[name](1)
        except Exception as error:  # noqa: PERF203  # another library's, or another version's
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del turns[name]
    return failed


def figures(times: Times, pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Medians in us of the parts and of their sum, with its extremes; and ratios of the pairs.

    A ratio is the median, over the repetitions, of one path's time over that of another.
    """
    us, sums = {}, {}
    for name, parts in times.items():
        both = sums[name] = [sum(all_) for all_ in zip(*parts.values(), strict=True)]
        us[name] = {part: median(spent) * 1e6 for part, spent in parts.items()}
        us[name] |= {"both": median(both) * 1e6, "repetitions": len(both)}
        us[name] |= {"fastest": min(both) * 1e6, "slowest": max(both) * 1e6}
    ratios = {
        f"{a} / {b}": median(x / y for x, y in zip(sums[a], sums[b], strict=True))
        for a, b in pairs
        if a in sums and b in sums
    }
    return {"us": us, "ratio": ratios}
