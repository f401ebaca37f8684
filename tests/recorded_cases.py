"""The cases of ``recording.py``, for one backend; runs one process, or the ranks of an MPI job.

A case is a function of a communicator that returns digests by name. Its name starts with the
backend and the number of ranks. Random numbers come from a seed that the case, the rank and the
step give, so cases do not depend on each other. Only the public API is used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import numpy as np

import cupybn
from cupybn import functional
from cupybn.communicators import MpiCommunicator
from cupybn.testing import run_ranks

BACKEND = os.environ["CUPYBN_CPU_BACKEND"]
STEPS = 4  # a first one, one that binds what depends on shapes only, two that find it bound
TIMEOUT = 20  # seconds for a message between threads
Items = dict[str, str]
Case = Callable[[Any], Items]

DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
if find_spec("ml_dtypes"):
    import ml_dtypes

    DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


# ---- digests -------------------------------------------------------------------------------------


def digest(array: Any) -> str:
    """dtype, shape, strides and a digest of the values in C order; all NaN count as one."""
    array = np.asarray(array)
    # Which NaN comes out depends on the order of operands, which no standard says.
    if array.dtype.kind in "fV" and np.isnan(array).any():
        array = np.where(np.isnan(array), array.dtype.type("nan"), array)
    strides = [s for s, size in zip(array.strides, array.shape, strict=True) if size > 1]
    layout = f"{list(array.shape)} by {strides}" if array.size else f"{list(array.shape)}"
    return f"{array.dtype} {layout} {blake2b(array.tobytes(), digest_size=8).hexdigest()}"


class Spy:
    """A communicator that keeps a digest of every message as it is handed over."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.seen: list[str] = []

    def allreduce(self, message: Any, label: str = "") -> Any:
        values = np.asarray(message)
        bits = blake2b(values.tobytes(), digest_size=8).hexdigest()
        self.seen.append(f"{label}: {values.size} x {values.dtype} {bits}")
        return self._comm.allreduce(message, label)

    def taken(self) -> str:
        """What was seen since the last call."""
        seen, self.seen = self.seen, []
        return "; ".join(seen)


def arrays_of(layer: Any) -> Items:
    """Digests of all parameters, gradients and buffers of a tree."""
    return {
        f"{kind} {name}": digest(array)
        for kind, pairs in (
            ("parameter", layer.named_parameters()),
            ("gradient", layer.named_gradients()),
            ("buffer", layer.named_buffers()),
        )
        for name, array in pairs
    }


def under(prefix: str, items: Items) -> Items:
    return {f"{prefix} {name}": text for name, text in items.items()}


def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """(result, "") or (None, class and text of the exception)."""
    try:
        return function(), ""
    except Exception as error:  # any: its class and text are what is recorded
        return None, f"{type(error).__name__}: {error}"


def generator(*what: Any) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(what).encode()))


# ---- layouts -------------------------------------------------------------------------------------


def _dense(values: Any) -> Any:
    return values


def _channels_last(values: Any) -> Any:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1)


def _every_second(values: Any) -> Any:
    array = np.zeros((*values.shape[:-1], 2 * values.shape[-1]), values.dtype)[..., ::2]
    array[...] = values
    return array


def _misaligned(values: Any) -> Any:
    memory = np.zeros(values.nbytes + 1, np.uint8)[1:]
    array = memory.view(values.dtype).reshape(values.shape)
    array[...] = values
    return array


def _read_only(values: Any) -> Any:
    values.flags.writeable = False
    return values


class Layout(NamedTuple):
    """Shape of a rank's x, without the batch, and how it lies in memory.

    `samples`: of the rank; where ranks have different numbers, they tell their data apart.
    """

    shape: tuple[int, ...]
    samples: Callable[[int, int], int] = lambda rank, size: 3 + rank
    arrange: Callable[[Any], Any] = _dense
    channel_axis: int = 1

    def array(self, dtype: Any, rank: int, size: int, random: np.random.Generator) -> Any:
        shape = (self.samples(rank, size), *self.shape)
        return self.arrange((random.standard_normal(shape) * 2 + rank + 0.5).astype(dtype))

    @property
    def channels(self) -> int:
        return self.shape[0 if self.channel_axis == 1 else -1]


