"""Batch normalization without state: for frameworks that keep their own parameters.

Forward, with the mean and biased variance of the batch of all ranks (Ioffe and Szegedy, "Batch
Normalization", 2015, algorithm 1)::

    y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

Backward, with the sums over all n values a channel has on all ranks::

    dx = (dy - sum(dy) / n - (x - mean) * invstd**2 * sum(dy * (x - mean)) / n) * invstd * weight
    dweight = sum(dy * (x - mean)) * invstd,  dbias = sum(dy)        (over this rank's values)

Data are float16, bfloat16, float32 (with float32 weight and bias) or float64 (with float64 ones),
of any rank from 2, with the channels on axis 1 or -1: NumPy or CuPy arrays, or other libraries'
that can be seen as such without a copy (PyTorch, JAX, Numba, memoryviews). What comes back is NumPy
or CuPy. ``comm=None`` is this process alone. With a communicator every rank calls the same
functions in the same order, ranks without samples too.

The five primitives work on (N, C, L) views and are for frameworks that own the collective:
``batch_moments``, ``finalize_moments``, ``normalize``, ``backward_reduce``, ``backward_input``; and
``recentre_moments``, for a second message with float64 data. Per channel they take and return (C,)
float64, but ``weight``, ``bias``, their gradients and running statistics, which have the dtype that
goes with the data. What does not fit raises ShapeError, DTypeError, DeviceError or ValueError, and
nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from .arrays import Array, as_array, as_written, is_floating, on_device_of
from .backends import backend_for
from .checks import check_momentum
from .coalesce import coalesce
from .communicators import resolve
from .double_backward import DoubleGrads, double_backward_call, double_backward_steps
from .errors import CupyBNError, DTypeError, ShapeError
from .joint import Started, Steps, on_its_device
from .passes import (
    ALONE,
    Saved,
    backward_steps,
    check_saved,
    forward_steps,
    inference_pass,
    joint_pass,
)
from .primitives import (
    backward_input,
    backward_reduce,
    batch_moments,
    finalize_moments,
    normalize,
    recentre_moments,
)
from .statistics import BackwardSums, Moments

__all__ = [
    "BackwardSums",
    "DoubleGrads",
    "Grads",
    "Moments",
    "Saved",
    "backward_input",
    "backward_reduce",
    "batch_moments",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_forward",
    "batch_norm_inference",
    "coalesce",
    "finalize_moments",
    "normalize",
    "recentre_moments",
    "update_running",
]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def _collective(start: Callable[_Parameters, Started[_Result]]) -> Callable[_Parameters, _Result]:
    """The call that `start` starts, by itself; :func:`coalesce` finds `start` to run several."""

    @wraps(start)
    def call(*args: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        return start(*args, **options).run()

    returns = start.__annotations__["return"].removeprefix("Started[").removesuffix("]")
    call.__signature__ = signature(start).replace(return_annotation=returns)  # type: ignore[attr-defined]
    call.start = start  # type: ignore[attr-defined]
    return call


def _array_if_possible(argument: Any) -> Any:
    # What is wrong with it, if anything, is for a check that the other ranks hear of.
    with suppress(CupyBNError):
        return as_array(argument)
    return argument


class Grads(NamedTuple):
    """What :func:`batch_norm_backward` returns.

    Attributes:
        dx: like x.
        dweight, dbias: (C,), sums over this rank's values; None where there was no weight or bias.
        dresidual: like x; ``dy`` itself without an activation; None without a residual.
    """

    dx: Array
    dweight: Array | None
    dbias: Array | None
    dresidual: Array | None


@_collective
def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    comm: Any = None,
    name: str | None = None,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
) -> Started[tuple[Array, Saved]]:
    """Normalises x with the statistics of the batch of all ranks of `comm`.

    Args:
        x: (N, C) or (N, C, ...), or (N, ..., C) with ``channel_axis=-1``. N may be 0.
        weight, bias: (C,), or None.
        eps: added to the variance, positive.
        comm: an mpi4py or cupybn communicator; None is this process alone.
        name: of the layer, equal on all ranks, for errors; layers that must not be confused have
            different names.
        activation: None or "relu".
        residual: like x, added before the activation.
        out: like x, takes the result; may be `residual`, must not overlap x.

    With a communicator and without a weight, an x that has no shape on one rank only cannot be told
    to the others if they have more than 128 channels: then the job ends.

    Returns:
        (y, saved): y like x, in the layout of x where x is contiguous or channels-last.

    Raises:
        ShapeError, DTypeError, DeviceError, ValueError: bad arguments, or one value per channel on
            all ranks together.
        PeerError: another rank raised one of these.
        CollectiveMismatchError: the ranks called different layers, or with different settings.
    """
    options: dict[str, Any] = {
        "channel_axis": channel_axis,
        "activation": activation,
        "residual": residual,
        "out": out,
    }
    x, weight = _array_if_possible(x), _array_if_possible(weight)
    channels = _channels(x, weight, channel_axis)
    call = joint_pass(ALONE if comm is None else resolve(comm), "forward", name, channels)

    def steps() -> Steps[tuple[Array, Saved]]:
        array = as_array(x)
        steps = forward_steps(call, array, weight, bias, eps, name=name or "", **options)
        return (yield from on_its_device(array, steps))

    return Started(call, steps())


@_collective
def batch_norm_backward(dy: Array, saved: Saved, *, out: Array | None = None) -> Started[Grads]:
    """Gradients of a forward, over the ranks of its communicator.

    Args:
        dy: shape and dtype of y, any layout.
        saved: from :func:`batch_norm_forward`.
        out: like x, takes dx; may be `dy`, unless a residual without activation hands dy on.

    Returns:
        Grads: dx accounts for all ranks; dweight and dbias are this rank's sums.

    Raises:
        TypeError: `saved` is something else.
        Otherwise as :func:`batch_norm_forward`.
    """
    check_saved(saved)
    c = saved.layout.channels
    call = joint_pass(saved.comm, "backward", saved.name, c)

    def steps() -> Steps[Grads]:
        dweight, dbias = (
            None if p is None else np.zeros_like(p, shape=(c,)) for p in (saved.weight, saved.bias)
        )
        options = {"out": out, "dweight": dweight, "dbias": dbias}
        dx, dresidual = yield from backward_steps(call, dy, saved, **options)
        return Grads(dx, dweight, dbias, dresidual)

    return Started(call, on_its_device(saved.x3, steps()))


@_collective
def batch_norm_double_backward(
    ddx: Array | None,
    ddweight: Array | None,
    ddbias: Array | None,
    saved: Saved,
    dy: Array,
    *,
    ddresidual: Array | None = None,
) -> Started[DoubleGrads]:
    """Gradients of :func:`batch_norm_backward`, over the ranks of its communicator.

    They are those of ``sum(ddx * dx) + sum(ddweight * dweight) + sum(ddbias * dbias)``, summed over
    the ranks, with dx, dweight and dbias of ``batch_norm_backward(dy, saved)``: dweight and dbias
    are each rank's own sums, and ddweight and ddbias may differ from rank to rank. One message of
    7C sums. The formulas and where they come from stand in ``cupybn/double_backward.py``. A ReLU
    counts as straight on either side of 0. By array expressions on the CPU and on devices.

    Args:
        ddx: like x, or None for zeros.
        ddweight, ddbias: (C,) like the weight and bias of the forward, or None for zeros.
        saved: from :func:`batch_norm_forward`; a backward does not use it up.
        dy: what the backward was given.
        ddresidual: like x, the same for dresidual, after a forward with a residual.

    Returns:
        DoubleGrads: ddy and dx account for all ranks; dweight is this rank's sums.

    Raises:
        ValueError: ddweight, ddbias or ddresidual for what the forward did not have.
        TypeError: `saved` is something else.
        Otherwise as :func:`batch_norm_forward`.
    """
    check_saved(saved)
    call = double_backward_call(saved)
    steps = double_backward_steps(call, ddx, ddweight, ddbias, saved, dy, ddresidual)
    return Started(call, on_its_device(saved.x3, steps))


def batch_norm_inference(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Normalises x with a given mean and variance, (C,) each. Never communicates.

    `out` may be x or `residual`. Otherwise as :func:`batch_norm_forward`.
    """
    options: dict[str, Any] = {
        "channel_axis": channel_axis,
        "activation": activation,
        "residual": residual,
        "out": out,
    }
    x = as_array(x)
    with on_device_of(x):
        y, _ = inference_pass(x, mean, var, weight, bias, eps, save=False, **options)
    return y


