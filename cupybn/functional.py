"""Batch normalization without state: for frameworks that keep their own parameters.

Forward, with the mean and biased variance of the batch of all ranks (Ioffe and Szegedy, "Batch
Normalization", 2015, algorithm 1)::

    y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

Backward, with the sums over all n values a channel has on all ranks::

    dx = (dy - sum(dy) / n - (x - mean) * invstd**2 * sum(dy * (x - mean)) / n) * invstd * weight
    dweight = sum(dy * (x - mean)) * invstd,  dbias = sum(dy)        (over this rank's values)

Data are float16, bfloat16, float32 (with float32 weight and bias) or float64 (with float64 ones),
of 2 or more dimensions, with the channels on axis 1 or -1: NumPy or CuPy arrays, or arrays of
other libraries that can be used without a copy (PyTorch, JAX, Numba, memoryviews). Results are
NumPy or CuPy arrays. ``comm=None`` is this process alone. With a communicator every rank calls
the same functions in the same order, ranks without samples too.

The five primitives work on (N, C, L) views and are for frameworks that own the collective:
``batch_moments``, ``finalize_moments``, ``normalize``, ``backward_reduce``, ``backward_input``; and
``recentre_moments``, for a second message with float64 data. All of them take

* ``x3``, ``dy3``, ``residual3``: (N, C, L), all of one dtype; ``out3``, ``dresidual3``: the same,
  written to;
* ``mean``, ``invstd``, ``m2``, ``weighted`` and sums: (C,) float64;
* ``weight``, ``bias``: (C,), float32, or float64 with float64 data; or None. ``dweight``,
  ``dbias``: the same, added to;
* ``relu_bits``: (ceil(N C L / 8),) uint8, a bit for each value of y above 0;
* ``payload``: (2C,) float64, or (C,) where it says so, written to: this rank's part of a message;
* ``mask``: (N, L), bool or uint8, nonzero where x is valid; or None;
* ``eps``: positive; ``activation``: None or "relu".

All arrays are on one device. Arguments that do not fit raise ShapeError, DTypeError, DeviceError
or ValueError, and nothing is written.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from .arrays import as_array, as_written, is_floating, on_device_of
from .backends import backend_for, by_type
from .checks import check_momentum
from .collective import CollectiveCall
from .communicators import resolve
from .double_backward import DoubleGrads, double_backward, double_backward_call
from .errors import CupyBNError, DTypeError, ShapeError
from .forward_backward import (
    ALONE,
    Bindings,
    Bound,
    Options,
    Saved,
    bind,
    call_name,
    check_saved,
)
from .primitives import (
    backward_input,
    backward_reduce,
    batch_moments,
    finalize_moments,
    normalize,
    recentre_moments,
)
from .statistics import BackwardSums, Moments, message_length
from .typing import Array, ArrayLike

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
    "finalize_moments",
    "normalize",
    "recentre_moments",
    "update_running",
    "updated_running",
]

_bindings = Bindings(256)


def _array_if_possible(argument: Any) -> Any:
    # A later check says what is wrong with it, and tells the other ranks.
    with suppress(CupyBNError):
        return as_array(argument)
    return argument


class Grads(NamedTuple):
    """The result of :func:`batch_norm_backward`.

    Attributes:
        dx: like x.
        dweight, dbias: (C,), sums over this rank's values; None where there was no weight or bias.
        dresidual: like x; ``dy`` itself without activation and mask; None without a residual.
    """

    dx: Array
    dweight: Array | None
    dbias: Array | None
    dresidual: Array | None


def batch_norm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    comm: Any = None,
    name: str | None = None,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    out: ArrayLike | None = None,
    save: bool = True,
) -> tuple[Array, Saved]:
    """Normalises x with the statistics of the batch of all ranks of `comm`.

    Args:
        x: (N, C) or (N, C, ...), or (N, ..., C) with ``channel_axis=-1``. N may be 0.
        weight, bias: (C,), or None.
        eps: added to the variance, positive.
        comm: an mpi4py or cupybn communicator; None is this process alone.
        name: of the layer, equal on all ranks, for errors; different ones for different layers.
        activation: None or "relu".
        residual: like x, added before the activation.
        mask: bool or uint8, x's shape without the channel axis, nonzero where x is valid: y is that
            of the valid values alone, and 0 elsewhere. On some ranks or all; kept by reference.
        out: like x, takes the result; may be `residual`, must not overlap x.
        save: whether a backward may follow. Else `saved` has the statistics, and no array like x.

    With a communicator and without a weight, a rank whose x has no shape cannot tell the others if
    they have more than 128 channels: then the job ends.

    Returns:
        (y, saved): y like x, in the layout of x where x is contiguous or channels-last.

    Raises:
        ShapeError, DTypeError, DeviceError, ValueError: bad arguments, or one value per channel.
        PeerError: another rank raised one of these.
        CollectiveMismatchError: the ranks called different layers, or with different settings.
    """
    affine = weight is not None, bias is not None
    options = (eps, activation, channel_axis, affine, residual is None, bool(save), name)
    key = _signature(x, comm, options)
    arrays: dict[str, Any] = {"residual": residual, "mask": mask, "out": out}
    if (found := _bindings.get(key)) is not None and found[0] is comm:
        bound: Bound = found[1]
        with CollectiveCall(bound.comm, *bound.forward_call) as call:
            return bound.forward(call, x, {"weight": weight, "bias": bias}, **arrays)
    communicator = ALONE if comm is None else resolve(comm)
    x, weight = _array_if_possible(x), _array_if_possible(weight)
    length = message_length(_channels(x, weight, channel_axis))
    with CollectiveCall(communicator, call_name("forward", name), length) as call:
        x = as_array(x)
        wanted = Options(eps, activation, affine, residual is not None, bool(save))
        bound = bind(x, channel_axis, wanted, communicator, name or "")
        if key is not None:
            _bindings.keep(key, (comm, bound))
        *_, call.fingerprint, call.messages = bound.forward_call
        return bound.forward(call, x, {"weight": weight, "bias": bias}, **arrays)


def _signature(x: Any, comm: Any, options: tuple[Any, ...]) -> Any:
    """The key of a binding; None if x is another library's array."""
    if type(x) not in by_type:
        return None
    device = None if type(x) is np.ndarray else x.data.device_id
    key = (type(x), x.shape, x.strides, x.dtype, device, id(comm), *options)
    with suppress(TypeError):  # bind refuses an option that cannot be hashed
        hash(key)
        return key
    return None


