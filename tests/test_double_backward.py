"""batch_norm_double_backward; the central differences over ranks are in rank_checks.py."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from conftest import DTYPES, TOLERANCE
from rank_checks import Spy, normal

import cupybn
from cupybn import functional as F
from cupybn.testing import run_ranks


def data(dtype, shape=(6, 3, 4, 5)):
    wide = np.float64 if dtype == np.float64 else np.float32
    arrays = [normal(shape, np.dtype(dtype), seed) for seed in range(3)]
    return arrays, [normal(3, wide, seed) for seed in (10, 11, 12, 13)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "sliced"])
def test_every_dtype_and_layout_against_float64(dtype, layout):
    """Small dtypes: against the same values in float64, which the central differences vouch for."""
    arrays, per_channel = data(dtype)

    def run(convert, view):
        x, dy, ddx = (view(convert(a)) for a in arrays)
        weight, bias, a, b = (convert(v) if convert is wide else v for v in per_channel)
        _, saved = F.batch_norm_forward(x, weight, bias)
        return F.batch_norm_double_backward(ddx, a, b, saved, dy)

    def wide(values):
        return values.astype(np.float64)

    views = {
        "rows": lambda v: v,
        "columns": lambda v: np.moveaxis(np.moveaxis(v, 1, -1).copy(), -1, 1),
        "sliced": lambda v: np.repeat(v, 2, axis=3)[..., ::2],
    }
    result, expected = run(lambda v: v, views[layout]), run(wide, views["rows"])
    for name, mine, theirs in zip(result._fields, result, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == (dtype if name != "dweight" else per_channel[0].dtype)
        scale = max(1.0, np.abs(theirs).max())
        assert reference.error(mine / scale, theirs / scale) < TOLERANCE[dtype.name], name
    if layout == "columns":
        assert np.moveaxis(result.dx, 1, -1).flags.c_contiguous


def test_many_blocks_are_one():
    """More values than one block holds, rows and columns, with a mean far from 0."""
    for shape in ((3, 2, 70_000), (140_001, 2)):
        x, dy, ddx = (normal(shape, np.float32, seed, mean=100) for seed in range(3))
        narrow = F.batch_norm_forward(x)[1]
        wide = F.batch_norm_forward(x.astype("d"))[1]
        mine = F.batch_norm_double_backward(ddx, None, None, narrow, dy)
        theirs = F.batch_norm_double_backward(ddx.astype("d"), None, None, wide, dy.astype("d"))
        for a, b in zip(mine[:2], theirs[:2], strict=True):
            assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()


def test_missing_cotangents_are_zeros():
    (x, dy, ddx), (weight, bias, a, b) = data(np.float64)
    _, saved = F.batch_norm_forward(x, weight, bias, activation="relu")
    zero, none = np.zeros_like(x), np.zeros(3)
    for given in ((None, a, b), (ddx, None, b), (ddx, a, None), (None, None, None)):
        filled = [z if g is None else g for g, z in zip(given, (zero, none, none), strict=True)]
        first = F.batch_norm_double_backward(*given, saved, dy)
        second = F.batch_norm_double_backward(*filled, saved, dy)
        for mine, theirs in zip(first, second, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_constant_statistics_stay_local():
    """After an evaluation forward: central differences, and no message."""

    def rank(comm):
        spy = Spy(comm)
        layer = cupybn.SyncBatchNorm(3, comm=spy, dtype="float64", activation="relu").eval()
        layer.weight, layer.running_mean = normal(3, seed=1), normal(3, seed=2)
        (x, dy, ddx), (_, _, a, b) = data(np.float64, (4, 3, 2))

        def backward(x, dy):
            layer.zero_grad()
            layer.forward(x, save_for_backward=True)
            saved = layer.saved
            dx = layer.backward(dy)
            return np.vdot(ddx, dx) + a @ layer.grads["weight"] + b @ layer.grads["bias"], saved

        result = F.batch_norm_double_backward(ddx, a, b, backward(x, dy)[1], dy)
        for array, gradient in ((x, result.dx), (dy, result.ddy), (layer.weight, result.dweight)):
            for index in np.ndindex(array.shape):
                array[index] += 1e-5
                up = backward(x, dy)[0]
                array[index] -= 2e-5
                slope = (up - backward(x, dy)[0]) / 2e-5
                array[index] += 1e-5
                assert abs(slope - gradient[index]) < 1e-7 * max(1, abs(slope))
        return spy.sent

    assert run_ranks(2, rank) == [[], []]


def test_all_ranks_empty():
    def rank(comm):
        empty = np.empty((0, 3, 2), np.float32)
        weight = np.ones(3, np.float32)
        _, saved = F.batch_norm_forward(empty, weight, comm=comm)
        result = F.batch_norm_double_backward(empty, weight, None, saved, empty)
        assert result.ddy.shape == result.dx.shape == empty.shape
        return result.dweight.tolist()

    assert run_ranks(3, rank) == [[0.0] * 3] * 3


BAD = {
    "shape": (ValueError, {"dy": np.ones((4, 3, 1))}),
    "dtype": (TypeError, {"ddx": np.ones((4, 3, 2), np.float32)}),
    "no array": (TypeError, {"ddx": [1.0]}),
    "ddweight without weight": (ValueError, {"ddbias": np.ones(3)}),
    "ddweight's shape": (ValueError, {"ddweight": np.ones(2)}),
    "ddresidual without residual": (ValueError, {"ddresidual": np.ones((4, 3, 2))}),
}


@pytest.mark.parametrize("what", list(BAD))
def test_a_rank_that_fails_tells_the_others(what):
    expected, bad = BAD[what]

    def rank(comm):
        x = normal((4, 3, 2), seed=comm.rank)
        _, saved = F.batch_norm_forward(x, np.ones(3), comm=comm, name="f")
        given = {"ddx": x, "ddweight": None, "ddbias": None, "saved": saved, "dy": x}
        error = expected if comm.rank == 1 else cupybn.PeerError
        text = "double backward of 'f': rank 1 failed" if comm.rank != 1 else "^dd|^dy"
        with pytest.raises(error, match=text):
            F.batch_norm_double_backward(**given | (bad if comm.rank == 1 else {}))
        return F.batch_norm_double_backward(**given).dx  # the ranks are in step

    assert all(np.isfinite(dx).all() for dx in run_ranks(3, rank))


def test_backward_meeting_double_backward_is_seen():
    def rank(comm):
        x = normal((4, 3, 2), seed=comm.rank)
        _, saved = F.batch_norm_forward(x, comm=comm)
        calls = [
            lambda: F.batch_norm_backward(x, saved),
            lambda: F.batch_norm_double_backward(x, None, None, saved, x),
        ]
        with pytest.raises(cupybn.CollectiveMismatchError, match="rank 1: double backward of"):
            calls[comm.rank]()

    run_ranks(2, rank)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("training", [True, False])
def test_against_pytorch(dtype, training):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    (x, dy, ddx), (weight, bias, a, b) = data(np.dtype(dtype))
    mean, var = np.full(3, 0.3, dtype), np.full(3, 2.5, dtype)
    leaves = [torch.from_numpy(v).requires_grad_() for v in (x, weight, bias, dy)]
    tx, tweight, tbias, tdy = leaves
    running = [torch.from_numpy(v.copy()) for v in (mean, var)]
    y = torch.nn.functional.batch_norm(tx, *running, tweight, tbias, training, eps=1e-5)
    first = torch.autograd.grad(y, (tx, tweight, tbias), tdy, create_graph=True)
    value = sum((torch.from_numpy(v) * g).sum() for v, g in zip((ddx, a, b), first, strict=True))
    theirs = torch.autograd.grad(value, (tdy, tx, tweight))
    if training:
        _, saved = F.batch_norm_forward(x, weight, bias)
    else:
        layer = cupybn.BatchNorm2d(3, dtype=dtype).eval()
        layer.weight, layer.bias, layer.running_mean, layer.running_var = weight, bias, mean, var
        layer.forward(x, save_for_backward=True)
        saved = layer.saved
    mine = F.batch_norm_double_backward(ddx, a, b, saved, dy)
    for ours, tensor in zip(mine, theirs, strict=True):
        scale = float(tensor.abs().max())
        limit = 1e-5 if dtype == "float32" else 1e-12
        assert np.abs(ours - tensor.numpy()).max() < limit * max(1.0, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_device(dtype):
    """The same array expressions on CuPy arrays."""
    cupy = pytest.importorskip("cupy")
    arrays, per_channel = data(dtype)

    def run(convert):
        x, dy, ddx = map(convert, arrays)
        weight, bias, a, b = map(convert, per_channel)
        _, saved = F.batch_norm_forward(x, weight, bias, activation="relu", residual=dy)
        return F.batch_norm_double_backward(ddx, a, b, saved, dy, ddresidual=x)

    mine, theirs = run(cupy.asarray), run(np.asarray)
    for ours, expected in zip(mine, theirs, strict=True):
        assert isinstance(ours, cupy.ndarray)
        wide = expected.astype(np.float64)
        scale = max(1.0, np.abs(wide).max())
        assert reference.error(ours.get() / scale, wide / scale) < TOLERANCE[dtype.name]
