"""The cost of a call besides its arithmetic.

`overhead`: the cost of a call with next to no arithmetic, (8, 16), float32, one thread.
`functions` are the Python functions of cupybn and NumPy that one call enters, by
``sys.setprofile``; `us` the wall-clock time of a call in a loop, which waits for a device only at
its end. Both are of a layer that knows the call; `first` and `first us` of a layer that was just
made, whose code is compiled already. Beside it PyTorch's module with autograd. SyncBatchNorm has
the communicator of one rank. On a GPU `4 empty kernels` is what CuPy takes for a step's launches.
The JSON file has the functions by file.

`memory`: the peak of a forward and of a backward, MB of 10^6 bytes, less the arrays that a caller
cannot do without, y and dx; x, dy and residual are there before. So "peak = x + y + forward" and
"x + dy + dx + backward". `kept` is what stays until the backward besides x and y. Backward with
out=dy has no dx to allocate. On the CPU the peak is tracemalloc's, which sees what NumPy allocates;
compiled loops have next to nothing of their own. On a GPU it is what CuPy's pool hands out.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from timeit import timeit
from types import FrameType
from typing import Any

import numpy as np

import cupybn

from . import LAYOUTS
from .cases import Case, Tensors, products
from .report import Report, no_gpu
from .timing import figures, interleave, nothing, turn_of

Call = Callable[[], object]
_SHAPE = (8, 16)
_FOLDERS = tuple(f"{Path(module.__file__ or '').parent}/" for module in (cupybn, np))
_FIRST = 20  # layers whose first call is timed
_EMPTY = (
    f'extern "C" __global__ void empty({", ".join(f"float* a{i}" for i in range(10))}, '
    f"{', '.join(f'long long n{i}' for i in range(8))}) {{}}"
)


def measure_overhead(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("overhead", f"overhead of a call on {_SHAPE}, float32")
    for device in devices():
        xp: Any = np if device == "cpu" else import_module("cupy")
        wait = nothing if device == "cpu" else xp.cuda.Device().synchronize
        made = calls(xp, device)
        paths = {name: make() for name, make in made.items()}
        turns = {n: turn_of({"call": c}, wait, wait, warm=0.005) for n, c in paths.items()}
        times = interleave(turns, 5 if args.quick else max(args.repeat, 50))
        own = [name for name in made if not name.startswith("torch ")]
        pairs = [(n, f"torch {n if f'torch {n}' in made else 'forward + backward'}") for n in own]
        found = figures(times, pairs)
        section[device] = rows = {}
        for name, peer in pairs:
            make, known, new = made[name], entered(paths[name]), entered(made[name]())
            rows[name] = {
                "functions": known.total(),
                "first": new.total(),
                "us": found["us"][name]["both"],
                "first us": median(timeit(make(), number=1) for _ in range(_FIRST)) * 1e6,
                "torch us": found["us"].get(peer, {}).get("both"),
                "/ torch": found["ratio"].get(f"{name} / {peer}"),
            }
            report.row(f"{name}, {device}", rows[name])
            rows[name]["functions by file"] = dict(known.most_common())


def entered(call: Call) -> Counter[str]:
    """How many Python functions of cupybn and NumPy a call enters, by file."""
    found = Counter[str]()

    def hook(frame: FrameType, event: str, _: object) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(_FOLDERS):
            found["/".join(Path(path).parts[-2:])] += 1

    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def calls(xp: Any, device: str) -> dict[str, Callable[[], Call]]:
    """Functions that make a layer and return the call to measure; `torch ...` are PyTorch's."""
    x, dy = (xp.ones(_SHAPE, xp.float32) for _ in range(2))
    x[::2] = 0

    def layer(kind: Any = cupybn.BatchNorm1d, **options: Any) -> Any:
        return kind(_SHAPE[1], device=device, **options)

    def forward(layer: Any) -> Call:
        return lambda: layer.forward(x, save_for_backward=False)

    def step(layer: Any, *residual: Any) -> Call:
        return lambda: (layer.forward(x, *residual), layer.backward(dy))

    def stateless() -> Call:
        weight, bias = layer().weight, layer().bias

        def forward_backward() -> None:
            _, saved = cupybn.functional.batch_norm_forward(x, weight, bias)
            cupybn.functional.batch_norm_backward(dy, saved)

        return forward_backward

    made: dict[str, Callable[[], Call]] = {
        "forward": lambda: forward(layer()),
        "forward + backward": lambda: step(layer()),
        "evaluation": lambda: forward(layer().eval()),
        "with ReLU and residual": lambda: step(layer(activation="relu"), x),
        "SyncBatchNorm": lambda: step(layer(cupybn.SyncBatchNorm, comm=cupybn.SelfCommunicator())),
        "functional": stateless,
    }
    if device == "cuda":
        made["4 empty kernels"] = lambda: empty_kernels(xp, x)
    torch = import_module("torch") if find_spec("torch") else None
    if torch is None or (device != "cpu" and not torch.cuda.is_available()):
        return made
    return made | calls_of_torch(torch, device, *map(torch.from_dlpack, (x, dy)))