LAYOUTS = {
    "NC": Layout((6,), lambda rank, size: 7 + rank),
    "wide NC": Layout((130,)),
    "NCL, short rows": Layout((5, 7)),
    "NCL, long rows": Layout((3, 150)),
    "NCHW": Layout((4, 5, 3)),
    "NCHW over channels-last memory": Layout((4, 5, 3), arrange=_channels_last),
    "channel_axis=-1": Layout((5, 3, 4), channel_axis=-1),
    "every second value": Layout((3, 10), arrange=_every_second),
    "misaligned": Layout((3, 110), arrange=_misaligned),
    "read-only": Layout((4, 9), arrange=_read_only),
    "empty": Layout((3, 4), lambda rank, size: 0),
    "last rank empty": Layout((3, 4), lambda rank, size: 0 if rank == size - 1 else 4),
    "one sample a rank": Layout((3,), lambda rank, size: 1),
}
LARGE = {
    "several segments": Layout((2, 40_000), lambda rank, size: 4),
    "several segments of columns": Layout((24,), lambda rank, size: 24_000 + rank),
    "past the caches": Layout((4, 70_001), lambda rank, size: 4),
}

# The Numba backend of a71c31a raises a TypingError here, so there is nothing to compare with.
UNSUPPORTED = ("bfloat16", "read-only") if BACKEND == "numba" else None
UNWATCHED = ["NC", "NCL, long rows", "NCHW over channels-last memory", "last rank empty"]


# ---- layers --------------------------------------------------------------------------------------


class Option(NamedTuple):
    """How a layer is made and called.

    `out`: whether y and dx have a place given. `other_dy`: dy is strided, whatever x is.
    """

    keywords: dict[str, Any] = {}  # noqa: RUF012
    residual: bool = False
    out: bool = False
    evaluate: bool = False
    save: bool = True
    other_dy: bool = False


_relu = {"activation": "relu"}
OPTIONS = {
    "plain": Option(),
    "ReLU": Option(_relu),
    "residual": Option(residual=True),
    "residual, ReLU": Option(_relu, residual=True),
    "no affine": Option({"affine": False}),
    "no affine, ReLU": Option({"affine": False, **_relu}),
    "no bias": Option({"bias": False}),
    "no bias, ReLU": Option({"bias": False, **_relu}),
    "momentum=None": Option({"momentum": None}),
    "eval": Option(evaluate=True),
    "eval, residual, ReLU": Option(_relu, residual=True, evaluate=True),
    "eval without tracking": Option({"track_running_stats": False}, evaluate=True),
    "eval without saving": Option(evaluate=True, save=False, out=True),
    "out": Option(out=True),
    "out, residual, ReLU": Option(_relu, out=True, residual=True),
    "check_finite": Option({"check_finite": True}),
    "no tracking": Option({"track_running_stats": False}),
    "without saving": Option(save=False),
    "without saving, residual, ReLU": Option(_relu, save=False, residual=True),
    "dy of another layout, ReLU": Option(_relu, other_dy=True),
}


def make_layer(comm: Any, layout: Layout, dtype: Any, **keywords: Any) -> Any:
    """A layer with random parameters, the same on all ranks."""
    layer = cupybn.SyncBatchNorm(
        layout.channels,
        comm=comm,
        name="norm",
        channel_axis=layout.channel_axis,
        dtype="float64" if dtype == np.float64 else "float32",
        **keywords,
    )
    random = generator("parameters")
    for parameter in layer.params.values():
        parameter[...] = random.standard_normal(parameter.shape) + 0.5
    return layer


def train_step(layer: Any) -> None:
    """Parameters move in place, as with an optimiser; gradients are added up over the steps."""
    for name, parameter in layer.params.items():
        parameter -= 0.05 * layer.grads[name]


def layer_case(
    dtype: Any, layout: Layout, option: Option, steps: int, comm: Any, *, watched: bool = True
) -> Items:
    """Forward and backward, step by step; messages only if `watched`."""
    spy = Spy(comm)
    layer = make_layer(spy if watched else comm, layout, dtype, **option.keywords)
    make = partial(layout.array, dtype, comm.rank, comm.size)
    items: Items = {}
    for step in range(steps):
        random = generator(dtype.name, comm.rank, step)
        x, residual = make(random), make(random)
        dy = _every_second(make(random)) if option.other_dy else make(random)
        layer.train(step == 0 or not option.evaluate)
        forward: dict[str, Any] = {"save_for_backward": option.save}
        backward: dict[str, Any] = {}
        if option.residual:
            forward["residual"] = residual
        if option.out:
            forward["out"] = np.array(x)
            backward["out"] = np.array(dy)
        y, error = attempt(partial(layer.forward, x, **forward))
        found = {"y": error or digest(y)}
        if option.save and not error:
            dx, error = attempt(partial(layer.backward, dy, **backward))
            parts = dx if isinstance(dx, tuple) else (dx,)
            for name, part in zip(("dx", "dresidual"), parts, strict=False):
                found[name] = error or digest(part)
        items |= under(f"step {step}", found | arrays_of(layer) | {"messages": spy.taken()})
        train_step(layer)
        if step == 1:
            layer.zero_grad()
    return items


