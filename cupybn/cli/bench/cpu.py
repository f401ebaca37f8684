"""The CPU backends beside PyTorch on the CPU: forward + backward in training mode.

Layers against PyTorch's modules with autograd, on the same memory and with the same number of
threads, in turns. A turn begins with 20 ms of calls that are not timed, as in a loop of training;
with several threads after a pause, in which the other's threads stop to spin. `ratio` is cupybn's
time over PyTorch's, forward + backward: below 1, cupybn is faster. `err` is the larger of the
relative L2 errors of y and of dx against float64, or NumPy's long double for float64 data, over as
many channels as make 4 Mi values. The copy rate is that of ``np.copyto`` on as many threads, bytes
read and written, measured in the same run; a share of it counts 3 B forward and 5 B backward, B
being the bytes of x: the least that a streaming batch norm moves. Where x stays in the cache it can
exceed 100 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import numpy as np

from ... import backends, layers
from .cases import EPS, MOMENTUM, Case, Tensors, available, every_case
from .report import Report, Table, by_x, load_torch
from .threads import choices, limited
from .timing import in_microseconds, interleave
from .totals import print_totals, totals

_SOME = [
    (32, 64, 56, 56), (64, 256, 14, 14), (32, 512, 7, 7), (32, 64, 112, 112), (256, 512),
    (4096, 1024), (64, 2048), (64, 4, 112, 112), (4, 256, 16, 16), (8, 16),
]  # fmt: skip
_REST = 0.02  # seconds in which OpenMP's threads stop to spin for more work
_WARM = 0.02  # seconds of calls before each turn
_CHECKED = 1 << 22  # values whose errors are taken
_COPIED = 1 << 28

Path = dict[str, Callable[[], Any]]


def backend_names() -> list[str]:
    """The backends for NumPy arrays that can be imported here."""
    there = ["numpy"]
    if find_spec("numba"):
        there.append("numba")
    return there


def some_cases() -> list[Case]:
    """What takes a few minutes: float32 in ten shapes, the rest in a few."""
    found = [Case("chosen", shape, 1, "float32", "rows") for shape in _SOME]
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        if dtype != "float32":
            found += [Case("chosen", shape, 1, dtype, "rows") for shape in (_SOME[0], _SOME[4])]
        found.append(Case("chosen", _SOME[0], 1, dtype, "columns"))
    return found


def quick_cases() -> list[Case]:
    shapes = [(32, 64, 28, 28), (256, 512), (8, 16)]
    found = [Case("chosen", shape, 1, "float32", "rows") for shape in shapes]
    return [*found, Case("chosen", shapes[0], 1, "float16", "columns")]


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("cpu", "CPU: forward + backward")
    names = args.backend or backend_names()
    torch = load_torch(args)
    if args.quick:
        cases, repeat, seconds = quick_cases(), min(5, args.repeat), 0.3
    elif args.full or args.shapes or args.only or args.batches or args.dtypes or args.layouts:
        cases, repeat, seconds = list(every_case(args)), args.repeat, args.seconds
    else:
        cases, repeat, seconds = some_cases(), args.repeat, args.seconds
        report.say("a choice of shapes; the rest with --full, --shapes, --batches or --dtypes")
    cases = [case for case in cases if case.dtype in available([case.dtype])]
    if find_spec("threadpoolctl") is None:
        report.say("threadpoolctl is not installed: the number of threads is the environment's")
    section["cases"] = records = []
    section["copy rate"] = rates = {}
    chosen_by_library = backends.cpu_backend()
    for threads in choices([1] if args.quick else args.threads):
        with limited(threads):
            rate = rates[str(threads)] = copy_rate(threads, 1 << 24 if args.quick else _COPIED)
            report.say(f"\n{threads} thread(s), copy rate {rate / 1e9:.1f} GB/s; times in ms")
            table = _table(names)
            report.say(table.header())
            for case in report.progress(cases):
                record = _record(case, threads, names, torch, repeat, seconds)
                records.append(record)
                report.flush()
                report.say(_line(table, record, names, rate))
    backends.use_cpu_backend(chosen_by_library)
    section["totals"] = totals(records, rates, (*names, "torch"), ("torch",))
    print_totals(report, section["totals"], (*names, "torch"))


def copy_rate(threads: int, size: int) -> float:
    """Bytes read and written a second by copies on so many threads at once."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(12):
            began = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), parts))
            times.append(time.perf_counter() - began)
    return 2 * size / statistics.median(times[2:])


def _record(
    case: Case, threads: int, names: list[str], torch: Any, repeat: int, seconds: float
) -> dict[str, Any]:
    record: dict[str, Any] = {
        **case._asdict(), "bytes": case.bytes, "threads": threads, "paths": {},
    }  # fmt: skip
    if (reason := _too_large(case)) is not None:
        return record | {"skipped": reason}
    tensors = Tensors(np, torch, case)
    results: dict[str, Any] = {name: {} for name in (*names, "torch")}
    paths = {name: ours(name, tensors, case, results[name]) for name in names}
    if torch is not None:
        paths["torch"] = theirs(torch, tensors, results["torch"])
    for name, parts in list(paths.items()):
        if (reason := _failure(parts)) is not None:
            record["paths"][name] = {"failed": reason}
            del paths[name]
    rest = _REST if threads > 1 else 0.0
    for name, times in interleave(paths, repeat, seconds=seconds, rest=rest, warm=_WARM).items():
        record["paths"][name] = in_microseconds(times) | _errors(tensors, results[name])
    return record