def batch_norm_backward(dy: ArrayLike, saved: Saved, *, out: ArrayLike | None = None) -> Grads:
    """Gradients of a forward, over the ranks of its communicator.

    Args:
        dy: shape and dtype of y, any layout.
        saved: from :func:`batch_norm_forward`.
        out: like x, takes dx; may be `dy`, unless it is handed on as dresidual.

    Returns:
        Grads: dx accounts for all ranks; dweight and dbias are this rank's sums.

    Raises:
        TypeError: `saved` is not a context.
        ValueError: `saved` is of a forward with ``save=False``.
        Others: as :func:`batch_norm_forward`.
    """
    check_saved(saved)
    bound = saved.bound
    with CollectiveCall(bound.comm, *bound.backward_call) as call:
        dweight, dbias = (
            None if p is None else np.zeros_like(p, shape=(bound.channels,))
            for p in (saved.weight, saved.bias)
        )
        dx, dresidual = bound.backward(call, dy, saved, out=out, dweight=dweight, dbias=dbias)
        return Grads(dx, dweight, dbias, dresidual)


def batch_norm_double_backward(
    ddx: ArrayLike | None,
    ddweight: ArrayLike | None,
    ddbias: ArrayLike | None,
    saved: Saved,
    dy: ArrayLike,
    *,
    ddresidual: ArrayLike | None = None,
) -> DoubleGrads:
    """Gradients of :func:`batch_norm_backward`, over the ranks of its communicator.

    They are those of ``sum(ddx * dx) + sum(ddweight * dweight) + sum(ddbias * dbias)``, summed over
    the ranks, with dx, dweight and dbias of ``batch_norm_backward(dy, saved)``: dweight and dbias
    are each rank's own sums, and ddweight and ddbias may differ from rank to rank. One message of
    7C sums. The formulas and their derivation are in ``cupybn/double_backward.py``. A ReLU counts
    as straight on either side of 0. Array expressions compute it, on the CPU and on devices.

    Args:
        ddx: like x, or None for zeros.
        ddweight, ddbias: (C,) like the weight and bias of the forward, or None for zeros.
        saved: from :func:`batch_norm_forward`; a backward does not use it up.
        dy: the argument of the backward.
        ddresidual: like x, the same for dresidual, after a forward with a residual.

    Returns:
        DoubleGrads: ddy and dx account for all ranks; dweight is this rank's sums.

    Raises:
        ValueError: ddweight, ddbias or ddresidual for what the forward did not have.
        TypeError: `saved` is not a context.
        Others: as :func:`batch_norm_forward`.
    """
    check_saved(saved)
    with double_backward_call(saved) as call:
        return double_backward(call, ddx, ddweight, ddbias, saved, dy, ddresidual)


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    out: ArrayLike | None = None,
) -> Array:
    """Normalises x with a given mean and variance. Never communicates.

    Args:
        mean, var: (C,), floating, on x's device.
        out: as there, and may be x.
        The others: as of :func:`batch_norm_forward`.

    Returns:
        y, like x; 0 where masked.

    Raises:
        ShapeError, DTypeError, DeviceError, ValueError: bad arguments. Nothing is written.
    """
    options = (eps, activation, channel_axis, weight is None, bias is None, residual is None)
    key = _signature(x, None, options)
    bound = _bindings.get(key)
    if bound is None:
        x = as_array(x)
        affine = weight is not None, bias is not None
        wanted = Options(eps, activation, affine, residual is not None, save=False, given=True)
        bound = bind(x, channel_axis, wanted, ALONE, "")
        if key is not None:
            _bindings.keep(key, bound)
    given = as_array(mean, "mean"), as_array(var, "var"), np.zeros((), np.int64)
    params = {"weight": weight, "bias": bias}
    y: Array
    y, _ = bound.forward(None, x, params, residual=residual, mask=mask, out=out, running=given)
    return y


