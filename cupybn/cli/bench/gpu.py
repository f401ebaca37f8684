"""cupybn on a GPU beside PyTorch's batch norms, on the same tensors, and beside the copy rate.

Device time is between CUDA events around one forward, and one backward. A short delay kernel goes
first, so that everything is in the stream when it starts: no waiting for Python is in these
figures. The implementations take turns, repetition by repetition. Each case has several sets of
tensors, together at least four times the second-level cache, and every repetition takes the next
set: what is read comes from memory, as if another layer had run in between, while what the
reduction leaves in the cache for the second pass is part of the result. The last results are kept,
so that outputs move through memory as well.

Percentages are of the device's copy rate (bytes read and written by a copy of 1 GiB, measured in
the same run before and after), for 3 B bytes forward and 5 B backward, B being the bytes of x: the
least a streaming batch norm moves. Where x fits into the cache it can come out above 100 %.

`speedup` is the better of PyTorch's native and cuDNN paths over cupybn, forward + backward: above
1, cupybn is faster. `issued` is the same step as a loop of Python calls runs it, wall-clock time,
so that the cost of a call shows. Without PyTorch its columns stay empty.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import time
from collections import deque
from typing import Any

from .cases import Case, Tensors, available, every_case
from .gpu_paths import PATHS, Implementation, implementations
from .report import Report, Table, by_x, load_torch
from .totals import best_of, print_totals, totals

DEVICE = "cuda"
WARM_UP = 3
_COPIED = 1 << 30
_DELAY_CYCLES = 1_000_000  # about half a millisecond
_DELAY = """
extern "C" __global__ void delay(long long cycles) {
  long long begin = clock64();
  while (clock64() - begin < cycles) {}
}
"""


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("gpu", "GPU: device time, us")
    dtypes = available(["float16", "bfloat16", "float32", *(["float64"] if args.full else [])])
    repeat = args.repeat
    if args.quick:
        repeat, dtypes = min(repeat, 7), ["float16"]
        args.batches = args.batches or [32]
    bench = Bench(_usable_torch(args, report), repeat)
    report.add(bench.environment())
    section["copy rate before"] = rate = bench.copy_rate()
    report.say(f"copy rate: {rate / 1e12:.3f} TB/s")
    names = [name for name in PATHS if name in (args.paths or PATHS)]
    section["cases"] = records = []
    heading = None
    for case in report.progress(list(every_case(args, dtypes))):
        if (case.group, case.dtype, case.layout) != heading:
            heading = (case.group, case.dtype, case.layout)
            report.say(f"\n{case.group}, {case.dtype}, {case.layout}")
            report.say(_table().header())
        try:
            record = bench.record(case, names)
        except Exception as error:  # for the other cases there may be room
            record = {**case._asdict(), "bytes": case.bytes, "paths": {}, "skipped": reason(error)}
        bench.release()
        records.append(record)
        report.flush()
        report.say(_line(record, rate))
    section["copy rate after"] = after = bench.copy_rate()
    report.say(f"\ncopy rate: {rate / 1e12:.3f} TB/s before, {after / 1e12:.3f} after")
    section["totals"] = totals(records, {"0": rate}, PATHS, PATHS[1:3])
    print_totals(report, section["totals"], PATHS)


def reason(error: Exception) -> str:
    """The first line of an error, after its type."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _usable_torch(args: argparse.Namespace, report: Report) -> Any:
    torch = load_torch(args)
    if torch is not None and not torch.cuda.is_available():
        report.say("this PyTorch sees no CUDA device: its columns stay empty")
        return None
    return torch


