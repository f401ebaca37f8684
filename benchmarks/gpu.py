"""cupybn on a GPU beside PyTorch's batch norms, on the same tensors, and beside the copy rate.

    python benchmarks/gpu.py [--quick] [--json FILE] [--plot FILE] [--dtypes float16 ...]
                             [--layouts rows columns] [--batches 32 64 256] [--repeat 20]
                             [--only resnet odd overhead] [--shapes 32x64x56x56 ...]

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

PyTorch's paths, without autograd: its own kernels (native), cuDNN, and the kernels of SyncBatchNorm
(sync; a world of size one does not use them). The ratio is the better of native and cuDNN over
cupybn, forward + backward: above 1, cupybn is faster. `issued` is the same step as a loop of Python
calls runs it, wall-clock time, so that the cost of a call shows.

It measures, and asserts nothing. Without PyTorch its columns stay empty. The JSON file is written
again after every case, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

RESNET50 = {
    (64, 112, 112): 1, (64, 56, 56): 6, (256, 56, 56): 4, (128, 56, 56): 1, (128, 28, 28): 7,
    (512, 28, 28): 5, (256, 28, 28): 1, (256, 14, 14): 11, (1024, 14, 14): 7, (512, 14, 14): 1,
    (512, 7, 7): 5, (2048, 7, 7): 4,
}  # fmt: skip
ODD = [
    (64, 4, 112, 112), (128, 4, 224, 224), (4, 256, 16, 16), (64, 2048), (4096, 1024),
    (2, 64, 32, 256, 256),
]  # fmt: skip
TINY = (8, 16)
PATHS = ("cupybn", "native", "cudnn", "sync")
WARM_UP = 3
DELAY_CYCLES = 1_000_000  # about half a millisecond
DELAY = """
extern "C" __global__ void delay(long long cycles) {
  long long begin = clock64();
  while (clock64() - begin < cycles) {}
}
"""
EPS, MOMENTUM = 1e-5, 0.1


class Case(NamedTuple):
    group: str  # "resnet", "odd" or "chosen"
    shape: tuple[int, ...]
    count: int  # layers of this shape
    dtype: str
    layout: str


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for dtype in args.dtypes:
        for layout in args.layouts:
            if args.shapes:
                for shape in args.shapes:
                    yield Case("chosen", shape, 1, dtype, layout)
                continue
            if "resnet" in args.only:
                for n in args.batches:
                    for (c, h, w), count in RESNET50.items():
                        yield Case("resnet", (n, c, h, w), count, dtype, layout)
            if "odd" in args.only:
                for shape in ODD:
                    if layout == "rows" or len(shape) > 2:
                        yield Case("odd", shape, 1, dtype, layout)


class Tensors:
    """One set of x and dy, for CuPy and for PyTorch over the same memory."""

    def __init__(self, cp: Any, torch: Any, case: Case, seed: int) -> None:
        self.x, self.tx = self._make(cp, torch, case, seed)
        self.dy, self.tdy = self._make(cp, torch, case, seed + 1)

    @staticmethod
    def _make(cp: Any, torch: Any, case: Case, seed: int) -> tuple[Any, Any]:
        shape, last = case.shape, len(case.shape) - 1
        columns = case.layout == "columns" and last > 1
        order = (0, *range(2, last + 1), 1) if columns else tuple(range(last + 1))
        back = tuple(order.index(axis) for axis in range(last + 1))
        memory = cp.empty(tuple(shape[axis] for axis in order), dtype_of(case.dtype))
        fill(cp, memory, seed)
        theirs = None
        if torch is not None:  # through int16, because CuPy does not export bfloat16
            bits = memory.view(cp.int16) if case.dtype == "bfloat16" else memory
            theirs = torch.from_dlpack(bits)
            if case.dtype == "bfloat16":
                theirs = theirs.view(torch.bfloat16)
            theirs = theirs.permute(back)
        return memory.transpose(back), theirs


def dtype_of(name: str) -> Any:
    if name != "bfloat16":
        return name
    return importlib.import_module("ml_dtypes").bfloat16


def fill(cp: Any, memory: Any, seed: int) -> None:
    """Standard normal values, the same ones every 4 Mi elements."""
    period, begin = 1 << 22, seed * 12289 % (1 << 20)
    values = normal_values(cp, period + (1 << 20))[begin : begin + period]
    if memory.dtype.name == "bfloat16":
        bits = (values.view(cp.uint32) >> cp.uint32(16)).astype(cp.uint16)
        values = bits.view(memory.dtype)
    else:
        values = values.astype(memory.dtype)
    flat = memory.reshape(-1)
    for i in range(0, flat.size, period):
        flat[i : i + period] = values[: flat.size - i]


@lru_cache(maxsize=1)
def normal_values(cp: Any, size: int) -> Any:
    import numpy as np

    return cp.asarray(np.random.default_rng(0).standard_normal(size, dtype=np.float32))


class Implementation(NamedTuple):
    forward: Callable[[Tensors], Any]
    backward: Callable[[Tensors, Any], Any]


def implementations(cp: Any, torch: Any, case: Case) -> dict[str, Implementation]:
    import cupybn

    c = case.shape[1]
    layer = cupybn.SyncBatchNorm(c, EPS, MOMENTUM, comm=cupybn.SelfCommunicator(), device="cuda")

    def ours_backward(t: Tensors, y: Any) -> Any:
        return layer.backward(t.dy)

    found = {"cupybn": Implementation(lambda t: layer.forward(t.x), ours_backward)}
    if torch is None:
        return found
    aten = torch.ops.aten
    weight, bias, mean, var = (
        make(c, device="cuda") for make in (torch.ones, torch.zeros, torch.zeros, torch.ones)
    )
    count = torch.tensor([math.prod(case.shape) // c], dtype=torch.int32, device="cuda")
    counts = count.to(torch.float32)

    def native(t: Tensors) -> Any:
        return aten.native_batch_norm(t.tx, weight, bias, mean, var, True, MOMENTUM, EPS)

    def native_backward(t: Tensors, kept: Any) -> Any:
        return aten.native_batch_norm_backward(
            t.tdy, t.tx, weight, mean, var, kept[1], kept[2], True, EPS, [True, True, True]
        )

    def cudnn(t: Tensors) -> Any:
        return aten.cudnn_batch_norm(t.tx, weight, bias, mean, var, True, MOMENTUM, EPS)

    def cudnn_backward(t: Tensors, kept: Any) -> Any:
        _, save_mean, save_var, reserve = kept
        return aten.cudnn_batch_norm_backward(
            t.tx, t.tdy, weight, mean, var, save_mean, save_var, EPS, reserve
        )

    def sync(t: Tensors) -> Any:
        mean1, invstd1 = aten.batch_norm_stats(t.tx, EPS)
        pooled = aten.batch_norm_gather_stats_with_counts(
            t.tx, mean1[None], invstd1[None], mean, var, MOMENTUM, EPS, counts
        )
        return aten.batch_norm_elemt(t.tx, weight, bias, *pooled, EPS), *pooled

    def sync_backward(t: Tensors, kept: Any) -> Any:
        _, mean1, invstd1 = kept
        sum_dy, sum_dy_xmu, dweight, dbias = aten.batch_norm_backward_reduce(
            t.tdy, t.tx, mean1, invstd1, weight, True, True, True
        )
        return aten.batch_norm_backward_elemt(
            t.tdy, t.tx, mean1, invstd1, weight, sum_dy, sum_dy_xmu, count
        ), dweight, dbias  # fmt: skip

    return found | {
        "native": Implementation(native, native_backward),
        "cudnn": Implementation(cudnn, cudnn_backward),
        "sync": Implementation(sync, sync_backward),
    }


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        import cupy as cp

        self.cp, self.args, self.torch = cp, args, None
        if not args.no_torch:
            try:
                self.torch = importlib.import_module("torch")
            except ImportError:
                print("no PyTorch here: its columns stay empty", file=sys.stderr)
        if self.torch is not None and not self.torch.cuda.is_available():
            print("this PyTorch sees no CUDA device: its columns stay empty", file=sys.stderr)
            self.torch = None
        self.delay_kernel = cp.RawKernel(DELAY, "delay")
        self.attributes = cp.cuda.Device().attributes
        self.cache_bytes = int(self.attributes["L2CacheSize"])
        self.report: dict[str, Any] = {"environment": self.environment(), "cases": []}

    def environment(self) -> dict[str, Any]:
        import numpy as np

        import cupybn

        runtime = self.cp.cuda.runtime
        name = runtime.getDeviceProperties(self.cp.cuda.Device().id)["name"]
        found = {
            "command": f"python {' '.join(sys.argv)}",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": name.decode() if isinstance(name, bytes) else str(name),
            "compute capability": self.cp.cuda.Device().compute_capability,
            "multiprocessors": int(self.attributes["MultiProcessorCount"]),
            "L2 MiB": self.cache_bytes / 2**20,
            "memory GiB": round(runtime.memGetInfo()[1] / 2**30, 1),
            "CUDA driver": runtime.driverGetVersion(),
            "CUDA runtime": runtime.runtimeGetVersion(),
            "python": platform.python_version(),
            "cupybn": cupybn.__version__, "CuPy": self.cp.__version__, "NumPy": np.__version__,
            "PyTorch": None, "cuDNN": None, "repetitions": self.args.repeat,
        }  # fmt: skip
        if self.torch is not None:
            found["PyTorch"] = self.torch.__version__
            found["cuDNN"] = self.torch.backends.cudnn.version()
        return found

    # ---- measuring -------------------------------------------------------------------------------

    def delay(self) -> None:
        self.delay_kernel((1,), (1,), (self.cp.int64(DELAY_CYCLES),))

    def event(self) -> Any:
        return self.cp.cuda.get_current_stream().record(self.cp.cuda.Event())

    def synchronize(self) -> None:
        self.cp.cuda.Device().synchronize()

    def elapsed(self, begin: Any, end: Any) -> float:
        """Microseconds."""
        return float(self.cp.cuda.get_elapsed_time(begin, end)) * 1e3

    def copy_rate(self) -> float:
        """Bytes read and written a second, the median of 20 copies of 1 GiB."""
        source = self.cp.zeros(1 << 30, self.cp.uint8)
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
        return 2 * (1 << 30) / (statistics.median(times) * 1e-6)

    def release(self) -> None:
        self.synchronize()
        self.cp.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()

    def measure(self, case: Case) -> dict[str, Any]:
        size = math.prod(case.shape)
        one = size * (4 if case.dtype == "float32" else 2)
        record: dict[str, Any] = {**case._asdict(), "bytes": one}
        free = self.cp.cuda.runtime.memGetInfo()[0]
        sets = max(1, min(64, math.ceil(4 * self.cache_bytes / (4 * one)), int(free // (10 * one))))
        if free < 12 * one:
            return record | {"skipped": "not enough device memory"}
        tensors = [Tensors(self.cp, self.torch, case, 2 * i) for i in range(sets)]
        working = self.working(case, tensors, record)
        kept: deque[Any] = deque(maxlen=sets * len(working))
        marks: dict[str, list[tuple[Any, Any, Any]]] = {name: [] for name in working}
        for repetition in range(WARM_UP + self.args.repeat):
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
            forward, backward = (
                [self.elapsed(mark[i], mark[i + 1]) for mark in found[WARM_UP:]] for i in (0, 1)
            )
            both = [f + b for f, b in zip(forward, backward, strict=True)]
            record[name] = {
                "forward us": statistics.median(forward),
                "backward us": statistics.median(backward),
                "both us": statistics.median(both),
                "fastest us": min(both), "slowest us": max(both),
            }  # fmt: skip
        for name, path in working.items():
            steps = max(2, min(20, int(20_000 / record[name]["both us"])))
            record[name]["issued us"] = self.issued(path, tensors, steps)
        return record

    def working(
        self, case: Case, tensors: list[Tensors], record: dict[str, Any]
    ) -> dict[str, Implementation]:
        """The implementations that take this case, and how far their results are from ours."""
        working, ours = {}, None
        for name, path in implementations(self.cp, self.torch, case).items():
            if name not in self.args.paths:
                continue
            try:
                y = path.forward(tensors[0])
                dx = path.backward(tensors[0], y)
                self.synchronize()
            except (RuntimeError, NotImplementedError) as error:
                record[name] = {"failed": str(error).splitlines()[0]}
                continue
            working[name] = path
            if name == "cupybn":
                ours = (y, dx)
            elif ours is not None and self.torch is not None:
                record.setdefault("largest difference", {})[name] = [
                    self.difference(case, a, b[0]) for a, b in zip(ours, (y, dx), strict=True)
                ]
        return working

    def difference(self, case: Case, ours: Any, theirs: Any) -> float:
        """The largest difference from a tensor of PyTorch's, over one sample."""
        a = ours[:1].copy()
        if case.dtype == "bfloat16":
            a = a.view(self.cp.int16)
        b = self.torch.from_dlpack(a)
        if case.dtype == "bfloat16":
            b = b.view(self.torch.bfloat16)
        return float((b.float() - theirs[:1].float()).abs().max())

    def issued(self, path: Implementation, tensors: list[Tensors], steps: int) -> float:
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

    def overhead(self) -> dict[str, Any]:
        """Wall-clock microseconds of a call on a tiny tensor, in loops that do not wait."""
        import cupybn

        cp, torch = self.cp, self.torch
        x, dy = (cp.ones(TINY, cp.float32) for _ in range(2))
        x[::2] = 0
        layer = cupybn.BatchNorm1d(TINY[1], device="cuda")
        evaluated = cupybn.BatchNorm1d(TINY[1], device="cuda").eval()

        def step() -> None:
            layer.forward(x)
            layer.backward(dy)

        calls: dict[str, Callable[[], Any]] = {
            "cupybn forward": lambda: layer.forward(x, save_for_backward=False),
            "cupybn forward + backward": step,
            "cupybn evaluation": lambda: evaluated.forward(x),
        }
        if torch is not None:
            module = torch.nn.BatchNorm1d(TINY[1]).cuda()
            resting = torch.nn.BatchNorm1d(TINY[1]).cuda().eval()
            tx, tdy = torch.from_dlpack(x), torch.from_dlpack(dy)
            needs_grad = tx.clone().requires_grad_()

            def torch_step() -> None:
                needs_grad.grad = None
                module(needs_grad).backward(tdy)

            def torch_forward() -> None:
                with torch.no_grad():
                    module(tx)

            def torch_evaluation() -> None:
                with torch.no_grad():
                    resting(tx)

            calls |= {
                "PyTorch module forward": torch_forward,
                "PyTorch module forward + backward": torch_step,
                "PyTorch module evaluation": torch_evaluation,
            }
        times: dict[str, list[float]] = {name: [] for name in calls}
        loops, rounds = 200, 5 if self.args.quick else 15
        for round_ in range(rounds + 1):
            for name, call in calls.items():
                self.synchronize()
                began = time.perf_counter()
                for _ in range(loops):
                    call()
                self.synchronize()
                if round_:
                    times[name].append((time.perf_counter() - began) / loops * 1e6)
        return {name: statistics.median(found) for name, found in times.items()}

    # ---- reporting -------------------------------------------------------------------------------

    def flush(self) -> None:
        if self.args.json is None:
            return
        partial = self.args.json.with_name(self.args.json.name + ".part")
        partial.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.args.json)

    def run(self) -> None:
        for name, value in self.report["environment"].items():
            print(f"{name}: {value}")
        self.report["copy rate before"] = rate = self.copy_rate()
        print(f"copy rate: {rate / 1e12:.3f} TB/s\n", flush=True)
        self.flush()
        if "overhead" in self.args.only and not self.args.shapes:
            self.report["overhead"] = found = self.overhead()
            self.flush()
            print(f"one call on {TINY}, float32, wall-clock us:")
            print("\n".join(f"  {name:34} {value:8.2f}" for name, value in found.items()))
            print(flush=True)
        todo = list(cases(self.args))
        heading = None
        for case in progress(todo):
            if (case.group, case.dtype, case.layout) != heading:
                heading = (case.group, case.dtype, case.layout)
                say(header(case))
            record = self.measure(case)
            self.release()
            self.report["cases"].append(record)
            self.flush()
            say(line(record, rate))
        if todo:
            self.report["copy rate after"] = after = self.copy_rate()
            print(f"\ncopy rate: {rate / 1e12:.3f} TB/s before, {after / 1e12:.3f} after")
        self.report["totals"] = totals(self.report["cases"], rate)
        self.flush()
        print_totals(self.report["totals"])
        if self.args.plot is not None:
            plot(self.report["cases"], rate, self.report["environment"], self.args.plot)


