"""What the batch norms share, and BatchNorm1d, BatchNorm2d, BatchNorm3d."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..arrays import as_array, check_device, device_of, is_capturing, parameter_dtype
from ..backends import by_type
from ..checks import check_eps, check_layer_dtype, check_momentum, is_relu
from ..collective import CollectiveCall
from ..communicators import Communicator
from ..errors import DeviceError, DTypeError, ShapeError
from ..forward_backward import (
    ALONE,
    Bindings,
    Bound,
    Options,
    Saved,
    bind,
    call_name,
    momentum_settings,
    running_factor,
)
from ..layout import check_channel_axis
from ..statistics import Moments, message_length
from ..typing import Array, ArrayLike
from .base import Layer

# What binding calls. A subclass that overrides one of these is bound anew in every forward.
_ASKED_WHEN_BINDING = frozenset(
    {"communicator", "label", "path", "_bind", "_call", "_check_input", "_factor", "_settings"}
)

ARGUMENTS = """
    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics, in [0, 1]; None averages over
            all batches, ``1 / num_batches_tracked`` each.
        affine: whether there are a weight (C,) and a bias (C,).
        track_running_stats: whether there are ``running_mean``, ``running_var`` (unbiased, over the
            count of all ranks) and ``num_batches_tracked``; without them evaluation mode uses the
            statistics of its own batch. Set to False later, training leaves them as they are.
        bias: whether an affine layer has a bias.
        channel_axis: 1, or -1 for channels-last shapes.
        activation: None or "relu", applied to y.
        weight_init: "ones", "uniform" (U(0, 1) from NumPy's global generator), or a function from
            shape to array. On ranks, random ones want ``distributed.broadcast_parameters``.
        check_finite: whether NaN or Inf in the statistics of a training batch raises
            FloatingPointError, on every rank and before anything is written, naming the channels.
            No message more; on a device one read of C flags. Gradients are not looked at.
        dtype: of parameters and statistics: float32 (default), for float16, bfloat16 and float32
            data; or float64, for float64 data.
        device: None or "cpu", "cuda", "cuda:<n>".

    Parameters ``weight`` and ``bias``, buffers ``running_mean``, ``running_var`` and
    ``num_batches_tracked`` (int64, shape ()). State version 2.

    ``forward(x, residual=None, *, mask=None, out=None, save_for_backward=None)`` returns y with
    shape, dtype and layout of x; `residual` is added before the activation. `mask`, bool or uint8,
    of x's shape without the channel axis, is nonzero where x is valid: everything is that of the
    valid values alone, and y, dx and dresidual are 0 elsewhere. ``backward(dy, saved=None, *,
    out=None)`` returns dx, or (dx, dresidual) after a forward with a residual, and adds this rank's
    sums to ``grads``. `out` takes y or dx, and may be the `residual`, the `dy`, and, in evaluation,
    the x of a forward that saves nothing. x, the mask and the parameters are kept by reference:
    change none of them between a forward and its backward. The formulas stand in
    :mod:`cupybn.functional`. After any exception parameters, gradients, buffers and counters are
    what they were.

    Raises:
        ShapeError, DTypeError, DeviceError: bad input.
        ValueError: bad options.
"""


def named(function: Any, qualname: str) -> Any:
    """The same function under another name, which TypeErrors show."""
    named = FunctionType(function.__code__, function.__globals__, closure=function.__closure__)
    named.__dict__.update(function.__dict__)
    for each in ("__defaults__", "__kwdefaults__", "__annotations__", "__doc__", "__module__"):
        setattr(named, each, getattr(function, each))
    named.__qualname__ = qualname
    return named


def _initial_weight(weight_init: Any, shape: tuple[int], dtype: np.dtype[Any]) -> Any:
    if not callable(weight_init):
        if isinstance(weight_init, str) and weight_init == "ones":
            return np.ones(shape, dtype)
        if isinstance(weight_init, str) and weight_init == "uniform":
            return np.random.random_sample(shape).astype(dtype)
        raise ValueError(
            f"weight_init must be 'ones', 'uniform' or a function of a shape, got {weight_init!r}"
        )
    weight = np.array(weight_init(shape), dtype)
    if weight.shape != shape:
        raise ShapeError(f"weight_init gave shape {weight.shape}, expected {shape}")
    return weight


class BatchNorm(Layer):
    """What the batch norms share; use one of the four classes."""

    version = 2
    host_buffers = frozenset({"num_batches_tracked"})
    _ndims: ClassVar[tuple[int, ...]] = ()
    _expected: ClassVar[str] = ""
    _binds: ClassVar[bool] = True
    """Whether bound calls are kept: no subclass of a user's changes what they are made of."""
    observed: Moments | None = None
    """Merged moments of this rank's batches, in place of the running statistics, if not None."""

    weight: Array  # these are None where they are absent
    bias: Array
    running_mean: Array
    running_var: Array
    num_batches_tracked: Array
    _bindings: Bindings

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        activation: str | None = None,
        weight_init: str | Callable[[tuple[int]], ArrayLike] = "ones",
        check_finite: bool = False,
        dtype: Any = None,
        device: str | None = None,
    ) -> None:
        if isinstance(num_features, bool) or not isinstance(num_features, int | np.integer):
            raise TypeError(f"num_features must be an integer, got {num_features!r}")
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        check_eps(eps)
        if momentum is not None:
            check_momentum(momentum)
        is_relu(activation)
        device = check_device(device)
        dtype = check_layer_dtype(np.float32 if dtype is None else dtype)
        super().__init__()
        self.num_features = int(num_features)
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.channel_axis = check_channel_axis(channel_axis)
        self.activation = activation
        self.weight_init = weight_init
        self.check_finite = check_finite
        self.dtype = dtype
        shape = (self.num_features,)
        weight = _initial_weight(weight_init, shape, dtype)
        self.register_parameter("weight", weight if affine else None)
        self.register_parameter("bias", np.zeros(shape, dtype) if affine and bias else None)
        tracked = track_running_stats
        self.register_buffer("running_mean", np.zeros(shape, dtype) if tracked else None)
        self.register_buffer("running_var", np.ones(shape, dtype) if tracked else None)
        self.register_buffer("num_batches_tracked", np.zeros((), np.int64) if tracked else None)
        self.to(device)

    def reset_parameters(self) -> None:
        """Sets the weight as `weight_init` says, and the bias to 0."""
        if "weight" in self.params:
            self.weight = _initial_weight(self.weight_init, (self.num_features,), self.dtype)
        if "bias" in self.params:
            self.bias[...] = 0

    def reset_running_stats(self) -> None:
        """Sets the running mean to 0, the running variance to 1, the number of batches to 0."""
        for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            if name in self.buffers:
                self.buffers[name][...] = value

    def communicator(self) -> Communicator:
        """The communicator of the next forward."""
        return ALONE

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls) and isinstance(cls.__init__, FunctionType):
            cls.__init__ = named(cls.__init__, f"{cls.__qualname__}.__init__")  # type: ignore[method-assign]
        if "_binds" not in vars(cls) and not _ASKED_WHEN_BINDING.isdisjoint(vars(cls)):
            cls._binds = False

    def _set(self, name: str, value: Any) -> None:
        super()._set(name, value)
        # The mode is part of a signature, and parameters are looked at in each call.
        if name in self.__dict__ and name != "training":
            self.__dict__["_bindings"] = Bindings()

    if not TYPE_CHECKING:
        __setattr__ = _set

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _bindings=Bindings())

    def forward(  # type: ignore[override]
        self,
        x: ArrayLike,
        residual: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        out: ArrayLike | None = None,
        save_for_backward: bool | None = None,
    ) -> Array:
        y: Array
        own = self.__dict__
        save = own["training"] if save_for_backward is None else save_for_backward
        if self._wants_save and mask is None:
            y, context = self.compute_forward(x, residual, out=out, save_for_backward=save)
        else:
            options: dict[str, Any] = {} if mask is None else {"mask": mask}
            if self._wants_save:
                options["save_for_backward"] = save
            y, context = self.compute_forward(x, residual, out=out, **options)
        if save:
            own["saved"] = context
        return y

    if TYPE_CHECKING:  # the keywords that :class:`Layer` hands on
        __call__ = forward

        def backward(  # type: ignore[override]
            self, dy: ArrayLike, saved: Any = None, *, out: ArrayLike | None = None
        ) -> Any: ...

    def compute_forward(
        self,
        x: Any,
        residual: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        out: ArrayLike | None = None,
        save_for_backward: bool = True,
    ) -> tuple[Any, Any]:
        own: Any = self.__dict__
        key: Any = None
        bound: Bound | None = None
        params, buffers, training = own["params"], own["buffers"], own["training"]
        running: Any = None
        if "running_mean" in buffers and (
            not training or (own["track_running_stats"] and self.observed is None)
        ):
            running = (
                buffers["running_mean"],
                buffers["running_var"],
                buffers["num_batches_tracked"],
            )
        if self._binds and (kind := type(x)) in by_type:
            key = (
                *(kind, x.shape, x.strides, x.dtype, training, not save_for_backward, own["_path"]),
                *(residual is None, running is None, "weight" in params, "bias" in params),
            )
            if kind is not np.ndarray:
                key = *key, x.data.device_id
            bound = own["_bindings"].get(key)
        if bound is None:
            arrays = {"residual": residual, "mask": mask, "out": out, "running": running}
            return self._bind_and_run(key, x, save_for_backward, arrays)
        call = CollectiveCall(bound.comm, *bound.forward_call) if bound.ranks > 1 else None
        try:  # a `with` would be two frames more
            return bound.forward(
                call, x, params, residual=residual, mask=mask, out=out, running=running
            )
        except Exception as error:
            bound.leave(call, "forward", error)
            raise

    def _bind_and_run(
        self, key: Any, x: Any, save: bool, arrays: dict[str, Any]
    ) -> tuple[Any, Saved]:
        """A forward whose signature is not bound yet; with `key` None its binding is not kept."""
        with self._call("forward", self.communicator()) as call:
            x = as_array(x)
            self._check_input(x)
            bound = self._bind(x, call.comm, save, arrays)
            if key is not None and not (
                self.momentum is None or self.check_finite or self.observed is not None
            ):
                self._bindings.keep(key, bound)
            if call.ranks > 1:
                *_, call.fingerprint, call.messages = bound.forward_call
            y, saved = bound.forward(call, x, self.params, **arrays)
        if self.observed is not None and self.training and saved.moments is not None:
            self.observed = self.observed.merge(saved.moments)
        return y, saved

    def _bind(self, x: Array, comm: Communicator, save: bool, arrays: dict[str, Any]) -> Bound:
        tracks = arrays["running"] is not None
        options = Options(
            eps=self.eps,
            activation=self.activation,
            affine=("weight" in self.params, "bias" in self.params),
            residual=arrays["residual"] is not None,
            save=save,
            given=not self.training and tracks,
            factor=self._factor() if self.training and tracks else None,
            check_finite=self.check_finite and self.training,
            keep_moments=self.observed is not None,
            settings=self._settings() if comm.size > 1 else {},
        )
        return bind(x, self.channel_axis, options, comm, self.label)

    def _call(self, direction: str, comm: Communicator) -> CollectiveCall:
        what = call_name(direction, self.label)
        return CollectiveCall(comm, what, message_length(self.num_features))

    def _settings(self) -> dict[str, object]:
        batches = self.num_batches_tracked if self._tracks() else None
        return momentum_settings(self.momentum, batches) | {
            "track_running_stats": self.track_running_stats,
            "check_finite": self.check_finite,
        }

    def _tracks(self) -> bool:
        """Whether training moves the running statistics; the option may have changed since."""
        return self.track_running_stats and "running_mean" in self.buffers

    def _factor(self) -> float:
        """The weight of the next batch in the running statistics."""
        if self.momentum is None and is_capturing(self.running_mean):
            raise RuntimeError(
                f"{self.label}: momentum=None cannot go into a CUDA graph: each replay would "
                "average with the factor of the capture"
            )
        return running_factor(self.momentum, self.num_batches_tracked)

    def compute_backward(self, dy: Any, context: Any, *, out: ArrayLike | None = None) -> Any:
        if type(context) is not Saved or context.bound.channels != self.num_features:
            with self._call("backward", self.communicator()):
                raise TypeError(f"{self.label}: saved must be a context of this layer's forward")
        grads, bound = self.__dict__["grads"], context.bound
        call = CollectiveCall(bound.comm, *bound.backward_call) if bound.ranks > 1 else None
        try:
            dx, dresidual = bound.backward(
                call,
                dy,
                context,
                out=out,
                dweight=grads.get("weight"),
                dbias=grads.get("bias"),
            )
        except Exception as error:
            bound.leave(call, "backward", error)
            raise
        return (dx, dresidual) if bound.residual else dx

    def leave_backward(self, error: Exception) -> bool:
        comm = self.communicator()
        with suppress(type(error)), self._call("backward", comm):
            raise error
        return comm.size > 1

    def _check_input(self, x: Array) -> None:
        if self._ndims and x.ndim not in self._ndims:
            raise ShapeError(f"expected {self._expected} input (got {x.ndim}D input)")
        if x.ndim < 2:
            raise ShapeError(f"expected at least 2D input (got {x.ndim}D input)")
        if x.shape[self.channel_axis] != self.num_features:
            raise ShapeError(
                f"expected {self.num_features} channels on axis {self.channel_axis}, got "
                f"{x.shape[self.channel_axis]} (input shape {x.shape})"
            )
        if parameter_dtype(x.dtype) != self.dtype:
            raise DTypeError(
                f"input is {x.dtype}, but this layer's parameters are {self.dtype}: convert the "
                f"input, or make the layer with dtype='{parameter_dtype(x.dtype)}'"
            )
        if device_of(x) != self.device:
            raise DeviceError(
                f"input is on {device_of(x)}, but the layer is on {self.device}: move one of them, "
                "layers with layer.to(device)"
            )

    def upgrade_state_dict(self, state: dict[str, Any], prefix: str, version: int) -> None:
        """Version 1 had no ``num_batches_tracked``: it keeps its current value."""
        if version < 2 and "num_batches_tracked" in self.buffers:
            state.setdefault(f"{prefix}num_batches_tracked", self.num_batches_tracked)

    def extra_repr(self) -> str:
        texts = [
            f"{name}={value!r}" for name, value, default in self._keywords() if value != default
        ]
        shown = ("eps", "momentum", "affine", "track_running_stats")
        settings = [f"{name}={getattr(self, name)}" for name in shown]
        return ", ".join([str(self.num_features), *settings, *texts])

    def _keywords(self) -> list[tuple[str, Any, Any]]:
        return [
            ("bias", not self.affine or "bias" in self.params, True),
            ("channel_axis", self.channel_axis, 1),
            ("activation", self.activation, None),
            ("weight_init", self.weight_init, "ones"),
            ("check_finite", self.check_finite, False),
            ("dtype", self.dtype.name, "float32"),
        ]


class BatchNorm1d(BatchNorm):
    __doc__ = "Batch norm of (N, C) or (N, C, L) input.\n" + ARGUMENTS
    _ndims = (2, 3)
    _expected = "2D or 3D"


class BatchNorm2d(BatchNorm):
    __doc__ = "Batch norm of (N, C, H, W) input.\n" + ARGUMENTS
    _ndims = (4,)
    _expected = "4D"


class BatchNorm3d(BatchNorm):
    __doc__ = "Batch norm of (N, C, D, H, W) input.\n" + ARGUMENTS
    _ndims = (5,)
    _expected = "5D"
