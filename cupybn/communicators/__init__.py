"""Sums of messages over ranks. The communicators do not know what the numbers mean."""

from __future__ import annotations

from .base import Communicator, SelfCommunicator
from .mpi import MpiCommunicator, check_comm, resolve
from .threads import ThreadCommunicator
from .timed import Timed

__all__ = [
    "Communicator",
    "MpiCommunicator",
    "SelfCommunicator",
    "ThreadCommunicator",
    "Timed",
    "check_comm",
    "resolve",
]
