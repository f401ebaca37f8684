"""What the batch norms share, and BatchNorm1d, BatchNorm2d, BatchNorm3d."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

from ..arrays import (
    Array,
    as_array,
    check_device,
    device_of,
    is_capturing,
    parameter_dtype,
)
from ..checks import check_eps, check_momentum, check_writeable, is_relu
from ..communicators import Communicator
from ..errors import DeviceError, DTypeError, ShapeError
from ..joint import Started, Steps, joint, on_its_device
from ..layout import check_channel_axis
from ..passes import ALONE, Saved, backward_steps, forward_steps, inference_pass, joint_pass
from ..statistics import Moments
from .base import Layer

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

    ``forward(x, residual=None, *, out=None, save_for_backward=None)`` returns y with shape, dtype
    and layout of x; `residual` is added before the activation. ``backward(dy, saved=None, *,
    out=None)`` returns dx, or (dx, dresidual) after a forward with a residual, and adds this rank's
    sums to ``grads``. `out` takes y or dx, and may be the `residual`, the `dy`, and, in evaluation,
    the x of a forward that saves nothing. x and the parameters are kept by reference: change
    neither between a forward and its backward. The formulas stand in :mod:`cupybn.functional`.

    Raises:
        ShapeError, DTypeError, DeviceError: bad input.
        ValueError: bad options.
        After any exception parameters, gradients, buffers and counters are what they were.
"""


