"""NaN and Inf: with check_finite every rank raises and nothing changes; off, they stay put."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import DTYPES
from cuda_tools import need
from kernel_cases import host_kernels, numpy_through_cuda, parameter_dtype
from ptx.launch import missing
from rank_checks import Spy, bits, normal

from cupybn import (
    BatchNorm2d,
    Sequential,
    SyncBatchNorm,
    backends,
    distributed,
    fold,
    forward_backward,
    recalibrate,
)
from cupybn.interop.names import convert_state_dict
from cupybn.testing import run_ranks

POISONS = [np.nan, np.inf, -np.inf]


@pytest.fixture(params=["numpy", "cuda"])
def backend(request, monkeypatch):
    """NumPy arrays go through the NumPy backend, or through the CUDA one in the machine for PTX."""
    if request.param == "numpy":
        yield request.param
        return
    need(missing())
    monkeypatch.setitem(backends.by_type, np.ndarray, numpy_through_cuda())
    with host_kernels():
        yield request.param


def layer_of(comm, dtype, **options):
    return SyncBatchNorm(5, comm=comm, dtype=parameter_dtype(dtype).name, name="bn", **options)


def batch(comm, dtype, poison=None):
    """(3, 5, 4); the last rank's has the poison in channels 1 and 3."""
    x = normal((3, 5, 4), dtype, seed=comm.rank)
    if poison is not None and comm.rank == comm.size - 1:
        x[1, 1, 2] = x[0, 3, 0] = poison
    return x


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_every_rank_raises_and_nothing_changes(backend, n, dtype, poison):
    def rank(comm):
        spy = Spy(comm)
        layer, plain = (layer_of(spy, dtype, check_finite=flag) for flag in (True, False))
        for one in (layer, plain):
            one.backward(one.forward(batch(comm, dtype)))
        layer.forward(batch(comm, dtype))
        x, out = batch(comm, dtype, poison), np.zeros((3, 5, 4), dtype)
        before, saved = bits(layer), layer.saved
        del spy.sent[:]
        with pytest.raises(FloatingPointError) as caught:
            layer.forward(x, out=out)
        assert str(caught.value) == (
            "forward of 'bn': NaN or Inf in the statistics of the batch, in channels 1, 3"
        )
        assert bits(layer) == before
        assert layer.saved is saved
        assert not out.any()
        guarded = list(spy.sent)
        del spy.sent[:]
        plain.forward(x)
        assert guarded == spy.sent  # no message more, and no poison
        assert len(guarded) == (0 if n == 1 else 2 if dtype == np.float64 else 1)
        layer.backward(layer.forward(batch(comm, dtype)))  # the ranks are in step
        return bits(layer)

    run_ranks(n, rank)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_without_it_the_poisoned_channels_alone_are_affected(backend, n, dtype, poison):
    """Every other channel keeps its bits: of y, dx, gradients and running statistics."""

    def rank(comm):
        results = []
        for value in (None, poison):
            layer = layer_of(comm, dtype, activation="relu")
            y = layer.forward(batch(comm, dtype, value))
            dx = layer.backward(normal((3, 5, 4), dtype, seed=7))
            arrays = [y.swapaxes(0, 1), dx.swapaxes(0, 1), *layer.grads.values()]
            results.append([*arrays, layer.running_mean, layer.running_var])
        for clean, poisoned in zip(*results, strict=True):
            for channel in (0, 2, 4):
                assert clean[channel].tobytes() == poisoned[channel].tobytes()
        y, dx, *_, mean, var = results[1]
        for channel in (1, 3):
            for array in (y, dx):
                assert not np.isfinite(array[channel].astype(np.float64)).any()
            assert not np.isfinite(mean[channel])
            assert not np.isfinite(var[channel])
        assert layer.num_batches_tracked == 1

    run_ranks(n, rank)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "fine", "too_large"),
    [("float32", 1e15, 2.5e19), ("float32", 1e15, 3e38), ("float64", 1e150, 1e160)],
)
def test_finite_values_whose_variance_overflows_count_too(backend, n, dtype, fine, too_large):
    """Also where only the sum over the ranks overflows, or only its conversion to float32."""

    def rank(comm):
        sign = (-1) ** comm.rank if n > 1 else np.array([1, -1, 1, -1])[:, None]
        layer = layer_of(comm, np.dtype(dtype), check_finite=True, momentum=1.0)
        x = np.ones((4, 5), dtype)
        x[:] = fine * sign
        layer.forward(x)
        assert np.isfinite(layer.running_var).all()
        before = bits(layer)
        x[:, 2] *= too_large / fine
        with pytest.raises(FloatingPointError, match="in channel 2"):
            layer.forward(x)
        assert bits(layer) == before
        layer.check_finite = False
        layer.forward(x)
        assert np.isfinite(layer.running_var).tolist() == [True, True, False, True, True]

    run_ranks(n, rank)


