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

from .cases import Case, Tensors, products
from .overhead import devices
from .report import Report


def cases(quick: bool) -> list[tuple[Case, str]]:
    """Each with what the layer is told, in words."""
    n = 4 if quick else 32
    rows, columns = products([f"{n}x64x112x112"], layouts=["rows", "columns"])
    others = products([f"{n}x64x112x112"], ["float16", "bfloat16", "float64"])
    plain = [rows, columns, Case((n * 512, 1024)), *others]
    told = [(rows, "out=dy"), (columns, "out=dy"), (rows, "relu"), (rows, "relu residual")]
    return [*((case, "") for case in plain), *told]


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("memory", "memory above x + y and x + dy + dx, MB of 10^6 bytes")
    for device in devices():
        section[device] = records = []
        for case, words in cases(args.quick):
            name, found = f"{case} {words}".strip(), record(case, words, device)
            records.append({"case": name} | found)
            report.flush()
            megabytes = {key: f"{size / 1e6:.3f}" for key, size in found.items()}
            report.row(name, megabytes | {"device": device})


def record(case: Case, words: str, device: str) -> dict[str, int]:
    """Bytes of a forward and a backward."""
    used, xp = (on_host, np) if device == "cpu" else (on_device, import_module("cupy"))
    t = Tensors(xp, None, case)
    residual = t.x.copy(order="K") if "residual" in words else None
    kind = cupybn.BatchNorm2d if len(case.shape) == 4 else cupybn.BatchNorm1d
    options: dict[str, Any] = {"activation": "relu"} if "relu" in words else {}
    layer = kind(case.shape[1], dtype=case.parameters, device=device, **options)
    out = t.dy if "out=dy" in words else None
    for _ in range(2):  # what is made once: caches, bindings, kernels, threads
        layer.forward(t.x, residual)
        layer.backward(t.dy.copy(order="K"))
    results: list[Any] = []
    peak, kept = used(lambda: results.append(layer.forward(t.x, residual)))
    peak_back, _ = used(lambda: results.append(layer.backward(t.dy, out=out)))
    made = (out is None) + (residual is not None)  # dx, and dresidual, which is as large
    above = {"forward": peak - case.bytes, "kept": kept - case.bytes}
    return {"x": case.bytes, **above, "backward": peak_back - made * case.bytes}


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