def update_running(
    running_mean: ArrayLike, running_var: ArrayLike, saved: Saved, momentum: float
) -> None:
    """``running = (1 - momentum) * running + momentum * new`` in place, with the unbiased variance.

    A batch without values on any rank changes nothing.

    Args:
        running_mean, running_var: (C,), floating, writable.
        saved: from :func:`batch_norm_forward`.
        momentum: the share of the new batch, in [0, 1].

    Raises:
        ShapeError, DTypeError: the arrays are not (C,), or not floating.
        ValueError: momentum is not in [0, 1], or an array is read-only.
        TypeError: `saved` is not a context. Nothing is written then.
    """
    check_momentum(momentum)
    check_saved(saved)
    mean, var = as_written(running_mean, "running_mean"), as_written(running_var, "running_var")
    for what, array in (("running_mean", mean), ("running_var", var)):
        if not is_floating(array.dtype):
            raise DTypeError(f"{what} is {array.dtype}, not floating")
        if array.shape != saved.mean.shape:
            raise ShapeError(f"{what} has shape {array.shape}, expected {saved.mean.shape}")
    if saved.count:
        with np.errstate(all="ignore"):  # a statistic too large for the dtype becomes Inf
            backend_for(saved.mean).update_running(
                mean, var, saved.mean, saved.var, saved.count, momentum
            )


def updated_running(
    running_mean: ArrayLike, running_var: ArrayLike, saved: Saved, momentum: float
) -> tuple[Array, Array]:
    """The result of :func:`update_running` as new arrays; the given ones may be read-only.

    Returns:
        (mean, var): like `running_mean` and `running_var`, NumPy or CuPy. Copies where no rank had
        values.

    Raises:
        As :func:`update_running`.
    """
    mean, var = as_array(running_mean, "running_mean"), as_array(running_var, "running_var")
    with on_device_of(mean):
        mean, var = mean.copy(), var.copy()
    update_running(mean, var, saved, momentum)
    return mean, var


def _channels(x: Any, weight: Any, channel_axis: Any) -> int:
    # Before any check, for the length of a message that may have to carry a failure header: this
    # must not raise, whatever the arguments are, or the other ranks would wait.
    try:
        return int(x.shape[channel_axis]) if weight is None else int(weight.shape[0])
    except (AttributeError, IndexError, TypeError, ValueError):
        return 0