def _failure(parts: Path) -> str | None:
    """What a path says that does not take the case."""
    try:
        for call in parts.values():
            call()
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None


def ours(name: str, t: Tensors, case: Case, results: dict[str, Any]) -> Path:
    """A layer's forward and backward through the backend of that name."""
    backend = import_module(f"cupybn.backends.{name}")
    kind = {2: layers.BatchNorm1d, 3: layers.BatchNorm1d, 4: layers.BatchNorm2d}
    layer = kind.get(len(case.shape), layers.BatchNorm3d)(
        case.shape[1], EPS, MOMENTUM, dtype="float64" if case.dtype == "float64" else "float32"
    )

    def forward() -> None:
        backends.use_cpu_backend(backend)
        results["y"] = layer.forward(t.x)

    def backward() -> None:
        results["dx"] = layer.backward(t.dy)

    return {"forward": forward, "backward": backward}


def theirs(torch: Any, t: Tensors, results: dict[str, Any]) -> Path:
    """PyTorch's module, with autograd."""
    x = t.tx.detach().requires_grad_()
    dimensions = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}[x.dim()]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    module = getattr(torch.nn, f"BatchNorm{dimensions}")(x.shape[1], EPS, MOMENTUM, dtype=dtype)

    def forward() -> None:
        x.grad = None
        results["y"] = module(x)

    def backward() -> None:
        results["y"].backward(t.tdy)
        results["dx"] = x.grad

    return {"forward": forward, "backward": backward}


def _errors(t: Tensors, results: dict[str, Any]) -> dict[str, float]:
    shape = t.x.shape
    channels = slice(0, max(1, _CHECKED * shape[1] // prod(shape)))
    exact = np.longdouble if t.x.dtype == np.float64 else np.float64
    x, dy = (a[:, channels].astype(exact) for a in (t.x, t.dy))
    return {
        f"{what} error": _relative(_as_float64(results[what], channels), expected)
        for what, expected in zip(("y", "dx"), _exact(x, dy), strict=True)
    }


def _as_float64(result: Any, channels: slice) -> np.ndarray[Any, Any]:
    part = result[:, channels]
    if isinstance(part, np.ndarray):
        return part.astype(np.float64)
    return part.detach().double().numpy()  # type: ignore[no-any-return]


def _exact(x: Any, dy: Any) -> tuple[Any, Any]:
    axes = (0, *range(2, x.ndim))
    mean = partial(np.mean, axis=axes, keepdims=True)
    xmu = x - mean(x)
    invstd = 1 / np.sqrt(mean(xmu**2) + EPS)
    xhat = xmu * invstd
    return xhat, (dy - mean(dy) - xhat * mean(dy * xhat)) * invstd


def _relative(actual: Any, expected: Any) -> float:
    return float(np.linalg.norm((actual - expected).ravel()) / np.linalg.norm(expected.ravel()))


def _too_large(case: Case) -> str | None:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    # x, dy, two results of two implementations, one more of each before it is replaced
    return "not enough memory" if free < 9 * case.bytes + (1 << 29) else None


def _table(names: list[str]) -> Table:
    columns = [("shape", ">18s"), ("dtype", "<8s"), ("layout", "<7s"), ("MB", ">6.1f")]
    for name in names:
        columns += [(f"{name} fwd", ">9.3f"), ("bwd", ">8.3f"), ("both", ">8.3f")]
        columns += [("% copy", ">6.0f")]
    columns += [("torch fwd", ">9.3f"), ("bwd", ">8.3f"), ("both", ">8.3f")]
    columns += [("ratio" if len(names) == 1 else f"{name} ratio", ">6.2f") for name in names]
    columns += [(f"err {name}", ">7.1e") for name in (*names, "torch")]
    return Table(*columns)


def _line(table: Table, record: dict[str, Any], names: list[str], rate: float) -> str:
    paths = record["paths"]
    values = [by_x(record["shape"]), record["dtype"], record["layout"], record["bytes"] / 1e6]

    def milliseconds(name: str) -> list[float | None]:
        found = [paths.get(name, {}).get(f"{w} us") for w in ("forward", "backward", "both")]
        return [None if value is None else value / 1e3 for value in found]

    for name in names:
        values += milliseconds(name)
        both = values[-1]
        values.append(None if both is None else 8 * record["bytes"] / (both * 1e-3) / rate * 100)
    values += milliseconds("torch")
    for name in names:
        pair = [paths.get(p, {}).get("both us") for p in (name, "torch")]
        values.append(None if None in pair else pair[0] / pair[1])
    for name in (*names, "torch"):
        errors = [paths.get(name, {}).get(f"{what} error") for what in ("y", "dx")]
        values.append(None if None in errors else max(errors))
    failed = [f"{name}: {path['failed']}" for name, path in paths.items() if "failed" in path]
    notes = [*failed, *([record["skipped"]] if "skipped" in record else [])]
    return "  ".join([table.line(*values), *notes])
