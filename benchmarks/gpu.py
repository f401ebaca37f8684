"""cupybn on a GPU beside PyTorch's native and cuDNN batch norms, without autograd, on the same
tensors; and beside the copy rate.

Device time, us, is between CUDA events around one forward, and one backward. A short delay kernel
goes first, so that everything is in the stream when it starts: no waiting for Python is in these
figures. The paths take turns, repetition by repetition. Each case has several sets of tensors,
together at least four times the second-level cache, and every repetition takes the next set: what
is read comes from memory, as if another layer had run in between. The last results are kept, so
that outputs move through memory as well.

Percentages are of the device's copy rate (bytes read and written by a copy of 1 GiB, before all
cases and after them), for 3 B bytes forward and 5 B backward, B being the bytes of x: the least a
streaming batch norm moves. Where x fits into the cache they can come out above 100 %. A ratio is
cupybn's time over PyTorch's, forward + backward: below 1, cupybn is faster. `issued` is the same
step as a loop of Python calls runs it, wall-clock time, so that the cost of a call shows.
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
from typing import Any, NamedTuple

import cupybn

from .cases import EPS, MOMENTUM, Case, Tensors, chosen, products
from .report import Report
from .timing import Parts, Turn, figures, interleave, turn_of, working

DEVICE = "cuda"
PATHS = ("cupybn", "native", "cudnn")
_ODD = [
    (64, 4, 112, 112),
    (128, 4, 224, 224),
    (4, 256, 16, 16),
    (64, 2048),
    (4096, 1024),
    (2, 64, 32, 256, 256),
]
_PAIRS = [("cupybn", "native"), ("cupybn", "cudnn")]
_WARM_UP = 3
_COPIED = 1 << 30
_STEPS = 20  # in a loop of Python calls
_DELAY = """
extern "C" __global__ void delay(long long cycles) {
  long long begin = clock64();
  while (clock64() - begin < cycles) {}
}
"""
_DELAY_CYCLES = 1_000_000  # about half a millisecond


class Path(NamedTuple):
    """``kept = forward(tensors)``, then ``backward(tensors, kept)``; PyTorch's return tuples."""

    forward: Callable[[Tensors], Any]
    backward: Callable[[Tensors, Any], Any]

    def parts(self, sets: list[Tensors]) -> Parts:
        """Forward and backward of one set after the other; the last results are kept."""
        results, cycle = deque[Any](maxlen=2 * len(sets)), itertools.cycle(sets)
        t = sets[0]

        def forward() -> None:
            nonlocal t
            t = next(cycle)
            results.append(self.forward(t))

        return {
            "forward": forward,
            "backward": lambda: results.append(self.backward(t, results[-1])),
        }


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("gpu", "GPU: device time, us")
    device = Device()
    report.add(device.described())
    rate = section["copy rate before"] = device.copy_rate()
    dtypes = ["float16"] if args.quick else ["float16", "bfloat16", "float32"]
    default = products(_ODD, [32] if args.quick else [32, 64, 256], dtypes, ["rows", "columns"])
    names = [name for name in PATHS if name in (args.paths or PATHS)]
    repeat = min(args.repeat, 7) if args.quick else args.repeat
    section["cases"] = records = []
    for case in report.progress(chosen(args, default, "float16")):
        try:
            found = device.record(case, names, repeat)
        except Exception as error:  # for the other cases there may be memory
            failed = {"all": f"{type(error).__name__}: {error}"}
            found = {"us": {}, "ratio": {}, "issued us": {}, "failed": failed}
        device.release()
        records.append(case._asdict() | {"bytes": case.bytes} | found)
        report.flush()
        report.row(str(case), columns(case, found, rate))
        report.notes(found["failed"])
    section["copy rate after"] = after = device.copy_rate()
    report.say(f"\ncopy rate: {rate / 1e12:.3f} TB/s before, {after / 1e12:.3f} after")
    section["ResNet-50"] = resnet50(records)
    for group, speedups in section["ResNet-50"].items():
        report.row(f"ResNet-50 {group}", speedups)


