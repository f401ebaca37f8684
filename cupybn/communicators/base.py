"""What the library asks of a communicator, and the communicator of one rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

import numpy as np

from ..arrays import Array, assign, copy_to_host, is_cupy
from ..backends import use_cpu_backend
from ..errors import CollectiveMismatchError, PeerError
from ..statistics import failed_ranks, pack_texts, unpack_texts

DEFAULT_TIMEOUT = 600.0  # seconds
_Value = TypeVar("_Value", bound=Hashable)


@runtime_checkable
class Communicator(Protocol):
    """Adds up messages across ranks. Any object with ``rank``, ``size`` and ``allreduce`` will do.

    What it must do:

    * ``rank`` and ``size`` never change.
    * ``allreduce`` is collective: all ranks call it in the same order, with messages of one length
      and dtype (float64, float32 or int64). It returns, on every rank, the same bits.
    * It returns the sum, or raises. A call that raises before anything was sent leaves the
      communicator usable; if the others can wait for this rank then, a timeout of the
      communicator has to end that.
    * It may keep or overwrite the message, and may return it.
    * Where a message is a CuPy array, so is the sum, and work on the current stream comes before
      and after it.
    * One thread at a time calls it.

    It may have two methods more. ``first_values(total, n)``: the first n values, in host memory, of
    the sum that it returned last. ``agree()``: called on all ranks before anything is computed.
    """

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def allreduce(self, message: Array, label: str = "") -> Array:
        """The elementwise sum of the ranks' messages, which are contiguous and of one dimension.

        `label` says what is being summed, for errors.
        """
        ...


class OfOneProcess:
    """An object that copies share, and that cannot be pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> Any:
        name = type(self).__name__
        article = "an" if name.startswith("Mpi") else "a"
        raise TypeError(
            f"{article} {name} belongs to its process and cannot be pickled, and neither can the "
            "context of a forward over it. Pickle the layer, whose communicator is left behind, or "
            "its state_dict(); run forward again where the context is needed"
        )


def seconds_to_wait(timeout: Any = None) -> float:
    """The seconds of a ``timeout=`` argument; None reads ``CUPYBN_TIMEOUT``, 600 where not set.

    Raises:
        ValueError: it is not a number of seconds; 0 is for no timeout.
    """
    what, value = "timeout", timeout
    if timeout is None:
        what, value = "CUPYBN_TIMEOUT", os.environ.get("CUPYBN_TIMEOUT") or DEFAULT_TIMEOUT
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{what} must be a number of seconds, or 0 for none; got {value!r}")
    return seconds


def sum_on_host(message: Array, summed: Callable[[Any], Any]) -> Array:
    """The sum of a message, which `summed` adds up in host memory; waits for the current stream."""
    if not is_cupy(message):
        return summed(message)
    assign(message, summed(copy_to_host(message)))
    return message


def first_values(comm: Communicator, total: Array, n: int) -> Any:
    """The first n values of what ``comm.allreduce`` returned last, in host memory.

    A communicator that has them there already has a method ``first_values(total, n)``.
    """
    if type(total) is np.ndarray:
        return total[:n]
    at_hand = getattr(comm, "first_values", None)
    return copy_to_host(total[:n]) if at_hand is None else at_hand(total, n)


def by_rank(values: Iterable[_Value]) -> dict[_Value, str]:
    """Each value once, with the ranks that have it: "ranks 0, 2"."""
    ranks_of: dict[_Value, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_of.setdefault(value, []).append(rank)
    return {value: _name_ranks(ranks) for value, ranks in ranks_of.items()}


def _name_ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def listed(texts: Iterable[str]) -> str:
    """A line for each text, with the ranks that have it."""
    return "".join(f"\n  {who}: {text}" for text, who in by_rank(texts).items())


def warn_once(rank: int, text: str) -> None:
    """Rank 0 warns for all; a warning turned into an error is dropped, or this rank would leave."""
    if rank == 0:
        with suppress(RuntimeWarning):
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def all_take_numpy(rank: int, problems: str) -> None:
    """NumPy computes on all ranks, because some cannot use their Numba; rank 0 says why."""
    use_cpu_backend("numpy")
    warn_once(
        rank,
        "Numba is installed, but not all ranks can use it, so NumPy computes on all of them; "
        f"CUPYBN_CPU_BACKEND=numpy says that this is meant:{problems}",
    )


class SelfCommunicator:
    """The communicator of one process alone: size 1; nothing is ever sent."""

    rank = 0
    size = 1

    def allreduce(self, message: Array, label: str = "") -> Array:
        """The message itself."""
        return message

    def __repr__(self) -> str:
        return "SelfCommunicator()"


# The communicators that a mismatch closed, by id, since they need not be hashable. They are kept
# alive, so that no other gets the id.
refused: dict[int, tuple[Communicator, str]] = {}


def refuse(comm: Communicator, reason: str) -> None:
    """Closes comm after a mismatch: no rank knows what the others would send next."""
    refused[id(comm)] = (comm, reason)


def check_usable(comm: Communicator) -> None:
    """Raises CollectiveMismatchError, without communicating, if an earlier mismatch closed comm."""
    if id(comm) in refused:
        raise CollectiveMismatchError(
            "this communicator is closed, because the ranks were found out of step earlier:\n"
            + refused[id(comm)][1]
        )


def raise_for(comm: Communicator, what: str, fingerprint: str, summed: Any) -> NoReturn:
    """Raises the error that a summed header stands for, on every rank. Collective."""
    number, rank = failed_ranks(summed)
    if number:
        who = f"rank {rank}" if number == 1 else f"{number} of {comm.size} ranks"
        raise PeerError(
            f"{what}: {who} failed, and raised the exception that says why; nothing was changed on "
            "this rank"
        )
    table = pack_texts(fingerprint, comm.rank, comm.size)
    texts = unpack_texts(comm.allreduce(table, f"{what}, mismatch"), comm.size)
    text = f"the ranks met in one collective with different calls:{listed(texts)}"
    refuse(comm, text)
    raise CollectiveMismatchError(text)