def progress(items: list[Case]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, unit="case", file=sys.stderr, mininterval=1, smoothing=0.1)


def say(text: str) -> None:
    """Prints above the progress bar."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text, flush=True)
    else:
        tqdm.tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def header(case: Case) -> str:
    columns = f"{'forward':>9} {'%':>5} {'backward':>9} {'%':>5} {'issued':>9}"
    theirs = " ".join(f"{name:>9} {'issued':>9}" for name in PATHS[1:])
    return (
        f"\n{case.group}, {case.dtype}, {case.layout}: us; forward and backward of cupybn and "
        "their share of the copy rate, the other paths forward + backward\n"
        f"{'shape':>24} {'MB':>7} {columns} {theirs} {'ratio':>6}"
    )


def best_of_torch(record: dict[str, Any], key: str = "both us") -> float | None:
    found = [record[name][key] for name in PATHS[1:3] if key in record.get(name, {})]
    return min(found) if found else None


def line(record: dict[str, Any], rate: float) -> str:
    shape = "x".join(map(str, record["shape"]))
    text = f"{shape:>24} {record['bytes'] / 1e6:7.1f}"
    ours = record.get("cupybn", {})
    if "both us" not in ours:
        return f"{text} {record.get('skipped') or ours.get('failed')}"
    shares = {
        way: 100 * floor * record["bytes"] / (ours[f"{way} us"] * 1e-6) / rate
        for way, floor in (("forward", 3), ("backward", 5))
    }
    for way, share in shares.items():
        text += f" {ours[f'{way} us']:9.1f} {share:5.0f}"
    text += f" {ours['issued us']:9.1f}"
    for name in PATHS[1:]:
        theirs = record.get(name, {})
        for key in ("both us", "issued us"):
            text += f" {theirs[key]:9.1f}" if key in theirs else f" {'-':>9}"
    best = best_of_torch(record)
    return text + (f" {'-':>6}" if best is None else f" {best / ours['both us']:6.2f}")


def totals(records: list[dict[str, Any]], rate: float) -> list[dict[str, Any]]:
    """The 53 batch norms of ResNet-50, by batch size, dtype and layout."""
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["group"] == "resnet" and "both us" in record.get("cupybn", {}):
            key = (record["shape"][0], record["dtype"], record["layout"])
            groups.setdefault(key, []).append(record)
    found = []
    for (n, dtype, layout), members in groups.items():
        total: dict[str, Any] = {
            "N": n, "dtype": dtype, "layout": layout,
            "layers": sum(record["count"] for record in members),
            "floor us": sum(r["count"] * 8 * r["bytes"] for r in members) / rate * 1e6,
        }  # fmt: skip
        for name in PATHS:
            for key in ("both us", "issued us"):
                if all(key in record.get(name, {}) for record in members):
                    total[f"{name} {key}"] = sum(r["count"] * r[name][key] for r in members)
        ratios = []
        for record in members:
            best = best_of_torch(record)
            if best is not None:
                ratios.append((best / record["cupybn"]["both us"], record["count"]))
        if ratios:
            weights = sum(count for _, count in ratios)
            logs = sum(count * math.log(ratio) for ratio, count in ratios)
            total["geometric mean of ratios"] = math.exp(logs / weights)
            total["lowest ratio"] = min(ratio for ratio, _ in ratios)
        found.append(total)
    return found


def print_totals(found: list[dict[str, Any]]) -> None:
    if not found:
        return
    print("\nResNet-50, weighted to its 53 batch norms, forward + backward, us of device time")
    print(f"{'N':>5} {'dtype':>9} {'layout':>8} {'layers':>6} {'8B/copy':>9} "
          + " ".join(f"{name:>9}" for name in PATHS)
          + f" {'ratio (geometric mean)':>23} {'lowest':>7}")  # fmt: skip
    for total in found:
        text = f"{total['N']:5} {total['dtype']:>9} {total['layout']:>8} {total['layers']:6} "
        text += f"{total['floor us']:9.0f} "
        for name in PATHS:
            value = total.get(f"{name} both us")
            text += f"{'-':>9} " if value is None else f"{value:9.0f} "
        if "lowest ratio" in total:
            text += f"{total['geometric mean of ratios']:23.2f} {total['lowest ratio']:7.2f}"
        print(text)


def plot(
    records: list[dict[str, Any]], rate: float, environment: dict[str, Any], path: Path
) -> None:
    """Time over size, one panel for each dtype and layout, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes, layouts_ = (
        list(dict.fromkeys(record[key] for record in records)) for key in ("dtype", "layout")
    )
    if not records:
        return
    figure, axes = pyplot.subplots(
        len(layouts_), len(dtypes), squeeze=False, sharex=True, sharey=True,
        figsize=(4.2 * len(dtypes), 3.6 * len(layouts_)), layout="constrained",
    )  # fmt: skip
    for row, layout in enumerate(layouts_):
        for column, dtype in enumerate(dtypes):
            panel = axes[row][column]
            panel.set_title(f"{dtype}, {layout}", fontsize=10)
            members = [r for r in records if (r["dtype"], r["layout"]) == (dtype, layout)]
            for name, marker in zip(PATHS[:3], "o+x", strict=True):
                points = [
                    (r["bytes"] / 1e6, r[name]["both us"])
                    for r in members
                    if "both us" in r.get(name, {})
                ]
                if points:
                    panel.loglog(*zip(*points, strict=True), marker, label=name, markersize=5)
            sizes = sorted(record["bytes"] for record in members)
            floor = [8 * size / rate * 1e6 for size in sizes]
            panel.loglog([s / 1e6 for s in sizes], floor, "k-", lw=0.8, label="8 B / copy rate")
            panel.grid(True, which="major", linewidth=0.3)
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("MB of x")
    figure.supylabel("forward + backward, us")
    figure.suptitle(f"{environment['device']}, {environment['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def shape_of(text: str) -> tuple[int, ...]:
    """An argument like 32x64x56x56."""
    try:
        shape = tuple(int(size) for size in text.split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must look like 32x64x56x56, got {text!r}")
    return shape


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="float16, N = 32, few repetitions")
    add("--json", type=Path, metavar="FILE", help="where to write all figures")
    add("--plot", type=Path, metavar="FILE", help="picture to write")
    add("--dtypes", nargs="+", default=["float16", "bfloat16", "float32"],
        choices=["float16", "bfloat16", "float32"])  # fmt: skip
    add("--layouts", nargs="+", default=["rows", "columns"], choices=["rows", "columns"])
    add("--batches", nargs="+", type=int, default=[32, 64, 256], help="of the ResNet-50 shapes")
    add("--only", nargs="+", default=["resnet", "odd", "overhead"],
        choices=["resnet", "odd", "overhead"])  # fmt: skip
    add("--shapes", nargs="+", type=shape_of, metavar="NxCxHxW", help="these, and no others")
    add("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    add("--repeat", type=int, default=20)
    add("--no-torch", action="store_true", help="leave PyTorch out")
    args = parser.parse_args()
    if args.quick:
        args.dtypes, args.batches, args.repeat = ["float16"], [32], min(args.repeat, 7)
    return args


if __name__ == "__main__":
    Bench(parse_arguments()).run()