def layer_cases() -> Iterator[tuple[str, Case]]:
    for (dtype, of_dtype), (layout, of_layout), (option, of_option) in product(
        DTYPES.items(), LAYOUTS.items(), OPTIONS.items()
    ):
        if (dtype, layout) != UNSUPPORTED:
            yield (
                f"layer | {dtype} | {layout} | {option}",
                partial(layer_case, of_dtype, of_layout, of_option, STEPS),
            )
    for (dtype, of_dtype), (layout, of_layout), option in product(
        DTYPES.items(), LARGE.items(), ("plain", "residual, ReLU")
    ):
        if layout != "past the caches" or (dtype, option) == ("float64", "residual, ReLU"):
            yield (
                f"layer | {dtype} | {layout} | {option}",
                partial(layer_case, of_dtype, of_layout, OPTIONS[option], 2),
            )
    # The library may know its own communicators and take a shorter way with them.
    for (dtype, of_dtype), layout, option in product(
        DTYPES.items(), UNWATCHED, ("plain", "residual, ReLU", "no affine")
    ):
        case = partial(layer_case, of_dtype, LAYOUTS[layout], OPTIONS[option], STEPS, watched=False)
        yield f"layer, communicator without a spy | {dtype} | {layout} | {option}", case


# ---- what changes between two calls --------------------------------------------------------------


def _replace(kind: str, name: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        arrays = getattr(layer, kind)
        arrays[name] = arrays[name] * 2

    return change


def _read_only_array(kind: str, name: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        getattr(layer, kind)[name].flags.writeable = False

    return change


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, name, value)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight replaced": _replace("params", "weight"),
    "weight gradient replaced": _replace("grads", "weight"),
    "running_var replaced": _replace("buffers", "running_var"),
    "bias gradient read-only": _read_only_array("grads", "bias"),
    "running_mean read-only": _read_only_array("buffers", "running_mean"),
    "num_batches_tracked read-only": _read_only_array("buffers", "num_batches_tracked"),
    "weight read-only": _read_only_array("params", "weight"),
    "eps": _set("eps", 0.25),
    "bad eps": _set("eps", -1.0),
    "momentum": _set("momentum", 0.5),
    "bad momentum": _set("momentum", 2.0),
    "momentum=None": _set("momentum", None),
    "ReLU": _set("activation", "relu"),
    "bad activation": _set("activation", "gelu"),
    "track_running_stats": _set("track_running_stats", False),
    "check_finite": _set("check_finite", True),
    "name": _set("name", "another"),
    "eval": lambda layer: layer.eval(),
    "load_state_dict": lambda layer: layer.load_state_dict(
        {name: array * 2 for name, array in layer.state_dict().items()}
    ),
    "reset": lambda layer: (layer.reset_parameters(), layer.reset_running_stats()),
}


def change_case(change: str, on_all: bool, comm: Any) -> Items:
    """Bound calls, a change of the layer, on all ranks or on the last only, and more calls."""
    spy = Spy(comm)
    layout, dtype = LAYOUTS["NCL, short rows"], DTYPES["float32"]
    layer = make_layer(spy, layout, dtype)
    items: Items = {}
    for step in range(2 * STEPS):
        if step == STEPS and (on_all or comm.rank == comm.size - 1):
            CHANGES[change](layer)
        random = generator("change", comm.rank, step)
        x, dy = (layout.array(dtype, comm.rank, comm.size, random) for _ in range(2))
        y, error = attempt(partial(layer.forward, x, save_for_backward=True))
        found = {"y": error or digest(y)}
        if not error:
            dx, error = attempt(partial(layer.backward, dy))
            found["dx"] = error or digest(dx)
        items |= under(f"step {step}", found | arrays_of(layer) | {"messages": spy.taken()})
    return items