def test_gradients_are_not_looked_at():
    """The guard is for running statistics, which no optimiser can skip; a NaN in dy stays put."""

    def rank(comm):
        layer = layer_of(comm, np.dtype("float32"), check_finite=True)
        layer.forward(batch(comm, np.float32))
        before = bits(layer)
        dx = layer.backward(batch(comm, np.float32, np.nan))
        assert np.isnan(dx).any(axis=(0, 2)).tolist() == [False, True, False, True, False]
        assert bits(layer)[-3:] == before[-3:]

    run_ranks(2, rank)


def test_evaluation_lets_through_what_it_is_given():
    def rank(comm):
        layer = layer_of(comm, np.dtype("float32"), check_finite=True).eval()
        assert np.isnan(layer.forward(batch(comm, np.float32, np.nan))).sum() in (0, 2)

    run_ranks(2, rank)


def test_without_running_statistics_it_guards_training_too():
    def rank(comm):
        options = {"track_running_stats": False, "check_finite": True}
        layer = layer_of(comm, np.dtype("float32"), **options)
        with pytest.raises(FloatingPointError, match="in channels 1, 3"):
            layer.forward(batch(comm, np.float32, np.nan))

    run_ranks(2, rank)


def test_it_cannot_go_into_a_cuda_graph(monkeypatch):
    """It reads the statistics; found before the first message."""
    monkeypatch.setattr(forward_backward, "is_capturing", lambda x: True)

    def rank(comm):
        layer = layer_of(comm, np.dtype("float32"), check_finite=True)
        before = bits(layer)
        with pytest.raises(RuntimeError, match="forward of 'bn': check_finite=True cannot go"):
            layer.forward(batch(comm, np.float32))
        assert bits(layer) == before

    run_ranks(2, rank)


def test_inf_warns_nobody_anywhere():
    """NaN and Inf are results like others; a warning would be an exception, on one rank alone."""

    def rank(comm):
        x = np.full((4, 3, 2, 2), -np.inf if comm.rank else np.inf, np.float32)
        layer = SyncBatchNorm(3, comm=comm)
        layer(x)
        layer.backward(x)
        layer.grads["bias"][...] = x[0, :, 0, 0]
        distributed.allreduce_gradients(layer, comm)
        assert np.isnan(layer.grads["bias"]).all()
        large = normal((4, 3, 2, 2), np.float64) * 1e300
        wide = BatchNorm2d(3, dtype="float64")
        recalibrate(wide, [large, large], comm)
        assert not np.isfinite(wide.running_var).any()

    with np.errstate(all="raise"):
        run_ranks(2, rank)
        layer = BatchNorm2d(3)
        layer.running_var[...] = -1
        assert np.isnan(fold(layer)).all()
        keras = {"a/moving_mean": np.zeros(3), "a/moving_variance": np.full(3, 3e38, np.float32)}
        ours = convert_state_dict(keras, "keras", "cupybn", count=2)
        assert np.isinf(ours["a.running_var"]).all()


def test_a_sum_too_large_for_its_gradient():
    def rank(comm):
        narrow, wide = BatchNorm2d(3), BatchNorm2d(3, dtype="float64")
        narrow.grads["weight"][...] = 3e38
        distributed.allreduce_gradients(Sequential(narrow, wide), comm, op="sum")
        assert np.isinf(narrow.grads["weight"]).all()

    run_ranks(2, rank)