def _initial_weight(weight_init: Any, shape: tuple[int], dtype: np.dtype[Any]) -> Array:
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
    _ranks_of_input: ClassVar[tuple[int, ...]] = ()
    _expected: ClassVar[str] = ""
    observe: Callable[[Moments], None] | None = None
    """Takes the moments of this rank's batch, in place of the running statistics."""

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
        weight_init: str | Callable[[tuple[int]], Array] = "ones",
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
        dtype = np.dtype(np.float32 if dtype is None else dtype)
        if dtype not in (np.float32, np.float64):
            raise DTypeError(f"dtype of a layer must be float32 or float64, got {dtype}")
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
        """Weight as `weight_init` says, bias 0."""
        if "weight" in self.params:
            self.weight = _initial_weight(self.weight_init, (self.num_features,), self.dtype)
        if "bias" in self.params:
            self.bias[...] = 0

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, no batches tracked."""
        for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            if name in self.buffers:
                self.buffers[name][...] = value

    def communicator(self) -> Communicator:
        """Who takes part in the next forward."""
        return ALONE

    def _joint(self, direction: str, comm: Communicator) -> joint:
        return joint_pass(comm, direction, self.label, self.num_features)

    def forward(  # type: ignore[override]
        self,
        x: Array,
        residual: Array | None = None,
        *,
        out: Array | None = None,
        save_for_backward: bool | None = None,
    ) -> Array:
        return super().forward(x, residual=residual, out=out, save_for_backward=save_for_backward)

    def compute_forward(
        self,
        x: Array,
        residual: Array | None = None,
        *,
        out: Array | None = None,
        save_for_backward: bool = True,
    ) -> tuple[Array, Saved]:
        call = self._joint("forward", self.communicator())
        return Started(call, self._forward_steps(call, x, residual, out, save_for_backward)).run()

    def start_forward(
        self,
        x: Array,
        residual: Array | None = None,
        *,
        out: Array | None = None,
        save_for_backward: bool | None = None,
    ) -> Started[Array]:
        """``forward``, for :func:`cupybn.functional.coalesce` to run."""
        self._check_unchanged("forward", "compute_forward")
        save = self.training if save_for_backward is None else save_for_backward
        call = self._joint("forward", self.communicator())

        def steps() -> Steps[Array]:
            y, context = yield from self._forward_steps(call, x, residual, out, save)
            if save:
                self._keep(context)
            return y

        return Started(call, steps())

    def _check_unchanged(self, *methods: str) -> None:
        for name in methods:
            if getattr(type(self), name) is not getattr(BatchNorm, name):
                raise TypeError(
                    f"{self.label}: {type(self).__name__} has a {name} of its own, which cannot "
                    "share a message"
                )

    def _forward_steps(
        self, call: joint, x: Array, residual: Array | None, out: Array | None, save: bool
    ) -> Steps[tuple[Array, Saved]]:
        options: dict[str, Any] = {
            "channel_axis": self.channel_axis,
            "activation": self.activation,
            "residual": residual,
            "out": out,
            "save": save,
        }
        x = as_array(x)
        self._check_input(x)
        evaluates = not self.training and "running_mean" in self.buffers
        computed = self._inference_steps if evaluates else self._batch_steps
        return (yield from on_its_device(x, computed(call, x, options)))

    def _inference_steps(
        self, call: joint, x: Array, options: dict[str, Any]
    ) -> Steps[tuple[Array, Saved]]:
        mean, var = self.running_mean, self.running_var
        result = inference_pass(x, mean, var, self.weight, self.bias, self.eps, **options)
        yield None
        return result

    def _batch_steps(
        self, call: joint, x: Array, options: dict[str, Any]
    ) -> Steps[tuple[Array, Saved]]:
        updates = self.training and self.observe is None and self._tracks()
        if updates:
            batches = self.buffers["num_batches_tracked"]
            check_writeable("num_batches_tracked", batches)
        y, saved = yield from forward_steps(
            call,
            x,
            self.params.get("weight"),
            self.params.get("bias"),
            self.eps,
            name=self.label,
            settings=self._settings() if call.ranks > 1 else "",
            running=self._running() if updates else None,
            check_finite=self.check_finite and self.training,
            observe=self.observe,
            **options,
        )
        if updates and saved.count:
            batches[()] = int(batches) + 1  # an in-place addition takes NumPy microseconds
        return y, saved

    def _settings(self) -> str:
        batch = ""
        if self.momentum is None and self._tracks():
            batch = f" (batch {int(self.num_batches_tracked) + 1})"
        return (
            f", momentum={self.momentum!r}{batch}, "
            f"track_running_stats={self.track_running_stats}, check_finite={self.check_finite}"
        )

    def _tracks(self) -> bool:
        """Whether training moves the running statistics; the option may have changed since."""
        return self.track_running_stats and "running_mean" in self.buffers

    def _running(self) -> tuple[Array, Array, float]:
        if self.momentum is None:
            if is_capturing(self.running_mean):
                raise RuntimeError(
                    f"{self.label}: momentum=None cannot go into a CUDA graph: each replay would "
                    "average with the factor of the capture"
                )
            factor = 1.0 / (int(self.num_batches_tracked) + 1)
        else:
            check_momentum(self.momentum)
            factor = self.momentum
        return self.buffers["running_mean"], self.buffers["running_var"], factor

    def compute_backward(self, dy: Array, context: Any, *, out: Array | None = None) -> Any:
        call = self._backward_call(context)
        return Started(call, self._backward_steps(call, dy, context, out)).run()

    def start_backward(
        self, dy: Array, saved: Any = None, *, out: Array | None = None
    ) -> Started[Any]:
        """``backward``, for :func:`cupybn.functional.coalesce` to run."""
        self._check_unchanged("backward", "compute_backward")
        context = self.saved if saved is None else saved
        call = self._backward_call(context)

        def steps() -> Steps[Any]:
            if context is None:
                raise self.no_context()
            dx = yield from self._backward_steps(call, dy, context, out)
            if self.saved is context:
                self._keep(None)
            return dx

        return Started(call, steps())

    def _knows(self, context: Any) -> bool:
        return isinstance(context, Saved) and context.layout.channels == self.num_features

    def _backward_call(self, context: Any) -> joint:
        comm = context.comm if self._knows(context) else self.communicator()
        return self._joint("backward", comm)

    def _backward_steps(
        self, call: joint, dy: Array, context: Any, out: Array | None
    ) -> Steps[Any]:
        if not self._knows(context):
            raise TypeError(f"{self.label}: saved must be a context of this layer's forward")
        steps = backward_steps(
            call, dy, context, out=out, dweight=self.grads.get("weight"),
            dbias=self.grads.get("bias"),
        )  # fmt: skip
        dx, dresidual = yield from on_its_device(context.x3, steps)
        return (dx, dresidual) if context.has_residual else dx

    def leave_backward(self, error: Exception) -> bool:
        comm = self.communicator()
        with suppress(type(error)), self._joint("backward", comm):
            raise error
        return comm.size > 1

    def _check_input(self, x: Array) -> None:
        if self._ranks_of_input and x.ndim not in self._ranks_of_input:
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
        return ", ".join([
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}",
            *(f"{name}={value!r}" for name, value, default in self._keywords() if value != default),
        ])  # fmt: skip

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
    _ranks_of_input = (2, 3)
    _expected = "2D or 3D"


class BatchNorm2d(BatchNorm):
    __doc__ = "Batch norm of (N, C, H, W) input.\n" + ARGUMENTS
    _ranks_of_input = (4,)
    _expected = "4D"


class BatchNorm3d(BatchNorm):
    __doc__ = "Batch norm of (N, C, D, H, W) input.\n" + ARGUMENTS
    _ranks_of_input = (5,)
    _expected = "5D"