def update_running(running_mean: Array, running_var: Array, saved: Saved, momentum: float) -> None:
    """``running = (1 - momentum) * running + momentum * new`` in place, with the unbiased variance.

    A batch without values on any rank changes nothing.

    Raises:
        ShapeError, DTypeError: the arrays are not (C,), or not floating.
        ValueError: momentum is not in [0, 1], or an array is read-only.
        TypeError: `saved` is something else than a context. Nothing is written then.
    """
    check_momentum(momentum)
    check_saved(saved)
    running_mean = as_written(running_mean, "running_mean")
    running_var = as_written(running_var, "running_var")
    for what, array in (("running_mean", running_mean), ("running_var", running_var)):
        if not is_floating(array.dtype):
            raise DTypeError(f"{what} is {array.dtype}, not floating")
        if array.shape != saved.mean.shape:
            raise ShapeError(f"{what} has shape {array.shape}, expected {saved.mean.shape}")
    if saved.count:
        with np.errstate(all="ignore"):  # a statistic too large for the dtype becomes Inf
            backend_for(saved.mean).update_running(
                running_mean, running_var, saved.mean, saved.var, saved.count, momentum
            )


def _channels(x: Any, weight: Any, channel_axis: Any) -> int:
    # Before any check, only for the length of a message that may have to carry poison: whatever the
    # arguments are, this must not raise, or the other ranks would wait.
    try:
        return int(x.shape[channel_axis]) if weight is None else int(weight.shape[0])
    except (AttributeError, IndexError, TypeError, ValueError):
        return 0
