"""The five primitives on NumPy arrays, compiled by Numba: the fast path on the CPU (extra ``cpu``).

Same names and meanings as in ``backends/numpy.py``. The loops are in ``loops.py``, which compiles
them for a dtype when they are first needed and keeps them on disk; how the work is cut, from the
shape alone, in ``pieces.py``; so the bits of a result do not depend on the number of threads.
"""

from __future__ import annotations

import logging
import sys
import time
from functools import lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from ..arrays import parameter_dtype
from ..statistics import BackwardSums, Moments, Transform
from . import numpy as reference
from .composed import compose
from .numpy import Data, PerChannel
from .pieces import SHORT, Plan, plan_for
from .threads import spread

_BITS = {"float16": np.int16, "bfloat16": np.uint16}
_FORMS = {"local": 0, "pooled": 1, "recentred": 2}
_FLOAT64, _FLOAT32, _UINT8 = (np.dtype(name) for name in ("float64", "float32", "uint8"))
_MASK_PIECE = 1 << 15  # bytes
_ready: set[tuple[Any, ...]] = set()
_log = logging.getLogger("cupybn")

given_statistics = reference.given_statistics
recentre_moments = reference.recentre_moments
update_running = reference.update_running
finish_forward, _local_forward, _local_backward = compose(sys.modules[__name__])


@lru_cache(maxsize=1)
def load() -> ModuleType:
    """The loops; imports Numba.

    Raises:
        ImportError: Numba cannot be imported.
    """
    from . import loops

    return loops


def batch_moments(x3: Data, *, payload: PerChannel | None = None) -> Moments:
    """Count, mean and m2 of each channel of an (N, C, L) array.

    `payload` takes this rank's part of the first message: (2C,) for ``count * mean`` and
    ``m2 + count * mean**2``, or (C,) for the first of them alone.
    """
    n, c, length = x3.shape
    if x3.size == 0:
        if payload is not None:
            payload[...] = 0
        return Moments(n * length, np.zeros(c), np.zeros(c))
    plan = plan_for(n, c, length)
    means, m2s = np.empty((2, len(plan.counts), c))
    loop = load().column_moments if plan.columns else load().row_moments
    spread(loop, (_flat(x3), means, m2s, plan.repeats), plan.pieces, plan.threads)
    if len(plan.counts) > 1:
        load().merge_moments(means, m2s, np.array(plan.counts))
    moments = Moments(n * length, means[0], m2s[0])
    if payload is not None:
        load().pack_moments(moments.mean, moments.m2, float(moments.count), payload)
    return moments


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
    (mean, invstd), var = np.empty((2, moments.mean.size)), np.empty(moments.mean.size)
    states = running or (None, None)
    dense = [_vector(state, _FLOAT32 if state is None else state.dtype) for state in states]
    load().finalize_moments(
        _vector(moments.mean), _vector(moments.m2), float(moments.count), float(eps),
        _FORMS[form], mean, var, invstd, *dense, float(factor), 0, mean.size,
    )  # fmt: skip
    _copy_back(states, dense)
    return mean, var, invstd


def normalize(
    x3: Data,
    transform: Transform,
    *,
    relu: bool = False,
    residual3: Data | None = None,
    out3: Data | None = None,
    mask: Data | None = None,
) -> Data:
    """``activation((x - mean) * invstd * weight + bias + residual)``, (N, C, L).

    `mask`, a uint8 array of ceil(size / 8) values, takes one bit for every y above 0.
    """
    y3 = np.empty_like(x3) if out3 is None else out3
    if x3.size == 0:
        return y3
    plan = plan_for(*x3.shape)
    dense = _dense(y3)
    y, residual = _flat(dense), _flat(residual3, x3)
    coefficients = _coefficients(plan, x3, transform)
    arguments = y, _flat(x3), residual, relu, coefficients
    spread(load().normalize, arguments, plan.pieces, plan.threads)
    _pack_mask(y, mask)
    _copy_back((y3,), (dense,))
    return y3


