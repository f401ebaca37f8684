"""BatchNorm1d, BatchNorm2d, BatchNorm3d and SyncBatchNorm as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from ...arrays import Array
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
from .autograd import PLAIN, WIDE, Normalise, Tensor, array_of, on_stream_of
from .checkpoint import remember, remembered
from .groups import check_comm, describe, resolve


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
        if type(x) in PLAIN and self._binds:
            own = self.__dict__
            key = (
                *(x.shape, x.stride(), x.dtype, x.device, backward, self.name, own.get("_comm")),
                *(self.eps, self.momentum, self.track_running_stats, self.num_features),
            )
            for tensor in (weight, bias, self.running_mean, self.running_var):
                key += (None, None) if tensor is None else (tensor.dtype, tensor.device)
            if "_bindings" in own:
                bound = own["_bindings"].get(key)
        if bound is None:
            return self._bind_and_run(key, x, weight, bias, backward)
        call = CollectiveCall(bound.comm, *bound.forward_call) if bound.ranks > 1 else None
        try:
            with on_stream_of(x):
                return self._run(call, bound, x, array_of(x), (weight, bias))
        except Exception as error:
            bound.leave(call, "forward", error)
            raise

    def _bind_and_run(
        self, key: Any, x: Tensor, weight: Tensor, bias: Tensor, backward: bool
    ) -> tuple[Tensor, Saved]:
        """A forward of a signature that was not met twice before; `key` None: not to be kept."""
        comm, label = self.communicator(), self.label
        what, length = call_name("forward", label), message_length(self.num_features)
        with CollectiveCall(comm, what, length) as call, on_stream_of(x):
            array = array_of(x)
            self._check_input(x, weight, bias)
            tracks = self.track_running_stats and self.running_mean is not None
            options = Options(
                self.eps,
                affine=(weight is not None, bias is not None),
                save=backward,
                factor=running_factor(self.momentum, self.num_batches_tracked) if tracks else None,
                settings=momentum_settings(self.momentum, self.num_batches_tracked)
                | {"track_running_stats": self.track_running_stats, "backward": backward},
            )
            bound = bind(array, 1, options, comm, label)
            if key is not None and self.momentum is not None:
                self.__dict__.setdefault("_bindings", Bindings()).keep(key, bound)
            if call.ranks > 1:
                *_, call.fingerprint, call.messages = bound.forward_call
            return self._run(call, bound, x, array, (weight, bias))

    def _run(
        self,
        call: CollectiveCall | None,
        bound: Bound,
        x: Tensor,
        array: Array,
        parameters: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Saved]:
        """The forward of a batch, or of one that is recomputed; `array` is x."""
        layout, wide = bound.layout, WIDE[x.dtype]
        params = {
            "weight": array_of(parameters[0], dtype=wide),
            "bias": array_of(parameters[1], dtype=wide),
        }
        y = torch.empty_strided(layout.shape, layout.strides, dtype=x.dtype, device=x.device)
        y3 = array_of(y)
        y3 = y3.reshape(layout.shape3) if bound.in_order else layout.view(y3)
        saved = remembered(bound.name, layout.shape)
        if saved is None:
            running, buffers = None, (self.running_mean, self.running_var)
            if bound.updates:
                fit = buffers[0].dtype is buffers[1].dtype is wide
                moved = buffers if fit else (buffers[0].to(wide), buffers[1].to(wide))
                running = Running(array_of(moved[0]), array_of(moved[1]), np.zeros((), np.int64))
            _, saved = bound.forward(call, array, params, y3=y3, running=running)
            saved = saved._replace(x3=None, weight=None, bias=None)
            if running is not None and saved.count:
                for target, values in zip(buffers, moved, strict=True):
                    if target is not values:
                        target.copy_(values)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        else:
            bound.normalize_again(array, params, saved, y3)
        remember(saved)
        return y, saved

    def _check_input(self, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ShapeError(
                f"expected {self.num_features} channels on axis 1, got {x.shape[1]} "
                f"(input shape {tuple(x.shape)})"
            )
        wide = WIDE.get(x.dtype, torch.float32)
        buffers = {"running_mean": self.running_mean, "running_var": self.running_var}
        for name, tensor in ({"weight": weight, "bias": bias} | buffers).items():
            if tensor is not None and tensor.dtype not in (x.dtype, wide):
                raise DTypeError(f"{name} is {tensor.dtype}, but {x.dtype} input goes with {wide}")
            if tensor is not None and tensor.device != x.device:
                raise DeviceError(f"{name} is on {tensor.device}, but the input is on {x.device}")


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
