"""Every module of kernels that there is: what ``plan_launch`` and the launches may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cupybn.arrays import DATA_TYPES
from cupybn.backends.cuda.plan import VECTOR_BYTES
from cupybn.backends.cuda.source import TOGETHER, module_text

RESIDENT = "local_forward", "local_backward"


class Variant(NamedTuple):
    """A module: kernels with their choices made; `defines` are macros and their values."""

    kernels: tuple[str, ...]
    defines: tuple[tuple[str, str | int], ...]

    @property
    def source(self) -> str:
        return module_text(self.kernels, self.defines)

    @property
    def label(self) -> str:
        choices = (f"{name}={value}" for name, value in self.defines)
        return " ".join(["+".join(self.kernels), *choices])


def geometries(itemsize: int) -> Iterator[tuple[bool, int, bool]]:
    """What `rows`, `vector` and `ragged` of a plan can be: a kernel is compiled for each.

    Ragged vectors are wide; rows that cannot be read in wide ones are read by the element.
    """
    wide = VECTOR_BYTES // itemsize
    yield from ((rows, wide, ragged) for rows in (True, False) for ragged in (False, True))
    yield True, 1, False
    while wide > 1:
        wide //= 2
        yield False, wide, False


def variants(dtype: str) -> Iterator[Variant]:
    """Every module that there is for data of a dtype, or for parameters of it."""
    scalar = ("SCALAR", DATA_TYPES[dtype].cuda)
    itemsize = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    for rows, vector, ragged in geometries(itemsize):
        shape = ("RAGGED_VECTORS", int(ragged)), ("ROWS", int(rows)), scalar, ("VECTOR", vector)
        for kernels in TOGETHER:
            yield Variant(kernels, shape)
        if dtype == "float64":
            yield Variant(("normalize_recentred",), shape)
        if vector * itemsize == VECTOR_BYTES and not ragged:
            yield from (Variant((kernel,), shape) for kernel in RESIDENT)
    yield Variant(("normalize_flat",), (scalar,))
    if dtype in ("float32", "float64"):
        yield Variant(("finalize_moments",), (scalar,))
    if dtype == "float64":
        yield Variant(("normalize_recentred_flat",), (scalar,))
        yield Variant(("recentre_moments",), ())