def _pack_mask(y: Data, mask: Data | None) -> None:
    if mask is not None:
        bounds = range(0, mask.size, _MASK_PIECE)
        pieces = np.array([(begin, min(begin + _MASK_PIECE, mask.size)) for begin in bounds])
        spread(load().pack_mask, (y, mask), pieces, len(pieces))


def backward_reduce(
    dy3: Data,
    x3: Data,
    transform: Transform,
    *,
    relu: bool = False,
    mask: Data | None = None,
    payload: PerChannel | None = None,
) -> BackwardSums:
    """The sums of dy and of dy * (x - mean), after the activation's backward, per channel.

    Where y passed a ReLU is read from `mask` if given, else computed again from x. `payload`,
    (2C,), takes a copy of both for the message.
    """
    c = x3.shape[1]
    if x3.size == 0:
        sums = BackwardSums(*np.zeros((2, c)))
    else:
        plan = plan_for(*x3.shape)
        sums_dy, sums_dy_xmu = np.empty((2, len(plan.counts), c))
        coefficients = _coefficients(plan, x3, transform)
        arguments = (
            sums_dy, sums_dy_xmu, _flat(dy3), _flat(x3), *_activation(relu, mask),
            coefficients, plan.repeats,
        )  # fmt: skip
        loop = load().column_reduce if plan.columns else load().row_reduce
        spread(loop, arguments, plan.pieces, plan.threads)
        mean = _vector(transform.mean)
        load().add_segments(sums_dy, sums_dy_xmu, mean, coefficients, plan.repeats, 0, c)
        sums = BackwardSums(sums_dy[0], sums_dy_xmu[0])
    if payload is not None:
        np.concatenate(sums, out=payload)
    return sums


def backward_input(
    dy3: Data,
    x3: Data,
    transform: Transform,
    *,
    sums: BackwardSums | None = None,
    count: int = 0,
    relu: bool = False,
    mask: Data | None = None,
    out3: Data | None = None,
    dresidual3: Data | None = None,
    local: BackwardSums | None = None,
    dweight: Data | None = None,
    dbias: Data | None = None,
) -> Data:
    """The gradient of x, (N, C, L); see ``backends/numpy.py``."""
    dx3 = np.empty_like(x3) if out3 is None else out3
    if local is not None:
        gradients = dweight, dbias
        vectors = [_vector(gradient, parameter_dtype(x3.dtype)) for gradient in gradients]
        invstd = _vector(transform.invstd)
        load().add_gradients(*vectors, *map(_vector, local), invstd, 0, invstd.size)
        _copy_back(gradients, vectors)
    if x3.size == 0:
        return dx3
    plan = plan_for(*x3.shape)
    dense = _dense(dx3), _dense(dresidual3)
    coefficients = _coefficients(plan, x3, transform)
    if sums is not None:
        load().fill_slope(
            coefficients, plan.repeats, _vector(transform.mean), _vector(transform.invstd),
            *map(_vector, sums), float(max(count, 1)), 0, x3.shape[1],
        )  # fmt: skip
    arguments = (
        _flat(dense[0]), _flat(dense[1], x3), _flat(dy3), _flat(x3),
        *_activation(relu, mask), sums is None, coefficients,
    )  # fmt: skip
    spread(load().backward_input, arguments, plan.pieces, plan.threads)
    _copy_back((dx3, dresidual3), dense)
    return dx3


