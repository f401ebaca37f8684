"""The "count" variant's figures: one record a launch, totals for each array."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# The numbers of cuda/memory.cuh; "channel" is everything per channel, "scratch" the partials.
ARRAYS = ("x", "y", "dy", "dx", "residual", "dresidual", "mask", "channel", "scratch")
_PLACES = 16


class Access(NamedTuple):
    """Loads or stores of one array.

    `instructions` counts (warp, call site, occurrence); `sectors` the 32-byte sectors of each,
    added up; `block_sectors` the different ones of each block, added up.
    """

    instructions: int
    lanes: int
    bytes: int
    sectors: int
    block_sectors: int


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    loads: dict[str, Access]  # of the arrays that were touched
    stores: dict[str, Access]


_records: list[Launch] | None = None


@contextlib.contextmanager
def counting() -> Iterator[list[Launch]]:
    """Collect a record for every launch of a kernel of the "count" variant."""
    global _records
    _records, outer = [], _records
    try:
        yield _records
    finally:
        _records = outer


@cache
def _totals(library: Path) -> Any:
    return ctypes.CDLL(str(library)).hostcuda_totals


def record(
    library: Path, kernel: str, grid: tuple[int, int, int], block: tuple[int, int, int]
) -> None:
    if _records is None:
        return
    out = np.zeros((_PLACES, 2, len(Access._fields)), np.uint64)
    _totals(library)(ctypes.c_void_p(out.ctypes.data))
    loads, stores = (
        {
            name: Access(*map(int, row))
            for name, row in zip(ARRAYS, out[:, direction], strict=False)
            if row.any()
        }
        for direction in (0, 1)
    )
    _records.append(Launch(kernel, grid, block, loads, stores))
