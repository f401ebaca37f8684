"""Peak memory of a forward and of a backward, above what is there before them.

`extra` is the peak less the arrays that a caller cannot do without: y (forward) and dx (backward);
x, dy and residual are there before. So "peak = x + y + extra" and "x + dy + dx + extra". `kept` is
what stays until the backward besides x and y, and the same by channel. Backward with out=dy has no
dx to allocate. On the CPU the peak is tracemalloc's, which sees what NumPy allocates; `resident` is
the rise of the process's resident memory less the same arrays, where Linux tells: it sees also what
compiled code allocates, in pages of whatever the allocator keeps. On a GPU it is what CuPy's pool
hands out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ... import layers
from .cases import Case, Tensors, available
from .overhead import _devices
from .report import Report, Table, by_x


class Variant(NamedTuple):
    """A case with what the layer is told."""

    case: Case
    relu: bool = False
    residual: bool = False
    in_place: bool = False

    def __str__(self) -> str:
        flags = {"relu": self.relu, "residual": self.residual, "out=dy": self.in_place}
        return " ".join(name for name, on in flags.items() if on)


def variants(quick: bool) -> list[Variant]:
    n = 4 if quick else 32
    rows, columns = (
        Case("memory", (n, 64, 112, 112), 1, "float32", layout) for layout in ("rows", "columns")
    )
    flat = Case("memory", (n * 512, 1024), 1, "float32", "rows")
    wide = [Case("memory", rows.shape, 1, d, "rows") for d in available(["float16", "bfloat16"])]
    return [
        *map(Variant, (rows, columns, flat, *wide, rows._replace(dtype="float64"))),
        Variant(rows, in_place=True),
        Variant(columns, in_place=True),
        Variant(rows, relu=True),
        Variant(rows, relu=True, residual=True),
    ]


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("memory", "memory: extra above x + y and x + dy + dx, MB of 10^6 bytes")
    for device in _devices():
        meter: Any = HostMeter() if device == "cpu" else DeviceMeter()
        section[device] = records = []
        table = Table(
            (f"shape, on {device}", "<18s"), ("dtype", "<8s"), ("layout", "<7s"), ("", "<14s"),
            ("x MB", ">6.1f"), ("forward", ">8.3f"), ("resident", ">8.3f"), ("kept", ">8.3f"),
            ("B a channel", ">10.1f"), ("backward", ">8.3f"), ("resident", ">8.3f"),
        )  # fmt: skip
        report.say(table.header())
        for variant in report.progress(variants(args.quick)):
            record = _record(variant, meter, device)
            records.append(record)
            report.flush()
            megabytes = [
                None if record[key] is None else record[key] / 1e6
                for key in ("bytes", "forward extra", "forward resident", "kept",
                            "backward extra", "backward resident")
            ]  # fmt: skip
            channels = record["kept"] / variant.case.shape[1]
            case = variant.case
            report.say(table.line(
                by_x(case.shape), case.dtype, case.layout, variant, *megabytes[:4], channels,
                *megabytes[4:],
            ))  # fmt: skip


def _record(variant: Variant, meter: Any, device: str) -> dict[str, Any]:
    case = variant.case
    xp: Any = np if device == "cpu" else importlib.import_module("cupy")
    t = Tensors(xp, None, case)
    residual = t.x.copy(order="K") if variant.residual else None
    layer_class = layers.BatchNorm2d if len(case.shape) == 4 else layers.BatchNorm1d
    layer = layer_class(
        case.shape[1], device=device, activation="relu" if variant.relu else None,
        dtype="float64" if case.dtype == "float64" else "float32",
    )  # fmt: skip
    kept: dict[str, Any] = {}

    def forward() -> None:
        kept["y"] = layer.forward(t.x, residual)

    def backward() -> None:
        kept["dx"] = layer.backward(t.dy, out=t.dy if variant.in_place else None)

    forward()  # what is made once: caches, kernels, threads
    layer.backward(t.dy.copy(order="K"))
    kept.clear()
    found = {"case": case._asdict(), "variant": str(variant), "bytes": case.bytes}
    (peak, after, resident) = meter.of(forward)
    found |= {
        "forward extra": peak - case.bytes,
        "kept": after - case.bytes,
        "forward resident": None if resident is None else resident - case.bytes,
    }
    made = 0 if variant.in_place else case.bytes
    if variant.relu and variant.residual:
        made += case.bytes  # dresidual, which the caller gets as well
    peak, _, resident = meter.of(backward)
    return found | {
        "backward extra": peak - made,
        "backward resident": None if resident is None else resident - made,
    }


class HostMeter:
    """Bytes allocated while something runs: at the peak, at its end; and the resident rise."""

    def of(self, call: Callable[[], None]) -> tuple[int, int, int | None]:
        gc.collect()
        resident = _reset_resident_peak()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        call()
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        rise = None if resident is None else _status("VmHWM") - resident
        return peak - before, after - before, rise


def _reset_resident_peak() -> int | None:
    """The resident bytes now, from which the kernel takes the peak anew; None without Linux."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # so that what was freed earlier does not count as there
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except (AttributeError, OSError, TypeError):  # other systems, other C libraries
        return None


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


class DeviceMeter:
    """Bytes that CuPy's memory pool hands out while something runs."""

    def of(self, call: Callable[[], None]) -> tuple[int, int, None]:
        cupy = importlib.import_module("cupy")
        pool = cupy.get_default_memory_pool()
        gc.collect()
        before = pool.used_bytes()
        peak = before

        class Hook(cupy.cuda.memory_hook.MemoryHook):  # type: ignore[misc, name-defined]
            name = "cupybn bench"

            def malloc_postprocess(self, **_: Any) -> None:
                nonlocal peak
                peak = max(peak, pool.used_bytes())

        with Hook():
            call()
        return peak - before, pool.used_bytes() - before, None
