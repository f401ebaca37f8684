"""BatchNorm1d, BatchNorm2d, BatchNorm3d and SyncBatchNorm as modules."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from ...arrays import array_of_tensor
from ...collective import CollectiveCall
from ...communicators import Communicator
from ...errors import DeviceError, DTypeError, ShapeError
from ...forward_backward import (
    ALONE,
    Bindings,
    Options,
    Saved,
    bind,
    call_name,
    momentum_settings,
    running_factor,
)
from ...layers.batchnorm import named
from ...layers.sync import Synchronised
from ...statistics import message_length
from .autograd import apply
from .checkpoint import is_watching, remembered
from .direct import Direct
from .groups import check_comm, describe, resolve
from .operators import forward_operator
from .passes import run_forward
from .tensors import (
    HOST,
    PLAIN,
    WIDE,
    Tensor,
    array_of,
    check_mask,
    is_recorded,
    is_transformed,
    is_without_values,
    on_stream_of,
    stands_for_another,
)

_affine = itemgetter("weight", "bias")
_statistics = itemgetter("running_mean", "running_var", "num_batches_tracked")
_GRAPH_BREAK = (
    "a cupybn SyncBatchNorm communicates, and a compiled graph may change the order of messages: "
    "compile without fullgraph, or with cupybn.interop.torch.BatchNorm1d, 2d, 3d for one process"
)
_TRANSFORMS = (
    "the transforms of torch.func (vmap, grad, ...) and forward-mode differentiation do not "
    "go through this batch norm in training mode: use torch.autograd.grad and "
    "torch.autograd.functional, or call .eval()"
)
_OVER_RANKS = (
    "cannot be normalised over ranks, where graphs and tracers do not keep the order of messages. "
    "Trace and export in evaluation mode, or with module.comm = cupybn.SelfCommunicator(); "
    "torch.compile breaks its graph there; of a DTensor pass .to_local()"
)


class BatchNorm(TorchBatchNorm):
    """PyTorch's module, and this library's forward in training mode."""

    name: str | None = None
    __jit_unused_properties__: ClassVar[list[str]] = ["label", "comm"]  # not for TorchScript
    _binds: ClassVar[bool] = True  # as of the layers' BatchNorm
    _communicates: ClassVar[bool] = False  # for dynamo, which cannot ask the communicator

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls):
            cls.__init__ = named(cls.__init__, f"{cls.__qualname__}.__init__")  # type: ignore[method-assign]
        asked = {"communicator", "label", "_check_input", "_check_input_dim"}
        cls._communicates = cls._communicates or "communicator" in vars(cls)
        if cls.__module__ != __name__ and not asked.isdisjoint(vars(cls)):
            cls._binds = False

    @property
    def label(self) -> str:
        """The name of this layer in errors."""
        return self.name or type(self).__name__

    def communicator(self) -> Communicator:
        """The communicator of the next forward."""
        return ALONE

    def forward(self, input: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalises (N, C, ...) `input`; y has its shape, dtype and memory format.

        Args:
            mask: bool or uint8, (N, ...), the input's shape without its channels; nonzero where it
                is valid (the opposite of ``key_padding_mask``). Everything is that of the valid
                values alone; y and the gradient are 0 elsewhere. None: all are valid.

        Raises:
            ShapeError, DTypeError, DeviceError: bad input. PeerError, CollectiveMismatchError: of
                another rank. Nothing has changed then.
        """
        if not torch.jit.is_scripting():  # TorchScript does not compile what is in here
            if torch.compiler.is_compiling() or stands_for_another(input):
                return self._traced(input, mask)
            if self.training or (mask is not None and self.running_mean is None):
                return self._train(input, mask)
            return self._evaluate(input, mask)
        if self.training:
            raise RuntimeError("this batch norm was scripted, and cannot train: call .eval()")
        if mask is not None:
            raise RuntimeError("this batch norm was scripted, and takes no mask")
        if input.dim() < 2:
            raise ValueError("expected at least 2D input")
        mean, var = self.running_mean, self.running_var
        weight, bias = self.weight, self.bias
        return torch.nn.functional.batch_norm(
            input, mean, var, weight, bias, mean is None, 0.0, self.eps
        )

    def _train(self, x: Tensor, mask: Tensor = None) -> Tensor:
        """A forward with the statistics of the batch."""
        try:
            weight, bias = _affine(self.__dict__["_parameters"])
        except KeyError:  # parametrised, or deleted: attributes, which take longer
            weight, bias = self.weight, self.bias
        backward = False
        if torch.is_grad_enabled():
            for tensor in (x, weight, bias):
                backward = backward or getattr(tensor, "requires_grad", False)
        return apply(x, weight, bias, self, backward, mask)

    def _evaluate(self, x: Tensor, mask: Tensor = None) -> Tensor:
        """A forward of PyTorch's own; masked values reach no gradient, whatever they are."""
        if mask is None:
            return super().forward(x)
        self._check_input_dim(x)
        check_mask(mask, x)
        masked = (mask == 0).unsqueeze(1)
        return super().forward(x.masked_fill(masked, 0)).masked_fill(masked, 0)

    def _traced(self, x: Tensor, mask: Tensor = None) -> Tensor:
        """A forward of something else than a tensor in memory, or one that is being recorded."""
        of_batch = self.training or (mask is not None and self.running_mean is None)
        if torch.compiler.is_dynamo_compiling():
            if not of_batch:
                return self._evaluate(x, mask)
            if self._communicates:
                torch._dynamo.graph_break(msg=_GRAPH_BREAK)
                return torch.compiler.disable(self._train)(x, mask)
            return self._operator(x, mask)
        if isinstance(x, torch.fx.Proxy):  # symbolic_trace takes PyTorch's own for leaves too
            path, given = x.tracer.path_of_module(self), {} if mask is None else {"mask": mask}
            return x.tracer.create_proxy("call_module", path, (x,), given)
        if not of_batch:
            return self._evaluate(x, mask)
        if not isinstance(x, torch.Tensor):
            return self._train(x, mask)
        if is_transformed(x, self):
            self._refuse(_TRANSFORMS)
        if is_watching():
            return self._train(x, mask)
        shapes_alone = is_without_values(x) and not is_recorded()
        if not shapes_alone and self.communicator().size > 1:
            if is_recorded() or type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
                self._refuse(f"a {type(x).__name__} {_OVER_RANKS}")
            if type(x) in PLAIN:
                return self._train(x, mask)
            return self._train(x.as_subclass(torch.Tensor), mask).as_subclass(type(x))
        remembered(self.label, tuple(x.shape))  # this raises in a recomputation
        return self._operator(x, mask)

    def _refuse(self, why: str) -> NoReturn:
        """Raises RuntimeError, and tells the other ranks, which may be in the same forward."""
        what, length = call_name("forward", self.label), message_length(self.num_features)
        with CollectiveCall(self.communicator(), what, length):
            raise RuntimeError(f"{self.label}: {why}")

    def _operator(self, x: Tensor, mask: Tensor = None) -> Tensor:
        """A forward of this rank alone, as an operator that PyTorch can record."""
        weight, bias = self.weight, self.bias
        buffers = self.running_mean, self.running_var, self.num_batches_tracked
        self._check_input(x, weight, bias, *buffers)
        if mask is not None:
            check_mask(mask, x)
        if not self.track_running_stats or buffers[0] is None:
            buffers = None, None, None
        y, _, *new = forward_operator(x, weight, bias, *buffers, self._momentum(), self.eps, mask)
        for buffer, values in zip(buffers, new, strict=True):
            if buffer is not None:
                buffer.copy_(values)  # not under no_grad: torch.export could not save that
        return y

    def normalise(
        self, x: Tensor, weight: Tensor, bias: Tensor, backward: bool, mask: Tensor
    ) -> tuple[Tensor, Saved, Direct | None]:
        """The forward of :class:`Normalise`.

        Returns:
            y, the context without arrays, and the direct way of its backward, if there is one.
        """
        own, momentum = self.__dict__, self.momentum
        try:
            mean, var, batches = _statistics(own["_buffers"])
        except KeyError:
            mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        key: Any = None
        direct: Direct | None = None
        strided = type(x) in PLAIN and x.layout is torch.strided and not x.is_nested
        if strided and type(momentum) is float and self._binds and self.training:
            key = (
                *(x.shape, x.stride(), x.dtype, x.device, backward, self.name, own.get("_comm")),
                *(self.eps, momentum, self.track_running_stats, self.num_features),
                *(None if weight is None else weight.dtype, None if bias is None else bias.dtype),
                *(None if mean is None else mean.dtype, None if var is None else var.dtype),
                *((None, None) if batches is None else (batches.dtype, batches.shape)),
            )
            for tensor in (mean, var, batches):
                if tensor is not None and tensor.is_inference():
                    key = None  # its writer may change
            if "_bindings" in own:
                direct = own["_bindings"].get(key)
        tensors = weight, bias, mean, var, batches
        if direct is None:
            return self._bind_and_run(key, x, tensors, backward, mask)
        bound = direct.bound
        call = CollectiveCall(bound.comm, *bound.forward_call) if bound.ranks > 1 else None
        try:
            if mask is None and (found := direct.forward(x, tensors)) is not None:
                return *found, direct
            with on_stream_of(x) if x.is_cuda else HOST:
                return *run_forward(call, bound, x, array_of_tensor(x), tensors, mask), None
        except Exception as error:
            bound.leave(call, "forward", error)
            raise

    def _bind_and_run(
        self, key: Any, x: Tensor, tensors: tuple[Tensor, ...], backward: bool, mask: Tensor
    ) -> tuple[Tensor, Saved, None]:
        """A forward whose signature is not bound yet; with `key` None its binding is not kept."""
        comm, label = self.communicator(), self.label
        what, length = call_name("forward", label), message_length(self.num_features)
        with CollectiveCall(comm, what, length) as call, on_stream_of(x):
            array = array_of(x)
            self._check_input(x, *tensors)
            batches, momentum = tensors[4], self._momentum()
            tracks = self.track_running_stats and tensors[2] is not None
            factor = None
            if tracks:  # without a counter PyTorch's own updates nothing
                counts = momentum is not None or batches is not None
                factor = running_factor(momentum, batches) if counts else 0.0
            options = Options(
                self.eps,
                affine=(tensors[0] is not None, tensors[1] is not None),
                save=False,  # autograd keeps x, weight and bias
                factor=factor,
                settings=momentum_settings(momentum, batches)
                | {"track_running_stats": self.track_running_stats, "backward": backward},
            )
            bound = bind(array, 1, options, comm, label)
            if key is not None:
                self.__dict__.setdefault("_bindings", Bindings()).keep(key, Direct(bound, x))
            if call.ranks > 1:
                *_, call.fingerprint, call.messages = bound.forward_call
            return *run_forward(call, bound, x, array, tensors, mask), None

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
        """Raises if x, or another tensor that a forward reads or writes, does not fit."""
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
        """Raises if the running statistics cannot be updated."""
        if (mean is None) != (var is None):
            raise ValueError(
                "running_mean and running_var must either both be None or neither be None"
            )
        if batches is not None and not (batches.numel() == 1 and batches.dtype is not torch.bool):
            raise ValueError(
                "num_batches_tracked must be one integer, got a tensor of shape "
                f"{tuple(batches.shape)} and {batches.dtype}"
            )
        if torch.compiler.is_compiling():
            return
        buffers = {"running_mean": mean, "running_var": var, "num_batches_tracked": batches}
        for name, tensor in buffers.items():
            if tensor is not None and tensor.is_inference() > torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"{name} was made in torch.inference_mode, and cannot be updated outside of "
                    f"it: make or load the module outside, or set module.{name} = "
                    f"module.{name}.clone()"
                )