def empty_kernels(cupy: Any, x: Any) -> Call:
    """As many launches as a step has, with about as many arguments: CuPy's part of its cost."""
    kernel = cupy.RawKernel(_EMPTY, "empty")
    given = (1,), (1,), (x,) * 10 + (np.int64(0),) * 8
    return lambda: [kernel(*given) for _ in range(4)]


def calls_of_torch(torch: Any, device: str, x: Any, dy: Any) -> dict[str, Callable[[], Call]]:
    """The same for PyTorch's module, and for cupybn's for PyTorch."""
    needs_grad = x.clone().requires_grad_()

    def module() -> Any:
        return torch.nn.BatchNorm1d(_SHAPE[1], device=device)

    def forward(module: Any) -> Call:
        def without_grad() -> None:
            with torch.no_grad():
                module(x)

        return without_grad

    def step(module: Any) -> Call:
        def forward_backward() -> None:
            needs_grad.grad = None
            module(needs_grad).backward(dy)

        return forward_backward

    made: dict[str, Callable[[], Call]] = {
        "torch forward": lambda: forward(module()),
        "torch forward + backward": lambda: step(module()),
        "torch evaluation": lambda: forward(module().eval()),
    }
    if device == "cpu":
        guest = import_module("cupybn.interop.torch").BatchNorm1d
        made["interop.torch"] = lambda: step(guest(_SHAPE[1]))
    return made


def devices() -> list[str]:
    return ["cpu"] if no_gpu() else ["cpu", "cuda"]


def measure_memory(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("memory", "memory above x + y and x + dy + dx, MB of 10^6 bytes")
    for device in devices():
        section[device] = records = []
        for case, words in cases_of_memory(args.quick):
            name, found = f"{case} {words}".strip(), bytes_of(case, words, device)
            records.append({"case": name} | found)
            report.flush()
            megabytes = {key: f"{size / 1e6:.3f}" for key, size in found.items()}
            report.row(name, megabytes | {"device": device})


def cases_of_memory(quick: bool) -> list[tuple[Case, str]]:
    """Each case with the options of the layer, in words."""
    rows, columns = products([shape := f"{4 if quick else 32}x64x112x112"], layouts=LAYOUTS)
    others = products([shape], ["float16", "bfloat16", "float64"])
    plain = [rows, columns, Case((512 * rows.shape[0], 1024)), *others]
    told = [(rows, "out=dy"), (columns, "out=dy"), (rows, "relu"), (rows, "relu residual")]
    return [*((case, "") for case in plain), *told]


def bytes_of(case: Case, words: str, device: str) -> dict[str, int]:
    """Bytes of a forward and a backward."""
    used, xp = (on_host, np) if device == "cpu" else (on_device, import_module("cupy"))
    t = Tensors(xp, None, case)
    residual = t.x.copy(order="K") if "residual" in words else None
    kind = cupybn.BatchNorm2d if len(case.shape) == 4 else cupybn.BatchNorm1d
    options: dict[str, Any] = {"activation": "relu"} if "relu" in words else {}
    layer = kind(case.shape[1], dtype=case.parameters, device=device, **options)
    out = t.dy if "out=dy" in words else None
    for _ in range(2):  # caches, bindings, kernels and threads are made once
        layer.forward(t.x, residual)
        layer.backward(t.dy.copy(order="K"))
    results: list[Any] = []
    peak, kept = used(lambda: results.append(layer.forward(t.x, residual)))
    peak_back, _ = used(lambda: results.append(layer.backward(t.dy, out=out)))
    made = (out is None) + (residual is not None)  # dx, and dresidual, which is as large
    above = {"forward": peak - case.bytes, "kept": kept - case.bytes}
    return {"x": case.bytes, **above, "backward": peak_back - made * case.bytes}


def on_host(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that NumPy allocated: at the peak, and still at the end."""
    gc.collect()
    tracemalloc.start()
    call()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak, after


def on_device(call: Callable[[], object]) -> tuple[int, int]:
    """The same for CuPy's memory pool."""
    cupy = import_module("cupy")
    pool = cupy.get_default_memory_pool()
    gc.collect()
    before = peak = pool.used_bytes()

    class Hook(cupy.cuda.memory_hook.MemoryHook):  # type: ignore[misc, name-defined]
        name = "benchmarks"

        def malloc_postprocess(self, **_: Any) -> None:
            nonlocal peak
            peak = max(peak, pool.used_bytes())

    with Hook():
        call()
    return peak - before, pool.used_bytes() - before
