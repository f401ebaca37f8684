"""Whether the loaded MPI library takes device pointers.

A library that does not take them dies of one with a segmentation fault, which Python cannot catch.
So nothing is guessed: only a clear yes of the library itself, or of the user, counts.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, NamedTuple

VARIABLE = "CUPYBN_CUDA_AWARE_MPI"
_GPU_IS_CUDA = 0  # MPIX_GPU_SUPPORT_CUDA, in MPICH's mpi.h

# Libraries with CUDA code that take device pointers only if a variable says so, whatever they
# answer: the beginning of their version text, and the variable.
_SWITCHES = {
    "Intel": "I_MPI_OFFLOAD",
    "MVAPICH2": "MV2_USE_CUDA",
    "CRAY MPICH": "MPICH_GPU_SUPPORT_ENABLED",
}


class Answer(NamedTuple):
    """Whether MPI takes device pointers, and how that was found."""

    aware: bool
    how: str


def cuda_aware(mpi: Any) -> Answer:
    """What ``CUPYBN_CUDA_AWARE_MPI`` says, or, if it is "auto" or not set, what MPI itself says.

    Does not touch CUDA. `mpi` is the module ``mpi4py.MPI``, initialised.

    Raises:
        ValueError: the variable is not auto, 0 or 1.
    """
    setting = os.environ.get(VARIABLE, "") or "auto"
    if setting not in ("auto", "0", "1"):
        raise ValueError(f"{VARIABLE} must be auto, 0 or 1; got {setting!r}")
    if setting != "auto":
        return Answer(setting == "1", f"{VARIABLE}={setting}")
    if not mpi.Is_initialized() or mpi.Is_finalized():
        return Answer(False, "MPI is not initialised and cannot be asked")
    version = mpi.Get_library_version()
    for name, variable in _SWITCHES.items():
        switch = os.environ.get(variable, "0")
        if version.startswith(name) and switch in ("", "0"):
            return Answer(False, f"{variable} is not set, without which {name} takes none")
    return _ask(load(mpi))


def load(mpi: Any) -> Any:
    """The MPI library that mpi4py uses: its symbols are found through mpi4py's own extension."""
    return ctypes.CDLL(mpi.__file__)


def _ask(library: Any) -> Answer:
    """Yes if the library has a function to ask and no such function says anything but yes."""
    answers = {}
    if hasattr(library, "MPIX_Query_cuda_support"):
        answers["MPIX_Query_cuda_support() = {}"] = library.MPIX_Query_cuda_support()
    if hasattr(library, "MPIX_GPU_query_support"):
        supported = ctypes.c_int(0)
        failed = library.MPIX_GPU_query_support(_GPU_IS_CUDA, ctypes.byref(supported))
        answers["MPIX_GPU_query_support(CUDA) = {}"] = -1 if failed else supported.value
    if not answers:
        return Answer(False, "the MPI library has no function that says so")
    how = ", ".join(text.format(value) for text, value in answers.items())
    return Answer(all(value == 1 for value in answers.values()), how)
