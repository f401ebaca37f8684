"""BatchNorm1d, BatchNorm2d, BatchNorm3d and SyncBatchNorm as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch.autograd.graph import increment_version
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from ...arrays import Array, array_of_tensor
from ...collective import CollectiveCall
from ...communicators import Communicator
from ...errors import DeviceError, DTypeError, ShapeError
from ...forward_backward import (
    ALONE,
    Bindings,
    Bound,
    Options,
    Running,
    Saved,
    bind,
    call_name,
    momentum_settings,
    running_factor,
)
from ...layers.sync import Synchronised
from ...statistics import message_length
from .autograd import (
    HOST,
    PLAIN,
    WIDE,
    Normalise,
    Tensor,
    array_of,
    arrays_of,
    new_array_like,
    on_stream_of,
)
from .checkpoint import remember, remembered
from .groups import check_comm, describe, resolve

_NONE = (None, None)  # dtype and device of what is not there


class BatchNorm(TorchBatchNorm):
    """PyTorch's module, and this library's forward in training mode."""

    name: str | None = None
    _binds: ClassVar[bool] = True  # as of the layers' BatchNorm

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        asked = {"communicator", "label", "_check_input", "_check_input_dim"}
        if cls.__module__ != __name__ and not asked.isdisjoint(vars(cls)):
            cls._binds = False

    @property
    def label(self) -> str:
        """What errors call this layer."""
        return self.name or type(self).__name__

    def communicator(self) -> Communicator:
        """Who takes part in the next forward."""
        return ALONE

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (N, C, ...) `input`; y has its shape, dtype and memory format.

        Raises:
            ShapeError, DTypeError, DeviceError: bad input; PeerError, CollectiveMismatchError: on
                another rank. Nothing was changed then.
        """
        if not self.training:
            return super().forward(input)
        if torch.compiler.is_compiling():  # what is here is not for tracing: a graph break
            return torch.compiler.disable(self._train)(input)
        return self._train(input)

    def _train(self, x: Tensor) -> Tensor:
        weight, bias, backward = self.weight, self.bias, False
        if torch.is_grad_enabled():
            for tensor in (x, weight, bias):
                backward = backward or getattr(tensor, "requires_grad", False)
        return Normalise.apply(x, weight, bias, self, backward)

    def normalise(
        self, x: Tensor, weight: Tensor, bias: Tensor, backward: bool
    ) -> tuple[Tensor, Saved]:
        """(y, context without arrays): what :class:`Normalise` does in a forward."""
        key: Any = None
        bound: Bound | None = None
        own, momentum = self.__dict__, self.momentum
        tensors = weight, bias, self.running_mean, self.running_var, self.num_batches_tracked
        if type(x) in PLAIN and type(momentum) is float and self._binds:
            key = (
                *(x.shape, x.stride(), x.dtype, x.device, backward, self.name, own.get("_comm")),
                *(self.eps, momentum, self.track_running_stats, self.num_features),
                None if tensors[4] is None else tensors[4].shape,
            )
            for tensor in tensors:
                key += _NONE if tensor is None else (tensor.dtype, tensor.device)
                if tensor is not None and tensor.is_inference():  # who may write it, may change
                    key = None
                    break
            if "_bindings" in own:
                bound = own["_bindings"].get(key)
        if bound is None:
            return self._bind_and_run(key, x, tensors, backward)
        call = CollectiveCall(bound.comm, *bound.forward_call) if bound.ranks > 1 else None
        try:
            with on_stream_of(x) if x.is_cuda else HOST:
                return self._run(call, bound, x, array_of_tensor(x), tensors)
        except Exception as error:
            bound.leave(call, "forward", error)
            raise

    def _bind_and_run(
        self, key: Any, x: Tensor, tensors: tuple[Tensor, ...], backward: bool
    ) -> tuple[Tensor, Saved]:
        """A forward of a signature that was not met twice before; `key` None: not to be kept."""
        comm, label = self.communicator(), self.label
        what, length = call_name("forward", label), message_length(self.num_features)
        with CollectiveCall(comm, what, length) as call, on_stream_of(x):
            array = array_of(x)
            self._check_input(x, *tensors)
            batches, momentum = tensors[4], self._momentum()
            tracks = self.track_running_stats and tensors[2] is not None
            factor = None
            if tracks:  # PyTorch's own does not move anything where it has nothing to count with
                counts = momentum is not None or batches is not None
                factor = running_factor(momentum, batches) if counts else 0.0
            options = Options(
                self.eps,
                affine=(tensors[0] is not None, tensors[1] is not None),
                save=backward,
                factor=factor,
                settings=momentum_settings(momentum, batches)
                | {"track_running_stats": self.track_running_stats, "backward": backward},
            )
            bound = bind(array, 1, options, comm, label)
            if key is not None:
                self.__dict__.setdefault("_bindings", Bindings()).keep(key, bound)
            if call.ranks > 1:
                *_, call.fingerprint, call.messages = bound.forward_call
            return self._run(call, bound, x, array, tensors)

    def _run(
        self,
        call: CollectiveCall | None,
        bound: Bound,
        x: Tensor,
        array: Array,
        tensors: tuple[Tensor, ...],
    ) -> tuple[Tensor, Saved]:
        """The forward of a batch, or of one that is recomputed; `array` is x.

        `tensors` are weight, bias, running mean, running variance and the counter.
        """
        wide, moved, batches = WIDE[x.dtype], tensors[2:4], tensors[4]
        weight, bias = arrays_of(tensors[:2], wide)
        params = {"weight": weight, "bias": bias}
        y, y3 = new_array_like(bound, x)
        saved = remembered(bound.name, bound.shape)
        if saved is not None:
            bound.normalize_again(array, params, saved, y3)
            remember(saved)
            return y, saved
        running, wide_ones = None, list(moved)
        if bound.updates:
            if not moved[0].dtype is moved[1].dtype is wide:
                wide_ones = [tensor.to(wide) for tensor in moved]
            on_host = batches is not None and batches.is_cpu
            counter = array_of_tensor(batches).reshape(()) if on_host else np.zeros((), np.int64)
            mean, var = arrays_of(wide_ones, wide)
            running = Running(mean, var, counter)
        _, saved = bound.forward(call, array, params, y3=y3, running=running)
        saved = saved._replace(x3=None, weight=None, bias=None)
        if running is not None and saved.count:
            increment_version(moved if batches is None else tensors[2:])
            for target, values in zip(moved, wide_ones, strict=True):
                if target is not values:
                    target.copy_(values)
            if batches is not None and not batches.is_cpu:
                batches.add_(1)
        remember(saved)
        return y, saved

    def _momentum(self) -> float | None:
        """A momentum that may be a tensor, as PyTorch takes it.

        Raises:
            TypeError: it is a tensor of another shape than (), or requires grad.
        """
        momentum: Any = self.momentum
        if not isinstance(momentum, torch.Tensor):
            return cast("float | None", momentum)
        if momentum.dim() or momentum.requires_grad:
            raise TypeError(
                "momentum must be a number, None, or a tensor of shape () that does not require "
                f"grad, got {momentum!r}"
            )
        return float(momentum)

    def _check_input(
        self, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, batches: Tensor
    ) -> None:
        """Raises where x, or what a forward reads and writes besides, does not fit."""
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ShapeError(
                f"expected {self.num_features} channels on axis 1, got {x.shape[1]} "
                f"(input shape {tuple(x.shape)})"
            )
        wide = WIDE.get(x.dtype, torch.float32)
        tensors = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        for name, tensor in tensors.items():
            if tensor is not None and tensor.dtype not in (x.dtype, wide):
                raise DTypeError(f"{name} is {tensor.dtype}, but {x.dtype} input goes with {wide}")
            if tensor is not None and tensor.device != x.device:
                raise DeviceError(f"{name} is on {tensor.device}, but the input is on {x.device}")
        if self.track_running_stats:
            self._check_buffers(mean, var, batches)

    def _check_buffers(self, mean: Tensor, var: Tensor, batches: Tensor) -> None:
        """Raises where the running statistics cannot be updated."""
        if (mean is None) != (var is None):
            raise ValueError(
                "running_mean and running_var must either both be None or neither be None"
            )
        if batches is not None and not (
            batches.numel() == 1 and torch.can_cast(torch.int64, batches.dtype)
        ):
            raise ValueError(
                "num_batches_tracked must be one integer, got a tensor of shape "
                f"{tuple(batches.shape)} and {batches.dtype}"
            )
        buffers = {"running_mean": mean, "running_var": var, "num_batches_tracked": batches}
        for name, tensor in buffers.items():
            if tensor is not None and tensor.is_inference() > torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"{name} was made in torch.inference_mode, and cannot be updated outside of "
                    f"it: make or load the module outside, or set module.{name} = "
                    f"module.{name}.clone()"
                )


