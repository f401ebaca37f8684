"""The order of the primitives in one forward and one backward, and every check of their arguments.

These are the steps of a :class:`cupybn.joint.joint` call, which the caller opens, so that whatever
is raised here reaches the other ranks; and on the device of x, which the caller has made an array.
A ``*_pass`` takes the steps of its namesake in a call of its own.
Everything that can fail on one rank alone (checks, copies, allocating outputs) comes before the
first message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .arrays import (
    Array,
    as_array,
    copy_to_host,
    is_capturing,
    on_device_of,
    overlap,
    parameter_dtype,
)
from .backends import backend_for
from .checks import (
    check_eps,
    check_like,
    check_out,
    check_overlap,
    check_parameter,
    check_written,
    is_relu,
)
from .communicators import Communicator, SelfCommunicator
from .errors import ShapeError
from .joint import Steps, joint
from .layout import Layout, check_channel_axis, layout_of
from .statistics import BackwardSums, Moments, Transform, message_length

ALONE = SelfCommunicator()


@dataclass(slots=True)
class Saved:
    """What a forward keeps for its backward. x, weight and bias are kept by reference.

    Attributes:
        mean: (C,) float64, of the batch of all ranks.
        invstd: (C,) float64, ``1 / sqrt(var + eps)``.
        eps: what was added to the variance.
        count: values per channel on all ranks, a host integer.
        comm: the communicator of the forward, which the backward uses too.
    """

    mean: Array
    invstd: Array
    eps: float
    count: int
    comm: Communicator
    x3: Array
    layout: Layout
    weight: Array | None
    bias: Array | None
    activation: str | None
    settings: str
    name: str
    has_residual: bool = False
    mask: Array | None = None
    constant: bool = False

    @property
    def var(self) -> Array:
        """(C,) float64, the biased variance of that batch, from `invstd`: to 1e-15 of var + eps."""
        with on_device_of(self.invstd), np.errstate(all="ignore"):  # Inf where invstd is 0
            return np.maximum(self.invstd**-2.0 - self.eps, 0)

    @property
    def options(self) -> dict[str, Any]:
        return {"relu": self.activation is not None, "mask": self.mask}

    @property
    def transform(self) -> Transform:
        return Transform(self.mean, self.invstd, self.weight, self.bias)


def check_saved(saved: object) -> None:
    """Raises TypeError unless this is the context of a forward."""
    if not isinstance(saved, Saved):
        raise TypeError(
            "saved must be what batch_norm_forward returned beside y, or layer.saved, got "
            f"{type(saved).__name__}"
        )


def joint_pass(comm: Communicator, direction: str, name: str | None, channels: int) -> joint:
    """The joint call of one forward or backward."""
    what = f"{direction} of {name!r}" if name else f"{direction} of a batch norm"
    return joint(comm, what, message_length(channels), room=2 * channels)


def _pooled_moments(
    call: joint, backend: Any, x3: Array, exact: bool, observe: Callable[[Moments], None] | None
) -> Steps[tuple[Moments, str]]:
    """The moments of all ranks' values, and the form in which ``finalize_moments`` gets them.

    With one rank the local moments are handed on untouched. With several, one message; two where
    `exact` (float64 data), the second with deviations from the mean of all.
    """
    c = x3.shape[1]
    size = c if exact else 2 * c
    payload = call.payload(x3, size)
    local = backend.batch_moments(x3, payload=payload)
    if observe is not None:
        observe(local)
    if payload is None:
        return local, "local"
    count, total = yield local.count, size
    if not exact:
        return Moments(count, *np.split(total, 2)), "pooled"
    payload = call.payload(x3, c)
    backend.recentre_moments(local, total, count, payload)
    _, m2 = yield local.count, c
    return Moments(count, total, m2), "recentred"


class _Inputs(NamedTuple):
    x3: Array
    layout: Layout
    residual3: Array | None
    y3: Array
    mask: Array | None


def forward_steps(
    call: joint,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    name: str = "",
    settings: str = "",
    running: tuple[Array, Array, float] | None = None,
    check_finite: bool = False,
    save: bool = True,
    observe: Callable[[Moments], None] | None = None,
) -> Steps[tuple[Array, Saved]]:
    """:func:`batch_norm_forward` inside a joint call.

    `running` is (running mean, running variance, factor), updated when nothing can fail any more;
    `settings` is what else must agree on all ranks; `observe` takes the moments of this rank's
    batch, before the message. Without `save` the context is not fit for a backward.
    """
    weight = None if weight is None else as_array(weight, "weight")
    bias = None if bias is None else as_array(bias, "bias")
    inputs = _prepare(x, weight, bias, eps, channel_axis, activation, residual, out, save)
    if out is not None:
        check_overlap(out, x, "x, which backward needs", may_be_same=False)
    x3, layout, residual3, y3, mask = inputs
    state, factor = (None, 0.0) if running is None else (running[:2], running[2])
    for what, array in zip(("running_mean", "running_var"), state or (), strict=False):
        check_written(what, array, x, layout)
    backend = backend_for(x3)
    if call.ranks > 1:
        affine = weight is not None, bias is not None
        settings = _settings(layout.channels, repr(eps), x.dtype, affine, activation) + settings
    exact = x.dtype == np.float64
    call.agree(settings, messages=2 if exact else 1)
    if check_finite and is_capturing(x3):
        raise RuntimeError(
            f"{call.what}: check_finite=True cannot go into a CUDA graph: it reads the statistics"
        )

    backend.prepare_forward(
        x3, y3, residual3=residual3, mask=mask, relu=activation is not None,
        running_dtype=None if state is None else _name_of(state[0].dtype), ranks=call.ranks,
    )  # fmt: skip
    whole = call.ranks == 1 and observe is None and not check_finite
    if whole:
        count = x3.shape[0] * x3.shape[2]
    else:
        moments, form = yield from _pooled_moments(call, backend, x3, exact, observe)
        count = moments.count
    if count == 1:
        everywhere = "" if call.ranks == 1 else f" on this rank, 1 value on all {call.ranks} ranks"
        raise ShapeError(
            "Expected more than 1 value per channel when training, got input size "
            f"{layout.shape}{everywhere}"
        )
    if check_finite:
        _check_finite(call, moments, form, parameter_dtype(x.dtype))
    yield None
    with _restored_on_error(state or ()):
        given = x3, y3, weight, bias, eps
        options = {
            "relu": activation is not None, "residual3": residual3, "mask": mask, "running": state,
            "factor": factor,
        }  # fmt: skip
        if whole:
            mean, invstd = backend.local_forward(*given, **options)
        else:
            mean, invstd = backend.finish_forward(moments, form, *given, **options)
        saved = Saved(
            mean, invstd, eps, count, call.comm, x3, layout, weight, bias, activation,
            settings, name, residual is not None, mask,
        )  # fmt: skip
        y = _finish(layout, y3, out)
        yield None
    return y, saved


def forward_pass(call: joint, x: Array, *args: Any, **options: Any) -> tuple[Array, Saved]:
    """(y, saved) of :func:`forward_steps`."""
    return call.drive(forward_steps(call, x, *args, **options))


class _restored_on_error:
    """Puts arrays back if memory runs out, or another call fails, after they were updated.

    On the CPU only: on a device nothing is compiled or checked from then on, and nothing larger
    than a number a channel is allocated.
    """

    def __init__(self, state: Iterable[Array | None]) -> None:
        self._state = state

    def __enter__(self) -> None:
        arrays = [array for array in self._state if isinstance(array, np.ndarray)]
        self._before = [(array, array.copy()) for array in arrays]

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            for array, values in self._before:
                array[...] = values


def repeated_pass(
    x: Array, saved: Saved, weight: Array | None, bias: Array | None, eps: float, *, out: Array
) -> None:
    """Writes the y of an earlier forward into `out` once more, from that forward's statistics.

    The same bits for the same x; no communication, no update. For forwards without a residual.
    """
    inputs = _prepare(x, weight, bias, eps, 1, saved.activation, None, out, save=False)
    again = replace(saved, x3=inputs.x3, layout=inputs.layout, weight=weight, bias=bias)
    _normalize(again, None, inputs.y3)
    _finish(inputs.layout, inputs.y3, out)


def inference_pass(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    save: bool = True,
) -> tuple[Array, Saved]:
    """:func:`batch_norm_inference` with a context; backward takes the statistics as constants."""
    mean, var = as_array(mean, "mean"), as_array(var, "var")
    weight = None if weight is None else as_array(weight, "weight")
    bias = None if bias is None else as_array(bias, "bias")
    inputs = _prepare(x, weight, bias, eps, channel_axis, activation, residual, out, save)
    x3, layout, residual3, y3, mask = inputs
    if out is not None:
        what = "x, which backward needs" if save else "x"
        check_overlap(out, x, what, may_be_same=not save)
    for what, array in (("mean", mean), ("var", var)):
        check_parameter(what, array, x, layout)
    mean, _, invstd = backend_for(x3).given_statistics(mean, var, eps)
    saved = Saved(
        mean, invstd, eps, 0, ALONE, x3, layout, weight, bias, activation, "", "",
        residual is not None, mask, constant=True,
    )  # fmt: skip
    _normalize(saved, residual3, y3)
    return _finish(layout, y3, out), saved


def backward_steps(
    call: joint,
    dy: Array,
    saved: Saved,
    *,
    out: Array | None = None,
    dweight: Array | None = None,
    dbias: Array | None = None,
) -> Steps[tuple[Array, Array | None]]:
    """:func:`batch_norm_backward` inside a joint call: (dx, dresidual). Adds to dweight, dbias."""
    dy = as_array(dy, "dy")
    x3, layout = saved.x3, saved.layout
    check_like("dy", dy, x3, layout)
    fused_residual = saved.has_residual and saved.activation is not None
    if out is not None:
        check_out(out, x3, layout)
        check_overlap(out, x3, "the x of forward", may_be_same=False)
        hands_dy_on = saved.has_residual and not fused_residual
        what = "dy, which is returned as dresidual" if hands_dy_on else "dy"
        check_overlap(out, dy, what, may_be_same=not hands_dy_on)
    for what, gradient in (("weight", dweight), ("bias", dbias)):
        if gradient is not None:
            check_written(f"the gradient of {what}", gradient, x3, layout)
    backend = backend_for(x3)
    dy3 = layout.view(dy)
    dx3 = _output3(layout, x3, out)
    dresidual3 = np.empty_like(x3) if fused_residual else None
    call.agree(saved.settings)
    options = saved.options
    backend.prepare_backward(
        dy3, x3, dx3, dresidual3=dresidual3, constant=saved.constant, ranks=call.ranks, **options
    )  # fmt: skip

    whole = call.ranks == 1
    if not whole:
        size = 2 * layout.channels
        payload = call.payload(x3, size)
        local = backend.backward_reduce(dy3, x3, saved.transform, **options, payload=payload)
        _, total = yield 0, size
        pooled = BackwardSums(*np.split(total, 2))
    yield None
    alone = call.together is None  # then nothing follows that could fail
    with nullcontext() if alone else _restored_on_error((dweight, dbias)):
        if whole:
            backend.local_backward(
                dy3, x3, dx3, saved.transform, **options,
                count=0 if saved.constant else saved.count, dresidual3=dresidual3,
                dweight=dweight, dbias=dbias,
            )  # fmt: skip
        else:
            backend.backward_input(
                dy3, x3, saved.transform, **options,
                sums=pooled, count=saved.count, out3=dx3, dresidual3=dresidual3,
                local=local, dweight=dweight, dbias=dbias,
            )  # fmt: skip
        dresidual = dy if saved.has_residual else None
        if dresidual3 is not None:
            dresidual = layout.restore(dresidual3)
        dx = _finish(layout, dx3, out)
        yield None
    return dx, dresidual


def backward_pass(
    call: joint, dy: Array, saved: Saved, **options: Any
) -> tuple[Array, Array | None]:
    """(dx, dresidual) of :func:`backward_steps`."""
    return call.drive(backward_steps(call, dy, saved, **options))


def _prepare(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    channel_axis: int,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
    save: bool,
) -> _Inputs:
    """Every check of the arguments, the views, and the memory of the output."""
    parameter_dtype(x.dtype)
    check_eps(eps)
    is_relu(activation)
    layout = layout_of(x, check_channel_axis(channel_axis))
    for what, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_parameter(what, parameter, x, layout)
    residual3 = None
    if residual is not None:
        residual = as_array(residual, "residual")
        check_like("residual", residual, x, layout)
        residual3 = layout.view(residual)
    if out is not None:
        check_out(out, x, layout)
        if residual is not None:
            check_overlap(out, residual, "residual", may_be_same=True)
    x3 = layout.view(x)
    y3 = _output3(layout, x3, out)
    needs_mask = save and residual is not None and activation is not None
    mask = np.empty_like(x3, shape=(x3.size + 7) // 8, dtype=np.uint8) if needs_mask else None
    return _Inputs(x3, layout, residual3, y3, mask)


@lru_cache(maxsize=16)
def _name_of(dtype: np.dtype[Any]) -> str:
    return str(dtype.name)


@lru_cache(maxsize=1024)
def _settings(
    c: int, eps: str, dtype: Any, affine: tuple[bool, bool], activation: str | None
) -> str:
    parameters = f"weight={affine[0]}, bias={affine[1]}"
    return f"C={c}, eps={eps}, {dtype}, {parameters}, activation={activation}"


def _normalize(saved: Saved, residual3: Array | None, y3: Array) -> None:
    backend_for(saved.x3).normalize(
        saved.x3, saved.transform, **saved.options, residual3=residual3, out3=y3
    )


def _check_finite(call: joint, moments: Moments, form: str, dtype: np.dtype[Any]) -> None:
    """Raises where the running mean or variance, of `dtype`, would take NaN or Inf.

    The moments are the same on every rank, so every rank raises. Reads (C,) values of a device.
    """
    count = moments.count
    with np.errstate(all="ignore"):
        if form == "pooled":
            moments = Moments.unpack(count, np.concatenate([moments.mean, moments.m2]))
        elif form == "recentred":
            moments = Moments(count, moments.mean / max(count, 1), moments.m2)
        largest = float(np.finfo(dtype).max)
        unbiased = moments.m2 / max(count - 1, 1)
        finite = (abs(moments.mean) <= largest) & (unbiased <= largest)
    bad = np.flatnonzero(~copy_to_host(finite)).tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        channels = "channel" if len(bad) == 1 else "channels"
        raise FloatingPointError(
            f"{call.what}: NaN or Inf in the statistics of the batch, in {channels} {shown}"
        )


def _output3(layout: Layout, x3: Array, out: Array | None) -> Array:
    """The (N, C, L) array to write: a view of out where the layouts fit, else new memory."""
    if out is not None:
        view = layout.view(out)
        if overlap(view, out):
            return view
    return np.empty_like(x3)


def _finish(layout: Layout, y3: Array, out: Array | None) -> Array:
    y = layout.restore(y3)
    if out is None:
        return y
    if not overlap(y3, out):
        out[...] = y
    return out
