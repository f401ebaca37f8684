"""For tests of layers and training loops: ranks as threads, gradients by central differences."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .arrays import Array, as_array, is_floating, on_device_of
from .communicators import Communicator, SelfCommunicator, ThreadCommunicator, resolve
from .errors import DTypeError, PeerError
from .layers import Layer
from .typing import ArrayLike


def run_ranks(
    n: int, fn: Callable[..., Any], *args: Any, timeout: float | None = None
) -> list[Any]:
    """Runs ``fn(comm, *args)`` on n threads whose communicators behave like MPI ranks.

    Args:
        n: the number of ranks.
        fn, args: each rank calls ``fn(comm, *args)`` with its own communicator.
        timeout: seconds for one sum; None reads ``CUPYBN_TIMEOUT``.

    Returns:
        The results of fn, by rank. If fn raises, this raises the exception of the lowest rank that
        failed by itself; the other ranks get a PeerError where they wait.

    Raises:
        CollectiveTimeoutError: the ranks did not meet within the timeout.
    """
    comms = ThreadCommunicator.group(n, timeout)
    results: list[Any] = [None] * n
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = fn(comms[rank], *args)
        except BaseException as error:  # raised below, in the caller's thread
            errors[rank] = error
            comms[rank].leave(f"raised {type(error).__name__}: {error}")
        else:
            comms[rank].leave()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        own = [rank for rank, error in errors.items() if not isinstance(error, PeerError)]
        raise errors[min(own or errors)]
    return results


def check_gradients(
    layer: Layer,
    x: ArrayLike,
    *,
    comm: Any = None,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    seed: int = 0,
    **options: Any,
) -> None:
    """Compares ``backward`` with central differences of ``forward``, in float64.

    It uses a copy of `layer` that is cast to float64, and casts of `x` and a residual.

    The loss is a random linear form of y, summed over the ranks. It checks dx, the gradients of all
    parameters, and dresidual if `options` has a ``residual``. `layer` is not changed.

    Args:
        layer: on the CPU, in the mode to check.
        x: floating, of any shape the layer takes. With ranks, every rank passes its own.
        comm: of the ranks that check together; None is this process alone.
        eps: the step.
        atol, rtol: the largest difference allowed is ``atol + rtol * abs(numeric)``.
        seed: of the linear form.
        options: for ``forward``; a ``residual`` is differentiated as well.

    Raises:
        AssertionError: names the worst value that differs.
        DTypeError: x or the residual is not floating.
    """
    ranks: Communicator = SelfCommunicator() if comm is None else resolve(comm)
    layer = copy.deepcopy(layer).to(dtype=np.float64)
    if options.get("residual") is not None:
        options["residual"] = _in_float64(options["residual"], "residual")
    failures = []
    for what, value, numeric in _slopes(layer, _in_float64(x, "x"), ranks, eps, seed, options):
        difference = abs(value - numeric)
        if not difference <= atol + rtol * abs(numeric):
            text = f"{what} is {value:.9g}, central differences give {numeric:.9g}"
            failures.append((difference, text))
    if failures:
        raise AssertionError(f"{len(failures)} gradients differ; the worst: {max(failures)[1]}")


def _in_float64(array: ArrayLike, what: str) -> Any:
    """A float64 copy of an array."""
    own = as_array(array, what)
    if not is_floating(own.dtype):
        raise DTypeError(f"{what} is {own.dtype}; gradients are by what is floating")
    with on_device_of(own):
        return own.astype(np.float64)


def _slopes(
    layer: Layer, x: Array, ranks: Communicator, eps: float, seed: int, options: dict[str, Any]
) -> Iterator[tuple[str, float, float]]:
    """(which value, its gradient by backward, by differences) of this rank's inputs and parameters.

    Every rank is in this together: it computes the loss when another rank's value moves, too.
    """
    layer.zero_grad()
    inputs = {"dx": x}
    if options.get("residual") is not None:
        inputs["dresidual"] = options["residual"]
    state = layer.state_dict()
    y = layer.forward(x, save_for_backward=True, **options)
    # A dy that depends on x linearly would hide a wrong dx: its seed is not one for x.
    dy = np.random.default_rng([seed, ranks.rank, 0x62E1]).standard_normal(y.shape)
    result = layer.backward(dy)
    analytic = dict(zip(inputs, result if isinstance(result, tuple) else (result,), strict=True))
    gradients = {name: grad.copy() for name, grad in layer.named_gradients()}

    def total(values: Any) -> Any:
        message = np.atleast_1d(np.array(values, np.float64))
        return ranks.allreduce(message, "check_gradients")

    def slope(array: Array, index: tuple[int, ...] | None) -> float:
        """The loss's slope in one value; without an index another rank's value moves."""
        losses = []
        before: Any = None if index is None else array[index]
        for step in (eps, -eps):
            layer.load_state_dict(state)  # running statistics as they were
            if index is not None:
                array[index] = before + step
            moved = layer.forward(x, save_for_backward=False, **options)
            losses.append(float(total(np.vdot(dy, moved))[0]))
        if index is not None:
            array[index] = before
        return (losses[0] - losses[1]) / (2 * eps)

    for name, array in inputs.items():
        for rank in range(ranks.size):
            for i in range(int(total(array.size if rank == ranks.rank else 0)[0])):
                if rank != ranks.rank:
                    slope(array, None)
                    continue
                at = tuple(map(int, np.unravel_index(i, array.shape)))
                yield f"{name}{list(at)}", analytic[name][at], slope(array, at)
    for name, parameter in layer.named_parameters():
        gradient = total(gradients[name].reshape(-1)).reshape(parameter.shape)
        for at in np.ndindex(parameter.shape):
            yield f"gradient of {name}{list(at)}", gradient[at], slope(parameter, at)
