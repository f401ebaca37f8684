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
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import cupybn

from .cases import TINY, as_torch
from .machine import no_gpu
from .report import Report
from .timing import figures, interleave, nothing, turn_of

Call = Callable[[], object]
_FOLDERS = tuple(f"{Path(module.__file__ or '').parent}/" for module in (cupybn, np))
_FIRST = 20  # layers whose first call is timed


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("overhead", f"overhead of a call on {TINY}, float32")
    for device in devices():
        xp: Any = np if device == "cpu" else import_module("cupy")
        wait = nothing if device == "cpu" else xp.cuda.Device().synchronize
        made, peers = calls(xp, device), calls_of_torch(xp, device)
        paths = {name: make() for name, make in made.items()}
        paths |= {f"torch {name}": call for name, call in peers.items()}
        turns = {n: turn_of({"call": c}, ready=wait, finish=wait) for n, c in paths.items()}
        times = interleave(turns, 5 if args.quick else max(args.repeat, 50), warm=0.005)
        peer_of = {n: f"torch {n if n in peers else 'forward + backward'}" for n in made}
        found = figures(times, peer_of.items())
        section[device] = rows = {}
        for name, make in report.progress(list(made.items()), unit="call"):
            peer = peer_of[name]
            known, new = entered(paths[name]), entered(make())
            rows[name] = {
                "functions": known.total(),
                "first": new.total(),
                "us": found["us"][name]["both"],
                "first us": first_us(make),
                "torch us": found["us"].get(peer, {}).get("both"),
                "/ torch": found["ratio"].get(f"{name} / {peer}"),
            }
            report.row(f"{name}, {device}", rows[name])
            rows[name]["functions by file"] = dict(known.most_common())


def devices() -> list[str]:
    return ["cpu"] if no_gpu() else ["cpu", "cuda"]


def first_us(make: Callable[[], Call]) -> float:
    """The median time of the first call of layers that were just made."""
    times = []
    for _ in range(_FIRST):
        call = make()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


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

    def step(layer: Any, *residual: Any) -> Call:
        def forward_backward() -> None:
            layer.forward(x, *residual)
            layer.backward(dy)

        return forward_backward

    def layer(kind: Any = cupybn.BatchNorm1d, **options: Any) -> Any:
        return kind(TINY[1], device=device, **options)

    def stateless() -> Call:
        weight, bias = layer().weight, layer().bias

        def forward_backward() -> None:
            _, saved = cupybn.functional.batch_norm_forward(x, weight, bias)
            cupybn.functional.batch_norm_backward(dy, saved)

        return forward_backward

    def once(layer: Any) -> Call:
        return lambda: layer.forward(x, save_for_backward=False)

    made: dict[str, Callable[[], Call]] = {
        "forward": lambda: once(layer()),
        "forward + backward": lambda: step(layer()),
        "evaluation": lambda: once(layer().eval()),
        "with ReLU and residual": lambda: step(layer(activation="relu"), x),
        "SyncBatchNorm": lambda: step(layer(cupybn.SyncBatchNorm, comm=cupybn.SelfCommunicator())),
        "functional": stateless,
    }
    if device == "cpu" and find_spec("torch"):
        made["interop.torch"] = guest_of_torch
    return made


def guest_of_torch() -> Call:
    """A step of cupybn's module for PyTorch."""
    torch, modules = import_module("torch"), import_module("cupybn.interop.torch")
    module = modules.BatchNorm1d(TINY[1])
    x, dy = (torch.from_dlpack(a) for a in arrays(np))
    return _step_of_torch(module, x.clone().requires_grad_(), dy)


def _step_of_torch(module: Any, x: Any, dy: Any) -> Call:
    def forward_backward() -> None:
        x.grad = None
        module(x).backward(dy)

    return forward_backward


def arrays(xp: Any) -> tuple[Any, Any]:
    x, dy = (xp.ones(TINY, xp.float32) for _ in range(2))
    x[::2] = 0
    return x, dy


def calls_of_torch(xp: Any, device: str) -> dict[str, Call]:
    """The same of PyTorch's module, where PyTorch is there."""
    if find_spec("torch") is None:
        return {}
    torch = import_module("torch")
    if device != "cpu" and not torch.cuda.is_available():
        return {}
    x, dy = (as_torch(torch, a, xp) for a in arrays(xp))
    needs_grad = x.clone().requires_grad_()
    module, resting = (torch.nn.BatchNorm1d(TINY[1]).to(device) for _ in range(2))
    resting.eval()
    step = _step_of_torch(module, needs_grad, dy)

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def evaluation() -> None:
        with torch.no_grad():
            resting(x)

    return {"forward": forward, "forward + backward": step, "evaluation": evaluation}
