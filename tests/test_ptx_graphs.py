"""CUDA graphs in the machine for PTX: launches of two captures whose blocks take turns."""

from __future__ import annotations

from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
from cuda_tools import need
from kernel_cases import back, gaussian, host_kernels, there
from ptx.launch import missing

from cupybn.backends import cuda

if missing() is None:
    from ptx.launch import PtxError, compile_module, run

pytestmark = pytest.mark.timeout(900)
SHAPE = 4000, 16, 1  # of columns: several slices


@pytest.fixture
def started():
    """Launches that have begun and not run; they come from graphs or from eager work."""
    need(missing())
    launches = []

    def build(text, names):
        def of(kernel):
            return lambda *args, **more: launches.append(kernel.start(*args, **more))

        module = compile_module(text, names)
        return SimpleNamespace(get_function=lambda name: of(module.get_function(name)))

    with host_kernels(build):
        yield launches


def moments_of(x, capturing):
    """A graph of `batch_moments`, if it is captured, and what it writes."""
    stream = fake_cupy.cuda.get_current_stream()
    if not capturing:
        return None, cuda.batch_moments(x)
    stream.begin_capture()
    moments = cuda.batch_moments(x)
    return stream.end_capture(), moments


def right(moments, x):
    return np.allclose(back(moments.mean), x.mean(axis=(0, 2), dtype=np.float64), atol=1e-4)


def test_graphs_of_one_stream_run_at_the_same_time(started):
    """And with the scratch of eager work, which is the stream's, they do not: the test can tell."""
    arrays = [gaussian(SHAPE, np.float32, seed, seed) for seed in range(2)]
    found = [moments_of(there(x), capturing=True) for x in arrays]
    assert not started
    for graph, _ in found:
        graph.launch()
    assert len(started) == 2
    run(*started)
    assert all(right(moments, x) for x, (_, moments) in zip(arrays, found, strict=True))

    def eager_work_at_the_same_time():
        for _ in range(20):  # not every order of the blocks shows it
            started.clear()
            for x in arrays:
                moments_of(there(x), capturing=False)
            run(*started)

    with pytest.raises(PtxError, match="another block wrote"):
        eager_work_at_the_same_time()
