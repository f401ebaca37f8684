"""How the work on an (N, C, L) array is cut for ``loops.py``: pure integers, from the shape alone.

So that sums have the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

KINDS = 5  # of coefficients: high, scale, shift, slope, offset
SHORT = 96  # runs below this are done by columns
WIDE = 1024  # columns of a piece, at most: their coefficients stay in L1
_NARROW = 1024  # columns below this are done several rows at a time
_LITTLE = 1 << 12  # values that are not worth the trouble
_CACHED = 1 << 17  # values of x, of dy and of dx that fit in a 2 MB cache together
_PIECE = 1 << 18  # values of a piece, about
_LEAST = 1 << 16  # values per channel that are worth a segment
_SHARE = 1 << 17  # values that are worth waking a thread: about 100 us of forward
_UNITS = 256  # channels times segments that keep any number of threads busy

Piece = tuple[int, int, int, int, int, int, int, int, int, int]
"""Segment; where in the data it starts; C and L; and the bounds of c, n and l.

A piece of columns has one channel, which is as long as there are columns.
"""


class Plan(NamedTuple):
    """The pieces of a shape.

    Attributes:
        columns: which loops.
        pieces: one a row, in the order of ``Piece``.
        counts: values per channel of each segment. Sums over a segment are merged in this order.
        threads: at most, that are of use.
        repeats: columns a channel has side by side.
        group: so many channels of a piece stay in the cache together.
        coefficients: the shape of the coefficients that ``loops.py`` takes.
    """

    columns: bool
    pieces: np.ndarray[Any, np.dtype[np.int64]]
    counts: tuple[float, ...]
    threads: int
    repeats: int
    group: int
    coefficients: tuple[int, ...]


@lru_cache(maxsize=1024)
def plan_for(n: int, channels: int, length: int) -> Plan:
    """The plan for an array that is not empty."""
    if length < SHORT:
        return _columns(n, channels, length)
    return _rows(n, channels, length)


def _rows(n: int, channels: int, length: int) -> Plan:
    segments = max(1, min(_UNITS // channels, n * length // _LEAST))
    pieces: list[Piece] = []
    counts: list[float] = []
    parts = min(n, segments)
    for n0, n1 in _cut(n, parts):
        for l0, l1 in _cut(length, -(-segments // parts)):
            count = (n1 - n0) * (l1 - l0)
            step = max(1, _PIECE // count)
            pieces += (
                (len(counts), 0, channels, length, c, min(c + step, channels), n0, n1, l0, l1)
                for c in range(0, channels, step)
            )
            counts.append(float(count))
    group = max(1, _CACHED // (n * length))
    threads = _threads(n * channels * length, len(pieces))
    return Plan(False, _rows_of(pieces), tuple(counts), threads, 1, group, (KINDS, channels))


def _columns(n: int, channels: int, length: int) -> Plan:
    width = channels * length
    together = 1 if n * width <= _LITTLE else max(1, min(n, _NARROW // width))
    whole = n // together
    tile = width * together if width <= WIDE else WIDE // length * length
    step = max(1, _PIECE // tile)
    pieces: list[Piece] = []
    counts: list[float] = []
    for start, rows, wide in (
        (0, whole, width * together),
        (whole * together * width, n - whole * together, width),
    ):
        for m0 in range(0, rows, step):
            m1 = min(m0 + step, rows)
            pieces += (
                (len(counts), start, 1, wide, 0, 1, m0, m1, j, min(j + tile, wide))
                for j in range(0, wide, tile)
            )
            counts.append(float((m1 - m0) * wide // channels))
    coefficients = KINDS, 1, width * together  # of the widest row of pieces
    threads = _threads(n * width, len(pieces))
    return Plan(True, _rows_of(pieces), tuple(counts), threads, length, channels, coefficients)


def _threads(values: int, pieces: int) -> int:
    return max(1, min(pieces, values // _SHARE))


def _rows_of(pieces: list[Piece]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(pieces, np.int64)


def _cut(size: int, parts: int) -> Iterator[tuple[int, int]]:
    for i in range(parts):
        yield size * i // parts, size * (i + 1) // parts
