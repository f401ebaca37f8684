"""Communicators over a ``torch.distributed`` process group: gloo, NCCL, or another."""

from __future__ import annotations

import platform
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import distributed

from ... import __version__, communicators
from ...arrays import Array, is_cupy
from ...backends import numba_problem
from ...communicators import Communicator
from ...communicators.base import OfOneProcess, all_take_numpy, listed, sum_on_host
from ...errors import CollectiveMismatchError, CollectiveTimeoutError, CupyBNError, PeerError
from ...launcher import started_by_mpi
from ...layers.sync import CommReference
from ...statistics import PROTOCOL, pack_texts, unpack_texts

if distributed.is_available():
    # If an optimizer's first step imports it later, defaults of its functions keep that time's
    # group, and gloo's threads may abort a process that ends with a group.
    import torch.distributed.nn.functional


class ProcessGroupCommunicator(OfOneProcess):
    """Sums messages with ``torch.distributed.all_reduce`` over a process group.

    NumPy messages are summed in place if the group has a backend for CPU tensors (gloo), and
    through the current CUDA device if it has none (NCCL alone). CuPy messages are summed in place,
    on the current stream, if it has one for CUDA tensors, and in host memory otherwise.

    Messages share the group with all else that is sent over it, so all must be in the same order on
    every rank, as for ``torch.nn.SyncBatchNorm``; ``torch.distributed.new_group()`` makes one for
    this library alone. The timeout is the group's own.

    Args:
        group: a process group that this process is in; None is the default one.

    Raises:
        ValueError: there is no default group, or this process is not in `group`.

    Attributes:
        rank, size: in the group.
        backend: the group's, e.g. ``"cpu:gloo,cuda:nccl"``.
    """

    def __init__(self, group: Any = None) -> None:
        group = distributed.group.WORLD if group is None else group
        if group is None:
            raise ValueError(
                "there is no default process group: call torch.distributed.init_process_group first"
            )
        _check_group(group)
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        self.backend: str = distributed.get_backend_config(group)
        # A weak reference: destroy_process_group() ends the group.
        self._group = ref(group)
        self._agreed = False

    def agree(self) -> None:
        """Has the ranks agree on what can be computed and sent, the first time; collective then.

        Looking up a ``comm=`` argument calls it, before anything is computed. Raises as
        :meth:`allreduce`.
        """
        if not self._agreed:
            with self._usable("agreeing on a protocol and a backend") as group:
                self._agree(group)

    def allreduce(self, message: Array, label: str = "") -> Array:
        """The sum over the ranks, in place.

        Raises:
            CollectiveTimeoutError: a rank did not come within the group's timeout.
            PeerError: a rank is gone; the text has what the group said.
            CollectiveMismatchError: other ranks run another version of cupybn.
            RuntimeError: the group was destroyed.
        """
        with self._usable(label or "allreduce") as group:
            if not self._agreed:
                self._agree(group)
            if not is_cupy(message):
                self._reduce(message, group)
            elif "cuda:" in self.backend:
                with _torch_stream(message):
                    distributed.all_reduce(torch.from_dlpack(message), group=group)
            else:
                sum_on_host(message, lambda values: self._reduce(values, group))
        return message

    @contextmanager
    def _usable(self, label: str) -> Any:
        """The group, if it is still there; its errors become this library's."""
        group = self._group()
        try:
            _check_group(group)
        except ValueError as error:
            raise RuntimeError(
                f"{label}: the process group was destroyed; modules keep the one they have until "
                "module.comm is set (to another group, or to None for the default one)"
            ) from error
        try:
            yield group
        except CupyBNError:
            raise
        except RuntimeError as error:  # the group has no other type for these
            late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            kind = CollectiveTimeoutError if late else PeerError
            raise kind(f"{label}, rank {self.rank} of {self.size}: {error}") from error

    def _agree(self, group: Any) -> None:
        """The first message: the protocol and its negative, as of :class:`MpiCommunicator`."""
        words = np.zeros(16, np.int64)
        problem = numba_problem() if self.size > 1 else ""
        words[:3] = PROTOCOL, -PROTOCOL, -bool(problem)
        self._reduce(words, group, "MIN")
        if words[0] != -words[1]:
            mine = f"cupybn {__version__}, protocol {PROTOCOL}, {platform.node()}"
            raise CollectiveMismatchError(
                "the ranks run versions of cupybn that do not understand each other; the same has "
                f"to be installed for all of them:{self._gather(mine, group)}"
            )
        if words[2]:
            mine = f"{platform.node()}, {problem or 'no problem'}"
            all_take_numpy(self.rank, self._gather(mine, group))
        self._agreed = True

    def _gather(self, text: str, group: Any) -> str:
        """The texts of all ranks, a line for each. Collective."""
        table = self._reduce(pack_texts(text, self.rank, self.size), group)
        return listed(unpack_texts(table, self.size))

    def _reduce(self, message: Array, group: Any, op: str = "SUM") -> Array:
        """A NumPy array, in place."""
        tensor, op = torch.from_numpy(message), getattr(distributed.ReduceOp, op)
        if "cpu:" in self.backend:
            distributed.all_reduce(tensor, op, group)
        else:
            on_device = tensor.cuda()
            distributed.all_reduce(on_device, op, group)
            tensor.copy_(on_device)
        return message

    def __repr__(self) -> str:
        return f"ProcessGroupCommunicator(rank {self.rank} of {self.size}, {self.backend})"


@contextmanager
def _torch_stream(message: Array) -> Any:
    """A context in which PyTorch works on CuPy's current stream, on the message's device."""
    import cupy  # type: ignore[import-not-found, unused-ignore]

    with message.device:
        stream = cupy.cuda.get_current_stream()
    device = torch.device("cuda", message.device.id)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, device)):
        yield


_communicators: WeakKeyDictionary[Any, ProcessGroupCommunicator] = WeakKeyDictionary()


def default_group() -> Any:
    """The process group that ``comm=None`` stands for; None where it is ``MPI.COMM_WORLD``."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    # Processes of torchrun inherit the variables of the launcher that started torchrun.
    if started_by_mpi() and not distributed.is_torchelastic_launched():
        return None
    return distributed.group.WORLD


def check_comm(comm: Any) -> Any:
    """:func:`cupybn.communicators.check_comm`; for a process group the one communicator over it."""
    if not _is_group(comm):
        return communicators.check_comm(comm)
    if comm not in _communicators:
        _communicators[comm] = ProcessGroupCommunicator(comm)
    return _communicators[comm]


def resolve(comm: Any) -> Communicator:
    """The communicator for a ``comm=`` argument of this package's."""
    return communicators.resolve(check_comm(default_group() if comm is None else comm))


def _is_group(comm: Any) -> bool:
    """Whether it is a process group, or the mark for one that this process is not in."""
    return distributed.is_available() and (
        isinstance(comm, distributed.ProcessGroup)
        or comm is distributed.GroupMember.NON_GROUP_MEMBER
    )


def _check_group(group: Any) -> None:
    """Raises ValueError unless it is a live process group with this process in it."""
    if not _is_group(group) or distributed.get_rank(group) < 0:
        raise ValueError("comm is a process group that this process is not in")


def describe(reference: CommReference) -> str:
    """The communicator in the text of a module; looks none up."""
    comm = reference.comm
    if reference.resolved is not None:
        return repr(reference.resolved)
    if reference.detached:
        return "left behind by pickling"
    if comm is None and (group := default_group()) is not None:
        return f"default process group ({distributed.get_backend_config(group)})"
    return "MPI.COMM_WORLD" if comm is None else repr(comm)