def local_forward(
    x3: Data,
    y3: Data,
    weight: Data | None,
    bias: Data | None,
    eps: float,
    *,
    relu: bool = False,
    residual3: Data | None = None,
    mask: Data | None = None,
    running: tuple[Data, Data] | None = None,
    factor: float = 0.0,
) -> tuple[PerChannel, PerChannel]:
    """``batch_moments``, ``finalize_moments`` and ``normalize`` of one rank.

    In one go where a thread has all values of a channel: it reads them again from its cache.
    """
    n, c, length = x3.shape
    plan = plan_for(n, c, length) if x3.size else None
    if plan is None or len(plan.counts) > 1:
        return _local_forward(
            x3, y3, weight, bias, eps, relu=relu, residual3=residual3, mask=mask,
            running=running, factor=factor,
        )  # fmt: skip
    dtype = parameter_dtype(x3.dtype)
    mean, var, invstd = np.empty((1, c)), np.empty((1, c)), np.empty(c)
    states = running or (None, None)
    dense = [_vector(state, dtype) for state in states]
    written = _dense(y3)
    y = _flat(written)
    arguments = (
        y, _flat(x3), _flat(residual3, x3), relu, _vector(weight, dtype),
        _vector(bias, dtype), eps, mean, invstd, var, *dense, factor,
        np.empty(plan.coefficients, dtype), plan.repeats, plan.group,
    )  # fmt: skip
    loop = load().column_forward if plan.columns else load().row_forward
    spread(loop, arguments, plan.pieces, plan.threads)
    _pack_mask(y, mask)
    _copy_back((y3, *states), (written, *dense))
    return mean[0], invstd


def local_backward(
    dy3: Data,
    x3: Data,
    dx3: Data,
    transform: Transform,
    *,
    count: int,
    relu: bool = False,
    mask: Data | None = None,
    dresidual3: Data | None = None,
    dweight: Data | None = None,
    dbias: Data | None = None,
) -> None:
    """``backward_reduce`` and ``backward_input`` of one rank.

    A count of 0: the statistics are constants.
    """
    plan = plan_for(*x3.shape) if x3.size else None
    if plan is None or len(plan.counts) > 1:
        _local_backward(
            dy3, x3, dx3, transform, count=count, relu=relu,
            mask=mask, dresidual3=dresidual3, dweight=dweight, dbias=dbias,
        )  # fmt: skip
        return
    dtype = parameter_dtype(x3.dtype)
    gradients = dweight, dbias
    dense = [_vector(gradient, dtype) for gradient in gradients]
    written = _dense(dx3), _dense(dresidual3)
    arguments = (
        _flat(written[0]), _flat(written[1], x3), _flat(dy3), _flat(x3),
        *_activation(relu, mask),
        count == 0, *_vectors(transform, dtype),
        float(max(count, 1)), np.empty((2, x3.shape[1])), *dense,
        np.empty(plan.coefficients, dtype), plan.repeats, plan.group,
    )  # fmt: skip
    loop = load().column_backward if plan.columns else load().row_backward
    spread(loop, arguments, plan.pieces, plan.threads)
    _copy_back((dx3, dresidual3, *gradients), (*written, *dense))


def prepare_forward(
    x3: Data,
    y3: Data,
    *,
    residual3: Data | None = None,
    mask: Data | None = None,
    relu: bool = False,
    running_dtype: str | None = None,
    ranks: int = 1,
) -> None:
    """Compiles the loops of a forward, or reads them from disk: before its first message.

    Once for a dtype, for rows and for columns; what happened goes to the log ``cupybn``.
    """
    _prepare("forward", x3, ranks, mask is not None)


def prepare_backward(
    dy3: Data,
    x3: Data,
    dx3: Data,
    *,
    dresidual3: Data | None = None,
    mask: Data | None = None,
    relu: bool = False,
    constant: bool = False,
    ranks: int = 1,
) -> None:
    """As :func:`prepare_forward`, for a backward."""
    _prepare("backward", x3, ranks)


def _prepare(direction: str, x3: Data, ranks: int, mask: bool = False) -> None:
    if x3.size == 0:
        return
    plan = plan_for(*x3.shape)
    whole = ranks == 1 and len(plan.counts) == 1
    key = direction, whole, x3.dtype, plan.columns, mask
    if key not in _ready:
        if whole:
            direction = f"local {direction}"
        compiled, seconds = rehearse(direction, x3.dtype, plan.columns, mask)
        _log.log(
            logging.INFO if compiled else logging.DEBUG,
            "%s of %s %s: %d loops compiled, the others read from disk, in %.1f s",
            direction, x3.dtype, "columns" if plan.columns else "rows", compiled, seconds,
        )  # fmt: skip
        _ready.add(key)


DIRECTIONS = ("local forward", "local backward", "forward", "backward")


