"""Masks on devices, where the host waits for the count: on the stand-in for CuPy."""

from __future__ import annotations

import fake_cupy
import pytest
import reference
from cuda_tools import need
from kernel_cases import host_kernels
from ptx.launch import missing
from test_cuda_layers import bits
from test_layers import layer_for, normal
from test_mask import half, spoiled, textbook, zero_where_masked

import cupybn
from cupybn import DeviceError, PeerError
from cupybn import functional as F
from cupybn.backends import cuda
from cupybn.testing import run_ranks

put = fake_cupy.asarray
SHAPE = (3, 3, 4, 5)


@pytest.fixture(autouse=True)
def cupy():
    need(missing())
    with host_kernels() as module:
        yield module


@pytest.mark.parametrize("relu, has_residual", [(False, False), (True, True), (False, True)])
def test_training_and_evaluation(relu, has_residual):
    layer = layer_for("f", activation="relu" if relu else None)
    weight, bias = layer.weight.copy(), layer.bias.copy()
    layer.to("cuda")
    mask = half(SHAPE)
    x, dy, residual = (spoiled(normal(SHAPE, seed=seed), mask) for seed in (1, 2, 3))
    residual = residual if has_residual else None
    given = () if residual is None else (put(residual),)
    y = layer.forward(put(x), *given, mask=put(mask))
    dx = layer.backward(put(dy))
    dx, dresidual = dx if has_residual else (dx, None)
    expected = textbook(x, dy, mask, weight, bias, residual, relu)
    assert reference.error(y.get(), expected[0]) < 1e-5
    assert reference.error(layer.running_var.get(), 0.9 + 0.1 * expected[3]) < 1e-5
    assert reference.error(dx.get(), expected[4]) < 1e-5
    assert zero_where_masked(y.get(), mask)
    assert zero_where_masked(dx.get(), mask)
    if has_residual:
        assert reference.error(dresidual.get(), expected[7]) < 1e-5
        assert zero_where_masked(dresidual.get(), mask)
    fixed = layer.running_mean.get(), layer.running_var.get()
    layer.eval()
    y = layer.forward(put(x), *given, mask=put(mask))
    expected = textbook(x, dy, mask, weight, bias, residual, relu, fixed=fixed)
    assert reference.error(y.get(), expected[0]) < 1e-5


def test_a_mask_on_another_device_raises_before_anything_is_sent():
    x, mask = normal(SHAPE), half(SHAPE)

    def rank(comm):
        layer = cupybn.SyncBatchNorm(3, comm=comm, name="bn", device="cuda")
        before = bits(layer)
        if comm.rank == 0:
            with pytest.raises(DeviceError, match="mask is on cpu, but the input is on cuda:0"):
                layer.forward(put(x), mask=mask)
        else:
            with pytest.raises(PeerError, match="rank 0 failed"):
                layer.forward(put(x), mask=put(mask))
        assert bits(layer) == before

    run_ranks(2, rank)
    with pytest.raises(DeviceError, match="mask is on cuda:0, but the input is on cpu"):
        F.batch_norm_forward(x, mask=put(mask))


def test_a_mask_cannot_go_into_a_cuda_graph(cupy):
    layer = layer_for("f").to("cuda")
    x, mask = put(normal(SHAPE)), put(half(SHAPE))
    before = bits(layer)
    stream = cupy.cuda.Stream()
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="mask= cannot go into a CUDA graph"):
            layer.forward(x, mask=mask)
        stream.end_capture()
    assert bits(layer) == before
    layer.forward(x, mask=mask)


def test_one_count_a_forward_and_only_with_a_mask(monkeypatch):
    """The count is what the host waits for."""
    counted, count_valid = [], cuda.count_valid
    monkeypatch.setattr(cuda, "count_valid", lambda m: counted.append(0) or count_valid(m))
    layer = layer_for("f").to("cuda")
    x, mask = put(normal(SHAPE)), put(half(SHAPE))
    for given, counts in ((None, 0), (mask, 1)):
        counted.clear()
        layer.train().forward(x, mask=given)
        layer.backward(x)
        layer.eval().forward(x, mask=given)
        assert len(counted) == counts