_float32 = partial(np.ones, dtype=np.float32)


def _with_nan(x: Any) -> Any:
    return np.where(x == x.max(), np.float32("nan"), x)


BAD_FORWARD: dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]] = {
    "channels": lambda x: (_float32((2, 4, 7)), {}),
    "dimensions": lambda x: (_float32(5), {}),
    "dtype": lambda x: (x.astype(np.float64), {}),
    "integers": lambda x: (x.astype(np.int64), {}),
    "no array": lambda x: ([1.0, 2.0], {}),
    "residual's shape": lambda x: (x, {"residual": x[:, :, :-1]}),
    "residual's dtype": lambda x: (x, {"residual": x.astype(np.float16)}),
    "out over x": lambda x: (x, {"out": x}),
    "out's shape": lambda x: (x, {"out": _float32((1, 5, 7))}),
    "out's dtype": lambda x: (x, {"out": x.astype(np.float64)}),
    "out read-only": lambda x: (x, {"out": _read_only(x.copy())}),
    "NaN": lambda x: (_with_nan(x), {}),
    "other length": lambda x: (np.ascontiguousarray(x[:, :, :-1]), {}),
    "one value": lambda x: (x[:1, :, :1], {}),
}
BAD_BACKWARD: dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]] = {
    "shape": lambda dy: (dy[:, :, :-1], {}),
    "dtype": lambda dy: (dy.astype(np.float64), {}),
    "no array": lambda dy: ("dy", {}),
    "out's shape": lambda dy: (dy, {"out": dy[:1].copy()}),
    "out read-only": lambda dy: (dy, {"out": _read_only(dy.copy())}),
    "out over dy": lambda dy: (dy, {"out": dy}),
    "saved": lambda dy: (dy, {"saved": "nothing"}),
    "NaN": lambda dy: (_with_nan(dy), {}),
}


def call_case(direction: str, what: str, on_all: bool, comm: Any) -> Items:
    """Bound calls, a bad or unusual one on all ranks or on the last only, and good ones again."""
    spy = Spy(comm)
    layout, dtype = LAYOUTS["NCL, short rows"], DTYPES["float32"]
    layer = make_layer(spy, layout, dtype, check_finite=True)
    items: Items = {}
    for step in range(STEPS + 2):
        random = generator("call", comm.rank, step)
        x, dy = (layout.array(dtype, comm.rank, comm.size, random) for _ in range(2))
        forward: dict[str, Any] = {}
        backward: dict[str, Any] = {}
        if step == STEPS and (on_all or comm.rank == comm.size - 1):
            if direction == "forward":
                x, forward = BAD_FORWARD[what](x)
            else:
                dy, backward = BAD_BACKWARD[what](dy)
        y, error = attempt(partial(layer.forward, x, **forward))
        found = {"y": error or digest(y)}
        if not error:
            dx, error = attempt(partial(layer.backward, dy, **backward))
            found["dx"] = error or digest(dx)
            if error:  # the context is still there
                dx, error = attempt(partial(layer.backward, np.ones_like(y)))
                found["dx, second call"] = error or digest(dx)
        items |= under(f"step {step}", found | arrays_of(layer) | {"messages": spy.taken()})
    return items


def changing_cases(ranks: int) -> Iterator[tuple[str, Case]]:
    for on_all in (True, False) if ranks > 1 else (True,):
        where = "on all ranks" if on_all else "on the last rank"
        for change in CHANGES:
            if on_all or change != "eval":  # the others would wait for it
                yield f"change | {change} | {where}", partial(change_case, change, on_all)
        for direction, calls in (("forward", BAD_FORWARD), ("backward", BAD_BACKWARD)):
            for what in calls:
                yield (
                    f"call | {direction}, {what} | {where}",
                    partial(call_case, direction, what, on_all),
                )


