"""The primitives for frameworks that own the collective: checked, then the backend's own.

Backends trust their arguments, which :mod:`cupybn.passes` has checked: a compiled loop or a kernel
that is given an array too short, or of another dtype, reads and writes the memory of others.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast

import numpy as np

from .arrays import Array, as_array, as_written, device_of, parameter_dtype
from .backends import backend_for
from .backends import numpy as reference
from .checks import check_activation, check_eps
from .errors import DeviceError, DTypeError, ShapeError
from .statistics import BackwardSums, Moments

_Primitive = TypeVar("_Primitive", bound=Any)

_NO_ARRAYS = {"eps", "factor", "form", "activation", "count"}
_WRITTEN = {"out3", "dresidual3", "mask", "payload", "dweight", "dbias"}
_FORMS = ("local", "pooled", "recentred")


def _checked(primitive: _Primitive) -> _Primitive:
    name = primitive.__name__
    parameters = signature(primitive)

    @wraps(primitive)
    def on_its_backend(*args: Any, **kwargs: Any) -> Any:
        call = parameters.bind(*args, **kwargs)
        given = call.arguments
        for what, argument in given.items():
            optional = argument is None and parameters.parameters[what].default is None
            if what not in _NO_ARRAYS and not optional:
                given[what] = _taken_over(name, what, argument)
        like = given["x3"] if "x3" in given else next(_arrays(given))[1]
        _check_options(given)
        _check_arrays(name, dict(_arrays(given)), like)
        return getattr(backend_for(like), name)(*call.args, **call.kwargs)

    return cast(_Primitive, on_its_backend)


def _taken_over(name: str, what: str, argument: Any) -> Any:
    """The argument with arrays of other libraries as NumPy's or CuPy's."""
    if what == "running":
        mean, var = argument
        return as_written(mean, "running mean"), as_written(var, "running variance")
    if what in ("moments", "sums", "local"):
        kind = Moments if name.endswith("_moments") else BackwardSums
        if not isinstance(argument, kind):
            raise DTypeError(f"{what} must be {kind.__name__}, got {type(argument).__name__}")
        if isinstance(argument, Moments):
            mean, m2 = as_array(argument.mean, "mean"), as_array(argument.m2, "m2")
            return Moments(argument.count, mean, m2)
        return BackwardSums(*(as_array(sums, what) for sums in argument))
    return as_written(argument, what) if what in _WRITTEN else as_array(argument, what)


def _arrays(given: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """(name, array) of all arrays among the arguments."""
    for what, argument in given.items():
        if isinstance(argument, Moments):
            yield from (("mean", argument.mean), ("m2", argument.m2))
        elif what == "running" and argument is not None:
            yield from zip(("running mean", "running variance"), argument, strict=True)
        elif isinstance(argument, BackwardSums):
            yield from ((f"{what}.{sums}", array) for sums, array in argument._asdict().items())
        elif what not in _NO_ARRAYS and argument is not None:
            yield what, argument


def _check_options(given: dict[str, Any]) -> None:
    check_activation(given.get("activation"))
    if "eps" in given:
        check_eps(given["eps"])
    if given.get("form", "local") not in _FORMS:
        raise ValueError(f"form must be one of {_FORMS}, got {given['form']!r}")


def _check_arrays(name: str, arrays: dict[str, Array], like: Array) -> None:
    """Raises unless shapes, dtypes and devices fit `like`, which is x3 or the mean."""
    if like.ndim != (3 if "x3" in arrays else 1):
        expected = "x3 as (N, C, L)" if "x3" in arrays else "moments of (C,) arrays"
        raise ShapeError(f"{name} takes {expected}, got shape {like.shape}")
    c = like.shape[1] if "x3" in arrays else like.size
    wide = parameter_dtype(like.dtype)
    for what, array in arrays.items():
        shape: tuple[int, ...] = (c,)
        dtype: np.dtype[Any] = np.dtype(np.float64)
        if what.endswith("3"):
            shape, dtype = like.shape, like.dtype
        elif what in ("weight", "bias", "dweight", "dbias"):
            dtype = wide
        elif what.startswith("running"):
            dtype = parameter_dtype(array.dtype)
        elif what == "mask":
            shape, dtype = ((like.size + 7) // 8,), np.dtype(np.uint8)
        elif what == "payload" and (name, array.shape) != ("batch_moments", (c,)):
            shape = (c if name == "recentre_moments" else 2 * c,)
        if array.shape != shape:
            raise ShapeError(f"{what} has shape {array.shape}, expected {shape}")
        if array.dtype != dtype:
            raise DTypeError(f"{what} is {array.dtype}, expected {dtype}")
        if device_of(array) != device_of(like):
            raise DeviceError(
                f"{what} is on {device_of(array)}, but others are on {device_of(like)}"
            )


batch_moments = _checked(reference.batch_moments)
recentre_moments = _checked(reference.recentre_moments)
finalize_moments = _checked(reference.finalize_moments)
normalize = _checked(reference.normalize)
backward_reduce = _checked(reference.backward_reduce)
backward_input = _checked(reference.backward_input)
