"""Which way device arrays go through MPI, and that nobody guesses. No GPU: see fake_cupy.py."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import types
import warnings
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
from conftest import rank_environment

from cupybn.communicators import cuda_aware, staging

PROGRAM = Path(__file__).parent / "mpi" / "transports.py"


class Library:
    """An MPI library with the functions that are given: name to answer."""

    def __init__(self, query=None, gpu=None):
        if query is not None:
            self.MPIX_Query_cuda_support = lambda: query
        if gpu is not None:
            self.MPIX_GPU_query_support = lambda kind, flag: self._tell(kind, flag, *gpu)

    def _tell(self, kind, flag, failed, supported):
        assert kind == 0
        ctypes.cast(flag, ctypes.POINTER(ctypes.c_int)).contents.value = supported
        return failed


def ask(monkeypatch, library, version="Open MPI v5.0.7", **variables):
    for name in (cuda_aware.VARIABLE, *cuda_aware._SWITCHES.values()):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cuda_aware, "load", lambda mpi: library)
    mpi = types.SimpleNamespace(
        Is_initialized=lambda: True,
        Is_finalized=lambda: False,
        Get_library_version=lambda: version,
    )
    return cuda_aware.cuda_aware(mpi)


@pytest.mark.parametrize(
    "library, aware, how",
    [
        (Library(), False, "has no function that says so"),
        (Library(query=0), False, "MPIX_Query_cuda_support() = 0"),
        (Library(query=1), True, "MPIX_Query_cuda_support() = 1"),
        (Library(query=-1), False, "MPIX_Query_cuda_support() = -1"),
        (Library(gpu=(0, 1)), True, "MPIX_GPU_query_support(CUDA) = 1"),
        (Library(gpu=(0, 0)), False, "MPIX_GPU_query_support(CUDA) = 0"),
        (Library(gpu=(1, 1)), False, "MPIX_GPU_query_support(CUDA) = -1"),
        (Library(query=1, gpu=(0, 0)), False, "MPIX_GPU_query_support(CUDA) = 0"),
        (Library(query=0, gpu=(0, 1)), False, "MPIX_Query_cuda_support() = 0"),
        (Library(query=1, gpu=(0, 1)), True, "= 1, MPIX_GPU_query_support(CUDA) = 1"),
    ],
)
def test_only_a_clear_yes_is_a_yes(monkeypatch, library, aware, how):
    answer = ask(monkeypatch, library)
    assert answer.aware is aware
    assert how in answer.how


@pytest.mark.parametrize(
    "version, variable",
    [
        ("Intel(R) MPI Library 2021.18", "I_MPI_OFFLOAD"),
        ("MVAPICH2 Version: 2.3.7", "MV2_USE_CUDA"),
        ("CRAY MPICH version 8.1", "MPICH_GPU_SUPPORT_ENABLED"),
    ],
)
def test_libraries_with_a_switch_of_their_own(monkeypatch, version, variable):
    answer = ask(monkeypatch, Library(query=1), version)
    assert answer == (False, answer.how)
    assert variable in answer.how
    assert not ask(monkeypatch, Library(query=1), version, **{variable: "0"}).aware
    assert ask(monkeypatch, Library(query=1), version, **{variable: "1"}).aware
    assert not ask(monkeypatch, Library(query=0), version, **{variable: "1"}).aware


def test_the_variable_overrules(monkeypatch):
    variable = cuda_aware.VARIABLE
    assert ask(monkeypatch, Library(query=1), **{variable: "0"}) == (False, f"{variable}=0")
    assert ask(monkeypatch, Library(query=0), **{variable: "1"}) == (True, f"{variable}=1")
    assert ask(monkeypatch, Library(query=1), **{variable: "auto"}).aware
    assert ask(monkeypatch, Library(query=1), **{variable: ""}).aware
    with pytest.raises(ValueError, match="CUPYBN_CUDA_AWARE_MPI must be auto, 0 or 1; got 'yes'"):
        ask(monkeypatch, Library(query=1), **{variable: "yes"})


def test_a_library_that_is_not_running_is_not_asked(monkeypatch):
    monkeypatch.delenv(cuda_aware.VARIABLE, raising=False)
    monkeypatch.setattr(cuda_aware, "load", None)
    for initialized, finalized in ((False, False), (True, True)):
        mpi = types.SimpleNamespace(
            Is_initialized=lambda i=initialized: i, Is_finalized=lambda f=finalized: f
        )
        assert not cuda_aware.cuda_aware(mpi).aware


@pytest.fixture
def cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # so that it is put back
    staging._staging.cache_clear()
    fake_cupy.install()
    fake_cupy.guard_memory()
    yield fake_cupy
    fake_cupy.install()


def written_late(cupy, values):
    """A device array that a kernel, launched just now, is still to fill."""
    array = cupy.asarray(np.full(len(values), -1.0))

    def kernel():
        array.memory[...] = values

    cupy.cuda.get_current_stream().launch(kernel)
    return array


def plus(amount, seen=None):
    def summed(host):
        if seen is not None:
            seen.append((fake_cupy.is_pinned(host), host.copy()))
        host += amount

    return summed


def test_the_host_waits_for_the_event_before_it_reads(cupy):
    seen = []
    staging.sum_through_pinned(cupy.asarray(np.zeros(4)), plus(0))
    message = written_late(cupy, np.arange(4.0))
    cupy.happened.clear()
    host = staging.sum_through_pinned(message, plus(10, seen))
    assert cupy.happened == ["to host", "event wait", "from host"]
    assert seen[0][0]
    np.testing.assert_array_equal(seen[0][1], np.arange(4.0))
    np.testing.assert_array_equal(host, np.arange(4.0) + 10)
    np.testing.assert_array_equal(message.get(), np.arange(4.0) + 10)


def test_pinned_memory_is_kept_and_not_overwritten_while_a_copy_reads_it(cupy):
    """The first sum is still on its way back, on its own stream, when the second comes."""
    first = written_late(cupy, np.zeros(4))
    staging.sum_through_pinned(first, plus(1))
    other = cupy.cuda.Stream()
    with other:
        second = written_late(cupy, np.zeros(4))
        staging.sum_through_pinned(second, plus(2))
    assert cupy.happened.count("pinned") == 1
    np.testing.assert_array_equal(first.get(), np.ones(4))
    with other:
        np.testing.assert_array_equal(second.get(), np.full(4, 2.0))


def test_pinned_memory_is_not_freed_while_a_copy_reads_it(cupy):
    first = written_late(cupy, np.zeros(4))
    staging.sum_through_pinned(first, plus(1))
    with cupy.cuda.Stream():
        staging.sum_through_pinned(written_late(cupy, np.zeros(1000)), plus(2))
    assert cupy.happened.count("pinned") == 2
    np.testing.assert_array_equal(first.get(), np.ones(4))


def test_without_pinned_memory_to_be_had_the_message_still_goes(cupy, monkeypatch):
    def none_left(size):
        raise MemoryError("none left")

    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", none_left)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (4, 4, 8):
            message = written_late(cupy, np.arange(float(length)))
            staging.sum_through_pinned(message, plus(1))
            np.testing.assert_array_equal(message.get(), np.arange(length) + 1)
    (told,) = caught  # once
    assert "cuda:0: no pinned memory to be had (none left)" in str(told.message)
    # A rank whose warnings are errors goes on too: the others have their sum.
    staging._staging.cache_clear()
    message = written_late(cupy, np.arange(4.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        staging.sum_through_pinned(message, plus(1))
    np.testing.assert_array_equal(message.get(), np.arange(4.0) + 1)


def test_a_device_pointer_is_handed_on_after_the_event(cupy):
    message = written_late(cupy, np.arange(4.0))
    cupy.happened.clear()
    given = []

    def summed(array):
        given.append((array, list(cupy.happened)))

    staging.sum_on_device(message, summed)
    assert given[0][0] is message
    assert given[0][1] == ["event wait"]
    assert cupy.happened == ["event wait"]


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_over_mpi(mpirun, n):
    mpirun(n, PROGRAM, "pinned", "host", "agreement", "layers", "device")


@pytest.mark.mpi
def test_a_pointer_given_to_an_mpi_that_cannot_follow_it_ends_the_process(mpirun):
    """What the other tests are spared: told a lie, the library hands the pointer over."""
    process = mpirun(2, PROGRAM, "lie", check=False, env={cuda_aware.VARIABLE: "1"})
    assert process.returncode != 0
    assert "survived" not in process.stdout
    assert "egmentation fault" in process.stderr


@pytest.mark.mpi
def test_the_wheels_say_no():
    code = "from mpi4py import MPI; from cupybn.communicators.cuda_aware import cuda_aware;"
    process = subprocess.run(
        [sys.executable, "-c", code + "print(cuda_aware(MPI))"],
        env=rank_environment(**{cuda_aware.VARIABLE: ""}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "aware=False, how='MPIX_Query_cuda_support() = 0" in process.stdout
