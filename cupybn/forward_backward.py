"""One forward and one backward: bound to a signature once, run often.

A call is *bind* and *run*. :func:`bind` finds out what depends on the signature alone (shape,
strides, dtype and device of x, the options, the communicator), and makes a :class:`Bound`. Its
:meth:`~Bound.forward` and :meth:`~Bound.backward` compare the other arrays with what it expects,
allocate, compute, send and keep. Layers and functions remember a few of them (:class:`Bindings`).
A Bound holds no array, so it may be shared by calls, layers and threads.

Calls over several ranks happen inside a :class:`~cupybn.collective.CollectiveCall`, which the
caller opens, so that any exception here reaches the other ranks. All that can fail on one rank
alone (checks, compiling, allocating outputs) comes before the first message. Backends are given
arrays that are C-contiguous (on the host also aligned and writeable), and change running
statistics, counter and gradients together, last, or not at all.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import typing
from .arrays import (
    Array,
    as_array,
    copy_to_host,
    is_capturing,
    is_cupy,
    on_device_of,
    overlap,
    parameter_dtype,
)
from .backends import backend_for, by_type
from .backends.plain import NO_COUNTER, plain
from .checks import (
    check_array,
    check_eps,
    check_like,
    check_mask,
    check_momentum,
    check_out,
    check_overlap,
    check_parameter,
    check_writeable,
    check_written,
    is_relu,
)
from .collective import CollectiveCall, fingerprint, say_where
from .communicators import Communicator, SelfCommunicator, resolve
from .errors import ShapeError
from .layout import Layout, check_channel_axis, layout_of
from .statistics import BackwardSums, Moments, Transform, message_length

ALONE = SelfCommunicator()
_COUNTER = np.dtype(np.int64), (), True  # as `Bound.seen` of a number of batches


def call_name(direction: str, name: str | None) -> str:
    """The name of a call in messages and errors, e.g. ``"forward of 'features.bn1'"``."""
    return f"{direction} of {name!r}" if name else f"{direction} of a batch norm"


def momentum_settings(momentum: float | None, batches: Array | None) -> dict[str, object]:
    """The momentum in a fingerprint; `batches` is the number so far, if it is counted."""
    batch = ""
    if momentum is None and batches is not None:
        batch = f" (batch {int(batches) + 1})"
    return {"momentum": f"{momentum!r}{batch}"}


def running_factor(momentum: float | None, batches: Array) -> float:
    """The weight of the next batch in the running statistics.

    Raises:
        ValueError: momentum is neither None nor in [0, 1].
    """
    if momentum is None:
        return 1.0 / (int(batches) + 1)
    check_momentum(momentum)
    return momentum


Running: TypeAlias = "tuple[Array, Array, Array]"
"""The running statistics that a forward moves in place, or is given: mean, var and batches.

