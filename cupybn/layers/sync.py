"""SyncBatchNorm: batch norm over the ranks of a communicator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from ..communicators import Communicator, check_comm, resolve
from ..forward_backward import ALONE
from ..typing import ArrayLike
from .base import Layer
from .batchnorm import ARGUMENTS, BatchNorm


class CommReference:
    """A layer's reference to its communicator: deepcopy shares it, pickle leaves it out."""

    def __init__(self, comm: Any, detached: bool = False) -> None:
        self.comm = comm
        self.detached = detached
        self.resolved: Communicator | None = None

    def resolve(self, label: str, look_up: Callable[[Any], Communicator]) -> Communicator:
        """The communicator, looked up once; the error for a lost one names the layer by `label`."""
        if self.resolved is None:
            if self.detached:
                raise RuntimeError(
                    f"{label}: this layer was unpickled, which leaves its communicator "
                    "behind: set layer.comm before training"
                )
            try:
                self.resolved = look_up(self.comm)
            except (RuntimeError, TimeoutError) as error:
                raise type(error)(f"{label}: {error}") from error
        return self.resolved

    def __deepcopy__(self, memo: dict[int, Any]) -> CommReference:
        return self

    def __reduce__(self) -> Any:
        return CommReference, (None, self.comm is not None or self.detached)


class Synchronised:
    """The communicator and the name of a synchronised batch norm, a layer or a module."""

    name: str | None
    training: bool
    _check_comm = staticmethod(check_comm)
    _look_up = staticmethod(resolve)

    @property
    def comm(self) -> Any:
        """The communicator as it was given; set it to change it."""
        return self._comm.comm

    @comm.setter
    def comm(self, comm: Any) -> None:
        self._comm = CommReference(self._check_comm(comm))

    @property
    def label(self) -> str:
        """The name of this layer in errors."""
        return self.name or super().label  # type: ignore[misc]

    def communicator(self) -> Communicator:
        """The communicator of the next forward."""
        if not self.training:
            return ALONE
        return self._comm.resolve(self.label, self._look_up)


class SyncBatchNorm(Synchronised, BatchNorm):
    __doc__ = (
        """Batch norm over the batches of all ranks; input of 2 or more dimensions.

    In training mode forward and backward are collective: every rank calls the same layers in the
    same order, ranks without samples too (N = 0), one allreduce a direction (two in forward for
    float64 data). Evaluation mode never communicates.
"""
        + ARGUMENTS.replace(
            "        bias: whether an affine",
            """        comm: an mpi4py intracommunicator, one of ``cupybn.communicators``, or None
            for ``MPI.COMM_WORLD``, looked up at the first training forward.
        name: stands for the layer's path in errors, and must be the same on all ranks.
        bias: whether an affine""",
        )
        + """        PeerError: another rank raised one of these.
        CollectiveMismatchError: the ranks called different layers, or with different settings.
        RuntimeError: no MPI library, or the layer was unpickled and its ``comm`` not set again.
"""
    )

    convert_sync_batchnorm: ClassVar[Callable[..., Layer]]
    """:func:`cupybn.convert_sync_batchnorm`, where PyTorch's users look for it."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        comm: Any = None,
        *,
        name: str | None = None,
        bias: bool = True,
        channel_axis: int = 1,
        activation: str | None = None,
        weight_init: str | Callable[[tuple[int]], ArrayLike] = "ones",
        check_finite: bool = False,
        dtype: Any = None,
        device: str | None = None,
    ) -> None:
        check_comm(comm)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            bias=bias,
            channel_axis=channel_axis,
            activation=activation,
            weight_init=weight_init,
            check_finite=check_finite,
            dtype=dtype,
            device=device,
        )
        self.name = name
        self.comm = comm
        self._converted_from: type[BatchNorm] | None = None

    def _keywords(self) -> list[tuple[str, Any, Any]]:
        return [*super()._keywords(), ("comm", self.comm, None), ("name", self.name, None)]
