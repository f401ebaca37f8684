"""The "count" variant's figures: one record a launch, totals for each argument."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Access(NamedTuple):
    """Loads or stores of one argument's memory.

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
    memory: list[tuple[int, int]]  # address and bytes of each argument's array, (0, 0) for scalars
    loads: list[Access]  # of each argument; one more at the end for memory of none of them
    stores: list[Access]


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
    library: Path, kernel: str, grid: tuple[int, int, int], block: tuple[int, int, int],
    args: Sequence[Any],
) -> None:  # fmt: skip
    if _records is None:
        return
    out = np.zeros((2, len(args) + 1, len(Access._fields)), np.uint64)
    _totals(library)(ctypes.c_void_p(out.ctypes.data))
    loads, stores = ([Access(*map(int, row)) for row in half] for half in out)
    memory = [(a.ctypes.data, a.nbytes) if isinstance(a, np.ndarray) else (0, 0) for a in args]
    _records.append(Launch(kernel, grid, block, memory, loads, stores))
