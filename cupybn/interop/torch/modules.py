"""BatchNorm1d, BatchNorm2d, BatchNorm3d and SyncBatchNorm as modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from ...checks import check_momentum
from ...communicators import Communicator, check_comm
from ...errors import DeviceError, DTypeError, ShapeError
from ...layers.sync import CommReference
from ...passes import ALONE, Saved, forward_pass, joint_pass, repeated_pass
from .autograd import Normalise, Tensor, array_of, like, on_stream_of, wide_dtype
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
        grads = (getattr(tensor, "requires_grad", False) for tensor in (x, self.weight, self.bias))
        backward = torch.is_grad_enabled() and any(grads)

        def run(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Saved]:
            return self._normalise(x, weight, bias, backward)

        return Normalise.apply(x, self.weight, self.bias, run)

    def _normalise(
        self, x: Tensor, weight: Tensor, bias: Tensor, backward: bool
    ) -> tuple[Tensor, Saved]:
        comm = self.communicator()
        with (
            joint_pass(comm, "forward", self.label, self.num_features) as call,
            on_stream_of(x),
        ):
            array = array_of(x)
            self._check_input(x)
            wide = wide_dtype(x)
            w, b = (None if p is None else array_of(p.to(wide)) for p in (weight, bias))
            y = like(x, array)
            saved = remembered(self.label, tuple(x.shape))
            if saved is not None:
                repeated_pass(array, saved, w, b, self.eps, out=array_of(y))
                remember(self.label, tuple(x.shape), saved)
                return y, saved
            running = self._running(wide)
            _, saved = forward_pass(
                call, array, w, b, self.eps,
                out=array_of(y), name=self.label, settings=self._settings(backward),
                running=None if running is None else (
                    array_of(running[0]), array_of(running[1]), self._factor()
                ),
            )  # fmt: skip
            saved = replace(saved, x3=None, weight=None, bias=None)
            if running is not None and saved.count:
                self._update(*running)
        remember(self.label, tuple(x.shape), saved)
        return y, saved

    def _check_input(self, x: Tensor) -> None:
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ShapeError(
                f"expected {self.num_features} channels on axis 1, got {x.shape[1]} "
                f"(input shape {tuple(x.shape)})"
            )
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype not in (x.dtype, wide_dtype(x)):
                raise DTypeError(
                    f"{name} is {tensor.dtype}, but {x.dtype} input goes with {wide_dtype(x)}"
                )
            if tensor is not None and tensor.device != x.device:
                raise DeviceError(f"{name} is on {tensor.device}, but the input is on {x.device}")

    def _settings(self, backward: bool) -> str:
        batch = ""
        if self.momentum is None and self.num_batches_tracked is not None:
            batch = f" (batch {int(self.num_batches_tracked) + 1})"
        return (
            f", momentum={self.momentum!r}{batch}, "
            f"track_running_stats={self.track_running_stats}, backward={backward}"
        )

    def _running(self, wide: Any) -> tuple[Tensor, Tensor] | None:
        """Running mean and variance in the dtype of the arithmetic: themselves, or copies."""
        if not self.track_running_stats or self.running_mean is None:
            return None
        return self.running_mean.to(wide), self.running_var.to(wide)

    def _factor(self) -> float:
        if self.momentum is None:
            return 1.0 / (int(self.num_batches_tracked) + 1)
        check_momentum(self.momentum)
        return float(self.momentum)

    def _update(self, mean: Tensor, var: Tensor) -> None:
        for target, values in ((self.running_mean, mean), (self.running_var, var)):
            if target is not values:
                target.copy_(values)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


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

    @staticmethod
    def convert_sync_batchnorm(module: Any, comm: Any = None, *, skip: Iterable[str] = ()) -> Any:
        """:func:`cupybn.interop.torch.convert_sync_batchnorm`."""
        from .convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, comm, skip=skip)