def alternating_case(comm: Any) -> Items:
    """One layer, several shapes, dtypes, modes and contexts in turn."""
    spy = Spy(comm)
    layouts = [LAYOUTS[name] for name in ("NCHW", "NCHW over channels-last memory")]
    layouts += [Layout((4, 5)), Layout((4,), lambda rank, size: 5)]
    layer = make_layer(spy, layouts[0], DTYPES["float32"], activation="relu")
    items: Items = {}
    for step in range(24):
        layout, dtype = layouts[step % len(layouts)], DTYPES[("float32", "float16")[step % 3 == 2]]
        random = generator("alternating", comm.rank, step)
        make = partial(layout.array, dtype, comm.rank, comm.size, random)
        layer.train(step % 5 != 4)
        first = layer.forward(make(), save_for_backward=True)
        context = layer.saved
        second = layer.forward(make(), save_for_backward=True)
        found = {"y": digest(first), "second y": digest(second)}
        found |= {"dx": digest(layer.backward(make(), context))}
        found |= {"second dx": digest(layer.backward(make()))}
        items |= under(f"step {step}", found | arrays_of(layer) | {"messages": spy.taken()})
    return items


# ---- functions -----------------------------------------------------------------------------------


def functional_case(dtype: Any, layout: Layout, options: dict[str, Any], comm: Any) -> Items:
    """Forward, running statistics, backward, double backward, inference."""
    spy = Spy(comm)
    wide = np.float64 if dtype == np.float64 else np.float32
    make = partial(layout.array, dtype, comm.rank, comm.size)
    shared = generator("parameters")
    parameters = {
        name: shared.standard_normal(layout.channels).astype(wide)
        for name in ("weight", "bias")
        if name not in options.get("without", ())
    }
    running = np.zeros(layout.channels, wide), np.ones(layout.channels, wide)
    given: dict[str, Any] = {"channel_axis": layout.channel_axis}
    given["activation"] = options.get("activation")
    items: Items = {}
    for step in range(STEPS):
        random = generator("functional", dtype.name, comm.rank, step)
        x, dy, residual, ddx = (make(random) for _ in range(4))
        if options.get("residual"):
            given["residual"] = residual
        y, saved = functional.batch_norm_forward(
            x, **parameters, eps=1e-3, comm=spy, name="f", **given
        )
        found = {"y": digest(y), "count": str(saved.count)}
        found |= {name: digest(getattr(saved, name)) for name in ("mean", "invstd", "var")}
        functional.update_running(*running, saved, 0.1)
        found |= {"running mean": digest(running[0]), "running variance": digest(running[1])}
        grads = functional.batch_norm_backward(dy, saved)
        double = functional.batch_norm_double_backward(
            ddx,
            *(parameters.get(name) for name in ("weight", "bias")),
            saved,
            dy,
            **({"ddresidual": residual} if "residual" in given else {}),
        )
        inferred = functional.batch_norm_inference(x, *running, **parameters, **given)
        found |= {"inference": digest(inferred)}
        for kind, results in (("backward", grads), ("double backward", double)):
            for name, array in results._asdict().items():
                found[f"{kind} {name}"] = "None" if array is None else digest(array)
        items |= under(f"step {step}", found | {"messages": spy.taken()})
    return items


FUNCTIONAL = {
    "plain": {},
    "residual": {"residual": True},
    "residual, ReLU": {"residual": True, "activation": "relu"},
    "no bias, ReLU": {"without": ("bias",), "activation": "relu"},
    "no affine": {"without": ("weight", "bias")},
}


def functional_cases() -> Iterator[tuple[str, Case]]:
    layouts = [name for name in LAYOUTS if name not in ("wide NC", "one sample a rank")]
    for (dtype, of_dtype), layout, (option, of_option) in product(
        DTYPES.items(), layouts, FUNCTIONAL.items()
    ):
        if (dtype, layout) != UNSUPPORTED:
            yield (
                f"functional | {dtype} | {layout} | {option}",
                partial(functional_case, of_dtype, LAYOUTS[layout], of_option),
            )


