"""The primitives for frameworks that own the collective: the backend's own, with checks.

Backends trust their arguments, which the core has checked: with an array that is too short, or of
another dtype, a compiled loop or a kernel would read and write foreign memory. Here the arguments
come from anywhere, so each is checked against the table below.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from .arrays import (
    as_array,
    as_written,
    device_of,
    is_floating,
    on_device_of,
    parameter_dtype,
)
from .backends import backend_for
from .backends.plain import call_plainly
from .checks import check_eps, is_relu
from .errors import DeviceError, DTypeError, ShapeError
from .statistics import BackwardSums, Moments, Transform
from .typing import Array, ArrayLike

_FORMS = ("local", "pooled", "recentred")


class _Kind(NamedTuple):
    """The shape and dtype of an argument, as `_expected` reads them."""

    shape: str
    dtype: str
    written: bool = False


_CHANNEL = _Kind("C", "float64")
_PARAMETER = _Kind("C", "parameter")
_GRADIENT = _Kind("C", "parameter", written=True)
_OUTPUT = _Kind("data", "data", written=True)
_ARGUMENTS = {
    "x3": _Kind("data", "data"),
    "dy3": _Kind("data", "data"),
    "residual3": _Kind("data", "data"),
    "out3": _OUTPUT,
    "dresidual3": _OUTPUT,
    "relu_bits": _Kind("bits", "uint8", written=True),
    "mask": _Kind("positions", "mask"),
    "payload": _Kind("2C", "float64", written=True),
    "mean": _CHANNEL,
    "invstd": _CHANNEL,
    "m2": _CHANNEL,
    "weighted": _CHANNEL,
    "weight": _PARAMETER,
    "bias": _PARAMETER,
    "dweight": _GRADIENT,
    "dbias": _GRADIENT,
    "running mean": _Kind("C", "floating", written=True),
    "running variance": _Kind("C", "floating", written=True),
    "sums.sum_dy": _CHANNEL,
    "sums.sum_dy_xmu": _CHANNEL,
    "local.sum_dy": _CHANNEL,
    "local.sum_dy_xmu": _CHANNEL,
}


def _expected(kind: _Kind, array: Any, like: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype; `like` is x3, or (C,) in a call without x3."""
    c = like.shape[1] if like.ndim == 3 else like.size
    shapes = {"data": like.shape, "C": (c,), "2C": (2 * c,), "bits": ((like.size + 7) // 8,)}
    shapes["positions"] = like.shape[::2]
    dtype: Any = kind.dtype
    if dtype == "data":
        dtype = like.dtype
    elif dtype == "parameter":
        dtype = parameter_dtype(like.dtype)
    elif dtype == "floating":
        dtype = array.dtype if is_floating(array.dtype) else "floating"
    elif dtype == "mask":
        dtype = array.dtype if array.dtype in (np.bool_, np.uint8) else "bool or uint8"
    return shapes[kind.shape], dtype


def _checked(
    required: tuple[str, ...], given: dict[str, Any], shapes: dict[str, str] | None = None
) -> SimpleNamespace:
    """The arguments as NumPy or CuPy arrays; the others must fit the first one.

    None stays None unless the argument is required. `shapes` holds for this call alone.
    """
    arrays: dict[str, Any] = {}
    for name, value in given.items():
        convert = as_written if _ARGUMENTS[name].written else as_array
        optional = value is None and name not in required
        arrays[name] = None if optional else convert(value, name)
    first, like = next(iter(arrays.items()))
    if like.ndim != (3 if first.endswith("3") else 1):
        expected = "x3 as (N, C, L)" if first.endswith("3") else f"{first} as (C,)"
        raise ShapeError(f"expected {expected}, got shape {like.shape}")
    parameter_dtype(like.dtype)
    for name, array in arrays.items():
        if array is None:
            continue
        kind = _ARGUMENTS[name]
        kind = kind._replace(shape=(shapes or {}).get(name, kind.shape))
        shape, dtype = _expected(kind, array, like)
        if array.shape != shape:
            raise ShapeError(f"{name} has shape {array.shape}, expected {shape}")
        if dtype in ("floating", "bool or uint8") or array.dtype != dtype:
            raise DTypeError(f"{name} is {array.dtype}, expected {dtype}")
        if device_of(array) != device_of(like):
            raise DeviceError(
                f"{name} is on {device_of(array)}, but {first} is on {device_of(like)}"
            )
    if (mask := arrays.get("mask")) is not None:
        arrays["mask"] = (mask if mask.flags.c_contiguous else mask.copy(order="C")).view(np.uint8)
    return SimpleNamespace(**{name.replace(" ", "_"): a for name, a in arrays.items()})


def _fields(name: str, sums: BackwardSums | None) -> dict[str, Any]:
    """The arrays of sums by their names in the table."""
    if sums is not None and not isinstance(sums, BackwardSums):
        raise DTypeError(f"{name} must be BackwardSums, got {type(sums).__name__}")
    values = (None, None) if sums is None else sums
    return {f"{name}.{field}": v for field, v in zip(BackwardSums._fields, values, strict=True)}


def _sums(given: SimpleNamespace, name: str) -> BackwardSums | None:
    total = getattr(given, f"{name}.sum_dy")
    return None if total is None else BackwardSums(total, getattr(given, f"{name}.sum_dy_xmu"))


def _check_moments(name: str, moments: Moments) -> None:
    if not isinstance(moments, Moments):
        raise DTypeError(f"{name} must be Moments, got {type(moments).__name__}")


def batch_moments(
    x3: ArrayLike, *, payload: ArrayLike | None = None, mask: ArrayLike | None = None
) -> Moments:
    """Count, mean and m2 of each channel of an (N, C, L) array.

    `payload` takes this rank's part of the first message: (2C,) for ``count * mean`` and
    ``m2 + count * mean**2``, or (C,) for the first of them alone. With a `mask` the moments are
    those of the valid values. Arguments `x3`, errors: see :mod:`cupybn.functional`.
    """
    shape: tuple[int, ...] = getattr(x3, "shape", ())
    half = len(shape) == 3 and getattr(payload, "shape", None) == shape[1:2]
    arrays = {"x3": x3, "payload": payload, "mask": mask}
    given = _checked(("x3",), arrays, {"payload": "C"} if half else None)
    with on_device_of(given.x3):
        backend, options = backend_for(given.x3), {"mask": given.mask}
        if given.mask is not None:
            options["count"] = backend.count_valid(given.mask)
        options |= {"x3": given.x3, "payload": given.payload}
        moments: Moments = call_plainly(backend.batch_moments, ("payload",), **options)
        return moments


def recentre_moments(local: Moments, weighted: ArrayLike, count: int, payload: ArrayLike) -> None:
    """Writes ``m2 + local.count * (mean - weighted / count)**2`` into `payload`, (C,) float64.

    The second message of float64 data; `weighted` and `count` are the results of the first. See
    :mod:`cupybn.functional`.
    """
    _check_moments("local", local)
    arrays = {"mean": local.mean, "m2": local.m2, "weighted": weighted, "payload": payload}
    given = _checked(tuple(arrays), arrays, {"payload": "C"})
    local = Moments(local.count, given.mean, given.m2)
    with on_device_of(given.mean):
        options = {"weighted": given.weighted, "count": count, "payload": given.payload}
        recentre = backend_for(given.mean).recentre_moments
        call_plainly(recentre, ("payload",), local=local, **options)


def finalize_moments(
    moments: Moments,
    eps: float,
    *,
    running: tuple[ArrayLike, ArrayLike] | None = None,
    factor: float = 0.0,
    form: str = "local",
) -> tuple[Array, Array, Array]:
    """(mean, biased variance, ``invstd = 1 / sqrt(var + eps)``), (C,) float64 each, of `moments`.

    With `running`, (C,) each, its mean and variance are updated in place by `factor`; a count of 0
    leaves them alone.

    `form` says what `moments.mean` and `moments.m2` hold: themselves (``"local"``); the sums over
    the ranks of both halves of the message (``"pooled"``); the pooled first half, and the pooled
    result of :func:`recentre_moments` (``"recentred"``). See :mod:`cupybn.functional`.
    """
    _check_moments("moments", moments)
    check_eps(eps)
    if form not in _FORMS:
        raise ValueError(f"form must be one of {_FORMS}, got {form!r}")
    arrays = {"mean": moments.mean, "m2": moments.m2}
    if running is not None:
        arrays |= {"running mean": running[0], "running variance": running[1]}
    given = _checked(tuple(arrays), arrays)
    if running is not None:
        running = given.running_mean, given.running_variance
    moments = Moments(moments.count, given.mean, given.m2)
    with on_device_of(given.mean):
        options = {"eps": eps, "running": running, "factor": factor, "form": form}
        finalize = backend_for(given.mean).finalize_moments
        found: tuple[Array, Array, Array]
        found = call_plainly(finalize, ("running",), moments=moments, **options)
        return found


def normalize(
    x3: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    activation: str | None = None,
    residual3: ArrayLike | None = None,
    out3: ArrayLike | None = None,
    relu_bits: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Array:
    """``activation((x - mean) * invstd * weight + bias + residual)``, (N, C, L).

    `relu_bits`, where given, takes one bit for every y above 0. Where masked, y is 0 and its bit
    too. Arguments and errors: see :mod:`cupybn.functional`.
    """
    relu = is_relu(activation)
    given = _checked(
        ("x3", "mean", "invstd"),
        {
            "x3": x3,
            "mean": mean,
            "invstd": invstd,
            "weight": weight,
            "bias": bias,
            "residual3": residual3,
            "out3": out3,
            "relu_bits": relu_bits,
            "mask": mask,
        },
    )
    transform = Transform(given.mean, given.invstd, given.weight, given.bias)
    options = {"residual3": given.residual3, "out3": given.out3, "relu_bits": given.relu_bits}
    options |= {"x3": given.x3, "transform": transform, "relu": relu, "mask": given.mask}
    with on_device_of(given.x3):
        y3: Array = call_plainly(backend_for(given.x3).normalize, ("out3", "relu_bits"), **options)
        return y3 if given.out3 is None else given.out3


def backward_reduce(
    dy3: ArrayLike,
    x3: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    activation: str | None = None,
    relu_bits: ArrayLike | None = None,
    payload: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> BackwardSums:
    """The sums of dy and of dy * (x - mean), after the activation's backward, per channel.

    Where y passed a ReLU is read from `relu_bits` if given, else computed again from x. `payload`,
    (2C,), takes a copy of both for the message. Arguments and errors: see
    :mod:`cupybn.functional`.
    """
    relu = is_relu(activation)
    given = _checked(
        ("x3", "dy3", "mean", "invstd"),
        {
            "x3": x3,
            "dy3": dy3,
            "mean": mean,
            "invstd": invstd,
            "weight": weight,
            "bias": bias,
            "relu_bits": relu_bits,
            "payload": payload,
            "mask": mask,
        },
    )
    transform = Transform(given.mean, given.invstd, given.weight, given.bias)
    with on_device_of(given.x3):
        sums: BackwardSums = call_plainly(
            backend_for(given.x3).backward_reduce,
            ("payload",),
            dy3=given.dy3,
            x3=given.x3,
            transform=transform,
            relu=relu,
            relu_bits=given.relu_bits,
            payload=given.payload,
            mask=given.mask,
        )
        return sums


def backward_input(
    dy3: ArrayLike,
    x3: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    sums: BackwardSums | None = None,
    count: int = 0,
    activation: str | None = None,
    relu_bits: ArrayLike | None = None,
    out3: ArrayLike | None = None,
    dresidual3: ArrayLike | None = None,
    local: BackwardSums | None = None,
    dweight: ArrayLike | None = None,
    dbias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Array:
    """The gradient of x, (N, C, L).

    ``dx = (dy - sum_dy / n - (x - mean) * invstd**2 * sum_dy_xmu / n) * invstd * weight``, with
    `sums` and n = `count` of all ranks. Without `sums` the statistics are constants and dx is
    ``dy * invstd * weight``. `dresidual3` takes dy after the activation's backward. The gradients
    of weight and bias, from the `local` sums, are added to `dweight` and `dbias`. dx and dresidual
    are 0 where masked. Arguments and errors: see :mod:`cupybn.functional`.
    """
    relu = is_relu(activation)
    given = _checked(
        ("x3", "dy3", "mean", "invstd"),
        {
            "x3": x3,
            "dy3": dy3,
            "mean": mean,
            "invstd": invstd,
            "weight": weight,
            "bias": bias,
            "relu_bits": relu_bits,
            "out3": out3,
            "dresidual3": dresidual3,
            "dweight": dweight,
            "dbias": dbias,
            "mask": mask,
            **_fields("sums", sums),
            **_fields("local", local),
        },
    )
    transform = Transform(given.mean, given.invstd, given.weight, given.bias)
    others = ("out3", "dresidual3", "dweight", "dbias")
    options = {name: getattr(given, name) for name in (*others, "relu_bits", "x3", "dy3", "mask")}
    options |= {"transform": transform, "relu": relu}
    options |= {"sums": _sums(given, "sums"), "local": _sums(given, "local"), "count": count}
    with on_device_of(given.x3):
        dx3: Array = call_plainly(backend_for(given.x3).backward_input, others, **options)
        return dx3 if given.out3 is None else given.out3
