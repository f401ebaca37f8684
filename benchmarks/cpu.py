"""The CPU backends beside PyTorch and JAX on the CPU: forward + backward in training mode, us.

`numba` and `numpy` are layers; `torch` is PyTorch's module with autograd, `compiled` the same under
``torch.compile`` (inductor), on the same memory; `jax` is one jitted function that returns y, the
gradients and the running statistics. All have the same number of threads, ``--threads``, and take
turns. A turn begins with 20 ms of calls that are not timed, as in a loop of training; with several
threads after a pause, in which the other's threads stop to spin.

A ratio is the median, over the repetitions, of one path's time over that of another in its turn:
below 1 the first is faster. With ``--against CHECKOUT`` there is a path `... before` for each
backend, the layers of that checkout, and both versions run in processes of their own. `err` is the
larger of the relative L2 errors of y and of dx against float64, or NumPy's long double for float64
data, over as many channels as make 4 Mi values.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any, NamedTuple

import numpy as np

import cupybn
from cupybn.backends import use_cpu_backend

from .cases import EPS, MOMENTUM, TINY, Case, Tensors, available, chosen
from .machine import ROOT
from .report import Report
from .timing import Turn, figures, interleave, turn_of, working
from .worker import Worker

BACKENDS = ("numba", "numpy")
PEERS = {"torch": "torch", "compiled": "torch", "jax": "jax"}  # path -> module
_SHAPES = [
    (32, 64, 56, 56),
    (64, 256, 14, 14),
    (32, 512, 7, 7),
    (32, 64, 112, 112),
    (256, 512),
    (4096, 1024),
    (64, 2048),
    (64, 4, 112, 112),
    (4, 256, 16, 16),
    TINY,
]
_REST = 0.02  # seconds in which OpenMP's threads stop to spin for more work
_WARM = 0.02  # seconds of calls before each turn
_CHECKED = 1 << 22  # values whose errors are taken


class Path(NamedTuple):
    """One way to compute a case."""

    turn: Turn
    error: Callable[[], float]


def default_cases() -> list[Case]:
    """What takes a few minutes: float32 in ten shapes, the rest in a few."""
    found = [Case(shape) for shape in _SHAPES]
    found.append(Case(_SHAPES[0], layout="columns"))
    for dtype in available(["float16", "bfloat16", "float64"]):
        found += [Case(shape, dtype) for shape in (_SHAPES[0], _SHAPES[4])]
        found.append(Case(_SHAPES[0], dtype, "columns"))
    return found


def quick_cases() -> list[Case]:
    shape = (32, 64, 28, 28)
    return [Case(shape), Case((256, 512)), Case(TINY), Case(shape, "float16", "columns")]


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("cpu", f"CPU: forward + backward, us, {args.threads} thread(s)")
    names = args.paths or default_paths(args.quick)
    if unknown := sorted({*names} - {*BACKENDS, *PEERS}):
        there = ", ".join([*BACKENDS, *PEERS])
        raise SystemExit(f"--paths: must be of {there}, got {', '.join(unknown)}")
    backends = [name for name in BACKENDS if name in names]
    workers = {}
    if args.against is not None:
        workers = {"": Worker(ROOT), " before": Worker(args.against)}
    timed = [*names, *(f"{name} before" for name in backends if workers)]
    pairs = [(name, "torch") for name in names if name != "torch"]
    pairs += [(name, f"{name} before") for name in backends]
    repeat, seconds = (min(5, args.repeat), 0.3) if args.quick else (args.repeat, args.seconds)
    rest = _REST if args.threads > 1 else 0.0
    section["cases"] = records = []
    default = quick_cases() if args.quick else default_cases()
    for case in report.progress(chosen(args, default, "float32")):
        paths, failed = paths_of(case, names, workers, args.threads)
        turns = {name: path.turn for name, path in paths.items()}
        times = interleave(turns, repeat, seconds=seconds, rest=rest, warm=_WARM)
        found = figures(times, pairs) | {"failed": failed}
        found["error"] = {name: paths[name].error() for name in times}
        records.append(case._asdict() | {"bytes": case.bytes, "threads": args.threads} | found)
        report.flush()
        both = {name: found["us"].get(name, {}).get("both") for name in timed}
        errors = {f"err {name}": found["error"].get(name) for name in names}
        report.row(str(case), both | found["ratio"] | errors)
        report.notes(failed)
    for worker in workers.values():
        worker.close()
    use_cpu_backend(os.environ.get("CUPYBN_CPU_BACKEND") or "auto")  # for other sections


def default_paths(quick: bool) -> list[str]:
    """Those that are installed; the quick form leaves out what compiles for long."""
    names = [name for name in BACKENDS if name == "numpy" or find_spec(name)]
    peers = [name for name, module in PEERS.items() if find_spec(module)]
    return names + [name for name in peers if name == "torch" or not quick]


def paths_of(
    case: Case, names: list[str], workers: dict[str, Worker], threads: int
) -> tuple[dict[str, Path], dict[str, str]]:
    """The paths that take the case, and the reasons of the others."""
    backends = [name for name in names if name in BACKENDS]
    torch = _torch(threads) if {"torch", "compiled"} & {*names} else None
    tensors = Tensors(np, torch, case)
    found = {} if workers else own_paths(backends, case, tensors)
    for suffix, worker in workers.items():
        worker.ask("begin", backends, *case)
        for name in backends:
            ask = partial(worker.ask, "turn", name), partial(worker.ask, "error", name)
            found[f"{name}{suffix}"] = Path(*ask)
    for name in names:
        if name == "jax":
            found[name] = _of_jax(tensors, case, threads)
        elif name in PEERS:
            found[name] = _of_torch(torch, tensors, case, compiled=name == "compiled")
    turns, failed = working({name: path.turn for name, path in found.items()})
    return {name: found[name] for name in turns}, failed


def own_paths(backends: list[str], case: Case, tensors: Tensors) -> dict[str, Path]:
    """The layers of this process through each backend."""
    return {name: _own(name, tensors, case) for name in backends}


def _own(backend: str, t: Tensors, case: Case) -> Path:
    kinds = {4: cupybn.BatchNorm2d, 5: cupybn.BatchNorm3d}
    kind = kinds.get(len(case.shape), cupybn.BatchNorm1d)
    layer = kind(case.shape[1], EPS, MOMENTUM, dtype=case.parameters)
    results = {}

    def forward() -> None:
        results["y"] = layer.forward(t.x)

    def backward() -> None:
        results["dx"] = layer.backward(t.dy)

    parts = {"forward": forward, "backward": backward}
    turn = turn_of(parts, begin=partial(use_cpu_backend, backend))
    return Path(turn, lambda: error(t, results["y"], results["dx"]))


def _torch(threads: int) -> Any:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes beside this one
    torch = import_module("torch")
    torch.set_num_threads(threads)
    return torch


def _of_torch(torch: Any, t: Tensors, case: Case, compiled: bool) -> Path:
    x = t.tx.detach().requires_grad_()
    kind = getattr(torch.nn, f"BatchNorm{max(1, len(case.shape) - 2)}d")
    module = kind(case.shape[1], EPS, MOMENTUM, dtype=getattr(torch, case.parameters))
    if compiled:
        torch._dynamo.reset()  # else it compiles for shapes of any size after the first few
        module = torch.compile(module, dynamic=False)
    results = {}

    def forward() -> None:
        x.grad = None
        results["y"] = module(x)

    def backward() -> None:
        results["y"].backward(t.tdy)
        results["dx"] = x.grad

    def found() -> float:
        return error(t, *(results[name].detach().double().numpy() for name in ("y", "dx")))

    return Path(turn_of({"forward": forward, "backward": backward}), found)


def _of_jax(t: Tensors, case: Case, threads: int) -> Path:
    os.environ["NPROC"] = str(threads)  # the size of XLA's pool of threads
    jax = import_module("jax")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jnp, last = jax.numpy, len(case.shape) - 1
    axis = last if case.layout == "columns" else 1
    axes = [i for i in range(last + 1) if i != axis]
    shape = [-1 if i == axis else 1 for i in range(last + 1)]
    factor = MOMENTUM * (count := t.x.size // case.shape[1]) / (count - 1)

    def normalized(x: Any, weight: Any, bias: Any) -> Any:
        wide = x.astype(case.parameters)
        mean, var = wide.mean(axes), wide.var(axes)
        scale = weight / jnp.sqrt(var + EPS)
        y = (wide - mean.reshape(shape)) * scale.reshape(shape) + bias.reshape(shape)
        return y.astype(x.dtype), (mean, var)

    def step(x: Any, dy: Any, weight: Any, bias: Any, running: Any) -> Any:
        y, pull, (mean, var) = jax.vjp(normalized, x, weight, bias, has_aux=True)
        keep = 1 - MOMENTUM
        return y, pull(dy), (keep * running[0] + MOMENTUM * mean, keep * running[1] + factor * var)

    x, dy = (jax.device_put(memory) for memory in t.memory)
    zeros, ones = (make(case.shape[1], case.parameters) for make in (jnp.zeros, jnp.ones))
    compiled, results = jax.jit(step), dict[str, Any]()

    def both() -> None:
        y, (dx, *_), _ = jax.block_until_ready(compiled(x, dy, ones, zeros, (zeros, ones)))
        results.update(y=y, dx=dx)

    def found() -> float:
        return error(t, *(np.moveaxis(np.asarray(results[n]), axis, 1) for n in ("y", "dx")))

    return Path(turn_of({"both": both}), found)


def error(t: Tensors, y: Any, dx: Any) -> float:
    """The larger of the relative L2 errors of y and dx."""
    channels = slice(0, max(1, _CHECKED * t.x.shape[1] // prod(t.x.shape)))
    wide = np.longdouble if t.x.dtype == np.float64 else np.float64
    x, dy = (a[:, channels].astype(wide) for a in (t.x, t.dy))
    mean = partial(np.mean, axis=(0, *range(2, x.ndim)), keepdims=True)
    xmu = x - mean(x)
    invstd = 1 / np.sqrt(mean(xmu**2) + EPS)
    xhat = xmu * invstd
    exact = xhat, (dy - mean(dy) - xhat * mean(dy * xhat)) * invstd
    return max(
        float(
            np.linalg.norm((a[:, channels].astype(np.float64) - b).ravel())
            / np.linalg.norm(b.ravel())
        )
        for a, b in zip((y, dx), exact, strict=True)
    )