def primitives_case(dtype: Any, shape: tuple[int, ...], relu: bool, comm: Any) -> Items:
    """The primitives as a framework calls them, with sums of its own."""
    wide = np.float64 if dtype == np.float64 else np.float32
    random = generator("primitives", dtype.name, comm.rank)
    x3, dy3 = (random.standard_normal(shape).astype(dtype) for _ in range(2))
    c = shape[1]
    weight, bias = generator("parameters").standard_normal((2, c)).astype(wide)
    dweight, dbias = np.ones((2, c), wide)
    running = np.zeros(c, wide), np.ones(c, wide)
    payload, reduced = np.empty((2, 2 * c))
    options = {"activation": "relu"} if relu else {}
    moments = functional.batch_moments(x3, payload=payload)
    mean, var, invstd = functional.finalize_moments(moments, 1e-3, running=running, factor=0.25)
    y3 = functional.normalize(x3, mean, invstd, weight, bias, **options)
    sums = functional.backward_reduce(
        dy3, x3, mean, invstd, weight, bias, payload=reduced, **options
    )
    dx3 = functional.backward_input(
        *(dy3, x3, mean, invstd, weight, bias),
        sums=sums, count=moments.count, local=sums, dweight=dweight, dbias=dbias, **options,
    )  # fmt: skip
    arrays = {
        "payload": payload, "mean": mean, "var": var, "invstd": invstd, "y": y3, "sums": reduced,
        "dx": dx3, "dweight": dweight, "dbias": dbias, "running mean": running[0],
        "running variance": running[1],
    }  # fmt: skip
    return {name: digest(array) for name, array in arrays.items()}


def primitives_cases() -> Iterator[tuple[str, Case]]:
    for (dtype, of_dtype), shape, relu in product(
        DTYPES.items(), [(7, 6, 1), (3, 5, 7), (2, 3, 300), (0, 3, 2)], (False, True)
    ):
        yield (
            f"primitives | {dtype} | {shape}{' | ReLU' if relu else ''}",
            partial(primitives_case, of_dtype, shape, relu),
        )


# ---- trees of layers, and PyTorch's modules ------------------------------------------------------


def make_tree(comm: Any, dtype: str) -> Any:
    options = {"comm": comm, "dtype": dtype}
    inner = cupybn.Sequential(
        {
            "second": cupybn.SyncBatchNorm(4, momentum=None, **options),
            "third": cupybn.BatchNorm1d(4, dtype=dtype, activation="relu"),
        }
    )
    tree = cupybn.Sequential(
        {
            "first": cupybn.SyncBatchNorm(4, activation="relu", **options),
            "inner": inner,
            "last": cupybn.SyncBatchNorm(4, affine=False, **options),
        }
    )
    random = generator("tree")
    for _, parameter in tree.named_parameters():
        parameter[...] = random.standard_normal(parameter.shape)
    return tree


def tree_case(dtype: str, comm: Any) -> Items:
    """Training, gradients of all ranks, evaluation, recalibration, converting back."""
    spy = Spy(comm)
    tree = make_tree(spy, dtype)
    layout = Layout((4, 6))
    items: Items = {}
    cupybn.distributed.broadcast_parameters(tree, spy)
    cupybn.distributed.verify_sync(tree, spy)
    for step in range(STEPS):
        random = generator("tree", comm.rank, step)
        x, dy = (layout.array(dtype, comm.rank, comm.size, random) for _ in range(2))
        found = {"y": digest(tree.forward(x)), "dx": digest(tree.backward(dy))}
        cupybn.distributed.allreduce_gradients(tree, spy)
        for (_, parameter), (_, gradient) in zip(
            tree.named_parameters(), tree.named_gradients(), strict=True
        ):
            parameter -= 0.05 * gradient
        tree.zero_grad()
        items |= under(f"step {step}", found | arrays_of(tree) | {"messages": spy.taken()})
    found = {"eval y": digest(tree.eval().forward(x)), "messages": spy.taken()}
    cupybn.recalibrate(tree, [x, dy], spy)
    found |= under("recalibrated", arrays_of(tree) | {"messages": spy.taken()})
    tree = cupybn.revert_sync_batchnorm(tree.train())
    found |= {"reverted y": digest(tree.forward(x)), "reverted dx": digest(tree.backward(dy))}
    found |= under("reverted", arrays_of(tree) | {"messages": spy.taken()})
    # Running statistics of the layer that is this rank's own differ from rank to rank.
    _, found["verify_sync"] = attempt(partial(cupybn.distributed.verify_sync, tree, spy))
    return items | found | {"last messages": spy.taken()}


def make_module(comm: Any, kind: str) -> Any:
    import torch
    from torch import nn

    from cupybn.interop import torch as interop

    if kind == "linear":
        norms = interop.SyncBatchNorm(8, comm=comm, name="one"), interop.BatchNorm1d(8)
        net = nn.Sequential(nn.Linear(5, 8), norms[0], nn.ReLU(), nn.Linear(8, 8), norms[1])
    else:
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3),
            nn.BatchNorm2d(6, momentum=None), nn.ReLU(),
        )  # fmt: skip
        net = interop.convert_sync_batchnorm(net, comm)
    random = generator("torch", kind)
    with torch.no_grad():
        for parameter in net.parameters():
            values = random.standard_normal(tuple(parameter.shape)) * 0.5
            parameter.copy_(torch.from_numpy(values))
    return net


