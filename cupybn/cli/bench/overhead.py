"""What a call costs where there is next to nothing to compute: (8, 16), float32.

Wall-clock microseconds of one call, in loops that do not wait for a device, but for all of it at
their end; beside PyTorch's module with autograd. SyncBatchNorm has the communicator of one rank.
Then where the time of a forward + backward goes, by cProfile, which makes small functions look
dearer than they are: the shares tell more than the microseconds.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import pstats
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ... import functional
from ...communicators import SelfCommunicator
from ...layers import BatchNorm1d, SyncBatchNorm
from .cases import TINY, as_torch
from .report import Report, Table, load_torch
from .threads import limited
from .timing import interleave

_PACKAGE = Path(__file__).resolve().parents[2]
_SHOWN = 15


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("overhead", f"overhead of a call on {TINY}, float32, us, one thread")
    rounds, steps = (5, 200) if args.quick else (max(args.repeat, 30), 2000)
    torch = load_torch(args)
    with limited(1):
        for device in _devices():
            xp: Any = np if device == "cpu" else importlib.import_module("cupy")
            wait = None if device == "cpu" else xp.cuda.Device().synchronize
            calls = _calls(xp, device, torch)
            parts = {name: {"call": call} for name, call in calls.items()}
            found = interleave(
                parts, rounds, before=wait, after=wait, seconds=1.0 if args.quick else 60.0,
                calls=None if device == "cpu" else 200,
            )  # fmt: skip
            times = {name: statistics.median(t["call"]) * 1e6 for name, t in found.items()}
            profile = profiled(calls["cupybn forward + backward"], steps)
            section[device] = {"us": times, "profile": profile}
            report.flush()
            _say_times(report, device, times)
            _say_profile(report, profile)


def _devices() -> list[str]:
    from . import _no_gpu

    return ["cpu"] if _no_gpu() else ["cpu", "cuda"]


def _calls(xp: Any, device: str, torch: Any) -> dict[str, Callable[[], Any]]:
    x, dy = (xp.ones(TINY, xp.float32) for _ in range(2))
    x[::2] = 0
    layer = BatchNorm1d(TINY[1], device=device)
    sync = SyncBatchNorm(TINY[1], comm=SelfCommunicator(), device=device)
    resting = BatchNorm1d(TINY[1], device=device).eval()

    def step(layer: Any) -> Callable[[], Any]:
        def forward_backward() -> None:
            layer.forward(x)
            layer.backward(dy)

        return forward_backward

    def plain() -> None:
        _, saved = functional.batch_norm_forward(x, layer.weight, layer.bias)
        functional.batch_norm_backward(dy, saved)

    calls: dict[str, Callable[[], Any]] = {
        "cupybn forward": lambda: layer.forward(x, save_for_backward=False),
        "cupybn forward + backward": step(layer),
        "cupybn evaluation": lambda: resting.forward(x),
        "cupybn SyncBatchNorm forward + backward": step(sync),
        "cupybn.functional forward + backward": plain,
    }
    if torch is None or (device != "cpu" and not torch.cuda.is_available()):
        return calls
    return calls | _calls_of_torch(torch, as_torch(torch, x, xp), as_torch(torch, dy, xp), device)


def _calls_of_torch(torch: Any, x: Any, dy: Any, device: str) -> dict[str, Callable[[], Any]]:
    module = torch.nn.BatchNorm1d(TINY[1]).to(device)
    resting = torch.nn.BatchNorm1d(TINY[1]).to(device).eval()
    needs_grad = x.clone().requires_grad_()

    def step() -> None:
        needs_grad.grad = None
        module(needs_grad).backward(dy)

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def evaluation() -> None:
        with torch.no_grad():
            resting(x)

    return {
        "PyTorch module forward": forward,
        "PyTorch module forward + backward": step,
        "PyTorch module evaluation": evaluation,
    }


def profiled(call: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Time of its own of each function and of each file, in a step, by cProfile."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(steps):
        call()
    profile.disable()
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    functions, files = [], dict[str, float]()
    total = sum(entry[2] for entry in stats.values())
    for (path, line, name), (_, count, own, _, _) in stats.items():
        where = _name_of(path)
        files[where] = files.get(where, 0.0) + own
        functions.append({
            "function": f"{name} ({where}:{line})" if line else f"{name} ({where})",
            "calls": count / steps, "us": own / steps * 1e6, "share": own / total,
        })  # fmt: skip
    functions.sort(key=lambda entry: -entry["us"])
    ranked = sorted(files.items(), key=lambda item: -item[1])
    return {
        "us in all": total / steps * 1e6,
        "files": [{"file": f, "us": t / steps * 1e6, "share": t / total} for f, t in ranked],
        "functions": functions[:_SHOWN],
    }


def _name_of(path: str) -> str:
    if path == "~":
        return "built in"
    try:
        return str(Path(path).resolve().relative_to(_PACKAGE))
    except ValueError:
        return "/".join(Path(path).parts[-2:])


def _say_times(report: Report, device: str, times: dict[str, float]) -> None:
    table = Table((f"on {device}", "<40s"), ("us a call", ">9.2f"), ("of PyTorch", ">10.2f"))
    report.say(table.header())
    for name, value in times.items():
        what = name.partition("cupybn ")[2].removeprefix("SyncBatchNorm ")
        peer = times.get(f"PyTorch module {what or 'forward + backward'}")
        ratio = None if peer is None or name.startswith("PyTorch") else value / peer
        report.say(table.line(name, value, ratio))


def _say_profile(report: Report, profile: dict[str, Any]) -> None:
    report.say(f"\nwhere a forward + backward goes ({profile['us in all']:.0f} us under cProfile)")
    table = Table(("file", "<24s"), ("us", ">7.2f"), ("%", ">5.1f"))
    report.say(table.header())
    for entry in profile["files"][:10]:
        report.say(table.line(entry["file"], entry["us"], 100 * entry["share"]))
    table = Table(("function", "<62s"), ("calls", ">6.1f"), ("us", ">7.2f"), ("%", ">5.1f"))
    report.say("\n" + table.header())
    for entry in profile["functions"]:
        values = entry["function"][-62:], entry["calls"], entry["us"], 100 * entry["share"]
        report.say(table.line(*values))
