"""The shapes that are measured, and tensors of them for NumPy or CuPy and for PyTorch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from . import DTYPES, LAYOUTS

Shape = tuple[int, ...]
RESNET50 = {
    (64, 112, 112): 1,
    (64, 56, 56): 6,
    (256, 56, 56): 4,
    (128, 56, 56): 1,
    (128, 28, 28): 7,
    (512, 28, 28): 5,
    (256, 28, 28): 1,
    (256, 14, 14): 11,
    (1024, 14, 14): 7,
    (512, 14, 14): 1,
    (512, 7, 7): 5,
    (2048, 7, 7): 4,
}
"""(C, H, W) of its batch norms, and how many of the 53 have them."""
TINY = (8, 16)
EPS, MOMENTUM = 1e-5, 0.1
_PERIOD = 1 << 20


class Case(NamedTuple):
    shape: Shape
    dtype: str = "float32"
    layout: str = "rows"  # or columns: channels-last memory
    layers: int = 0  # of ResNet-50 that have this shape

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def parameters(self) -> str:
        """The dtype of weight, bias and running statistics."""
        return "float64" if self.dtype == "float64" else "float32"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{shape} {self.dtype}{' columns' if self.layout == 'columns' else ''}"


def products(
    shapes: Sequence[Shape], batches: Sequence[int], dtypes: Sequence[str], layouts: Sequence[str]
) -> list[Case]:
    """The shapes, and those of ResNet-50 for each number of samples, in all dtypes and layouts."""
    counted: list[tuple[Shape, int]] = [(shape, 0) for shape in shapes]
    counted += [((n, *shape), layers) for n in batches for shape, layers in RESNET50.items()]
    return [
        Case(shape, dtype, layout, layers)
        for dtype in available(dtypes)
        for layout in layouts
        for shape, layers in counted
        if layout == "rows" or len(shape) > 2
    ]


def chosen(args: argparse.Namespace, default: list[Case], dtype: str) -> list[Case]:
    """What `args` ask for: products of shapes, or those of the default cases that fit."""
    if args.shapes or args.batches:
        kinds = args.dtypes or [dtype], args.layouts or ["rows"]
        return products(args.shapes or [], args.batches or [], *kinds)
    dtypes, layouts = available(args.dtypes or DTYPES), args.layouts or LAYOUTS
    return [case for case in default if case.dtype in dtypes and case.layout in layouts]


def available(dtypes: Sequence[str]) -> list[str]:
    """Those of the names that NumPy knows here: bfloat16 needs ml_dtypes."""
    there = find_spec("ml_dtypes") is not None
    return [name for name in dtypes if name != "bfloat16" or there]


class Tensors:
    """x and dy of a case: arrays of `xp`, and PyTorch's over the same memory."""

    def __init__(self, xp: Any, torch: Any, case: Case, seed: int = 0) -> None:
        ndim = len(case.shape)
        order = [0, *range(2, ndim), 1] if case.layout == "columns" else [*range(ndim)]
        back = [order.index(axis) for axis in range(ndim)]
        shape = tuple(case.shape[axis] for axis in order)
        self.memory = [_normal(xp, shape, case.dtype, seed + i) for i in range(2)]
        self.x, self.dy = (memory.transpose(back) for memory in self.memory)
        if torch is not None:
            self.tx, self.tdy = (as_torch(torch, a, xp).permute(back) for a in self.memory)


def _normal(xp: Any, shape: Shape, dtype: str, seed: int) -> Any:
    """Standard normal values, the same ones every Mi elements."""
    memory = xp.empty(shape, dtype_of("uint16" if dtype == "bfloat16" else dtype))
    begin, flat = seed * 12289 % _PERIOD, memory.reshape(-1)
    values = xp.asarray(_values(dtype)[begin : begin + _PERIOD])
    for i in range(0, flat.size, _PERIOD):
        flat[i : i + _PERIOD] = values[: flat.size - i]
    return memory.view(dtype_of(dtype))


@cache
def _values(dtype: str) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(0).standard_normal(2 * _PERIOD).astype(dtype_of(dtype))
    return values.view(np.uint16) if dtype == "bfloat16" else values  # not every CuPy copies it


def as_torch(torch: Any, array: Any, xp: Any = np) -> Any:
    """A tensor over the memory of an array; through int16, as nobody exports bfloat16."""
    if array.dtype.name != "bfloat16":
        return torch.from_dlpack(array)
    return torch.from_dlpack(array.view(xp.int16)).view(torch.bfloat16)


def dtype_of(name: str) -> Any:
    return np.dtype(import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
