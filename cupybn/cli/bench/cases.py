"""The shapes that are measured, and tensors of them for NumPy or CuPy and for PyTorch."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from . import DTYPES, LAYOUTS

RESNET50 = {
    (64, 112, 112): 1, (64, 56, 56): 6, (256, 56, 56): 4, (128, 56, 56): 1, (128, 28, 28): 7,
    (512, 28, 28): 5, (256, 28, 28): 1, (256, 14, 14): 11, (1024, 14, 14): 7, (512, 14, 14): 1,
    (512, 7, 7): 5, (2048, 7, 7): 4,
}  # fmt: skip
"""(C, H, W) of its batch norms, and how many of the 53 have them."""
BATCHES = [32, 64, 256]
ODD = [
    (64, 4, 112, 112), (128, 4, 224, 224), (4, 256, 16, 16), (64, 2048), (4096, 1024),
    (2, 64, 32, 256, 256),
]  # fmt: skip
TINY = (8, 16)
EPS, MOMENTUM = 1e-5, 0.1
_PERIOD = 1 << 22
_values: dict[str, Any] = {}  # by module


class Case(NamedTuple):
    group: str  # "resnet", "odd" or "chosen"
    shape: tuple[int, ...]
    layers: int  # that have this shape
    dtype: str
    layout: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * {"float64": 8, "float32": 4}.get(self.dtype, 2)


def every_case(args: argparse.Namespace, dtypes: list[str] | None = None) -> Iterator[Case]:
    """The product of what `args` leave open."""
    groups = args.only or ["resnet", "odd"]
    for dtype in args.dtypes or dtypes or DTYPES:
        for layout in args.layouts or LAYOUTS:
            if args.shapes:
                for shape in args.shapes:
                    yield Case("chosen", shape, 1, dtype, layout)
                continue
            if "resnet" in groups:
                for n in args.batches or BATCHES:
                    for (c, h, w), layers in RESNET50.items():
                        yield Case("resnet", (n, c, h, w), layers, dtype, layout)
            if "odd" in groups:
                for shape in ODD:
                    if layout == "rows" or len(shape) > 2:
                        yield Case("odd", shape, 1, dtype, layout)


class Tensors:
    """x and dy of a case: arrays of `xp`, and PyTorch's over the same memory."""

    def __init__(self, xp: Any, torch: Any, case: Case, seed: int = 0) -> None:
        self.x, self.tx = _make(xp, torch, case, seed)
        self.dy, self.tdy = _make(xp, torch, case, seed + 1)


def _make(xp: Any, torch: Any, case: Case, seed: int) -> tuple[Any, Any]:
    shape, last = case.shape, len(case.shape) - 1
    columns = case.layout == "columns" and last > 1
    order = (0, *range(2, last + 1), 1) if columns else tuple(range(last + 1))
    back = tuple(order.index(axis) for axis in range(last + 1))
    memory = xp.empty(tuple(shape[axis] for axis in order), dtype_of(case.dtype))
    fill(xp, memory, seed)
    theirs = None if torch is None else as_torch(torch, memory, xp).permute(back)
    return memory.transpose(back), theirs


def as_torch(torch: Any, array: Any, xp: Any = np) -> Any:
    """A tensor over the memory of an array; through int16, as nobody exports bfloat16."""
    if array.dtype.name != "bfloat16":
        return torch.from_dlpack(array)
    return torch.from_dlpack(array.view(xp.int16)).view(torch.bfloat16)


def dtype_of(name: str) -> Any:
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def available(dtypes: Any) -> list[str]:
    """Those of the names that NumPy knows here: bfloat16 needs ml_dtypes."""
    there = importlib.util.find_spec("ml_dtypes") is not None
    return [name for name in dtypes if name != "bfloat16" or there]


def fill(xp: Any, memory: Any, seed: int) -> None:
    """Standard normal values, the same ones every 4 Mi elements."""
    begin = seed * 12289 % (1 << 20)
    wanted = min(_PERIOD, memory.size)
    values = _normal_values(xp)[begin : begin + wanted]
    if memory.dtype.name == "bfloat16":
        bits = (values.view(xp.uint32) >> xp.uint32(16)).astype(xp.uint16)
        values = bits.view(memory.dtype)
    else:
        values = values.astype(memory.dtype)
    flat = memory.reshape(-1)
    for i in range(0, flat.size, _PERIOD):
        flat[i : i + _PERIOD] = values[: flat.size - i]


def _normal_values(xp: Any) -> Any:
    if xp.__name__ not in _values:
        size = _PERIOD + (1 << 20)
        values = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
        _values[xp.__name__] = xp.asarray(values)
    return _values[xp.__name__]
