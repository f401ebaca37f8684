"""Peak memory on the CPU: x + y + 2 MB in a forward, x + dy + dx + 2 MB in a backward.

tracemalloc sees what NumPy allocates, which is all there is: the compiled loops take what they need
from the stack, and a few numbers a channel.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from conftest import DTYPES, NUMBA

import cupybn
from cupybn import backends

MB = 1 << 20
CASES = [((16, 64, 96, 96), 1), ((16, 96, 96, 64), -1), ((8192, 1024), 1)]


@pytest.fixture(params=["numpy", "numba"] if NUMBA else ["numpy"], autouse=True)
def backend(request):
    return backends.use_cpu_backend(request.param)


def peak(call, *arguments, **options):
    """(result, bytes above those there before at most, bytes that stay)."""
    tracemalloc.start()
    try:
        result = call(*arguments, **options)
        after, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return result, most, after


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 50_000), (300, 20_000)], ids=str)
def test_two_vectors_of_float64_are_kept(shape, training):
    layer = cupybn.BatchNorm1d(shape[1]).train(training)
    x = np.ones(shape, np.float32)
    layer.backward(layer(x, save_for_backward=True))
    y, _, kept = peak(layer.forward, x, save_for_backward=True)
    assert 16 * shape[1] <= kept - y.nbytes < 16 * shape[1] + 20_000


@pytest.mark.parametrize("shape, axis", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training(shape, axis, dtype):
    layer = cupybn.SyncBatchNorm(
        shape[axis], comm=cupybn.SelfCommunicator(), channel_axis=axis,
        dtype="float64" if dtype == np.float64 else "float32",
    )  # fmt: skip
    x = np.ones(shape, dtype)
    layer.backward(layer(x))
    y, most, kept = peak(layer.forward, x)
    assert most < y.nbytes + 2 * MB
    assert kept < y.nbytes + 16 * shape[axis] + 20_000
    saved, layer.saved = layer.saved, None
    dy = y
    dx, most, _ = peak(layer.backward, dy, saved)
    assert most < dx.nbytes + 2 * MB
    dx, most, _ = peak(layer.backward, dy, saved, out=dy)
    assert dx is dy
    assert most < 2 * MB


def test_activation_and_residual():
    layer = cupybn.BatchNorm2d(64, activation="relu")
    x = np.ones(CASES[0][0], np.float32)
    residual = x.copy()
    layer.backward(layer(x, residual))
    y, most, kept = peak(layer.forward, x, residual)
    mask = x.size // 8
    assert kept < y.nbytes + mask + 30_000
    assert most < y.nbytes + mask + 2 * MB
    (dx, dresidual), most, _ = peak(layer.backward, y)
    assert most < dx.nbytes + dresidual.nbytes + 2 * MB
