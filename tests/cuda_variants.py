"""Every module of kernels that there is: what ``plan_launch`` and the launches may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cupybn.arrays import DATA_TYPES
from cupybn.backends.cuda.launch import mask_loads
from cupybn.backends.cuda.plan import VECTOR_BYTES, LaunchPlan
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


def masked_variants(dtype: str) -> Iterator[Variant]:
    """Those of them that take a mask, for each way of reading it that a launch may ask for."""
    itemsize = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    for kernels, defines in variants(dtype):
        choices = dict(defines)
        if kernels[0].endswith("_flat"):
            yield Variant(kernels, (("MASK", "ONE_BYTE"), *defines))
        if "VECTOR" not in choices or kernels[0] in RESIDENT:
            continue
        vector, ragged, rows = (choices[name] for name in ("VECTOR", "RAGGED_VECTORS", "ROWS"))
        plan = LaunchPlan(
            bool(rows), vector, bool(ragged), 1, 256, 1, 1, 1, line_samples=ragged + 1
        )
        lengths = [vector] if rows else [1, vector, vector + 1]
        for loads in dict.fromkeys(mask_loads(plan, (1, 1, n), itemsize) for n in lengths):
            yield Variant(kernels, (("MASK", loads), *defines))


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
        yield Variant(("count_valid",), ())