class BatchNorm1d(BatchNorm, torch.nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` with this library's training mode, over this process alone.

    Of (N, C) or (N, C, L) input. Arguments, dtypes and errors: as :class:`SyncBatchNorm`.
    """


class BatchNorm2d(BatchNorm, torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` with this library's training mode, over this process alone.

    Of (N, C, H, W) input. Arguments, dtypes and errors: as :class:`SyncBatchNorm`.
    """


class BatchNorm3d(BatchNorm, torch.nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` with this library's training mode, over this process alone.

    Of (N, C, D, H, W) input. Arguments, dtypes and errors: as :class:`SyncBatchNorm`.
    """


class SyncBatchNorm(Synchronised, BatchNorm):
    """:class:`torch.nn.SyncBatchNorm` over a process group or MPI, on the CPU too.

    Input has 2 or more dimensions.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in
            PyTorch, except that the weight starts at 1 (as it does there, whatever its docs say).
        comm: a ``torch.distributed`` process group, an mpi4py intracommunicator, or one of
            ``cupybn.communicators``. None, looked up at the first training forward, is the default
            process group where one is initialised, unless an MPI launcher started this process:
            then, and where there is none, ``MPI.COMM_WORLD``. Not in the state dict; shared by
            deepcopy, left behind by pickling (then set ``module.comm``).
        name: of the layer, in errors and messages; the same on all ranks, different for different
            layers. :func:`convert_sync_batchnorm` sets it to the path in the module.

    In training mode forward and backward are collective, for ranks without samples (N = 0) too. If
    no rank has any, nothing is updated, ``num_batches_tracked`` included. Evaluation mode never
    communicates. Input is float16, bfloat16, float32 or float64; parameters and statistics, (C,)
    each, have its dtype, or float32 for 16-bit input. :mod:`cupybn.functional` has the formulas.

    Raises:
        TypeError, ValueError: bad options. Those of a forward: see :meth:`forward`.
    """

    _communicates = True
    __jit_ignored_attributes__: ClassVar[list[str]] = ["_was"]
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
        bias: bool = True,
    ) -> None:
        comm = check_comm(comm)
        given = num_features, eps, momentum, affine, track_running_stats, device, dtype
        super().__init__(*given, bias=bias)
        self.comm = comm
        self.name = name

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ShapeError(f"expected at least 2D input (got {input.dim()}D input)")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, comm={describe(self._comm)}"

    convert_sync_batchnorm: ClassVar[Callable[..., Any]]
    """:func:`cupybn.interop.torch.convert_sync_batchnorm`, as a static method, as in PyTorch."""