class Bench:
    """A device, and how to measure on it."""

    def __init__(self, torch: Any, repeat: int) -> None:
        self.cp = importlib.import_module("cupy")
        self.torch, self.repeat = torch, repeat
        self.delay_kernel = self.cp.RawKernel(_DELAY, "delay")
        self.attributes = self.cp.cuda.Device().attributes
        self.cache_bytes = int(self.attributes["L2CacheSize"])

    def environment(self) -> dict[str, Any]:
        runtime, device = self.cp.cuda.runtime, self.cp.cuda.Device()
        name = runtime.getDeviceProperties(device.id)["name"]
        return {
            "device": name.decode() if isinstance(name, bytes) else str(name),
            "compute capability": device.compute_capability,
            "multiprocessors": int(self.attributes["MultiProcessorCount"]),
            "L2 MiB": self.cache_bytes / 2**20,
            "memory GiB": round(runtime.memGetInfo()[1] / 2**30, 1),
            "CUDA driver": runtime.driverGetVersion(),
            "CUDA runtime": runtime.runtimeGetVersion(),
            "CuPy": self.cp.__version__,
            "cuDNN": None if self.torch is None else self.torch.backends.cudnn.version(),
        }

    def delay(self) -> None:
        self.delay_kernel((1,), (1,), (self.cp.int64(_DELAY_CYCLES),))

    def event(self) -> Any:
        return self.cp.cuda.get_current_stream().record(self.cp.cuda.Event())

    def synchronize(self) -> None:
        self.cp.cuda.Device().synchronize()

    def elapsed(self, begin: Any, end: Any) -> float:
        """Microseconds."""
        return float(self.cp.cuda.get_elapsed_time(begin, end)) * 1e3

    def release(self) -> None:
        self.synchronize()
        self.cp.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()

    def copy_rate(self) -> float:
        """Bytes read and written a second, the median of 20 copies of 1 GiB."""
        source = self.cp.zeros(_COPIED, self.cp.uint8)
        target = self.cp.empty_like(source)
        marks = []
        for _ in range(WARM_UP + 20):
            self.delay()
            begin = self.event()
            target[...] = source
            marks.append((begin, self.event()))
        self.synchronize()
        times = [self.elapsed(*mark) for mark in marks[WARM_UP:]]
        del source, target
        self.release()
        return 2 * _COPIED / (statistics.median(times) * 1e-6)

    def record(self, case: Case, names: list[str]) -> dict[str, Any]:
        record: dict[str, Any] = {**case._asdict(), "bytes": case.bytes, "paths": {}}
        one = case.bytes
        free = self.cp.cuda.runtime.memGetInfo()[0]
        sets = max(1, min(64, math.ceil(4 * self.cache_bytes / (4 * one)), int(free // (10 * one))))
        if free < 12 * one:
            return record | {"skipped": "not enough device memory"}
        tensors = [Tensors(self.cp, self.torch, case, 2 * i) for i in range(sets)]
        working = self._working(case, names, tensors, record)
        kept: deque[Any] = deque(maxlen=sets * len(working))
        marks: dict[str, list[tuple[Any, Any, Any]]] = {name: [] for name in working}
        for repetition in range(WARM_UP + self.repeat):
            t = tensors[repetition % sets]
            for name, path in working.items():
                self.delay()
                begin = self.event()
                y = path.forward(t)
                middle = self.event()
                dx = path.backward(t, y)
                marks[name].append((begin, middle, self.event()))
                kept.append((y, dx))
        self.synchronize()
        kept.clear()
        for name, found in marks.items():
            times = self._summary(found[WARM_UP:])
            steps = max(2, min(20, int(20_000 / times["both us"])))
            issued = self._issued(working[name], tensors, steps)
            record["paths"][name] = times | {"issued us": issued}
        return record

    def _summary(self, marks: list[tuple[Any, Any, Any]]) -> dict[str, float]:
        forward, backward = (
            [self.elapsed(mark[i], mark[i + 1]) for mark in marks] for i in (0, 1)
        )  # fmt: skip
        both = [f + b for f, b in zip(forward, backward, strict=True)]
        return {
            "forward us": statistics.median(forward),
            "backward us": statistics.median(backward),
            "both us": statistics.median(both),
            "fastest us": min(both), "slowest us": max(both),
        }  # fmt: skip

    def _working(
        self, case: Case, names: list[str], tensors: list[Tensors], record: dict[str, Any]
    ) -> dict[str, Implementation]:
        """The implementations that take this case, and how far their results are from ours."""
        working, ours = {}, None
        for name, path in implementations(self.torch, case, DEVICE).items():
            if name not in names:
                continue
            try:
                y = path.forward(tensors[0])
                dx = path.backward(tensors[0], y)
                self.synchronize()
            except (MemoryError, RuntimeError) as error:
                record["paths"][name] = {"failed": reason(error)}
                continue
            working[name] = path
            if name == "cupybn":
                ours = (y, dx)
            elif ours is not None and self.torch is not None:
                record.setdefault("largest difference", {})[name] = [
                    self._difference(case, a, b[0]) for a, b in zip(ours, (y, dx), strict=True)
                ]
        return working

    def _difference(self, case: Case, ours: Any, theirs: Any) -> float:
        """The largest difference from a tensor of PyTorch's, over one sample."""
        a = ours[:1].copy()
        if case.dtype == "bfloat16":
            a = a.view(self.cp.int16)
        b = self.torch.from_dlpack(a)
        if case.dtype == "bfloat16":
            b = b.view(self.torch.bfloat16)
        return float((b.float() - theirs[:1].float()).abs().max())

    def _issued(self, path: Implementation, tensors: list[Tensors], steps: int) -> float:
        """Microseconds of wall-clock time for a step, the median of five rounds of steps."""
        times = []
        for _ in range(5):
            self.synchronize()
            began = time.perf_counter()
            for i in range(steps):
                t = tensors[i % len(tensors)]
                path.backward(t, path.forward(t))
            self.synchronize()
            times.append((time.perf_counter() - began) / steps * 1e6)
        return statistics.median(times)


def _table() -> Table:
    columns = [("shape", ">18s"), ("MB", ">7.1f"), ("forward", ">8.1f"), ("%", ">4.0f"),
               ("backward", ">8.1f"), ("%", ">4.0f"), ("issued", ">8.1f")]  # fmt: skip
    for name in PATHS[1:]:
        columns += [(name, ">8.1f"), ("issued", ">8.1f")]
    return Table(*columns, ("speedup", ">7.2f"))


def _line(record: dict[str, Any], rate: float) -> str:
    paths = record["paths"]
    ours = paths.get("cupybn", {})
    values: list[Any] = [by_x(record["shape"]), record["bytes"] / 1e6]
    for way, floor in (("forward", 3), ("backward", 5)):
        spent = ours.get(f"{way} us")
        share = None if spent is None else 100 * floor * record["bytes"] / (spent * 1e-6) / rate
        values += [spent, share]
    values.append(ours.get("issued us"))
    for name in PATHS[1:]:
        values += [paths.get(name, {}).get(key) for key in ("both us", "issued us")]
    best = best_of(record, PATHS[1:3])
    values.append(best / ours["both us"] if best and "both us" in ours else None)
    reason = record.get("skipped") or ours.get("failed")
    return "  ".join([_table().line(*values), *([reason] if reason else [])])
