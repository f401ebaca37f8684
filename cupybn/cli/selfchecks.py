"""The checks of ``selftest``. Each runs on every rank, and all its messages come first.

It compares only then, so that a rank with wrong results raises without leaving the others
waiting. A check returns what it found, or None if one rank alone has nothing to show.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array, copy_to_host, move, on_device_of
from ..communicators import Communicator
from ..communicators.base import first_values
from ..distributed import allreduce_gradients, broadcast_parameters, verify_sync
from ..errors import CollectiveMismatchError, PeerError, ShapeError
from ..layers import BatchNorm2d, Sequential, SyncBatchNorm
from ..statistics import HEADER, message_length

_CHANNELS = 6
_LIMITS = {"float32": 1e-5, "float16": 1e-3}


@dataclass(frozen=True)
class Setup:
    """Where a check runs: a device, and a maker of communicators, which is collective."""

    device: str
    make_comm: Callable[[], Communicator]
    repeat: int


def check_against_one_process(setup: Setup, dtype: str, sizes: list[int]) -> float:
    """Forward, backward, gradients and running statistics of ranks with `sizes` samples.

    Returns the largest error, relative to the largest value, beside a layer that has the batch of
    all ranks, in float64.
    """
    comm = setup.make_comm()
    rng = np.random.default_rng(0)
    shape = (sum(sizes), _CHANNELS, 5, 3)
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    x += np.arange(len(x), dtype=dtype).reshape(-1, 1, 1, 1) / 4  # no two ranks have the same mean
    mine = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))

    layer = SyncBatchNorm(_CHANNELS, comm=comm, name="selftest").to(setup.device)
    y = layer.forward(move(x[mine], setup.device))
    dx = layer.backward(move(dy[mine], setup.device))
    allreduce_gradients(layer, comm, op="sum")

    single = BatchNorm2d(_CHANNELS, dtype="float64")
    whole = single.forward(x.astype(np.float64)), single.backward(dy.astype(np.float64))
    expected = _named(single, whole[0][mine], whole[1][mine])
    found = _named(layer, y, dx)
    worst = max((_error(found[name], values), name) for name, values in expected.items())
    if not worst[0] <= _LIMITS[dtype]:
        raise AssertionError(
            f"{worst[1]} is {worst[0]:.1e} off one process with the whole batch (limit "
            f"{_LIMITS[dtype]:g})"
        )
    return worst[0]


def _named(layer: Any, y: Array, dx: Array) -> dict[str, Array]:
    """The results of a step, by names for the report."""
    gradients = {f"the gradient of {name}": grad for name, grad in layer.grads.items()}
    return {"y": y, "dx": dx, **gradients, **layer.buffers}


def _error(array: Array, expected: Array) -> float:
    difference = np.abs(copy_to_host(array).astype(np.float64) - expected)
    if not np.isfinite(difference).all():
        return float("inf")
    return float(difference.max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30))


def check_same_bits(setup: Setup) -> str | None:
    """Parameters and statistics have the same bits on all ranks after five steps of training."""
    comm = setup.make_comm()
    rng = np.random.default_rng([1, comm.rank])
    norms = [SyncBatchNorm(_CHANNELS, comm=comm, activation="relu") for _ in range(2)]
    net = Sequential(*norms)
    for norm in norms:
        norm.weight = rng.uniform(0.5, 1, _CHANNELS).astype(np.float32)
    net.to(setup.device)
    broadcast_parameters(net, comm)
    for _ in range(5):
        x = rng.standard_normal((2 + comm.rank % 3, _CHANNELS, 5, 3)).astype(np.float32)
        net.zero_grad()
        net.backward(net.forward(move(x, setup.device)))
        allreduce_gradients(net, comm)
        gradients = dict(net.named_gradients())
        for name, parameter in net.named_parameters():
            with on_device_of(parameter):
                parameter -= np.float32(0.1) * gradients[name]
    verify_sync(net, comm)
    return "yes" if comm.size > 1 else None


def check_mismatch(setup: Setup) -> str | None:
    """Ranks with different settings all raise, change nothing, and can go on."""
    comm = setup.make_comm()
    last = comm.rank == comm.size - 1
    layer = SyncBatchNorm(_CHANNELS, eps=1e-3 if last else 1e-5, comm=comm, name="selftest")
    return _expect(setup, layer, _CHANNELS, CollectiveMismatchError, setup.make_comm)


def check_bad_input(setup: Setup) -> str | None:
    """A rank with bad input raises what is wrong, the others PeerError; all can go on."""
    comm = setup.make_comm()
    last = comm.rank == comm.size - 1
    layer = SyncBatchNorm(_CHANNELS, comm=comm, name="selftest")
    channels = _CHANNELS + 1 if last else _CHANNELS
    return _expect(setup, layer, channels, ShapeError if last else PeerError, lambda: comm)


def _expect(
    setup: Setup, layer: Any, channels: int, kind: type[Exception], afterwards: Callable[[], Any]
) -> str | None:
    """The error that a forward raises on this rank of several; then a sum of all ranks works."""
    if layer.comm.size == 1:
        return None
    layer.to(setup.device)
    before = [copy_to_host(array).tobytes() for array in layer.buffers.values()]
    x = move(np.ones((2, channels, 3, 3), np.float32), setup.device)
    seen: Exception | None = None
    try:
        layer.forward(x)
    except Exception as error:  # compared below
        seen = error
    comm, message = afterwards(), move(np.ones(message_length(1)), setup.device)
    total = first_values(comm, comm.allreduce(message, "selftest"), 1)[0]
    if type(seen) is not kind:
        instead = "nothing" if seen is None else f"{type(seen).__name__}: {seen}"
        raise AssertionError(f"expected {kind.__name__}, got {instead}")
    if [copy_to_host(array).tobytes() for array in layer.buffers.values()] != before:
        raise AssertionError("the running statistics changed all the same")
    if total != comm.size:
        raise AssertionError(f"afterwards the sum over the ranks was {total}")
    return "seen"


def check_latency(setup: Setup, channels: int) -> float:
    """Median microseconds of a forward message: the sum, and its header read on the host."""
    comm = setup.make_comm()
    message = move(np.zeros(message_length(channels)), setup.device)
    seconds = timeit.repeat(
        lambda: first_values(comm, comm.allreduce(message, "selftest"), HEADER),
        number=1,
        repeat=setup.repeat + 10,
    )
    return float(np.median(seconds[10:]) * 1e6)