def rehearse(
    direction: str, dtype: np.dtype[Any], columns: bool, mask: bool = True
) -> tuple[int, float]:
    """A pass over next to nothing, after which its loops are compiled.

    Returns:
        How many were not on disk, and the seconds it took.
    """
    began, before = time.perf_counter(), load().compiled()
    x3 = np.zeros((2, 1, 1 if columns else SHORT), dtype)
    y3 = np.empty_like(x3)
    one = np.ones(1, parameter_dtype(dtype))
    bits = np.zeros(-(-x3.size // 8), np.uint8) if mask else None
    transform = Transform(*np.zeros((2, 1)), one, one)
    if direction == "local forward":
        local_forward(x3, y3, one, one, 1.0, mask=bits)
    elif direction == "local backward":
        local_backward(x3, x3, y3, transform, count=2)
    elif direction == "forward":
        moments = batch_moments(x3, payload=np.zeros(2))
        for running in (None, (one, one)):
            finalize_moments(moments, 1.0, running=running)
        normalize(x3, transform, mask=bits)
    else:
        sums = backward_reduce(x3, x3, transform)
        backward_input(x3, x3, transform, sums=sums, local=sums, dweight=one, dbias=one)
    return load().compiled() - before, time.perf_counter() - began


def _coefficients(
    plan: Plan,
    x3: Data,
    transform: Transform,
) -> Data:
    """What the loops multiply and add, for each channel or column; slope and offset come later."""
    dtype = parameter_dtype(x3.dtype)
    coefficients = np.empty(plan.coefficients, dtype)
    load().fill_affine(
        coefficients, plan.repeats, *_vectors(transform, dtype), 0, x3.shape[1],
    )  # fmt: skip
    return coefficients


def _activation(relu: bool, mask: Data | None) -> tuple[int, Data]:
    number = 0 if not relu else 1 if mask is None else 2
    return number, _vector(mask, _UINT8)


# ---- arrays as the loops take them: contiguous, aligned, writeable, of a dtype that Numba knows --


@lru_cache(maxsize=16)
def _as_loops_see(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(_BITS.get(dtype.name, dtype))


@lru_cache(maxsize=16)
def _nothing(dtype: np.dtype[Any]) -> Data:
    return np.empty(0, dtype)


def _flat(a3: Data | None, like: Data | None = None) -> Data:
    """The values one after the other; none of the dtype of `like` for None."""
    if a3 is None:
        assert like is not None
        return _nothing(_as_loops_see(like.dtype))
    if not a3.flags.carray:
        a3 = _writable(a3) if _fits(a3) else a3.copy()
    dtype = _as_loops_see(a3.dtype)
    return a3.reshape(-1) if dtype is a3.dtype else a3.reshape(-1).view(dtype)


def _vector(values: Data | None, dtype: np.dtype[Any] = _FLOAT64) -> Data:
    if values is None:
        return _nothing(dtype)
    if values.dtype == dtype:
        if values.flags.carray:
            return values
        if _fits(values):
            return _writable(values)
    return np.array(values, dtype, order="C")


def _vectors(transform: Transform, dtype: np.dtype[Any]) -> tuple[Data, ...]:
    mean, invstd, weight, bias = transform
    return _vector(mean), _vector(invstd), _vector(weight, dtype), _vector(bias, dtype)


def _fits(a: Data) -> bool:
    """With ``writeable`` that is ``flags.carray``."""
    return a.flags.c_contiguous and a.flags.aligned


def _writable(a: Data) -> Data:
    """The same memory as an array that may be written: a read-only one is another type to Numba."""
    if a.flags.writeable:
        return a
    interface = a.__array_interface__
    interface["data"] = interface["data"][0], False
    return np.asarray(SimpleNamespace(__array_interface__=interface, owner=a))


def _dense(a3: Data | None) -> Data | None:
    return a3 if a3 is None or _fits(a3) else np.empty(a3.shape, a3.dtype)


def _copy_back(given: Any, written: Any) -> None:
    for i, target in enumerate(given):
        if target is not None and written[i] is not target:
            target[...] = written[i]
