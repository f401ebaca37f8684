"""Each kernel of a forward and a backward by itself, beside what the model predicts of it; and
variants of the kernels and of their launches, in turns with what there is.

The launches of one step of a layer are noted with their arguments, and made again between CUDA
events, on as many sets of tensors as the second-level cache cannot hold, behind a delay kernel: no
time of Python is in these figures. An event's own time, about a us, is. `predicted` is by
``benchmarks.model`` with this device's multiprocessors and copy rate, `%` of that rate.

A variant is the same text with a constant replaced, the same planning with other numbers, or
`resident`: one launch a direction wherever a block's shared memory holds the channels. The others
all stream; `plan` lines say what is chosen if nobody asks, and why. A figure is a variant's time
over that of the kernels as they are, the median over repetitions: below 1 it is faster. `all` lines
are geometric means over the cases. A pattern that is no longer in the text, or a kernel that does
not compile, is named in the place of figures. `--paths` names the variants to measure.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from cupybn.backends.cuda import launch, plan, source

from . import LAYOUTS, model
from .cases import Case, Tensors, chosen, products
from .gpu import copy_rate, cupy, device_turn_of, of_layer, tensor_sets
from .report import Report
from .timing import Parts, Times, interleave, without_failing

# Of ResNet-50; the last one is large.
SHAPES = ["32x64x112x112", "32x256x56x56", "32x512x28x28", "32x1024x14x14", "32x2048x7x7"]
SHAPES += ["256x256x56x56"]
KERNELS = {kernel.name: kernel for kernel in (*model.FORWARD, *model.BACKWARD)}
RESIDENT = {kernel.name: kernel for kernel in model.RESIDENT_KERNELS}
_DIRECTIONS = {
    "forward": ("batch_moments", "normalize", "normalize_flat", "local_forward"),
    "backward": ("backward_reduce", "backward_input", "local_backward"),
}
_AS_IT_IS = "as it is"
_WARM_UP = 3  # rounds


class Variant(NamedTuple):
    """What is other: regular expressions in the text, constants of plan.py, places for blocks; and
    `resident`, the value of ``CUPYBN_RESIDENT``.
    """

    name: str
    text: tuple[tuple[str, str], ...] = ()
    plan: tuple[tuple[str, int], ...] = ()
    places: float = 1.0
    resident: str = "0"

    def apply(self, text: str) -> str:
        """The text of a module with this variant's constants.

        Raises:
            LookupError: a constant is not there.
        """
        for pattern, replacement in self.text:
            text, found = re.subn(pattern, replacement, text)
            if not found:
                raise LookupError(f"{pattern!r} is not in the kernels' text")
        return text


def _constant(name: str, change: str) -> tuple[tuple[str, str], ...]:
    return ((rf"(constexpr int {name} = )([^;]+);", rf"\1(\2) {change};"),)


VARIANTS = (
    Variant(_AS_IT_IS),
    Variant("MIN_BLOCKS of sums + 1", _constant("SUMMING_BLOCKS", "+ 1")),
    Variant("MIN_BLOCKS of sums - 1", _constant("SUMMING_BLOCKS", "- 1")),
    Variant("MIN_BLOCKS of writes + 1", _constant("WRITING_BLOCKS", "+ 1")),
    Variant("MIN_BLOCKS of writes - 1", _constant("WRITING_BLOCKS", "- 1")),
    Variant("UNROLL * 2", _constant("UNROLL", "* 2")),
    Variant("UNROLL / 2", _constant("UNROLL", "/ 2")),
    Variant("streaming stores", ((r"st\.global\.v4", "st.global.cs.v4"),)),
    Variant("slices of 8 KB", plan=(("_SLICE_BYTES", 8 << 10),)),
    Variant("slices of 32 KB", plan=(("_SLICE_BYTES", 32 << 10),)),
    Variant("runs of 256 bytes", plan=(("_RUN_BYTES", 256),)),
    Variant("half the blocks", places=0.5),
    Variant("twice the blocks", places=2.0),
    Variant("resident", resident="1"),
)


class _Noted:
    """A kernel that notes its launches."""

    def __init__(
        self, compiled: Any, name: str, notes: list[tuple[str, Callable[[], Any]]]
    ) -> None:
        self.compiled, self.name, self.notes = compiled, name, notes
        self.kernel = compiled.kernel  # by which the driver is asked for its occupancy

    def __setattr__(self, name: str, value: Any) -> None:
        """What the kernel itself has to know: how much shared memory it may have."""
        if name == "max_dynamic_shared_size_bytes":
            setattr(self.compiled, name, value)
        else:
            object.__setattr__(self, name, value)

    def __call__(self, *given: Any, **options: Any) -> None:
        self.notes.append((self.name, partial(self.compiled, *given, **options)))
        self.compiled(*given, **options)


@contextmanager
def taking(variant: Variant, notes: list[tuple[str, Callable[[], Any]]]) -> Iterator[None]:
    """Layers made in here launch the variant's kernels, which is noted."""
    compile_module, resident = source.compile_module, launch._resident
    before = {name: getattr(plan, name) for name, _ in variant.plan}
    asked = os.environ.get(launch.RESIDENT)

    def compiled(text: str, kernels: tuple[str, ...]) -> Any:
        module = compile_module(variant.apply(text), kernels)
        return SimpleNamespace(
            get_function=lambda name: _Noted(module.get_function(name), name, notes)
        )

    def places(compiled: Any, threads: int, shared: int) -> int:
        return max(1, int(resident(compiled, threads, shared) * variant.places))

    _forget()
    os.environ[launch.RESIDENT] = variant.resident
    source.compile_module = compiled
    launch._resident = places
    for name, value in variant.plan:
        setattr(plan, name, value)
    try:
        yield
    finally:
        source.compile_module, launch._resident = compile_module, resident
        os.environ.pop(launch.RESIDENT)
        os.environ |= {} if asked is None else {launch.RESIDENT: asked}
        for name, value in before.items():
            setattr(plan, name, value)
        _forget()