class BatchNorm1d(BatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` with this library's training mode, over this process alone."""


class BatchNorm2d(BatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with this library's training mode, over this process alone."""


class BatchNorm3d(BatchNorm, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` with this library's training mode, over this process alone."""


class SyncBatchNorm(Synchronised, BatchNorm):
    """``torch.nn.SyncBatchNorm`` over a process group or MPI, on the CPU too; 2 or more dimensions.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in
            PyTorch, except that the weight starts at 1 (as it does there, whatever its docs say).
        comm: a ``torch.distributed`` process group, an mpi4py intracommunicator, or one of
            ``cupybn.communicators``. None, looked up at the first training forward, is the default
            process group where one is initialised, unless an MPI launcher started this process:
            then, and where there is none, ``MPI.COMM_WORLD``. Not in the state dict; shared by
            deepcopy, left behind by pickling (then set ``module.comm``).
        name: stands for the layer in errors, and tells it from others in messages; the same on all
            ranks. :func:`convert_sync_batchnorm` sets it to the path in the module.

    In training mode forward and backward are collective, for ranks without samples (N = 0) too. If
    no rank has any, nothing is updated, ``num_batches_tracked`` included. Evaluation mode never
    communicates.
    """

    _was: tuple[type, Any] | None = None  # what it was converted from
    _check_comm = staticmethod(check_comm)
    _look_up = staticmethod(resolve)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        comm: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        name: str | None = None,
        **keywords: Any,
    ) -> None:
        comm = check_comm(comm)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **keywords
        )
        self.comm = comm
        self.name = name

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ShapeError(f"expected at least 2D input (got {input.dim()}D input)")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, comm={describe(self._comm)}"

    convert_sync_batchnorm: ClassVar[Callable[..., Any]]
    """:func:`cupybn.interop.torch.convert_sync_batchnorm`, as a static method, as in PyTorch."""
