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
from typing import Any

import numpy as np

import cupybn

from .cases import Case, Tensors, available
from .overhead import devices
from .report import Report


def cases(quick: bool) -> list[tuple[Case, str]]:
    """Each with what the layer is told, in words."""
    n = 4 if quick else 32
    rows, columns = (Case((n, 64, 112, 112), "float32", layout) for layout in ("rows", "columns"))
    others = [Case(rows.shape, name) for name in available(["float16", "bfloat16", "float64"])]
    found = [(case, "") for case in (rows, columns, Case((n * 512, 1024)), *others)]
    found += [(rows, "out=dy"), (columns, "out=dy"), (rows, "relu"), (rows, "relu residual")]
    return found


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("memory", "memory above x + y and x + dy + dx, MB of 10^6 bytes")
    for device in devices():
        section[device] = records = []
        for case, words in report.progress(cases(args.quick)):
            name, found = f"{case} {words}".strip(), record(case, words, device)
            records.append({"case": name} | found)
            report.flush()
            megabytes = {key: f"{size / 1e6:.3f}" for key, size in found.items()}
            report.row(name, megabytes | {"device": device})


def record(case: Case, words: str, device: str) -> dict[str, int]:
    """Bytes of a forward and a backward."""
    relu, in_place = "relu" in words, "out=dy" in words
    used = on_host if device == "cpu" else on_device
    t = Tensors(np if device == "cpu" else import_module("cupy"), None, case)
    residual = t.x.copy(order="K") if "residual" in words else None
    kind = cupybn.BatchNorm2d if len(case.shape) == 4 else cupybn.BatchNorm1d
    options: dict[str, Any] = {"dtype": case.parameters, "device": device}
    layer = kind(case.shape[1], activation="relu" if relu else None, **options)
    results: dict[str, Any] = {}

    def forward() -> None:
        results["y"] = layer.forward(t.x, residual)

    def backward() -> None:
        results["dx"] = layer.backward(t.dy, out=t.dy if in_place else None)

    for _ in range(2):  # what is made once: caches, bindings, kernels, threads
        layer.forward(t.x, residual)
        layer.backward(t.dy.copy(order="K"))
    peak, kept = used(forward)
    peak_back, _ = used(backward)
    made = (not in_place) + (residual is not None)  # dx, and dresidual, which is as large
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
