"""The threads of the compiled backend: however a call ends, nothing is written after it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from conftest import NUMBA, ROOT
from rank_checks import normal

import cupybn
from cupybn import backends
from cupybn.backends.cpu import pool

pytestmark = pytest.mark.skipif(not NUMBA, reason="Numba is not installed")
X = normal((16, 64, 32, 32), np.float32)  # worth four threads
DY = normal(X.shape, np.float32, seed=1)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(autouse=True)
def _as_before():
    backends.use_cpu_backend("numba")
    yield
    pool.set_threads(None)


def state(layer):
    return [array.tobytes() for arrays in (layer.buffers, layer.grads) for array in arrays.values()]


def run(code, **env):
    """The lines that a fresh interpreter prints; it must end with code 0."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUPYBN_CPU_BACKEND": "numba"} | env,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_an_interrupted_call_writes_nothing_afterwards(backend):
    """Five hundred at random moments; arrays and layer belong to the caller again at once."""
    backends.use_cpu_backend(backend)
    pool.set_threads(4)
    layer = cupybn.BatchNorm2d(64)
    out, dx = np.empty_like(X), np.empty_like(X)
    for _ in range(3):
        layer.forward(X, out=out)
        layer.backward(DY, out=dx)
    expected, others = out.copy(), dx.copy()
    before = signal.signal(signal.SIGALRM, interrupt)
    interrupts = 0
    try:
        while interrupts < 500:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 4e-3))
                while True:
                    layer.forward(X, out=out)
                    layer.backward(DY, out=dx)
            except KeyboardInterrupt:
                out[...] = dx[...] = 7
                found = state(layer)
                interrupts += 1
            time.sleep(5e-4)
            assert (out == 7).all()
            assert (dx == 7).all()
            assert state(layer) == found
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    layer.forward(X, out=out)
    layer.backward(DY, out=dx)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(dx, others)


def test_with_no_more_threads_to_be_had_it_computes_on_those_there_are(monkeypatch):
    """The pids limit of a container, ``ulimit -u``; on other numbers of threads the same bits."""
    pool.set_threads(1)
    expected = cupybn.BatchNorm2d(64).forward(X)
    monkeypatch.setattr(pool, "_workers", [])
    monkeypatch.setattr(pool, "_calls", pool.SimpleQueue())
    start, left = threading.Thread.start, []

    def limited(thread):
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    pool.set_threads(4)
    for more, there in ((0, 0), (1, 1), (9, 3)):
        left += [None] * more
        layer = cupybn.BatchNorm2d(64)
        np.testing.assert_array_equal(layer.forward(X), expected)
        layer.backward(X)
        assert len(pool._workers) == there
    pool._calls.put(None)


@pytest.mark.parametrize("warm", [False, True])
def test_a_process_that_ends_computes_to_the_last(warm):
    """In threads that outlive the main one, and in functions of ``atexit``, first and last."""
    code = """
        import atexit, sys, threading
        import numpy as np
        x = np.random.default_rng(0).standard_normal((32, 64, 56, 56)).astype("f")
        def one(where):
            y = cupybn.BatchNorm2d(64).forward(x)
            print(where, bool(abs(y.mean()) < 1e-3), flush=True)
        atexit.register(one, "after the workers")
        import cupybn
        if WARM:
            one("main")
        atexit.register(one, "before the workers")
        def train():
            threading.main_thread().join()
            one("thread")
        threading.Thread(target=train).start()
    """
    found = run(code.replace("WARM", str(warm)), OMP_NUM_THREADS="2")
    assert found == ["main True"] * warm + [
        f"{where} True" for where in ("thread", "before the workers", "after the workers")
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forks_while_others_compute():
    """A forked child has none of the threads, at whatever point they were, and starts its own."""
    code = """
        import os, threading
        import numpy as np, cupybn
        from cupybn.backends.cpu import pool
        pool.set_threads(3)
        x = np.random.default_rng(0).standard_normal((16, 64, 32, 32)).astype("f")
        expected, ends = cupybn.BatchNorm2d(64).forward(x), threading.Event()
        def train():
            layer = cupybn.BatchNorm2d(64)
            while not ends.is_set():
                layer.forward(x)
        thread = threading.Thread(target=train)
        thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                y = cupybn.BatchNorm2d(64).forward(x)
                os._exit(7 if (y == expected).all() and len(pool._workers) == 2 else 8)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        ends.set()
        thread.join()
        print("done")
    """
    assert run(code) == ["done"]


def test_helpers_keep_no_array_alive(monkeypatch):
    """Wherever they are, before a kernel, in it, or after it and waiting for Python's lock."""
    pool.set_threads(4)
    handed = []

    class Calls(pool.SimpleQueue):
        def put(self, call):
            handed.append(call)
            super().put(call)

    monkeypatch.setattr(pool, "_workers", [])
    monkeypatch.setattr(pool, "_calls", Calls())
    layer = cupybn.BatchNorm2d(64, activation="relu")
    y = layer.forward(X, DY)
    layer.backward(y)
    assert len(handed) >= 6
    for _, arguments, _ in handed:
        arrays = [array for array in arguments if isinstance(array, np.ndarray)]
        assert sum(array.nbytes for array in arrays) < 10_000
    pool._calls.put(None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_ends_while_a_helper_is_on_its_way():
    code = """
        import os, sys, numpy as np, cupybn
        x = np.ones((16, 64, 32, 32), "f")
        layer = cupybn.BatchNorm2d(64)
        layer.forward(x[:2])
        for number in range(5):
            child = os.fork()
            if child == 0:
                for _ in range(1 + number):
                    layer.forward(x)
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0, number
        print("done")
    """
    assert run(code, OMP_NUM_THREADS="4") == ["done"]
