"""Peak memory of a forward and of a backward, MB of 10^6 bytes, above what is there before them.

`forward` and `backward` are the peak less the arrays that a caller cannot do without, y and dx; x,
dy and residual are there before. So "peak = x + y + forward" and "x + dy + dx + backward". `kept`
is what stays until the backward besides x and y. Backward with out=dy has no dx to allocate. On the
CPU the peak is tracemalloc's, which sees what NumPy allocates; compiled loops have next to nothing
of their own. On a GPU it is what CuPy's pool hands out.
"""

from __future__ import annotations

import argparse
import gc
import tracemalloc
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

import cupybn

from .cases import Case, Tensors, available
from .overhead import devices
from .report import Report


class Variant(NamedTuple):
    """A case with what the layer is told."""

    case: Case
    relu: bool = False
    residual: bool = False
    in_place: bool = False

    def __str__(self) -> str:
        flags = {"relu": self.relu, "residual": self.residual, "out=dy": self.in_place}
        return " ".join([str(self.case), *(name for name, on in flags.items() if on)])


def variants(quick: bool) -> list[Variant]:
    n = 4 if quick else 32
    rows, columns = (Case((n, 64, 112, 112), "float32", layout) for layout in ("rows", "columns"))
    others = [Case(rows.shape, name) for name in available(["float16", "bfloat16", "float64"])]
    return [
        *map(Variant, [rows, columns, Case((n * 512, 1024)), *others]),
        Variant(rows, in_place=True),
        Variant(columns, in_place=True),
        Variant(rows, relu=True),
        Variant(rows, relu=True, residual=True),
    ]


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("memory", "memory above x + y and x + dy + dx, MB of 10^6 bytes")
    for device in devices():
        section[device] = records = []
        for variant in report.progress(variants(args.quick)):
            found = record(variant, device)
            records.append({"case": str(variant)} | found)
            report.flush()
            megabytes = {name: f"{size / 1e6:.3f}" for name, size in found.items()}
            report.row(str(variant), megabytes | {"device": device})


def record(variant: Variant, device: str) -> dict[str, int]:
    """Bytes of a forward and a backward."""
    case = variant.case
    used = on_host if device == "cpu" else on_device
    t = Tensors(np if device == "cpu" else import_module("cupy"), None, case)
    residual = t.x.copy(order="K") if variant.residual else None
    kind = cupybn.BatchNorm2d if len(case.shape) == 4 else cupybn.BatchNorm1d
    activation = "relu" if variant.relu else None
    layer = kind(case.shape[1], dtype=case.parameters, device=device, activation=activation)
    results: dict[str, Any] = {}

    def forward() -> None:
        results["y"] = layer.forward(t.x, residual)

    def backward() -> None:
        results["dx"] = layer.backward(t.dy, out=t.dy if variant.in_place else None)

    for _ in range(2):  # what is made once: caches, bindings, kernels, threads
        layer.forward(t.x, residual)
        layer.backward(t.dy.copy(order="K"))
    peak, kept = used(forward)
    peak_back, _ = used(backward)
    # dresidual, which the caller gets as well, is dx's size
    made = (not variant.in_place) + (variant.relu and variant.residual)
    return {
        "x": case.bytes,
        "forward": peak - case.bytes,
        "kept": kept - case.bytes,
        "backward": peak_back - made * case.bytes,
    }


def on_host(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that NumPy has allocated more than before: at the peak, and at the end."""
    gc.collect()
    tracemalloc.start()
    call()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak, after


def on_device(call: Callable[[], object]) -> tuple[int, int]:
    """The same of what CuPy's memory pool hands out."""
    cupy = import_module("cupy")
    pool = cupy.get_default_memory_pool()
    gc.collect()
    before = peak = pool.used_bytes()

    class Hook(cupy.cuda.memory_hook.MemoryHook):  # type: ignore[misc, name-defined]
        name = "benchmarks"

        def malloc_postprocess(self, **_: Any) -> None:
            nonlocal peak
            peak = max(peak, pool.used_bytes())

    with Hook():
        call()
    return peak - before, pool.used_bytes() - before