class Device:
    """A device, and how to measure on it."""

    def __init__(self) -> None:
        self.cp = import_module("cupy")
        torch = import_module("torch") if find_spec("torch") else None
        self.torch = torch if torch is not None and torch.cuda.is_available() else None
        self.delay = self.cp.RawKernel(_DELAY, "delay")
        self.cache = int(self.cp.cuda.Device().attributes["L2CacheSize"])

    def described(self) -> dict[str, Any]:
        runtime, device = self.cp.cuda.runtime, self.cp.cuda.Device()
        name = runtime.getDeviceProperties(device.id)["name"]
        return {
            "device": name.decode() if isinstance(name, bytes) else str(name),
            "capability": device.compute_capability,
            "L2 MiB": self.cache / 2**20,
            "memory GiB": round(runtime.memGetInfo()[1] / 2**30, 1),
            "CUDA": f"driver {runtime.driverGetVersion()}, runtime {runtime.runtimeGetVersion()}",
            "cupy": self.cp.__version__,
            "cuDNN": None if self.torch is None else self.torch.backends.cudnn.version(),
        }

    def synchronize(self) -> None:
        self.cp.cuda.Device().synchronize()

    def release(self) -> None:
        self.synchronize()
        self.cp.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()

    def turn_of(self, parts: Parts) -> Turn:
        """The turn of one round of calls, in device time."""
        cuda = self.cp.cuda

        def event() -> Any:
            return cuda.get_current_stream().record(cuda.Event())

        def turn(calls: int, warm: float) -> dict[str, float]:
            self.delay((1,), (1,), (self.cp.int64(_DELAY_CYCLES),))
            marks = [event()]
            for call in parts.values():
                call()
                marks.append(event())
            self.synchronize()
            times = [cuda.get_elapsed_time(*pair) / 1e3 for pair in itertools.pairwise(marks)]
            return dict(zip(parts, times, strict=True))

        return turn

    def copy_rate(self) -> float:
        """Bytes read and written a second, the median of 20 copies of 1 GiB."""
        source, target = (self.cp.zeros(_COPIED, self.cp.uint8) for _ in range(2))

        def copy() -> None:
            target[...] = source

        times = interleave({"copy": self.turn_of({"copy": copy})}, _WARM_UP + 20, calls=1)
        return 2 * _COPIED / statistics.median(times["copy"]["copy"][_WARM_UP:])

    def record(self, case: Case, names: list[str], repeat: int) -> dict[str, Any]:
        """All figures of a case."""
        free = self.cp.cuda.runtime.memGetInfo()[0]
        count = min(64, math.ceil(self.cache / case.bytes), free // (10 * case.bytes))
        sets = [Tensors(self.cp, self.torch, case, 2 * i) for i in range(max(1, count))]
        paths = {"cupybn": own(case)}
        if self.torch is not None:
            paths |= of_torch(self.torch, case)
        parts = {name: path.parts(sets) for name, path in paths.items() if name in names}
        turns, failed = working({name: self.turn_of(part) for name, part in parts.items()})
        interleave(turns, _WARM_UP, calls=1)
        found = figures(interleave(turns, repeat, calls=1), _PAIRS)
        wait = self.synchronize
        loops = {name: turn_of(parts[name], ready=wait, finish=wait) for name in turns}
        issued = figures(interleave(loops, 5, calls=_STEPS), [])["us"]
        return found | {
            "issued us": {name: us["both"] for name, us in issued.items()},
            "failed": failed,
        }


def own(case: Case) -> Path:
    options: dict[str, Any] = {"device": DEVICE, "dtype": case.parameters}
    comm = cupybn.SelfCommunicator()
    layer = cupybn.SyncBatchNorm(case.shape[1], EPS, MOMENTUM, comm=comm, **options)
    return Path(lambda t: layer.forward(t.x), lambda t, y: layer.backward(t.dy))


def of_torch(torch: Any, case: Case) -> dict[str, Path]:
    aten = torch.ops.aten
    weight, bias, mean, var = (
        make(case.shape[1], device=DEVICE, dtype=getattr(torch, case.parameters))
        for make in (torch.ones, torch.zeros, torch.zeros, torch.ones)
    )

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

    return {"native": Path(native, native_backward), "cudnn": Path(cudnn, cudnn_backward)}


def columns(case: Case, found: dict[str, Any], rate: float) -> dict[str, Any]:
    """What is printed of a case."""
    row: dict[str, Any] = {"MB": case.bytes / 1e6}
    for part, moved in (("forward", 3), ("backward", 5)):
        us = row[part] = found["us"].get("cupybn", {}).get(part)
        row[f"% {part}"] = us and 100 * moved * case.bytes / (us * 1e-6) / rate
    for name in PATHS:
        row[name] = found["us"].get(name, {}).get("both")
        row[f"{name} issued"] = found["issued us"].get(name)
    return row | {f"/ {b}": found["ratio"].get(f"{a} / {b}") for a, b in _PAIRS}


def resnet50(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Speedups over the better of PyTorch's paths, weighted to the 53 layers of ResNet-50."""
    groups: dict[str, list[float]] = {}
    for record in records:
        if record["layers"] and record["ratio"]:
            group = f"N={record['shape'][0]} {record['dtype']} {record['layout']}"
            speedup = 1 / max(record["ratio"].values())
            groups.setdefault(group, []).extend([speedup] * record["layers"])
    return {
        group: {"mean speedup": statistics.geometric_mean(speedups), "lowest": min(speedups)}
        for group, speedups in groups.items()
    }
