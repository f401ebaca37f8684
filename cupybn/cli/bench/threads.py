"""How many threads the libraries in this process may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from ...backends.cpu.pool import set_threads


def cores() -> int:
    """Of this process, where the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choices(wanted: list[int] | None) -> list[int]:
    """The numbers of threads to measure with: one, and all cores."""
    if find_spec("threadpoolctl") is None:
        return [_from_environment()]
    return wanted or sorted({1, cores()})


def _from_environment() -> int:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return cores()


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """Sets NumPy's BLAS, PyTorch where it is loaded, and the compiled loops to so many threads."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    set_threads(threads)
    if find_spec("threadpoolctl") is None:
        yield
        return
    import threadpoolctl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    limits: Any = threadpoolctl.threadpool_limits(threads, user_api="blas")
    with limits:
        yield
