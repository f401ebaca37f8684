"""The shapes that are measured, and tensors of them for NumPy or CuPy and for PyTorch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from . import DTYPES, LAYOUTS

RESNET50 = (
    "1*64x112x112 6*64x56x56 4*256x56x56 1*128x56x56 7*128x28x28 5*512x28x28 "
    "1*256x28x28 11*256x14x14 7*1024x14x14 1*512x14x14 5*512x7x7 4*2048x7x7"
)
"""Its 53 batch norms: how many times C x H x W."""
EPS, MOMENTUM = 1e-5, 0.1
if find_spec("ml_dtypes"):
    import_module("ml_dtypes")  # with it NumPy knows bfloat16


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "rows"  # or columns: channels-last memory

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def shape3(self) -> tuple[int, int, int]:
        """The shape (N, C, L) that the kernels see."""
        n, c, *rest = self.shape
        size = math.prod(rest)
        return (n, c, size) if self.layout == "rows" else (n * size, c, 1)

    @property
    def parameters(self) -> str:
        """The dtype of weight, bias and running statistics."""
        return "float64" if self.dtype == "float64" else "float32"

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), self.dtype, self.layout.replace("rows", "")]
        return " ".join(filter(None, words))


def of_resnet50(batches: Iterable[int]) -> list[str]:
    """ResNet-50's shapes for each number of samples."""
    return [f"{n}x{text.partition('*')[2]}" for n in batches for text in RESNET50.split()]


def products(
    shapes: Iterable[str], dtypes: Sequence[str] = ("float32",), layouts: Sequence[str] = ("rows",)
) -> list[Case]:
    """All shapes, as "32x64x56x56", in all dtypes that are here (bfloat16 needs ml_dtypes) and in
    all layouts: of two dimensions there is one.
    """
    sizes = [tuple(map(int, text.split("x"))) for text in shapes]
    return [
        Case(shape, dtype, layout)
        for dtype in dtypes
        if dtype != "bfloat16" or find_spec("ml_dtypes")
        for layout in layouts
        for shape in sizes
        if layout == "rows" or len(shape) > 2
    ]


def chosen(args: argparse.Namespace, default: list[Case], dtype: str) -> list[Case]:
    """The cases that `args` ask for: products of shapes, or the default cases that fit."""
    if shapes := [*(args.shapes or []), *of_resnet50(args.batches or [])]:
        return products(shapes, args.dtypes or [dtype], args.layouts or ["rows"])
    dtypes, layouts = args.dtypes or DTYPES, args.layouts or LAYOUTS
    return [case for case in default if case.dtype in dtypes and case.layout in layouts]


class Tensors:
    """x and dy of a case: arrays of `xp`, and PyTorch's over the same memory."""

    def __init__(self, xp: Any, torch: Any, case: Case, seed: int = 0) -> None:
        axes = list(range(len(case.shape)))
        order = [0, *axes[2:], 1] if case.layout == "columns" else axes
        back = [order.index(axis) for axis in axes]
        shape = [case.shape[axis] for axis in order]
        self.memory = [_normal(xp, shape, case.dtype, seed + i) for i in range(2)]
        self.x, self.dy = (memory.transpose(back) for memory in self.memory)
        if torch is not None:
            bits = [torch.from_dlpack(a.view(f"i{a.itemsize}")) for a in self.memory]
            self.tx, self.tdy = (a.view(getattr(torch, case.dtype)).permute(back) for a in bits)


def _normal(xp: Any, shape: list[int], dtype: str, seed: int) -> Any:
    """Standard normal values, repeated every Mi elements; copied as integers, since not every
    library copies or exports bfloat16.
    """
    values = np.random.default_rng(seed).standard_normal(min(1 << 20, math.prod(shape)))
    bits = np.resize((found := values.astype(dtype)).view(f"i{found.itemsize}"), shape)
    return xp.asarray(bits).view(found.dtype)