def torch_case(kind: str, dtype_name: str, memory_format: str, comm: Any) -> Items:
    """Training steps of a PyTorch model with the modules of ``cupybn.interop.torch``."""
    import torch

    torch.set_num_threads(1)
    spy, dtype = Spy(comm), getattr(torch, dtype_name)
    net = make_module(spy, kind).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    shape = (5 + comm.rank, *((5,) if kind == "linear" else (3, 8, 7)))
    items: Items = {}
    for step in range(STEPS + 1):
        random = generator("torch", comm.rank, step)
        x = torch.from_numpy(random.standard_normal(shape)).to(dtype)
        if kind != "linear":
            x = x.contiguous(memory_format=getattr(torch, memory_format))
        x.requires_grad_()
        net.train(step != STEPS - 1)
        optimizer.zero_grad()
        y = net(x)
        (y.double() ** 3).mean().backward()
        optimizer.step()
        found = {"y": torch_digest(y), "dx": torch_digest(x.grad)}
        for name, parameter in net.named_parameters():
            found[f"gradient {name}"] = torch_digest(parameter.grad)
        for name, tensor in net.state_dict().items():
            found[name] = torch_digest(tensor)
        items |= under(f"step {step}", found | {"messages": spy.taken()})
    return items


def torch_digest(tensor: Any) -> str:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return digest(tensor.numpy())


def torch_cases() -> Iterator[tuple[str, Case]]:
    for kind, dtype, memory_format in [
        ("linear", "float32", "contiguous_format"),
        ("linear", "float64", "contiguous_format"),
        ("conv", "float32", "contiguous_format"),
        ("conv", "float32", "channels_last"),
        ("conv", "bfloat16", "contiguous_format"),
        ("conv", "float64", "channels_last"),
    ]:
        name = f"torch | {kind} | {dtype} | {memory_format}"
        yield name, partial(torch_case, kind, dtype, memory_format)


# ---- running them --------------------------------------------------------------------------------


def cases_of(ranks: int) -> Iterator[tuple[str, Case]]:
    yield from layer_cases()
    yield from changing_cases(ranks)
    yield "alternating", alternating_case
    yield from functional_cases()
    yield from primitives_cases()
    for dtype in ("float32", "float64"):
        yield f"tree | {dtype}", partial(tree_case, dtype)
    if find_spec("torch"):
        yield from torch_cases()


def about() -> dict[str, str]:
    """What digests belong to, and which version was recorded."""
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name in ("ml_dtypes", "numba", "torch"):
        if find_spec(name):
            versions[name] = version(name)
    machine = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        machine = " ".join([machine, *models[:1]])
    return versions | {"machine": machine, "code": os.path.dirname(cupybn.__file__)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--mpi", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    found: dict[str, Items] = {}

    def chosen(prefix: str, ranks: int) -> Iterator[tuple[str, Case]]:
        for name, case in cases_of(ranks):
            if options.only in (name := f"{BACKEND} | {prefix} ranks | {name}"):
                yield name, case

    begin, root = time.perf_counter(), True
    if options.mpi:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        root = world.rank == 0
        comm = MpiCommunicator(world, timeout=TIMEOUT)
        for name, case in chosen(f"MPI {world.size}", world.size):
            by_rank = world.gather(_quietly(comm, case)) or []
            found[name] = merged(by_rank)
    else:
        for ranks in map(int, options.ranks.split(",")):
            for name, case in chosen(str(ranks), ranks):
                found[name] = merged(run_ranks(ranks, _quietly, case, timeout=TIMEOUT))
    if root:
        with open(options.file, "w") as file:
            json.dump({"about": about(), "digests": found}, file)
        print(f"{BACKEND}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)


def merged(by_rank: list[Items]) -> Items:
    """One rank's items after the other's, with the rank in front of their names."""
    items: Items = {}
    for rank, of_rank in enumerate(by_rank):
        items |= under(f"rank {rank},", of_rank)
    return items


def _quietly(comm: Any, case: Case) -> Items:
    with np.errstate(all="ignore"):  # of each thread
        return case(comm)


if __name__ == "__main__":
    main()
