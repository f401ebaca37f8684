"""The primitives on NumPy arrays, compiled by Numba: the fast path on the CPU (extra ``cpu``).

Same names and meanings as in ``backends/numpy.py``. ``kernels.py`` names the compiled loops, each
made for a dtype when it is first needed and kept on disk; ``plan.py`` cuts the work, from the shape
alone, so the bits of a result do not depend on the number of threads; ``pool.py`` has the threads.

A call has to be short where arrays are small: each function here looks up what the calls of its
shape and dtype have in common, allocates, and calls a kernel. Nothing is allocated after the first
value is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ...arrays import DATA_TYPES, parameter_dtype
from ...statistics import BackwardSums, Moments, Transform
from .. import numpy as reference
from ..numpy import Data, PerChannel
from ..plain import NO_COUNTER
from .plan import LINE, SHORT, bits_items, plan_for, repeated
from .pool import spread

DIRECTIONS = ("forward", "backward")

_FORMS = {"local": 0, "pooled": 1, "recentred": 2}
_MOMENTS, _FINALIZE, _NORMALIZE = 1, 2, 4  # stages of the forward
_SUMS, _MERGE, _GRADIENTS, _INPUT = 1, 2, 4, 8  # and of the backward
_WHOLE_FORWARD, _WHOLE_BACKWARD = 7, 15
_UNMASKED: tuple[Any, ...] = None, True  # in place of a mask, and None
_UNCOUNTED: tuple[Any, ...] = None, None, True
_INT64, _UINT8 = np.dtype(np.int64), np.dtype(np.uint8)
_NO_NUMBERS, _NO_STATE, _NO_BITS = (np.empty(0, t) for t in (np.float64, np.float32, np.uint8))
_log = logging.getLogger("cupybn")

given_statistics = reference.given_statistics
count_valid = reference.count_valid
recentre_moments = reference.recentre_moments
update_running = reference.update_running


@lru_cache(maxsize=1)
def load() -> ModuleType:
    """The kernels; imports Numba.

    Raises:
        ImportError: Numba cannot be imported.
    """
    try:
        from . import kernels
    except ImportError:
        raise
    except Exception as error:  # a broken installation raises what it will
        raise ImportError(f"{type(error).__name__}: {error}") from error
    return kernels


class _Bound(NamedTuple):
    """What calls on arrays of one shape and dtype have in common.

    Attributes:
        forward, backward: the kernels, with their items; on several threads where that pays.
        counts: values per channel of each segment.
        single: whether there is one segment.
        in_place: whether one kernel on one thread does a whole call. Nothing can interrupt it, so
            it may write what has to change together. Others compute that in copies.
        seen: the dtype that the kernels see in place of a 16-bit one, or None.
        no_data, no_parameter: what stands for an absent array.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
    counts: Data
    single: bool
    in_place: bool
    seen: np.dtype[Any] | None
    no_data: Data
    no_parameter: Data


@lru_cache(maxsize=1024)
def _bound(shape: tuple[int, int, int], dtype: np.dtype[Any]) -> _Bound:
    plan, kernels = plan_for(*shape), load()
    columns = True if plan.columns else None
    shared, alone = (columns, plan.items), (columns, plan.alone)
    bits = DATA_TYPES[dtype.name].bits
    seen = np.dtype(bits) if bits else None

    def on_threads(kernel: Callable[..., None]) -> Callable[..., None]:
        if plan.threads > 1:
            return partial(spread, kernel, plan.threads, shared, alone=alone)
        return partial(kernel, False, *alone)

    no_data, no_parameter = np.empty((0, 0, 0), seen or dtype), np.empty(0, parameter_dtype(dtype))
    forward, backward = on_threads(kernels.forward), on_threads(kernels.backward)
    single = len(plan.counts) == 1
    in_place = single and plan.threads == 1
    return _Bound(forward, backward, plan.counts, single, in_place, seen, no_data, no_parameter)


def _keep(running: tuple[Data, ...], moved: tuple[Data, ...], batches: Data) -> None:
    """Writes moved running statistics, and one batch more."""
    number = int(batches) + 1
    # No call between these: Python checks for interrupts only at calls and jumps.
    running[0][...], running[1][...], batches[...] = *moved, number


