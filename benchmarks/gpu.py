"""cupybn on a GPU beside PyTorch's native and cuDNN batch norms, without autograd, on the same
tensors; and beside the copy rate.

Device time, us, is between CUDA events around one forward, and one backward. A short delay kernel
goes first, so that everything is in the stream when it starts: no waiting for Python is in these
figures. Each case has several sets of tensors, together at least four times the second-level cache,
and every repetition takes the next set, so that what is read comes from memory. The last results
are kept: outputs move through memory as well.

Percentages are of the device's copy rate (bytes read and written by a copy of twenty times the
second-level cache, about 1 GB, before all cases and after them), for 3 B bytes forward and 5 B
backward, B being the bytes of x: the least a streaming batch norm moves. Where x fits into the
cache they can come out above 100 %. A ratio is cupybn's time over PyTorch's, forward + backward.
`issued` is the same step as a loop of Python calls runs it, wall-clock time, so that the cost of a
call shows.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import cupybn

from . import LAYOUTS
from .cases import EPS, MOMENTUM, RESNET50, Case, Tensors, chosen, of_resnet50, products
from .report import Report
from .timing import Parts, Turn, figures, interleave, turn_of, without_failing

cupy = import_module("cupy")
torch: Any = import_module("torch") if find_spec("torch") else None
torch = torch if torch is not None and torch.cuda.is_available() else None
DEVICE = "cuda"  # of PyTorch's parameters
PATHS = ("cupybn", "native", "cudnn")
_ODD = "64x4x112x112 128x4x224x224 4x256x16x16 64x2048 4096x1024 2x64x32x256x256"
_PAIRS = [("cupybn", "native"), ("cupybn", "cudnn")]
_WARM_UP = 3  # rounds
_COPIED = 20  # times the second-level cache
_STEPS = 20  # in a loop of Python calls
_DELAY = """
extern "C" __global__ void delay(long long cycles) {
  long long begin = clock64();
  while (clock64() - begin < cycles) {}
}
"""
_DELAY_CYCLES = 1_000_000  # about half a millisecond
Both = tuple[Callable[[Tensors], Any], Callable[[Tensors, Any], Any]]  # backward(t, forward(t))


def measure_gpu(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("gpu", "GPU: device time, us")
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    cudnn = torch and torch.backends.cudnn.version()
    report.add({"device": name, "cupy": cupy.__version__, "cuDNN": cudnn})
    rate = section["copy rate before"] = copy_rate()
    shapes = _ODD.split() + of_resnet50([32] if args.quick else [32, 64, 256])
    dtypes = ["float16"] if args.quick else ["float16", "bfloat16", "float32"]
    names = [name for name in PATHS if name in (args.paths or PATHS)]
    repeat = min(args.repeat, 7) if args.quick else args.repeat
    section["cases"] = records = []
    for case in chosen(args, products(shapes, dtypes, LAYOUTS), "float16"):
        try:
            found = record(case, names, repeat)
        except Exception as error:  # other cases may fit into memory
            failed = {"all": f"{type(error).__name__}: {error}"}
            found = {"us": {}, "ratio": {}, "issued us": {}, "failed": failed}
        cupy.cuda.Device().synchronize()
        cupy.get_default_memory_pool().free_all_blocks()
        if torch is not None:
            torch.cuda.empty_cache()
        records.append(case._asdict() | {"bytes": case.bytes} | found)
        report.flush()
        report.row(str(case), columns(case, found, rate), found["failed"])
    section["copy rate after"] = after = copy_rate()
    report.say(f"\ncopy rate: {rate / 1e12:.3f} TB/s before, {after / 1e12:.3f} after")
    section["ResNet-50"] = resnet50(records)
    for group, speedups in section["ResNet-50"].items():
        report.row(f"ResNet-50 {group}", speedups)


def device_turn_of(parts: Parts) -> Turn:
    """The turn of one round of calls, in device time."""
    delay, cuda = cupy.RawKernel(_DELAY, "delay"), cupy.cuda

    def turn(calls: int) -> dict[str, float]:
        stream = cuda.get_current_stream()
        delay((1,), (1,), (cupy.int64(_DELAY_CYCLES),))
        marks = [stream.record(cuda.Event())]
        for call in parts.values():
            call()
            marks.append(stream.record(cuda.Event()))
        cupy.cuda.Device().synchronize()
        times = [cuda.get_elapsed_time(*pair) / 1e3 for pair in itertools.pairwise(marks)]
        return dict(zip(parts, times, strict=True))

    return turn


def copy_rate() -> float:
    """Bytes read and written a second, the median of 20 copies."""
    size = _COPIED * int(cupy.cuda.Device().attributes["L2CacheSize"])
    source, target = (cupy.zeros(size, cupy.uint8) for _ in range(2))
    turn = device_turn_of({"copy": lambda: target.__setitem__(..., source)})
    times = interleave({"copy": turn}, _WARM_UP + 20, calls=1)
    return 2 * size / statistics.median(times["copy"]["copy"][_WARM_UP:])


def record(case: Case, names: list[str], repeat: int) -> dict[str, Any]:
    """All figures of a case."""
    sets = tensor_sets(case, torch)
    paths = {"cupybn": of_layer(case)} | (of_torch(case) if torch is not None else {})
    parts = {name: cycled(sets, *paths[name]) for name in names if name in paths}
    turns = {name: device_turn_of(part) for name, part in parts.items()}
    failed = without_failing(turns)
    interleave(turns, _WARM_UP, calls=1)
    found = figures(interleave(turns, repeat, calls=1), _PAIRS)
    wait = cupy.cuda.Device().synchronize
    loops = {name: turn_of(parts[name], wait, wait) for name in turns}
    issued = figures(interleave(loops, 5, calls=_STEPS), [])["us"]
    return found | {"issued us": {n: us["both"] for n, us in issued.items()}, "failed": failed}


def tensor_sets(case: Case, torch: Any) -> list[Tensors]:
    """Sets of tensors: with results together at least four times the second-level cache."""
    cache, free = cupy.cuda.Device().attributes["L2CacheSize"], cupy.cuda.runtime.memGetInfo()[0]
    count = min(64, math.ceil(cache / case.bytes), free // (10 * case.bytes))
    return [Tensors(cupy, torch, case, 2 * i) for i in range(max(1, count))]


def cycled(sets: list[Tensors], forward: Any, backward: Any) -> Parts:
    """Forward and backward of one set after the other; the last results are kept."""
    results, cycle = deque[Any](maxlen=2 * len(sets)), itertools.cycle(sets)
    return {
        "forward": lambda: results.append((t := next(cycle), forward(t))),
        "backward": lambda: results.append(backward(*results[-1])),
    }


def of_layer(case: Case) -> Both:
    options: dict[str, Any] = {"device": "cuda", "dtype": case.parameters}
    comm = cupybn.SelfCommunicator()
    layer = cupybn.SyncBatchNorm(case.shape[1], EPS, MOMENTUM, comm=comm, **options)
    return lambda t: layer.forward(t.x), lambda t, y: layer.backward(t.dy)


def of_torch(case: Case) -> dict[str, Both]:
    aten, dtype = torch.ops.aten, getattr(torch, case.parameters)
    weight, _, mean, var = parameters = [
        make(case.shape[1], device=DEVICE, dtype=dtype)
        for make in (torch.ones, torch.zeros, torch.zeros, torch.ones)
    ]

    def native_backward(t: Tensors, kept: Any) -> Any:
        given = (weight, mean, var, kept[1], kept[2], True, EPS, [True, True, True])
        return aten.native_batch_norm_backward(t.tdy, t.tx, *given)

    def cudnn_backward(t: Tensors, kept: Any) -> Any:
        given = (weight, mean, var, kept[1], kept[2], EPS, kept[3])
        return aten.cudnn_batch_norm_backward(t.tx, t.tdy, *given)

    given = (*parameters, True, MOMENTUM, EPS)
    return {
        "native": (lambda t: aten.native_batch_norm(t.tx, *given), native_backward),
        "cudnn": (lambda t: aten.cudnn_batch_norm(t.tx, *given), cudnn_backward),
    }


def columns(case: Case, found: dict[str, Any], rate: float) -> dict[str, Any]:
    """The printed figures of a case."""
    row: dict[str, Any] = {"MB": case.bytes / 1e6}
    for part, moved in (("forward", 3), ("backward", 5)):
        us = row[part] = found["us"].get("cupybn", {}).get(part)
        row[f"% {part}"] = us and 100 * moved * case.bytes / (us * 1e-6) / rate
    for name in PATHS:
        row[name] = found["us"].get(name, {}).get("both")
        row[f"{name} issued"] = found["issued us"].get(name)
    return row | {f"/ {b}": found["ratio"].get(f"{a} / {b}") for a, b in _PAIRS}


def resnet50(records: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Speedups over the better of PyTorch's paths, weighted to the 53 layers of ResNet-50.

    `sum` is the speedup of all layers' times together, if all were measured.
    """
    layers = {shape: int(n) for n, _, shape in (x.partition("*") for x in RESNET50.split())}
    groups: dict[str, list[float]] = {}
    sums: dict[str, list[float]] = {}
    for record in records:
        count = layers.get("x".join(map(str, record["shape"][1:])), 0)
        if count and record["ratio"]:
            group = f"N={record['shape'][0]} {record['dtype']} {record['layout']}"
            speedup = 1 / max(record["ratio"].values())
            groups.setdefault(group, []).extend([speedup] * count)
            own, total = record["us"]["cupybn"]["both"], sums.setdefault(group, [0.0, 0.0])
            total[:] = total[0] + count * own, total[1] + count * own * speedup
    return {
        group: {
            "mean speedup": statistics.geometric_mean(speedups),
            "lowest": min(speedups),
            "sum": sums[group][1] / sums[group][0]
            if len(speedups) == sum(layers.values())
            else None,
        }
        for group, speedups in groups.items()
    }
