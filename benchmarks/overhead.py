"""What a call costs where there is next to nothing to compute: (8, 16), float32, one thread.

`functions` are the Python functions of cupybn and NumPy that one call enters, by
``sys.setprofile``; `us` the wall-clock time of a call in a loop, which waits for a device only at
its end. Both are of a layer that knows the call; `first` and `first us` of a layer that was just
made, whose code is compiled already. Beside it PyTorch's module with autograd. SyncBatchNorm has
the communicator of one rank. The JSON file has the functions by file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from timeit import timeit
from types import FrameType
from typing import Any

import numpy as np

import cupybn

from .report import Report, no_gpu
from .timing import figures, interleave, nothing, turn_of

Call = Callable[[], object]
_SHAPE = (8, 16)
_FOLDERS = tuple(f"{Path(module.__file__ or '').parent}/" for module in (cupybn, np))
_FIRST = 20  # layers whose first call is timed


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("overhead", f"overhead of a call on {_SHAPE}, float32")
    for device in devices():
        xp: Any = np if device == "cpu" else import_module("cupy")
        wait = nothing if device == "cpu" else xp.cuda.Device().synchronize
        made, peers = calls(xp, device), calls_of_torch(xp, device)
        paths = {name: make() for name, make in (made | peers).items()}
        turns = {n: turn_of({"call": c}, wait, wait, warm=0.005) for n, c in paths.items()}
        times = interleave(turns, 5 if args.quick else max(args.repeat, 50))
        peer_of = {n: f"torch {n if f'torch {n}' in peers else 'forward + backward'}" for n in made}
        found = figures(times, peer_of.items())
        section[device] = rows = {}
        for name, make in made.items():
            known, new = entered(paths[name]), entered(make())
            rows[name] = {
                "functions": known.total(),
                "first": new.total(),
                "us": found["us"][name]["both"],
                "first us": statistics.median(timeit(make(), number=1) for _ in range(_FIRST))
                * 1e6,
                "torch us": found["us"].get(peer_of[name], {}).get("both"),
                "/ torch": found["ratio"].get(f"{name} / {peer_of[name]}"),
            }
            report.row(f"{name}, {device}", rows[name])
            rows[name]["functions by file"] = dict(known.most_common())


def devices() -> list[str]:
    return ["cpu"] if no_gpu() else ["cpu", "cuda"]


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
    """By name, what makes a layer and returns the call to measure."""
    x, dy = arrays(xp)

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
    if device == "cpu" and find_spec("torch"):
        guest = import_module("cupybn.interop.torch").BatchNorm1d
        made["interop.torch"] = lambda: step_of_torch(guest(_SHAPE[1]), xp)
    return made


def calls_of_torch(xp: Any, device: str) -> dict[str, Callable[[], Call]]:
    """The same of PyTorch's module, where PyTorch is there."""
    torch = import_module("torch") if find_spec("torch") else None
    if torch is None or (device != "cpu" and not torch.cuda.is_available()):
        return {}
    x, _ = map(torch.from_dlpack, arrays(xp))

    def module() -> Any:
        return torch.nn.BatchNorm1d(_SHAPE[1], device=device)

    def without_grad(module: Any) -> Call:
        def forward() -> None:
            with torch.no_grad():
                module(x)

        return forward

    return {
        "torch forward": lambda: without_grad(module()),
        "torch forward + backward": lambda: step_of_torch(module(), xp),
        "torch evaluation": lambda: without_grad(module().eval()),
    }


def step_of_torch(module: Any, xp: Any) -> Call:
    from_dlpack = import_module("torch").from_dlpack
    x, dy = map(from_dlpack, arrays(xp))
    x.requires_grad_()

    def forward_backward() -> None:
        x.grad = None
        module(x).backward(dy)

    return forward_backward


def arrays(xp: Any) -> tuple[Any, Any]:
    x, dy = (xp.ones(_SHAPE, xp.float32) for _ in range(2))
    x[::2] = 0
    return x, dy