def _positions(mask: Data, shape: tuple[int, int, int]) -> Data:
    """The mask as the kernels take it, for x of that shape; see ``masked.py``."""
    (n, length), wanted = mask.shape, repeated(*shape)
    if not plan_for(*shape).columns:
        bits = np.packbits(mask, bitorder="little")
        whole = np.zeros(2 * LINE + bits.size, np.int8)
        whole[LINE : LINE + bits.size] = bits.view(np.int8)
        return whole
    whole = np.zeros(2 * LINE + n * wanted, np.uint8)
    inside = whole[LINE : LINE + n * wanted]
    inside.reshape(n, wanted // max(length, 1), length)[...] = mask[:, None]
    return whole


# ---- the primitives ------------------------------------------------------------------------------


def batch_moments(
    x3: Data,
    *,
    payload: PerChannel | None = None,
    mask: Data | None = None,
    count: int | None = None,
) -> Moments:
    """Count, mean and m2 of each channel of an (N, C, L) array.

    `payload` takes this rank's part of the first message: (2C,) for ``count * mean`` and
    ``m2 + count * mean**2``, or (C,) for the first of them alone.
    """
    message = _NO_NUMBERS if payload is None else payload
    bound = _bound(x3.shape, x3.dtype)
    n, c, length = x3.shape
    segments, none = max(1, len(bound.counts)), bound.no_parameter
    mean, m2 = np.zeros(c * segments), np.zeros(c * segments)
    x3 = x3 if bound.seen is None else x3.view(bound.seen)
    numbers = mean, m2, mean, m2, message if bound.single else _NO_NUMBERS
    arrays = x3, x3, bound.no_data, none, none, none, none, *numbers
    counts, masked, total = bound.counts, _UNCOUNTED, n * length
    if mask is not None:
        counts, total = np.zeros(segments), count_valid(mask) if count is None else count
        masked = _positions(mask, x3.shape), counts, None
    settings = _MOMENTS, 0, False, (0.0, float(total), 0.0)
    bound.forward(np.zeros(2, _INT64), *arrays, *settings, *masked, NO_COUNTER)
    if not bound.single:
        load().merge_moments(mean, m2, c, counts, message)
    return Moments(total, mean[:c], m2[:c])


def finalize_moments(
    moments: Moments,
    eps: float,
    *,
    running: tuple[Data, Data] | None = None,
    factor: float = 0.0,
    form: str = "local",
) -> tuple[PerChannel, PerChannel, PerChannel]:
    """(mean, biased variance, invstd), (C,) float64 each; updates `running` in place.

    `form` says what `moments.mean` and `moments.m2` hold; see ``backends/numpy.py``.
    """
    count, first, second = moments
    mean, var, invstd = np.empty(first.size), np.empty(first.size), np.empty(first.size)
    written = mean, var, invstd, *(running or (_NO_STATE, _NO_STATE))
    given = first, second, float(count), float(eps), _FORMS[form]
    load().finalize_moments(*given, *written, float(factor))
    return mean, var, invstd


def normalize(
    x3: Data,
    transform: Transform,
    *,
    relu: bool = False,
    residual3: Data | None = None,
    out3: Data | None = None,
    relu_bits: Data | None = None,
    mask: Data | None = None,
) -> Data:
    """``relu((x - mean) * invstd * weight + bias + residual)``, (N, C, L).

    `relu_bits`, a uint8 array of ceil(size / 8) values, takes one bit for every y above 0.
    """
    out3 = np.empty(x3.shape, x3.dtype) if out3 is None else out3
    bound = _bound(x3.shape, x3.dtype)
    none, seen = bound.no_parameter, bound.no_data.dtype
    mean, invstd, weight, bias = transform
    residual = bound.no_data if residual3 is None else residual3.view(seen)
    weight, bias = none if weight is None else weight, none if bias is None else bias
    arrays = out3.view(seen), x3.view(seen), residual, weight, bias, none, none
    numbers = mean, invstd, mean, invstd, _NO_NUMBERS
    masked = _UNCOUNTED if mask is None else (_positions(mask, x3.shape), _NO_NUMBERS, None)
    settings = _NORMALIZE, 0, relu, (0.0, 0.0, 0.0)
    bound.forward(np.zeros(2, _INT64), *arrays, *numbers, *settings, *masked, NO_COUNTER)
    if relu_bits is not None:
        _pack_bits(arrays[0], relu_bits)
    return out3


def backward_reduce(
    dy3: Data,
    x3: Data,
    transform: Transform,
    *,
    relu: bool = False,
    relu_bits: Data | None = None,
    payload: PerChannel | None = None,
    mask: Data | None = None,
) -> BackwardSums:
    """The sums of dy and of dy * (x - mean), after the ReLU's backward, per channel.

    Where y passed a ReLU is read from `relu_bits` if given, else computed again from x. `payload`,
    (2C,), takes a copy of both for the message.
    """
    bound = _bound(x3.shape, x3.dtype)
    none, nothing = bound.no_parameter, bound.no_data
    mean, invstd, weight, bias = transform
    weight, bias = none if weight is None else weight, none if bias is None else bias
    arrays = dy3, x3, _NO_BITS if relu_bits is None else relu_bits, mean, invstd, weight, bias
    if bound.seen is not None:
        arrays = dy3.view(bound.seen), x3.view(bound.seen), *arrays[2:]
    c, segments = mean.size, max(1, len(bound.counts))
    sum_dy, sum_dy_xmu = np.zeros(c * segments), np.zeros(c * segments)
    sums = none, none, sum_dy, sum_dy_xmu, sum_dy, sum_dy_xmu
    stages = _SUMS | _MERGE if bound.single else _SUMS
    masked = _UNMASKED if mask is None else (_positions(mask, x3.shape), None)
    settings = stages, relu, 0.0, *masked
    bound.backward(np.zeros(2, _INT64), nothing, nothing, *arrays, *sums, *settings)
    if not bound.single:
        load().merge_sums(sum_dy, sum_dy_xmu, mean, none)
    if payload is not None:
        payload[:c], payload[c:] = sum_dy[:c], sum_dy_xmu[:c]
    return BackwardSums(sum_dy[:c], sum_dy_xmu[:c])


def backward_input(
    dy3: Data,
    x3: Data,
    transform: Transform,
    *,
    sums: BackwardSums | None = None,
    count: int = 0,
    relu: bool = False,
    relu_bits: Data | None = None,
    out3: Data | None = None,
    dresidual3: Data | None = None,
    local: BackwardSums | None = None,
    dweight: Data | None = None,
    dbias: Data | None = None,
    mask: Data | None = None,
) -> Data:
    """The gradient of x, (N, C, L); see ``backends/numpy.py``."""
    dx3 = np.empty(x3.shape, x3.dtype) if out3 is None else out3
    bound = _bound(x3.shape, x3.dtype)
    none, bits = bound.no_parameter, _NO_BITS if relu_bits is None else relu_bits
    mean, invstd, weight, bias = transform
    coefficients = mean, invstd, none if weight is None else weight, none if bias is None else bias
    dresidual = bound.no_data if dresidual3 is None else dresidual3
    total = (mean, mean) if sums is None else (sums[0], sums[1])
    own = total if local is None else (local[0], local[1])
    gradients = none if dweight is None else dweight, none if dbias is None else dbias
    into = gradients if bound.in_place else (gradients[0].copy(), gradients[1].copy())
    arrays = dx3, dresidual, dy3, x3, bits, *coefficients, *into, *own, *total
    if (seen := bound.seen) is not None:
        data = dx3.view(seen), dresidual.view(seen), dy3.view(seen), x3.view(seen)
        arrays = *data, *arrays[4:]
    divisor = 0.0 if sums is None else float(max(count, 1))
    stages = _INPUT
    if local is not None and bound.single:
        stages = _GRADIENTS | _INPUT
    elif local is not None:
        load().add_gradients(*into, *own, invstd)
    masked = _UNMASKED if mask is None else (_positions(mask, x3.shape), None)
    bound.backward(np.zeros(2, _INT64), *arrays, stages, relu, divisor, *masked)
    if into is not gradients:
        gradients[0][...], gradients[1][...] = into
    return dx3


# ---- what a layer calls --------------------------------------------------------------------------


def finish_forward(
    moments: Moments,
    form: str,
    x3: Data,
    y3: Data,
    weight: Data | None,
    bias: Data | None,
    eps: float,
    *,
    relu: bool = False,
    residual3: Data | None = None,
    relu_bits: Data | None = None,
    running: tuple[Data, Data] | None = None,
    batches: Data = NO_COUNTER,
    factor: float = 0.0,
    mask: Data | None = None,
) -> tuple[PerChannel, PerChannel]:
    """``finalize_moments`` and ``normalize`` into y3: (mean, invstd)."""
    bound = _bound(x3.shape, x3.dtype)
    none, c = bound.no_parameter, x3.shape[1]
    weight, bias = none if weight is None else weight, none if bias is None else bias
    residual = bound.no_data if residual3 is None else residual3
    arrays = y3, x3, residual, weight, bias
    if (seen := bound.seen) is not None:
        arrays = y3.view(seen), x3.view(seen), residual.view(seen), weight, bias
    states = running or (none, none)
    in_place = bound.in_place and relu_bits is None
    moved = states if in_place else (states[0].copy(), states[1].copy())
    mean, invstd, first, second = np.empty(c), np.empty(c), moments.mean, moments.m2
    pooled, turns = (first, second, _NO_NUMBERS), np.zeros(2, _INT64)
    numbers, stages = (float(eps), float(moments.count), float(factor)), _FINALIZE | _NORMALIZE
    if not bound.single:
        stages, written = _NORMALIZE, (mean, np.empty(c), invstd, *moved)
        of_all = first, second, float(moments.count), float(eps), _FORMS[form]
        load().finalize_moments(*of_all, *written, float(factor))
    masked = _UNCOUNTED if mask is None else (_positions(mask, x3.shape), _NO_NUMBERS, None)
    settings = stages, _FORMS[form], relu, numbers
    last = *masked, batches if in_place else NO_COUNTER
    bound.forward(turns, *arrays, *moved, mean, invstd, *pooled, *settings, *last)
    if relu_bits is not None:
        _pack_bits(arrays[0], relu_bits)
    if moved is not states:
        _keep(states, moved, batches)
    return mean, invstd


def local_forward(
    x3: Data,
    y3: Data,
    weight: Data | None,
    bias: Data | None,
    eps: float,
    *,
    relu: bool = False,
    residual3: Data | None = None,
    relu_bits: Data | None = None,
    running: tuple[Data, Data] | None = None,
    batches: Data = NO_COUNTER,
    factor: float = 0.0,
    mask: Data | None = None,
    count: int | None = None,
) -> tuple[PerChannel, PerChannel]:
    """``batch_moments`` and ``finish_forward`` of one rank: (mean, invstd).

    In one go where a thread has all values of a channel: it reads them again from its cache.
    """
    bound = _bound(x3.shape, x3.dtype)
    none, (n, c, length) = bound.no_parameter, x3.shape
    if not bound.single:
        moments = batch_moments(x3, mask=mask, count=count)
        options: dict[str, Any] = {"running": running, "batches": batches, "factor": factor}
        options |= {"relu": relu, "residual3": residual3, "relu_bits": relu_bits, "mask": mask}
        return finish_forward(moments, "local", x3, y3, weight, bias, eps, **options)
    weight, bias = none if weight is None else weight, none if bias is None else bias
    residual, state = bound.no_data if residual3 is None else residual3, running or (none, none)
    in_place = bound.in_place and relu_bits is None
    moved = state if in_place else (state[0].copy(), state[1].copy())
    arrays = y3, x3, residual
    if (seen := bound.seen) is not None:
        arrays = y3.view(seen), x3.view(seen), residual.view(seen)
    mean, invstd, turns = np.empty(c), np.empty(c), np.zeros(2, _INT64)
    masked, total = _UNCOUNTED, n * length
    if mask is not None:
        total = count_valid(mask) if count is None else count
        masked = _positions(mask, x3.shape), np.zeros(1), None
    # m2, then invstd in its place
    numbers = *moved, mean, invstd, mean, invstd, _NO_NUMBERS
    settings = _WHOLE_FORWARD, 0, relu, (float(eps), float(total), float(factor))
    last = *masked, batches if in_place else NO_COUNTER
    bound.forward(turns, *arrays, weight, bias, *numbers, *settings, *last)
    if relu_bits is not None:
        _pack_bits(arrays[0], relu_bits)
    if moved is not state:
        _keep(state, moved, batches)
    return mean, invstd


def local_backward(
    dy3: Data,
    x3: Data,
    dx3: Data,
    transform: Transform,
    *,
    count: int,
    relu: bool = False,
    relu_bits: Data | None = None,
    dresidual3: Data | None = None,
    dweight: Data | None = None,
    dbias: Data | None = None,
    mask: Data | None = None,
) -> None:
    """``backward_reduce`` and ``backward_input`` of one rank.

    A count of 0: the statistics are constants.
    """
    bound = _bound(x3.shape, x3.dtype)
    if not bound.single:
        options: dict[str, Any] = {"relu": relu, "relu_bits": relu_bits, "mask": mask}
        local = backward_reduce(dy3, x3, transform, **options)
        options |= {"out3": dx3, "dresidual3": dresidual3, "dweight": dweight, "dbias": dbias}
        options |= {"sums": local if count else None, "local": local, "count": count}
        backward_input(dy3, x3, transform, **options)
        return
    none, c = bound.no_parameter, x3.shape[1]
    mean, invstd, weight, bias = transform
    weight, bias = none if weight is None else weight, none if bias is None else bias
    gradients = none if dweight is None else dweight, none if dbias is None else dbias
    into = gradients if bound.in_place else (gradients[0].copy(), gradients[1].copy())
    dresidual = bound.no_data if dresidual3 is None else dresidual3
    arrays = dx3, dresidual, dy3, x3
    if (seen := bound.seen) is not None:
        arrays = dx3.view(seen), dresidual.view(seen), dy3.view(seen), x3.view(seen)
    bits = _NO_BITS if relu_bits is None else relu_bits
    sums, turns = (np.empty(c), np.empty(c)), np.zeros(2, _INT64)
    numbers = bits, mean, invstd, weight, bias, *into, *sums, *sums
    masked = _UNMASKED if mask is None else (_positions(mask, x3.shape), None)
    bound.backward(turns, *arrays, *numbers, _WHOLE_BACKWARD, relu, float(count), *masked)
    if into is not gradients:
        gradients[0][...], gradients[1][...] = into


def _pack_bits(y: Data, relu_bits: Data) -> None:
    items = bits_items(relu_bits.size)
    arguments = np.zeros(2, _INT64), y, relu_bits
    if len(items) > 1:
        spread(load().pack_bits, len(items), (items,), *arguments)
    else:
        load().pack_bits(False, items, *arguments)


# ---- compiling in time ---------------------------------------------------------------------------


def prepare_forward(
    x3: Data,
    y3: Data,
    *,
    residual3: Data | None = None,
    relu_bits: Data | None = None,
    relu: bool = False,
    running_dtype: str | None = None,
    ranks: int = 1,
    mask: Data | None = None,
) -> None:
    """Compiles the kernels of a forward, or reads them from disk: before its first message.

    Once for a dtype, for rows and for columns; what happened goes to the log ``cupybn``.
    """
    _prepare("forward", x3, relu_bits is not None, mask is not None)


def prepare_backward(
    dy3: Data,
    x3: Data,
    dx3: Data,
    *,
    dresidual3: Data | None = None,
    relu_bits: Data | None = None,
    relu: bool = False,
    constant: bool = False,
    ranks: int = 1,
    mask: Data | None = None,
) -> None:
    """As :func:`prepare_forward`, for a backward."""
    _prepare("backward", x3, False, mask is not None)


def _prepare(direction: str, x3: Data, relu_bits: bool, masked: bool) -> None:
    segments = len(_bound(x3.shape, x3.dtype).counts) > 1
    rehearse(direction, x3.dtype, x3.shape[2] < SHORT, relu_bits, segments, masked)


@lru_cache(maxsize=1024)  # what is compiled stays so
def rehearse(
    direction: str,
    dtype: np.dtype[Any],
    columns: bool,
    relu_bits: bool = True,
    segments: bool = True,
    masked: bool = False,
) -> tuple[int, float]:
    """A call on next to nothing, after which its kernels are compiled, for any number of ranks.

    `relu_bits` and `segments`: those that pack a relu_bits, or merge several segments, too;
    `masked`: those for a mask, in place of those without.

    Returns:
        How many were not on disk, and the seconds it took.
    """
    began, before, kernels = time.perf_counter(), load().compiled(), load()
    x3 = np.zeros((2, 1, 1 if columns else SHORT), dtype)
    y3, one, number = x3.copy(), np.ones(1, parameter_dtype(dtype)), np.zeros(1)
    bits = np.zeros((x3.size + 7) // 8, np.uint8) if relu_bits else None
    mask = np.ones((2, x3.shape[2]), np.uint8) if masked else None
    if direction == "forward":
        local_forward(x3, y3, one, one, 1.0, relu_bits=bits, mask=mask)
        if segments:
            kernels.merge_moments(number, number, 1, number, number)
            finalize_moments(Moments(1, number, number), 1.0, running=(one, one))
    else:
        local_backward(x3, x3, y3, Transform(number, number, one, one), count=2, mask=mask)
        if segments:
            kernels.merge_sums(number, number, number, one)
            kernels.add_gradients(one, one, number, number, number)
    compiled, seconds = kernels.compiled() - before, time.perf_counter() - began
    _log.log(
        logging.INFO if compiled else logging.DEBUG,
        "%s of %s %s%s: %d kernels compiled, the others read from disk, in %.1f s",
        direction,
        dtype,
        "columns" if columns else "rows",
        " with a mask" if masked else "",
        compiled,
        seconds,
    )
    return compiled, seconds
