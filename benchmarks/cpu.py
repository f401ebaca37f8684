"""The CPU backends beside PyTorch and JAX on the CPU: forward + backward in training mode, us.

`numba` and `numpy` are layers; `torch` is PyTorch's module with autograd, `compiled` the same
under ``torch.compile`` (inductor), on the same memory; `interop` and `interop-compiled` are
cupybn's module for PyTorch in the same two ways, with the backend that is taken where none is
named; `jax` is one jitted function that returns y, the gradients and the running statistics.
`masked`, only where ``--paths`` names it, is `numba` with a mask of half of the positions. All
have the same number of threads, ``--threads``, and take turns. A turn begins with 20 ms of calls
that are not timed, as in a loop of training; with several threads after a pause, in which the
other's threads stop to spin.

A ratio is the median, over the repetitions, of one path's time over that of another in its turn:
below 1 the first is faster; the last line has the geometric means over the cases. With ``--against
CHECKOUT`` there is a path `... before` for each backend, the layers of that checkout, and both
versions run in processes of their own, which have no PyTorch in them. `err` is the larger of the
relative L2 errors of y and of dx against float64, or NumPy's long double for float64 data, over as
many channels as make 4 Mi values.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from math import prod
from statistics import geometric_mean
from typing import Any, NamedTuple

import numpy as np

import cupybn
from cupybn.backends import use_cpu_backend

from . import LAYOUTS
from .cases import EPS, MOMENTUM, Case, Tensors, chosen, products
from .report import ROOT, Report
from .timing import Parts, Turn, Worker, figures, interleave, turn_of, without_failing

BACKENDS = ("numba", "numpy")
MASKED = "masked"
_SHAPES = (
    "32x64x56x56 64x256x14x14 32x512x7x7 32x64x112x112 256x512 "
    "4096x1024 64x2048 64x4x112x112 4x256x16x16 8x16"
)
_SECONDS = 3.0  # after which a case has enough repetitions
_WARM = 0.02  # seconds of calls before each turn
_REST = 0.02  # seconds in which OpenMP's threads stop to spin for more work
_CHECKED = 1 << 22  # values whose errors are taken
_MOVED = (
    10  # turns, after which a worker's arrays are made anew: their addresses make some per cent
)


Made = tuple[Parts, Callable[[], Iterable[Any]]]
"""What to call, and what finds the last y and dx."""


class Path(NamedTuple):
    turn: Turn
    error: Callable[[], float]


def default_cases(quick: bool) -> list[Case]:
    """What takes a few minutes: float32 in ten shapes, the rest in a few."""
    if quick:
        small = products(["32x64x28x28", "256x512", "8x16"])
        return [*small, *products(["32x64x28x28"], ["float16"], ["columns"])]
    columns = products(["32x64x56x56"], layouts=["columns"])
    others = products(["32x64x56x56", "256x512"], ["float16", "bfloat16", "float64"], LAYOUTS)
    return [*products(_SHAPES.split()), *columns, *others]


def measure_cpu(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("cpu", f"CPU: forward + backward, us, {args.threads} thread(s)")
    here = [name for name, (module, _) in MAKERS.items() if module == "numpy" or find_spec(module)]
    slow = {"compiled", "interop-compiled", "jax"} if args.quick else set()  # to compile
    names = args.paths or [name for name in here if name not in {*slow, MASKED}]
    if unknown := sorted({*names} - {*MAKERS}):
        raise SystemExit(f"--paths: must be of {', '.join(MAKERS)}, got {', '.join(unknown)}")
    workers = {}
    if args.against is not None:
        workers = {"": Worker(ROOT), " before": Worker(args.against)}
    befores = [f"{name} before" for name in names if name in BACKENDS and workers]
    pairs = [(name, "torch") for name in names if name != "torch"]
    pairs += [(name, "compiled") for name in names if name.startswith("interop")]
    pairs += [(name.removesuffix(" before"), name) for name in befores]
    pairs += [(MASKED, "numba")] if {MASKED, "numba"} <= {*names} else []
    repeat, seconds = (min(5, args.repeat), 0.3) if args.quick else (args.repeat, _SECONDS)
    rest = _REST if args.threads > 1 else 0.0
    section["cases"] = records = []
    for case in chosen(args, default_cases(args.quick), "float32"):
        paths = paths_of(case, names, workers)
        turns = {name: path.turn for name, path in paths.items()}
        failed = without_failing(turns)
        times = interleave(turns, repeat, seconds, rest)
        found = figures(times, pairs) | {"failed": failed}
        found["error"] = {name: paths[name].error() for name in times}
        records.append(case._asdict() | {"bytes": case.bytes, "threads": args.threads} | found)
        report.flush()
        both = {name: found["us"].get(name, {}).get("both") for name in [*names, *befores]}
        errors = {f"err {name}": found["error"].get(name) for name in names}
        report.row(str(case), both | found["ratio"] | errors, failed)
    if len(records) > 1 and means(records):
        report.row("geometric mean", dict.fromkeys(both) | means(records) | dict.fromkeys(errors))
    for worker in workers.values():
        worker.pool.shutdown()
    use_cpu_backend(_asked_for())  # for other sections


def _asked_for() -> str:
    """The backend of who is not told which."""
    return os.environ.get("CUPYBN_CPU_BACKEND") or "auto"


def means(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The geometric mean of each ratio that every case has."""
    ratios = [record["ratio"] for record in records]
    return {
        name: geometric_mean(ratio[name] for ratio in ratios)
        for name in ratios[0]
        if all(name in ratio for ratio in ratios)
    }


