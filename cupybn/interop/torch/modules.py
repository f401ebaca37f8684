"""BatchNorm1d, BatchNorm2d, BatchNorm3d and SyncBatchNorm as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from ...arrays import Array
from ...checks import check_momentum
from ...collective import CollectiveCall
from ...communicators import Communicator, check_comm
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
)
from ...layers.sync import CommReference
from ...statistics import message_length
from .autograd import WIDE, Normalise, Tensor, array_of, like, on_stream_of
from .checkpoint import remember, remembered


class BatchNorm(TorchBatchNorm):
    """PyTorch's module, and this library's forward in training mode."""

    name: str | None = None

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
        comm, label = self.communicator(), self.label
        what, length = call_name("forward", label), message_length(self.num_features)
        with CollectiveCall(comm, what, length) as call, on_stream_of(x):
            array = array_of(x)
            bound = self._bound(x, array, comm, label, backward)
            wide, params = WIDE[x.dtype], {}
            for name, tensor in (("weight", weight), ("bias", bias)):
                if tensor is not None:
                    params[name] = array_of(tensor if tensor.dtype is wide else tensor.to(wide))
            y = like(x, bound.layout)
            y3 = bound.layout.view(array_of(y))
            saved = remembered(label, bound.shape)
            if saved is not None:
                bound.normalize_again(array, params, saved, y3)
            else:
                if call.ranks > 1:
                    *_, call.fingerprint, call.messages = bound.forward_call
                saved = self._forward(call, bound, array, params, y3)
        remember(label, bound.shape, saved)
        return y, saved

    def _forward(
        self, call: CollectiveCall, bound: Bound, x: Array, params: dict[str, Array], y3: Array
    ) -> Saved:
        """Fills y3, and updates the running statistics."""
        running: Running | None = None
        moved: tuple[Tensor, ...] = ()
        if self.track_running_stats and self.running_mean is not None:
            wide = getattr(torch, bound.parameter_dtype.name)
            moved = self.running_mean.to(wide), self.running_var.to(wide)
            running = Running(array_of(moved[0]), array_of(moved[1]), np.zeros((), np.int64))
        _, saved = bound.forward(call, x, params, y3=y3, running=running)
        if running is not None and saved.count:
            for target, values in zip((self.running_mean, self.running_var), moved, strict=True):
                if target is not values:
                    target.copy_(values)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return saved._replace(x3=None, weight=None, bias=None)

    def _bound(
        self, x: Tensor, array: Array, comm: Communicator, label: str, backward: bool
    ) -> Bound:
        """The binding of this call; checks what it is made of where it is new."""
        arrays = self.weight, self.bias, self.running_mean, self.running_var
        key: list[Any] = [x.shape, array.strides, x.dtype, x.device, id(comm), label, backward]
        key += (self.eps, self.momentum, self.track_running_stats, self.num_features)
        for tensor in arrays:
            key.append(None if tensor is None else (tensor.dtype, tensor.device))
        bindings = self.__dict__.setdefault("_bindings", Bindings())
        bound: Bound | None = bindings.get(tuple(key))
        if bound is None or bound.comm is not comm:
            self._check_input(x)
            options = Options(
                self.eps,
                affine=(self.weight is not None, self.bias is not None),
                save=backward,
                factor=self._factor() if self.track_running_stats else 0.0,
                settings=self._settings(backward),
            )
            bound = bind(array, 1, options, comm, label)
            if self.momentum is not None:
                bindings.keep(tuple(key), bound)
        return bound

    def _check_input(self, x: Tensor) -> None:
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ShapeError(
                f"expected {self.num_features} channels on axis 1, got {x.shape[1]} "
                f"(input shape {tuple(x.shape)})"
            )
        wide = WIDE.get(x.dtype, torch.float32)
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype not in (x.dtype, wide):
                raise DTypeError(f"{name} is {tensor.dtype}, but {x.dtype} input goes with {wide}")
            if tensor is not None and tensor.device != x.device:
                raise DeviceError(f"{name} is on {tensor.device}, but the input is on {x.device}")

    def _settings(self, backward: bool) -> dict[str, object]:
        batch = ""
        if self.momentum is None and self.num_batches_tracked is not None:
            batch = f" (batch {int(self.num_batches_tracked) + 1})"
        return {
            "momentum": f"{self.momentum!r}{batch}",
            "track_running_stats": self.track_running_stats,
            "backward": backward,
        }

    def _factor(self) -> float:
        if self.momentum is None:
            return 1.0 / (int(self.num_batches_tracked) + 1)
        check_momentum(self.momentum)
        return float(self.momentum)


class BatchNorm1d(BatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` with this library's training mode, over this process alone."""


class BatchNorm2d(BatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with this library's training mode, over this process alone."""


class BatchNorm3d(BatchNorm, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` with this library's training mode, over this process alone."""


class SyncBatchNorm(BatchNorm):
    """``torch.nn.SyncBatchNorm`` over MPI, on the CPU too; input of 2 or more dimensions.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in
            PyTorch, except that the weight starts at 1 (as it does there, whatever its docs say).
        comm: an mpi4py intracommunicator, one of ``cupybn.communicators``, or None for
            ``MPI.COMM_WORLD``, looked up at the first training forward. Not in the state dict;
            shared by deepcopy, left behind by pickling (then set ``module.comm``).
        name: stands for the layer in errors, and tells it from others in messages; the same on all
            ranks. :func:`convert_sync_batchnorm` sets it to the path in the module.

    In training mode forward and backward are collective, for ranks without samples (N = 0) too. If
    no rank has any, nothing is updated, ``num_batches_tracked`` included. Evaluation mode never
    communicates.
    """

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
        check_comm(comm)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **keywords
        )
        self._comm = CommReference(comm)
        self.name = name

    @property
    def comm(self) -> Any:
        """The communicator as it was given; set it to change it."""
        return self._comm.comm

    @comm.setter
    def comm(self, comm: Any) -> None:
        check_comm(comm)
        self._comm = CommReference(comm)

    def communicator(self) -> Communicator:
        return self._comm.resolve(self.label)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ShapeError(f"expected at least 2D input (got {input.dim()}D input)")

    convert_sync_batchnorm: ClassVar[Callable[..., Any]]
    """:func:`cupybn.interop.torch.convert_sync_batchnorm`, as a static method, as in PyTorch."""
