"""How the work on an (N, C, L) array is divided: integers that depend on the shape alone.

Sums therefore have the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

SHORT = 96  # shorter rows are processed as columns
LINE = 64  # bytes of a cache line
WIDE = 1024  # most columns or channels at a time: their coefficients stay in L1
_NARROW = 1024  # with fewer columns, several rows are processed together
_LITTLE = 1 << 12  # values: so few are processed row by row
_ITEM = 1 << 18  # values of a work item, approximately
_ALONE = 1 << 20  # the same if one thread does all: it reads x and dy again from its cache
_LEAST = 1 << 16  # least values per channel in a segment
_SHARE = 1 << 17  # least values for which a thread is woken: about 100 us of forward
_UNITS = 256  # channels times segments: enough for any number of threads
_BITS = 1 << 15  # bytes of ReLU bits in an item
TURNS = 130  # counters and lent arrays that threads share, in int64; 2 for one thread


class WorkItem(NamedTuple):
    """A part of the array that one thread processes at a time, as the kernels read it.

    It has the values ``start + (n * channels + c) * length + l`` with n0 <= n < n1, l0 <= l < l1
    and, for rows, c0 <= c < c1. For columns, `channels` is 1, a row has `length` columns, each
    channel has `step` adjacent ones, and the channels c0 to c1 may repeat.

    Attributes:
        segment: where the sums of its segment begin: the segment's number times C.
        group: channels that are processed together; more channels make longer contiguous runs.
    """

    segment: int
    start: int
    channels: int
    length: int
    c0: int
    c1: int
    n0: int
    n1: int
    l0: int
    l1: int
    step: int
    group: int


class Plan(NamedTuple):
    """The work on a shape.

    Attributes:
        columns: whether the loops for columns run; otherwise those for rows.
        items: one per row, with the fields of ``WorkItem``.
        alone: the same work for one thread, in fewer items.
        counts: values per channel of each segment. The sums of segments are merged in this order.
        threads: the largest useful number.
    """

    columns: bool
    items: np.ndarray[Any, np.dtype[np.int64]]
    alone: np.ndarray[Any, np.dtype[np.int64]]
    counts: np.ndarray[Any, np.dtype[np.float64]]
    threads: int


@lru_cache(maxsize=1024)
def plan_for(n: int, channels: int, length: int) -> Plan:
    """The plan for an (n, channels, length) array; an empty array has no items."""
    columns = length < SHORT
    items: list[WorkItem] = []
    alone: list[WorkItem] = []
    counts: list[float] = []
    if n * channels * length > 0 and columns:
        items, counts = _columns(n, channels, length)
        alone = items
    elif n * channels * length > 0:
        items, counts = _rows(n, channels, length, _ITEM)
        alone, _ = _rows(n, channels, length, _ALONE)
    threads = max(1, min(len(items), n * channels * length // _SHARE))
    return Plan(columns, _table(items), _table(alone), np.array(counts), threads)


def _table(items: list[WorkItem]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(items, np.int64).reshape(-1, len(WorkItem._fields))


@lru_cache(maxsize=1024)
def repeated(n: int, channels: int, length: int) -> int:
    """The number of mask bytes that the loops need for each sample: `length`, or more.

    If a row of columns is one sample, the bytes are repeated, often enough for a line to begin
    anywhere in their first half.
    """
    plan = plan_for(n, channels, length)
    if not plan.columns or not len(plan.items) or plan.items[0, 3] > channels * length:
        return length
    return 2 * length * (1 + (LINE - 1) // length)


@lru_cache(maxsize=1024)
def bits_items(size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The bounds of the items of `size` bytes of ReLU bits, of shape (items, 2)."""
    bounds = [(begin, min(begin + _BITS, size)) for begin in range(0, size, _BITS)]
    return np.array(bounds, np.int64).reshape(-1, 2)


def _rows(n: int, channels: int, length: int, size: int) -> tuple[list[WorkItem], list[float]]:
    """Items of about `size` values, and the values per channel of each segment."""
    segments = max(1, min(_UNITS // channels, n * length // _LEAST))
    items: list[WorkItem] = []
    counts: list[float] = []
    parts = min(n, segments)
    for n0, n1 in _cut(n, parts):
        for l0, l1 in _cut(length, -(-segments // parts)):
            count = (n1 - n0) * (l1 - l0)
            step = max(1, min(WIDE, size // count))
            segment = len(counts) * channels
            for c in range(0, channels, step):
                c1 = min(c + step, channels)
                items.append(WorkItem(segment, 0, channels, length, c, c1, n0, n1, l0, l1, 1, step))
            counts.append(float(count))
    return items, counts


def _columns(n: int, channels: int, length: int) -> tuple[list[WorkItem], list[float]]:
    width = channels * length
    together = 1 if n * width <= _LITTLE else max(1, min(n, _NARROW // width))
    whole = n // together
    tile = width * together if width <= WIDE else WIDE // length * length
    step = max(1, _ITEM // tile)
    items: list[WorkItem] = []
    counts: list[float] = []
    for start, rows, wide in (
        (0, whole, width * together),
        (whole * together * width, n - whole * together, width),
    ):
        for m0 in range(0, rows, step):
            m1 = min(m0 + step, rows)
            segment = len(counts) * channels
            for j in range(0, wide, tile):
                j1 = min(j + tile, wide)
                c0, c1 = j // length, min(j1 // length, channels)
                items.append(
                    WorkItem(segment, start, 1, wide, c0, c1, m0, m1, j, j1, length, channels)
                )
            counts.append(float((m1 - m0) * wide // channels))
    return items, counts


def _cut(size: int, parts: int) -> Iterator[tuple[int, int]]:
    for i in range(parts):
        yield size * i // parts, size * (i + 1) // parts