def paths_of(case: Case, names: list[str], workers: dict[str, Worker]) -> dict[str, Path]:
    """Those of this process, and of the workers."""
    backends = tuple(name for name in names if name in BACKENDS)
    found = {**paths_here(tuple(n for n in names if not workers or n not in backends), case)}
    for suffix, worker in workers.items():
        for name in backends:
            ask = partial(worker.ask, served, name, backends, case)
            found[name + suffix] = Path(ask, partial(ask, 0))
    return found


@lru_cache(1)
def paths_here(names: tuple[str, ...], case: Case, made: int = 0) -> dict[str, Path]:
    """The paths in this process, made so many times before."""
    torch = import_module("torch") if {*names} & OF_TORCH else None
    tensors = Tensors(np, torch, case)
    return {name: path(name, tensors, case) for name in names}


def path(name: str, tensors: Tensors, case: Case) -> Path:
    parts, results = MAKERS[name][1](name, tensors, case)
    timed = turn_of(parts, warm=_WARM)

    def turn(calls: int) -> dict[str, float]:
        backend = "numba" if name == MASKED else name
        use_cpu_backend(backend if backend in BACKENDS else _asked_for())
        return timed(calls)

    found = partial(error, tensors, mask=half_of(case) if name == MASKED else None)
    return Path(turn, lambda: found(*results()))


def half_of(case: Case) -> Any:
    """A mask of about half of the positions, at random."""
    positions = case.shape[:1] + case.shape[2:]
    return np.random.default_rng(0).random(positions) < 0.5


_turns = itertools.count()


