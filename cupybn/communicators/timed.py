"""The time of each layer's messages, and the rank that the others wait for."""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..statistics import (
    HEADER,
    header_words,
    pack_texts,
    padded_length,
    unpack_texts,
    words_of_all,
)
from .base import OfOneProcess, check_usable, raise_for
from .mpi import resolve


class Total(NamedTuple):
    """Counts and seconds of the messages with one label, on one rank.

    Attributes:
        messages: how many.
        bytes: in all of them.
        seconds: from when this rank handed them over to when it had the sums.
    """

    messages: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Timed(OfOneProcess):
    """A communicator that records, by label, the messages over another one.

    A label is a call of a layer, such as ``"forward of 'features.bn1'"``. Give it to the layers in
    place of the communicator: ``comm = Timed(MPI.COMM_WORLD)``. With one rank it
    records nothing, since nothing is sent.

    Args:
        comm: as for SyncBatchNorm; None is ``MPI.COMM_WORLD``. Making an MPI communicator is
            collective.

    Raises:
        As :func:`resolve`.

    Attributes:
        comm: the other communicator.
        totals: a :class:`Total` for each label, of this rank. ``totals.clear()`` starts again.
    """

    def __init__(self, comm: Any = None) -> None:
        self.comm = resolve(comm)
        self.rank = self.comm.rank
        self.size = self.comm.size
        self.totals: dict[str, Total] = {}
        if hasattr(self.comm, "first_values"):
            self.first_values = self.comm.first_values

    def allreduce(self, message: Array, label: str = "") -> Array:
        """The sum over the ranks, as the other communicator gives it; raises what that raises."""
        began = time.perf_counter()
        total = self.comm.allreduce(message, label)
        seconds = time.perf_counter() - began
        before = self.totals.get(label, Total())
        self.totals[label] = Total(
            before.messages + 1, before.bytes + message.nbytes, before.seconds + seconds
        )
        return total

    def report(self) -> None:
        """Prints on rank 0 a line for each label: messages, MB, seconds that the ranks waited.

        The rank that waited least came last: the others waited for it. Collective.

        Raises:
            CollectiveMismatchError: the other ranks are in another call; on all ranks.
            PeerError: another rank failed.
        """
        check_usable(self)
        what, text = "Timed.report", json.dumps(self.totals)
        message = np.zeros(padded_length(self.size))
        message[:HEADER] = header_words(np.float64, what)
        message[HEADER + self.rank] = len(text)
        summed = self.comm.allreduce(message, what)
        header = summed[:HEADER]
        before, behind = words_of_all(np.float64, what, self.size)
        read = header.tobytes()
        if not (read.startswith(before) and read.endswith(behind)):
            raise_for(self, what, what, header)
        longest = int(summed[HEADER:].max())
        texts = self.comm.allreduce(pack_texts(text, self.rank, self.size, longest), what)
        if self.rank == 0:
            ranks = [json.loads(text) for text in unpack_texts(texts, self.size)]
            print("\n".join(table(ranks)), flush=True)


def table(ranks: list[dict[str, Any]]) -> list[str]:
    """The lines of a report, from the records of each rank."""
    labels = dict.fromkeys(label for totals in ranks for label in totals)
    rows = {label: [Total(*totals.get(label, ())) for totals in ranks] for label in labels}
    rows["all"] = [Total(*map(sum, zip(*totals.values(), strict=True))) for totals in ranks]
    lines = ["messages        MB  s waited: mean   least (rank)    most (rank)  call"]
    for label, row in rows.items():
        messages, size, seconds = zip(*row, strict=True)
        least, most = min(seconds), max(seconds)
        lines.append(
            f"{max(messages):8}{max(size) / 1e6:10.3f}{sum(seconds) / len(row):16.3f}"
            f"{least:9.3f} ({seconds.index(least)}){most:11.3f} ({seconds.index(most)})  {label}"
        )
    lines.append(f"rank {seconds.index(least)} waited least: the others waited for it")
    return lines