def _forget() -> None:
    for name in ("forward_launches", "backward_launches", "tensor_launch", "channel_launch"):
        getattr(launch, name).cache_clear()
    source._kernels.clear()


def parts_of(variant: Variant, case: Case, sets: list[Tensors]) -> Parts:
    """By kernel, a call that launches it on the next set of tensors."""
    notes: list[tuple[str, Callable[[], Any]]] = []
    with taking(variant, notes):
        forward, backward = of_layer(case)
        for t in sets:
            backward(t, forward(t))
    launches: dict[str, list[Callable[[], Any]]] = {}
    for name, again in notes:
        launches.setdefault(name, []).append(again)
    cycles = {name: itertools.cycle(calls) for name, calls in launches.items()}
    return {name: lambda cycle=cycle: next(cycle)() for name, cycle in cycles.items()}  # type: ignore[misc]


def measure_kernels(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("kernels", "kernels: device time, us; variants: times over it")
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    report.add({"device": properties["name"].decode()})
    rate = section["copy rate"] = copy_rate()
    section["cases"] = records = []
    repeat = min(args.repeat, 7) if args.quick else args.repeat
    for case in chosen(args, products(SHAPES, ["float16"], LAYOUTS), "float16"):
        try:
            found = record(case, rate, repeat, args.paths)
        except Exception as error:  # for the other cases there may be memory
            found = {"kernels": {}, "variants": {}, "failed": {"all": f"{error!r}"}}
        cupy.cuda.Device().synchronize()
        cupy.get_default_memory_pool().free_all_blocks()
        records.append(case._asdict() | {"bytes": case.bytes} | found)
        report.flush()
        report.say(f"\n{case}")
        for line in explained(case):
            report.say(f"  plan: {line}")
        for name, row in found["kernels"].items():
            report.row(f"  {name}", row)
        for name, row in found["variants"].items():
            report.row(f"    {name}", row)
        for name, reason in found["failed"].items():
            report.say(f"    {name}: {reason}")
    section["variants"] = means = over_cases(records)
    for name, row in means.items():
        report.row(f"all: {name}", row)


def explained(case: Case) -> list[str]:
    """What of this device is chosen for a case if nobody asks for anything, and why."""
    attributes = cupy.cuda.Device().attributes
    device = attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"]
    return model.explain(case.shape3, case.dtype, *device)


def record(
    case: Case, rate: float, repeat: int, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Each kernel's time beside the prediction, and over it that of the variants of these names."""
    sets, turns, failed = tensor_sets(case, None), {}, {}
    for variant in VARIANTS:
        if names and variant.name not in (_AS_IT_IS, *names):
            continue
        try:
            turns[variant.name] = device_turn_of(parts_of(variant, case, sets))
        except Exception as error:  # the compiler's, for one
            failed[variant.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    failed |= without_failing(turns)
    interleave(turns, _WARM_UP, calls=1)
    times = interleave(turns, repeat, calls=1)
    kernels = {
        name: beside(name, statistics.median(spent) * 1e6, case, rate)
        for name, spent in (times.get("resident", {}) | times[_AS_IT_IS]).items()
    }
    return {"kernels": kernels, "variants": ratios(times), "failed": failed}


def ratios(times: Times) -> dict[str, dict[str, float]]:
    """By variant, of each kernel, direction and of all, its time over that of what there is."""
    base, found = times[_AS_IT_IS], {}
    for variant, own in times.items():
        if variant != _AS_IT_IS:
            compared = {name: (own[name], base[name]) for name in base if name in own}
            for direction, names in _DIRECTIONS.items():
                if base.keys() & set(names):
                    compared[direction] = _total(own, names), _total(base, names)
            compared["sum"] = _total(own, own), _total(base, base)
            found[variant] = {
                name: statistics.median(a / b for a, b in zip(*pair, strict=True))
                for name, pair in compared.items()
            }
    return found


def _total(times: Mapping[str, list[float]], names: Iterable[str]) -> list[float]:
    """The time of several kernels together, by repetition."""
    return [sum(t) for t in zip(*(times[name] for name in names if name in times), strict=True)]


def beside(name: str, us: float, case: Case, rate: float) -> dict[str, float | None]:
    """A kernel's measured and predicted time, and the part of the copy rate."""
    row: dict[str, float | None] = {"measured": us, "predicted": None, "/": None, "%": None}
    kernel = (KERNELS | RESIDENT).get(name)
    if kernel is None:
        return row
    moved = (kernel.reads + kernel.writes) * case.bytes
    row["%"] = 100 * moved / (us * 1e-6) / rate
    processors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    assumed = model.Assumptions(multiprocessors=processors, rate=rate / 1e6)
    try:
        itemsize = case.bytes // math.prod(case.shape)
        predicted = model.predict(kernel, case.shape3, itemsize, assumed).time
    except KeyError:  # nothing is assumed of vectors this narrow
        return row
    return row | {"predicted": predicted, "/": us / predicted}


def over_cases(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By variant, the geometric means of its figures."""
    found: dict[str, dict[str, float]] = {}
    for variant in (variant.name for variant in VARIANTS[1:]):
        rows = [record["variants"][variant] for record in records if variant in record["variants"]]
        if rows:
            heads = dict.fromkeys(head for row in rows for head in row)
            columns = {head: [row[head] for row in rows if head in row] for head in heads}
            means = {head: statistics.geometric_mean(values) for head, values in columns.items()}
            found[variant] = means | {"slowest": max(row["sum"] for row in rows)}
    return found