def served(name: str, names: tuple[str, ...], case: Case, calls: int) -> Any:
    """In a worker, a turn of some calls; of none, the error."""
    path = paths_here(names, case, next(_turns) // _MOVED)[name]
    times = path.turn(calls or 1)
    return times if calls else path.error()


def of_layer(name: str, t: Tensors, case: Case) -> Made:
    kind = getattr(cupybn, f"BatchNorm{max(1, len(case.shape) - 2)}d")
    layer = kind(case.shape[1], EPS, MOMENTUM, dtype=case.parameters)
    options = {"mask": half_of(case)} if name == MASKED else {}
    results = {}

    def forward() -> None:
        results["y"] = layer.forward(t.x, **options)

    def backward() -> None:
        results["dx"] = layer.backward(t.dy)

    return {"forward": forward, "backward": backward}, results.values


def of_torch(name: str, t: Tensors, case: Case) -> Made:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes beside this one
    torch = import_module("torch")
    x = t.tx.detach().requires_grad_()
    of = import_module("cupybn.interop.torch") if name.startswith("interop") else torch.nn
    kind = getattr(of, f"BatchNorm{max(1, len(case.shape) - 2)}d")
    module = kind(case.shape[1], EPS, MOMENTUM, dtype=getattr(torch, case.parameters))
    if name.endswith("compiled"):
        torch._dynamo.reset()  # else it compiles for shapes of any size after the first few
        module = torch.compile(module, dynamic=False)
    results = {}

    def forward() -> None:
        x.grad = None
        results["y"] = module(x)

    def backward() -> None:
        results["y"].backward(t.tdy)

    parts = {"forward": forward, "backward": backward}
    return parts, lambda: (a.detach().double().numpy() for a in (results["y"], x.grad))


def of_jax(_: str, t: Tensors, case: Case) -> Made:
    jax = import_module("jax")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    axis = len(case.shape) - 1 if case.layout == "columns" else 1
    axes = [i for i in range(len(case.shape)) if i != axis]

    def normalized(x: Any, weight: Any, bias: Any) -> Any:
        wide = x.astype(case.parameters)
        mean, var = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
        y = (wide - mean) * (weight / jax.numpy.sqrt(var + EPS)) + bias
        return y.astype(x.dtype), (mean, var)

    def step(x: Any, dy: Any, weight: Any, bias: Any, *running: Any) -> Any:
        y, pull, found = jax.vjp(normalized, x, weight, bias, has_aux=True)
        kept = [a + MOMENTUM * (b - a) for a, b in zip(running, found, strict=True)]
        return y, *pull(dy), *kept

    x, dy = (jax.device_put(memory) for memory in t.memory)
    zero = x.astype(case.parameters).mean(axes, keepdims=True) * 0
    parameters = (zero + 1, zero, zero, zero + 1)
    compiled, results = jax.jit(step), [x, dy]

    def both() -> None:
        results[:] = jax.block_until_ready(compiled(x, dy, *parameters))

    return {"both": both}, lambda: (np.moveaxis(np.asarray(a), axis, 1) for a in results[:2])


MAKERS: dict[str, tuple[str, Callable[[str, Tensors, Case], Made]]] = {
    "numba": ("numba", of_layer),
    "numpy": ("numpy", of_layer),
    MASKED: ("numba", of_layer),
    "torch": ("torch", of_torch),
    "compiled": ("torch", of_torch),
    "interop": ("torch", of_torch),
    "interop-compiled": ("torch", of_torch),
    "jax": ("jax", of_jax),
}
OF_TORCH = {name for name, (module, _) in MAKERS.items() if module == "torch"}


def error(t: Tensors, y: Any, dx: Any, mask: Any = None) -> float:
    """The larger of the relative L2 errors of y and dx, over the valid values."""
    channels = slice(0, max(1, _CHECKED * t.x.shape[1] // prod(t.x.shape)))
    wide = np.longdouble if t.x.dtype == np.float64 else np.float64
    x, dy, y, dx = (a[:, channels].astype(wide) for a in (t.x, t.dy, y, dx))
    if mask is not None:
        x, dy, y, dx = (np.moveaxis(a, 1, -1)[mask] for a in (x, dy, y, dx))
    mean = partial(np.mean, axis=(0, *range(2, x.ndim)), keepdims=True)
    xmu = x - mean(x)
    invstd = 1 / np.sqrt(mean(xmu**2) + EPS)
    xhat = xmu * invstd
    exact = xhat, (dy - mean(dy) - xhat * mean(dy * xhat)) * invstd
    return max(
        float(np.sqrt(np.sum((a - b) ** 2) / np.sum(b**2)))
        for a, b in zip((y, dx), exact, strict=True)
    )