Mean and var are (C,), of the dtype that goes with x. Batches, () int64 in host memory, is how many
batches they have taken.
"""


class Saved(NamedTuple):
    """The context of a forward, for its backward. It keeps x, weight, bias and mask by reference.

    With ``save=False`` it has the statistics alone.

    Attributes:
        mean: (C,) float64, of the batch of all ranks.
        invstd: (C,) float64, ``1 / sqrt(var + eps)``.
        count: (valid) values per channel on all ranks, a host integer.
        relu_bits: one bit a value, set where y passed the ReLU; None if x alone tells.
        moments: of this rank's batch, if the forward was told to keep them.
        mask: (N, L) bytes, nonzero where x is valid; None: everywhere.
    """

    bound: Bound
    x3: Array
    weight: Array | None
    bias: Array | None
    mean: typing.Array
    invstd: typing.Array
    count: int  # type: ignore[assignment]  # of tuple, which has a method of that name
    relu_bits: Array | None = None
    moments: Moments | None = None
    mask: Array | None = None

    @staticmethod
    def from_arrays(
        x: Array,
        mean: Array,
        invstd: Array,
        count: int,
        eps: float,
        *,
        weight: Array | None = None,
        bias: Array | None = None,
        comm: Any = None,
        name: str | None = None,
        channel_axis: int = 1,
        activation: str | None = None,
        relu_bits: Array | None = None,
        mask: Array | None = None,
    ) -> Saved:
        """The context of a forward, made again from :meth:`arrays` and that forward's options.

        For frameworks of pure functions, which keep the arrays themselves. A backward with it has
        the same bits. No communication.

        Args:
            x: of the forward, of the same shape and in the same memory order.
            mean, invstd: (C,), floating, of the batch of all ranks; float64 for the same bits.
            count: (valid) values per channel on all ranks, an integer of any kind.
            relu_bits: of a forward with a ReLU and a residual; see :class:`Saved`.
            mask: of the forward, if it had one.
            The others: as :func:`~cupybn.functional.batch_norm_forward`.

        Raises:
            ShapeError, DTypeError, DeviceError, ValueError: the arrays or options do not fit.
        """
        x = as_array(x)
        affine = weight is not None, bias is not None
        options = Options(eps, activation, affine, residual=relu_bits is not None)
        comm = ALONE if comm is None else resolve(comm)
        bound = bind(x, channel_axis, options, comm, name or "")
        weight, bias, *_ = bound._checked(x, weight, bias, None)
        mean, invstd = (
            plain(as_array(array, what).astype(np.float64, copy=False))
            for what, array in (("mean", mean), ("invstd", invstd))
        )
        for what, array in (("mean", mean), ("invstd", invstd)):
            check_array(what, array, x, bound.layout.per_channel, np.float64)
        if relu_bits is not None:
            relu_bits = plain(as_array(relu_bits, "relu_bits"))
            check_array("relu_bits", relu_bits, x, bound.bits_shape, np.uint8)
        if int(count) != count or count < 0:
            raise ValueError(f"count must be a number of values, got {count!r}")
        valid = None if mask is None else bound.valid(mask, x)
        x3 = plain(bound.layout.view(x))
        return Saved(bound, x3, weight, bias, mean, invstd, int(count), relu_bits, mask=valid)

    def arrays(self) -> dict[str, Any]:
        """The arrays that a backward needs: the arguments of :meth:`from_arrays` but its options.

        Returns:
            dict: x, mean, invstd, weight, bias, relu_bits, mask (the last four may be None), and
            count.

        Raises:
            ValueError: the forward had ``save=False``.
        """
        self.check_complete()
        return {
            "x": self.layout.restore(self.x3),
            "mean": self.mean,
            "invstd": self.invstd,
            "count": self.count,
            "weight": self.weight,
            "bias": self.bias,
            "relu_bits": self.relu_bits,
            "mask": None if self.mask is None else self.mask.reshape(self.layout.positions),
        }

    def check_complete(self) -> None:
        """Raises ValueError after a forward with ``save=False``."""
        if self.x3 is None:
            raise ValueError(
                "saved is of a forward with save=False, which keeps the statistics alone: a "
                "backward needs one with save=True"
            )

    @property
    def layout(self) -> Layout:
        """The (N, C, L) view of x."""
        return self.bound.layout

    @property
    def eps(self) -> float:
        """The number that was added to the variance."""
        return self.bound.eps

    @property
    def comm(self) -> Communicator:
        """The communicator of the forward, which the backward uses too."""
        return self.bound.comm

    @property
    def var(self) -> typing.Array:
        """(C,) float64, the biased variance of that batch, from `invstd`: to 1e-15 of var + eps."""
        with on_device_of(self.invstd), np.errstate(all="ignore"):  # Inf where invstd is 0
            return np.maximum(self.invstd**-2.0 - self.eps, 0)

    @property
    def transform(self) -> Transform:
        """The numbers that map x to y."""
        return Transform(self.mean, self.invstd, self.weight, self.bias)


def check_saved(saved: object) -> None:
    """Raises TypeError unless this is the context of a forward."""
    if not isinstance(saved, Saved):
        raise TypeError(
            "saved must be what batch_norm_forward returned beside y, or layer.saved, got "
            f"{type(saved).__name__}"
        )


class Bindings:
    """A few bound calls by signature.

    A signature is kept when it is met the second time, so that a call made once costs no memory.
    Bindings are never copied: a copy, or an unpickled layer, starts with none.
    """

    def __init__(self, limit: int = 16) -> None:
        self._limit = limit
        self._met: dict[Hashable, Any] = {}
        self._bound: dict[Hashable, Any] = {}
        self.get = self._bound.get

    def keep(self, key: Hashable, bound: Any) -> None:
        """Keeps `bound`, just made for this signature, if the signature was met before."""
        kept = self._bound if key in self._met else self._met
        if len(kept) >= self._limit:
            kept.clear()
        kept[key] = bound

    def __deepcopy__(self, memo: Any) -> Bindings:
        return Bindings(self._limit)

    def __reduce__(self) -> Any:
        return Bindings, (self._limit,)


# x3, y3, weight, bias, residual3, relu_bits, mask; running mean and variance, counter
_Arrays: TypeAlias = "tuple[Array, Array, Any, Any, Any, Any, Any]"
_States: TypeAlias = "tuple[Any, Array]"
_Statistics: TypeAlias = "tuple[Array, Array, int, Moments | None]"  # mean, invstd, count, local


@dataclass(frozen=True)
class Options:
    """The options of a call.

    Attributes:
        eps: added to the variance.
        activation: None or "relu".
        affine: whether there are a weight and a bias.
        residual: whether there is a residual.
        save: whether a backward may follow.
        given: whether the statistics are given, as constants; else they are the batch's.
        factor: the weight of the batch in the running statistics; None: they are not updated.
        check_finite: whether NaN or Inf in the statistics is an error.
        keep_moments: whether the context keeps the moments of this rank's batch.
        settings: the other settings that must be equal on all ranks.
    """

    eps: float
    activation: str | None = None
    affine: tuple[bool, bool] = (True, True)
    residual: bool = False
    save: bool = True
    given: bool = False
    factor: float | None = None
    check_finite: bool = False
    keep_moments: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)


def bind(x: Array, channel_axis: int, options: Options, comm: Communicator, name: str) -> Bound:
    """The binding of a call: all that depends on the signature of x and the options alone.

    Raises:
        ShapeError, DTypeError, ValueError: x or an option is not valid.
        RuntimeError: ``check_finite`` while a CUDA graph is captured.
    """
    parameter_dtype(x.dtype)
    check_eps(options.eps)
    is_relu(options.activation)
    layout = layout_of(x, check_channel_axis(channel_axis))
    if options.check_finite and is_capturing(x):
        raise RuntimeError(
            f"{call_name('forward', name)}: check_finite=True cannot go into a CUDA graph: it "
            "reads the statistics"
        )
    backend_for(x)
    made = _OnDevice if is_cupy(x) else Bound
    return made(x, layout, options, comm, name)


class Bound:
    """A call's signature with all that follows from it; see the module. It holds no array.

    This one is for arrays in host memory, :class:`_OnDevice` for those of a device.
    """

    # What may change in an array from call to call, and has to be as `expected` or `like_x`.
    seen: Any = attrgetter("dtype", "shape", "flags.carray")
    is_plain: Any = attrgetter("flags.carray")
    on_host = True
    empty: Any = np.empty

    def __init__(
        self, x: Array, layout: Layout, options: Options, comm: Communicator, name: str
    ) -> None:
        self.layout, self.options, self.eps = layout, options, options.eps
        self.shape, self.shape3, self.channels = layout.shape, layout.shape3, layout.channels
        self.dtype, self.parameter_dtype = x.dtype, parameter_dtype(x.dtype)
        self.expected: tuple[Any, ...] = self.parameter_dtype, layout.per_channel, True
        self.like_x: tuple[Any, ...] = self.dtype, self.shape, True
        self.kind: Any = type(x)
        self.in_order = layout.to_memory is None
        self.relu, self.factor = is_relu(options.activation), options.factor or 0.0
        self.residual, self.save, self.given = options.residual, options.save, options.given
        self.fused_residual = self.residual and self.relu
        self.exact = x.dtype == np.float64
        self.updates = options.factor is not None and not options.given
        self.count = self.shape3[0] * self.shape3[2]
        self.comm, self.ranks, self.name = comm, comm.size, name
        self.needs_bits = self.fused_residual and options.save
        self.bits_shape = ((self.shape3[0] * self.channels * self.shape3[2] + 7) // 8,)
        self.prepared: dict[str, ModuleType] = {}
        self._statistics: Any = Bound._alone
        if options.given:
            self._statistics = Bound._given
        elif self.ranks > 1 or options.check_finite or options.keep_moments:
            self._statistics = Bound._over_ranks

    def __deepcopy__(self, memo: Any) -> Bound:
        return self  # it never changes, except for what is compiled

    @cached_property
    def settings(self) -> dict[str, object]:
        """The settings that must be equal on all ranks, for the fingerprint."""
        options = self.options
        return {
            "C": self.channels,
            "eps": repr(options.eps),
            "": self.dtype,
            "weight": options.affine[0],
            "bias": options.affine[1],
            "activation": options.activation,
            **options.settings,
        }

    @cached_property
    def forward_call(self) -> tuple[str, int, str, int]:
        """A collective call's arguments after its communicator: name, length, text, messages."""
        what = call_name("forward", self.name)
        text, messages = fingerprint(what, self.settings), 2 if self.exact else 1
        return what, message_length(self.channels), text, messages

    @cached_property
    def backward_call(self) -> tuple[str, int, str, int]:
        """The same for a backward."""
        what = call_name("backward", self.name)
        return what, message_length(self.channels), fingerprint(what, self.settings), 1

    def forward(
        self,
        call: CollectiveCall | None,
        x: Array,
        params: Mapping[str, Array],
        *,
        residual: Array | None = None,
        mask: Array | None = None,
        out: Array | None = None,
        y3: Array | None = None,
        running: Running | None = None,
    ) -> tuple[Array, Saved]:
        """(y, context), for an x of the signature that was bound, inside `call`.

        `params` has weight and bias, `running` the statistics to update, or the given ones; `y3`
        (`dx3` in a backward) is new, and the caller's. Without ``save`` x is not kept. Raises
        ShapeError, DTypeError, DeviceError or ValueError if an array does not fit,
        FloatingPointError with ``check_finite``, and whatever ``allreduce`` raises.
        """
        weight, bias = params.get("weight"), params.get("bias")
        kind, seen, expected, target = self.kind, self.seen, self.expected, None
        for array in (weight, bias) if running is None else (weight, bias, running[0], running[1]):
            if array is not None and (type(array) is not kind or seen(array) != expected):
                weight, bias, running, target = self._checked(x, weight, bias, running)
                break
        moved, batches = None if running is None else running[:2], NO_COUNTER
        if self.updates and running is not None:
            batches = running[2]
            fits = type(batches) is np.ndarray and Bound.seen(batches) == _COUNTER
            if target is not None or not fits:  # what is copied back together is counted in a copy
                check_writeable("num_batches_tracked", batches)
                target, batches = target or running, np.array(batches, np.int64).reshape(())
        in_order = self.in_order
        usual = in_order and self.is_plain(x)
        x3 = x.reshape(self.shape3) if usual else plain(self.layout.view(x))
        residual3 = None if residual is None else self._view("residual", residual, x)
        if out is not None:
            y, y3 = out, self._y3_in(out, x, residual)
        else:
            y3 = self.empty(self.shape3, self.dtype) if y3 is None else y3
            y = y3.reshape(self.shape) if in_order else self.layout.restore(y3)
        bits = self.empty(self.bits_shape, np.uint8) if self.needs_bits else None
        if mask is not None:
            mask = self.valid(mask, x)
        arrays = x3, y3, weight, bias, residual3, bits, mask
        found = self._statistics(self, call, arrays, (moved, batches))
        mean, invstd, count, local = found
        if target is not None and moved is not None and self.updates and count:
            target[0][...], target[1][...], target[2][...] = *moved, batches  # at once
        if out is not None and not overlap(y3, out):
            out[...] = self.layout.restore(y3)
        if not self.save:
            x3 = weight = bias = mask = None
        context = self, x3, weight, bias, mean, invstd, count, bits, local, mask
        return y, tuple.__new__(Saved, context)

    def _given(self, call: Any, arrays: _Arrays, states: _States) -> _Statistics:
        """Fills y3, with the given statistics."""
        x3, y3, weight, bias, *others = arrays
        backend = by_type[self.kind]
        mean, _, invstd = backend.given_statistics(*states[0], self.eps)
        transform, options = Transform(mean, invstd, weight, bias), self._options(*others)
        backend.normalize(x3, transform, out3=y3, **options)
        return mean, invstd, 0, None

    def _options(self, residual3: Any, bits: Any, mask: Any) -> dict[str, Any]:
        return {"relu": self.relu, "residual3": residual3, "relu_bits": bits, "mask": mask}

    def _alone(self, call: Any, arrays: _Arrays, states: _States) -> _Statistics:
        """Fills y3, with the statistics of this rank's batch, the only one."""
        x3, y3, weight, bias, residual3, bits, mask = arrays
        backend, count, (running, batches) = by_type[self.kind], self.count, states
        if self.prepared.get("forward" if mask is None else "masked forward") is not backend:
            self._prepare_forward(backend, arrays)
        if mask is not None:
            count = self._count_valid(backend, mask)
        if count == 1:
            self._refuse_one_value(mask)
        mean, invstd = backend.local_forward(
            x3,
            y3,
            weight,
            bias,
            self.eps,
            relu=self.relu,
            residual3=residual3,
            relu_bits=bits,
            running=running,
            batches=batches if count else NO_COUNTER,
            factor=self.factor,
            mask=mask,
            count=count,
        )
        return mean, invstd, count, None

    def _over_ranks(self, call: CollectiveCall, arrays: _Arrays, states: _States) -> _Statistics:
        """Fills y3, with the statistics of all ranks' batches.

        It takes one message; two with float64 data, the second about the mean of all ranks. One
        rank, which comes here if its moments are to be kept, sends none.
        """
        (x3, y3, weight, bias, *others), (running, batches) = arrays, states
        c, backend, mask = self.channels, by_type[self.kind], arrays[-1]
        if self.prepared.get("forward" if mask is None else "masked forward") is not backend:
            self._prepare_forward(backend, arrays)
        valid: dict[str, Any] = {}
        if mask is not None:
            valid = {"mask": mask, "count": self._count_valid(backend, mask)}
        if self.ranks == 1:
            local = moments = backend.batch_moments(x3, **valid)
            form = "local"
        else:
            payload = call.payload(x3, c if self.exact else 2 * c)
            local = backend.batch_moments(x3, payload=payload, **valid)
            count, total = call.allreduce(local.count)
            form, moments = "pooled", Moments(count, total[:c], total[c:])
            if self.exact:
                payload = call.payload(x3, c)
                backend.recentre_moments(local, total, count, payload)
                _, m2 = call.allreduce(local.count)
                form, moments = "recentred", Moments(count, total, m2)
        if moments.count == 1:
            self._refuse_one_value(mask)
        if self.options.check_finite:
            self._check_finite(moments, form)
        options = self._options(*others)
        options |= {"running": running, "factor": self.factor}
        options["batches"] = batches if moments.count else NO_COUNTER
        mean, invstd = backend.finish_forward(
            moments, form, x3, y3, weight, bias, self.eps, **options
        )
        return mean, invstd, moments.count, local if self.options.keep_moments else None

    def backward(
        self,
        call: CollectiveCall | None,
        dy: Array,
        saved: Saved,
        *,
        out: Array | None = None,
        dx3: Array | None = None,
        dweight: Array | None = None,
        dbias: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """(dx, dresidual), as :meth:`forward`. Adds this rank's sums to `dweight` and `dbias`."""
        x3, mask, kind, expected = saved.x3, saved.mask, self.kind, self.expected
        seen, targets, in_order = self.seen, None, self.in_order
        if x3 is None:
            saved.check_complete()
        for gradient in (dweight, dbias):
            if gradient is not None and (type(gradient) is not kind or seen(gradient) != expected):
                dweight, dbias, targets = self._checked_gradients(x3, dweight, dbias)
                break
        usual = in_order and type(dy) is kind and seen(dy) == self.like_x
        dy = dy if usual else as_array(dy, "dy")
        dy3 = dy.reshape(self.shape3) if usual else self._view("dy", dy, x3)
        if out is not None:
            dx, dx3 = out, self._dx3_in(out, dy, x3, mask)
        else:
            dx3 = self.empty(self.shape3, self.dtype) if dx3 is None else dx3
            dx = dx3.reshape(self.shape) if in_order else self.layout.restore(dx3)
        dresidual, dresidual3 = dy if self.residual else None, None
        if self.fused_residual or (self.residual and mask is not None):
            dresidual3 = self.empty(self.shape3, self.dtype)
            restore, shape = self.layout.restore, self.shape
            dresidual = dresidual3.reshape(shape) if in_order else restore(dresidual3)
        backend, arrays = by_type[kind], (dy3, x3, dx3)
        outputs = dresidual3, dweight, dbias
        if self.prepared.get("backward" if mask is None else "masked backward") is not backend:
            self._prepare_backward(backend, arrays, saved, dresidual3)
        transform = Transform(saved.mean, saved.invstd, saved.weight, saved.bias)
        if self.ranks > 1:
            self._over_ranks_backward(call, arrays, transform, saved, outputs)
        else:
            backend.local_backward(
                dy3,
                x3,
                dx3,
                transform,
                count=0 if self.given else saved.count,
                relu=self.relu,
                relu_bits=saved.relu_bits,
                dresidual3=dresidual3,
                dweight=dweight,
                dbias=dbias,
                mask=mask,
            )
        if targets is not None:
            _write_back(targets, (dweight, dbias))
        if out is not None and not overlap(dx3, out):
            out[...] = self.layout.restore(dx3)
        return dx, dresidual

    def _over_ranks_backward(
        self,
        call: Any,
        arrays: tuple[Array, Array, Array],
        transform: Transform,
        saved: Saved,
        outputs: tuple[Any, Any, Any],
    ) -> None:
        """Fills the last of `arrays` (dy3, x3, dx3): one message."""
        (dy3, x3, dx3), c, backend = arrays, self.channels, by_type[self.kind]
        options = {"relu": self.relu, "relu_bits": saved.relu_bits, "mask": saved.mask}
        payload = call.payload(x3, 2 * c)
        local = backend.backward_reduce(dy3, x3, transform, payload=payload, **options)
        _, total = call.allreduce()
        options |= {"sums": BackwardSums(total[:c], total[c:]), "count": saved.count}
        options |= zip(("dresidual3", "dweight", "dbias"), outputs, strict=True)
        backend.backward_input(dy3, x3, transform, out3=dx3, local=local, **options)

    def normalize_again(
        self,
        x: Array,
        params: Mapping[str, Array],
        saved: Saved,
        y3: Array,
        mask: Array | None = None,
    ) -> None:
        """Fills y3 with the y of an earlier forward, from that forward's statistics.

        The bits are the same for the same x and mask. No communication, no update. For forwards
        without a residual.
        """
        weight, bias, *_ = self._checked(x, params.get("weight"), params.get("bias"), None)
        with on_device_of(x):
            transform = Transform(saved.mean, saved.invstd, weight, bias)
            x3, valid = plain(self.layout.view(x)), None if mask is None else self.valid(mask, x)
            by_type[self.kind].normalize(x3, transform, relu=self.relu, out3=y3, mask=valid)

    def leave(self, call: CollectiveCall | None, direction: str, error: Exception) -> None:
        """Adds to an error where it came from, and tells the other ranks if there are any."""
        if call is None:
            say_where(error, call_name(direction, self.name), self.comm)
        else:
            call.leave(error)

    # ---- seldom: checks that fail, other arrays than last time -----------------------------------

    def _checked(
        self, x: Array, weight: Array | None, bias: Array | None, running: Running | None
    ) -> tuple[Array | None, Array | None, Running | None, Running | None]:
        """The arrays as backends take them; and where to copy the statistics, if these are copies.

        Raises if they do not fit x.
        """
        parameters = {"weight": weight, "bias": bias}
        for what, array in parameters.items():
            if array is not None:
                parameters[what] = as_array(array, what)
                check_parameter(what, parameters[what], x, self.layout)
        target = None
        if running is not None:
            names = ("mean", "var") if self.given else ("running_mean", "running_var")
            check = check_parameter if self.given else check_written
            mean, var = as_array(running[0], names[0]), as_array(running[1], names[1])
            check(names[0], mean, x, self.layout)
            check(names[1], var, x, self.layout)
            taken = plain(mean), plain(var)
            if self.updates and not (taken[0] is mean and taken[1] is var):
                target, taken = (mean, var, running[2]), (mean.copy(), var.copy())
            running = *taken, running[2]
        return plain(parameters["weight"]), plain(parameters["bias"]), running, target

    def _checked_gradients(
        self, x3: Array, dweight: Array | None, dbias: Array | None
    ) -> tuple[Array | None, Array | None, tuple[Array | None, Array | None]]:
        """The arrays as backends take them, and those to copy them back to.

        Raises if gradients cannot be written to them.
        """
        gradients = {"weight": dweight, "bias": dbias}
        for what, gradient in gradients.items():
            if gradient is not None:
                check_written(f"the gradient of {what}", gradient, x3, self.layout)
                gradients[what] = as_array(gradient)
        targets = gradients["weight"], gradients["bias"]
        return plain(targets[0]), plain(targets[1]), targets

    def _view(self, what: str, array: Array, x: Array) -> Array:
        """The array as (N, C, L); raises unless it is like x."""
        if type(array) is not self.kind or self.seen(array) != self.like_x:
            array = as_array(array, what)
            check_like(what, array, x, self.layout)
        elif self.in_order:
            return array.reshape(self.shape3)
        return plain(self.layout.view(array))

    def valid(self, mask: Any, x: Array) -> Array:
        """The mask as (N, L) bytes, a view if its memory is dense; raises if it does not fit x."""
        mask = as_array(mask, "mask")
        check_mask(mask, x, self.layout.positions)
        if not mask.flags.c_contiguous:
            mask = mask.copy(order="C")
        return mask.view(np.uint8).reshape(self.shape3[::2])

    def _count_valid(self, backend: ModuleType, mask: Array) -> int:
        """The number of valid positions of this rank. On a device this waits for earlier work."""
        if is_capturing(mask):
            raise RuntimeError(
                f"{call_name('forward', self.name)}: mask= cannot go into a CUDA graph: the host "
                "reads how many values are valid"
            )
        return int(backend.count_valid(mask))

    def _y3_in(self, out: Array, x: Array, residual: Array | None) -> Array:
        """The memory for a y in `out`: a view of it if the layouts fit, else new memory."""
        check_out(out, x, self.layout)
        if residual is not None:
            check_overlap(out, residual, "residual", may_be_same=True)
        what = "x, which backward needs" if self.save else "x"
        check_overlap(out, x, what, may_be_same=self.given and not self.save)
        return self._written(out)

    def _dx3_in(self, out: Array, dy: Array, x3: Array, mask: Array | None) -> Array:
        """The same for a dx in `out`."""
        check_out(out, x3, self.layout)
        check_overlap(out, x3, "the x of forward", may_be_same=False)
        hands_dy_on = self.residual and not self.relu and mask is None
        what = "dy, which is returned as dresidual" if hands_dy_on else "dy"
        check_overlap(out, dy, what, may_be_same=not hands_dy_on)
        return self._written(out)

    def _written(self, out: Array) -> Array:
        view = self.layout.view(out)
        fits = overlap(view, out) and self.is_plain(view)
        return view if fits else self.empty(self.shape3, self.dtype)

    def _prepare_forward(self, backend: ModuleType, arrays: _Arrays) -> None:
        """Lets the backend compile what it needs, before the first message."""
        backend.prepare_forward(
            *arrays[:2],
            **self._options(*arrays[4:]),
            running_dtype=self.parameter_dtype.name if self.updates else None,
            ranks=self.ranks,
        )
        self._is_prepared("forward", arrays[-1], backend)

    def _prepare_backward(
        self,
        backend: ModuleType,
        arrays: tuple[Array, Array, Array],
        saved: Saved,
        dresidual3: Array | None,
    ) -> None:
        options = {"constant": self.given, "ranks": self.ranks, "dresidual3": dresidual3}
        options |= {"relu": self.relu, "relu_bits": saved.relu_bits, "mask": saved.mask}
        backend.prepare_backward(*arrays, **options)
        self._is_prepared("backward", saved.mask, backend)

    def _is_prepared(self, direction: str, mask: Array | None, backend: ModuleType) -> None:
        # On a device this depends on addresses too, so over ranks it is done each time.
        if self.on_host or self.ranks == 1:
            self.prepared[direction if mask is None else f"masked {direction}"] = backend

    def _refuse_one_value(self, mask: Array | None) -> None:
        masked = "" if mask is None else " with a mask"
        everywhere = "" if mask is None else ", 1 valid value"
        if self.ranks > 1:
            everywhere = f" on this rank, 1 value on all {self.ranks} ranks"
        raise ShapeError(
            "Expected more than 1 value per channel when training, got input size "
            f"{self.shape}{masked}{everywhere}"
        )

    def _check_finite(self, moments: Moments, form: str) -> None:
        """Raises if the running mean or variance would become NaN or Inf.

        The moments are the same on every rank, so every rank raises. Reads (C,) values of a device.
        """
        count = moments.count
        with np.errstate(all="ignore"):
            if form == "pooled":
                moments = Moments.unpack(count, np.concatenate([moments.mean, moments.m2]))
            elif form == "recentred":
                moments = Moments(count, moments.mean / max(count, 1), moments.m2)
            largest = float(np.finfo(self.parameter_dtype).max)
            unbiased = moments.m2 / max(count - 1, 1)
            finite = (abs(moments.mean) <= largest) & (unbiased <= largest)
        bad = np.flatnonzero(~copy_to_host(finite)).tolist()
        if bad:
            shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            channels = "channel" if len(bad) == 1 else "channels"
            raise FloatingPointError(
                f"{call_name('forward', self.name)}: NaN or Inf in the statistics of the batch, "
                f"in {channels} {shown}"
            )


def _write_back(targets: tuple[Array | None, ...], values: tuple[Array | None, ...]) -> None:
    """Writes both gradients. No call: Python checks for interrupts only at calls and jumps."""
    (dweight, dbias), (of_weight, of_bias) = targets, values
    if dweight is not None:
        dweight[...] = of_weight
    if dbias is not None:
        dbias[...] = of_bias


class _OnDevice(Bound):
    """A :class:`Bound` for arrays of a device, which it makes the current one."""

    seen = attrgetter("dtype", "shape", "flags.c_contiguous", "data.device_id")
    is_plain = attrgetter("flags.c_contiguous")
    on_host = False

    def __init__(self, x: Array, *args: Any) -> None:
        super().__init__(x, *args)
        # cupy.ndarray(shape, dtype) makes the same as cupy.empty, in a fifth of its time.
        self.empty, device_id = self.kind, x.data.device_id
        self.expected, self.like_x = (*self.expected, device_id), (*self.like_x, device_id)

    def forward(self, call: Any, x: Array, *args: Any, **options: Any) -> tuple[Array, Saved]:
        with x.device:
            return super().forward(call, x, *args, **options)

    def backward(
        self, call: Any, dy: Array, saved: Saved, **options: Any
    ) -> tuple[Array, Array | None]:
        with saved.mean.device:  # type: ignore[attr-defined]
            return super().backward(call, dy, saved, **options)
