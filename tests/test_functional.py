"""The stateless functions, and the primitives with a collective of one's own."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from conftest import DTYPES, TOLERANCE
from test_layers import layouts, normal

from cupybn import DTypeError, ShapeError
from cupybn import functional as F
from cupybn.testing import run_ranks

WEIGHT, BIAS = np.array([0.5, 1.0, 1.5], np.float32), np.array([-1.0, 0.0, 1.0], np.float32)


def for_dtype(dtype):
    wide = np.float64 if dtype == np.float64 else np.float32
    return WEIGHT.astype(wide), BIAS.astype(wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_forward_backward_inference(dtype, affine):
    x, dy = normal((4, 3, 5, 5), dtype, 1), normal((4, 3, 5, 5), dtype, 2)
    weight, bias = for_dtype(dtype) if affine else (None, None)
    y, saved = F.batch_norm_forward(x, weight, bias, eps=1e-3)
    grads = F.batch_norm_backward(dy, saved)
    expected = reference.forward(x, weight, bias, eps=1e-3)
    gradient = reference.backward(dy, x, weight, bias, eps=1e-3)
    tolerance = TOLERANCE[dtype.name]
    assert reference.error(y, expected.y) < tolerance
    assert reference.error(grads.dx, gradient.dx) < tolerance
    assert saved.mean.dtype == saved.var.dtype == saved.invstd.dtype == np.float64
    assert reference.error(saved.mean, expected.mean) < 1e-6
    assert reference.error(saved.var, expected.var) < 1e-6
    np.testing.assert_allclose(saved.invstd, 1 / np.sqrt(saved.var + 1e-3))
    assert saved.count == 100
    assert grads.dresidual is None
    if affine:
        assert reference.error(grads.dweight, gradient.dweight) < 1e-5
        assert grads.dweight.dtype == weight.dtype
    else:
        assert grads.dweight is None
    mean, var = (v.astype(for_dtype(dtype)[0].dtype) for v in (saved.mean, saved.var))
    inference = F.batch_norm_inference(x, mean, var, weight, bias, eps=1e-3)
    assert reference.error(inference, expected.y) < tolerance


def test_saved_can_be_used_twice_and_gradients_do_not_accumulate():
    x = normal((4, 3, 5, 5))
    _, saved = F.batch_norm_forward(x, WEIGHT, BIAS)
    first, second = F.batch_norm_backward(x, saved), F.batch_norm_backward(x, saved)
    for a, b in zip(first[:3], second[:3], strict=True):
        np.testing.assert_array_equal(a, b)


def test_inference_in_place_and_with_residual():
    x, r = normal((4, 3, 5, 5)), normal((4, 3, 5, 5), seed=1)
    mean, var = np.zeros(3, np.float32), np.full(3, 4, np.float32)
    expected = reference.normalized(x, mean, var, WEIGHT, BIAS, residual=r, relu=True)
    for mine in layouts(x).values():
        if mine.flags.writeable:
            options = {"activation": "relu", "residual": r, "out": mine}
            assert F.batch_norm_inference(mine, mean, var, WEIGHT, BIAS, **options) is mine
            assert reference.error(mine, expected) < 1e-5


def test_update_running():
    x = normal((4, 3, 5, 5))
    _, saved = F.batch_norm_forward(x)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    F.update_running(mean, var, saved, 0.25)
    expected = reference.forward(x)
    np.testing.assert_allclose(mean, 0.25 * expected.mean, rtol=1e-6)
    np.testing.assert_allclose(var, 0.75 + 0.25 * expected.unbiased, rtol=1e-6)
    _, empty = F.batch_norm_forward(np.empty((0, 3, 5, 5), np.float32))
    before = mean.tobytes()
    F.update_running(mean, var, empty, 0.25)
    assert mean.tobytes() == before
    for momentum in (2, None):
        with pytest.raises(ValueError, match="momentum must lie in"):
            F.update_running(mean, var, saved, momentum)
    with pytest.raises(ShapeError, match=r"running_var has shape \(2,\), expected \(3,\)"):
        F.update_running(mean, var[:2], saved, 0.5)
    with pytest.raises(DTypeError, match="running_var is int64, not floating"):
        F.update_running(mean, np.ones(3, np.int64), saved, 0.5)
    with pytest.raises(DTypeError, match="running_var is a masked array"):
        F.update_running(mean, np.ma.ones(3), saved, 0.5)
    assert mean.tobytes() == before
    _, infinite = F.batch_norm_forward(x * np.float32(1e30))
    assert np.isinf(infinite.var).all()
    _, large = F.batch_norm_forward(x.astype(np.float64) * 1e30)
    F.update_running(mean, var, large, 0.5)
    assert np.isinf(var).all()


@pytest.mark.parametrize(
    "saved", [None, (1, 2), np.ones(3)], ids=lambda saved: type(saved).__name__
)
def test_what_is_no_context_is_named(saved):
    dy = normal((4, 3, 5, 5))
    message = f"saved must be what batch_norm_forward returned.*got {type(saved).__name__}"
    with pytest.raises(TypeError, match=message):
        F.batch_norm_backward(dy, saved)
    with pytest.raises(TypeError, match=message):
        F.batch_norm_double_backward(dy, None, None, saved, dy)
    with pytest.raises(TypeError, match=message):
        F.update_running(np.zeros(3), np.ones(3), saved, 0.5)


def test_bad_arguments():
    x = normal((4, 3, 5, 5))
    with pytest.raises(ShapeError, match=r"weight has shape \(4,\), expected \(3,\)"):
        F.batch_norm_forward(x, np.ones(4, np.float32))
    with pytest.raises(DTypeError, match="bias is float64, but float32 input"):
        F.batch_norm_forward(x, WEIGHT, np.ones(3))
    with pytest.raises(DTypeError, match="weight must be a NumPy or CuPy array"):
        F.batch_norm_forward(x, [1.0, 1.0, 1.0])
    with pytest.raises(ShapeError, match=r"mean has shape \(2,\)"):
        F.batch_norm_inference(x, np.ones(2, np.float32), np.ones(3, np.float32))
    with pytest.raises(ShapeError, match=r"var has shape \(2,\)"):
        F.batch_norm_inference(x, np.ones(3, np.float32), np.ones(2, np.float32))
    buffer = np.zeros(x.size + 1, np.float32)
    out, residual = buffer[1:].reshape(x.shape), buffer[:-1].reshape(x.shape)
    with pytest.raises(ValueError, match="out overlaps residual; pass residual itself"):
        F.batch_norm_forward(x, residual=residual, out=out)
    with pytest.raises(ValueError, match="out overlaps x in|out overlaps x;"):
        F.batch_norm_inference(x[1:], np.ones(3, np.float32), np.ones(3, np.float32), out=x[:-1])
    with pytest.raises(TypeError, match="comm must be"):
        F.batch_norm_forward(x, comm=3)


X3, ZERO, ONE = normal((4, 3, 25)), np.zeros(3), np.ones(3)
SUMS = F.BackwardSums(ZERO, ZERO)
OTHER = np.float64([7, 7])  # one channel short of three
NOT_FITTING = {
    "batch_moments of two dimensions": (ShapeError, lambda: F.batch_moments(X3[0])),
    "batch_moments of integers": (DTypeError, lambda: F.batch_moments(X3.astype(int))),
    "batch_moments, payload": (ShapeError, lambda: F.batch_moments(X3, payload=np.zeros(5))),
    "finalize_moments, m2": (
        ShapeError, lambda: F.finalize_moments(F.Moments(9, ZERO, OTHER), 1e-5)),
    "finalize_moments of an array": (DTypeError, lambda: F.finalize_moments(ZERO, 1e-5)),
    "finalize_moments, eps": (
        ValueError, lambda: F.finalize_moments(F.Moments(9, ZERO, ONE), -1.0)),
    "finalize_moments, form": (
        ValueError, lambda: F.finalize_moments(F.Moments(9, ZERO, ONE), 1e-5, form="lokal")),
    "finalize_moments, running": (
        DTypeError, lambda: F.finalize_moments(
            F.Moments(9, ZERO, ONE), 1e-5, running=(ZERO.astype(int), ONE.copy()), factor=0.1)),
    "recentre_moments, payload": (
        ShapeError, lambda: F.recentre_moments(F.Moments(9, ZERO, ONE), ZERO, 9, OTHER)),
    "normalize, mean": (ShapeError, lambda: F.normalize(X3, OTHER, ONE)),
    "normalize, no mean": (DTypeError, lambda: F.normalize(X3, None, ONE)),
    "normalize, invstd": (DTypeError, lambda: F.normalize(X3, ZERO, ONE.astype(np.float32))),
    "normalize, weight": (DTypeError, lambda: F.normalize(X3, ZERO, ONE, ONE)),
    "normalize, out": (ShapeError, lambda: F.normalize(X3, ZERO, ONE, out3=X3[1:].copy())),
    "normalize, residual": (
        DTypeError, lambda: F.normalize(X3, ZERO, ONE, residual3=X3.astype(np.float64))),
    "normalize, relu_bits": (
        ShapeError, lambda: F.normalize(X3, ZERO, ONE, relu_bits=np.zeros(2, np.uint8))),
    "normalize, activation": (ValueError, lambda: F.normalize(X3, ZERO, ONE, activation="gelu")),
    "backward_reduce, dy": (ShapeError, lambda: F.backward_reduce(X3[1:], X3, ZERO, ONE)),
    "backward_reduce, payload": (
        ShapeError, lambda: F.backward_reduce(X3, X3, ZERO, ONE, payload=ZERO.copy())),
    "backward_input, sums": (
        ShapeError, lambda: F.backward_input(
            X3, X3, ZERO, ONE, sums=F.BackwardSums(OTHER, ZERO), count=100)),
    "backward_input, a pair of sums": (
        DTypeError, lambda: F.backward_input(X3, X3, ZERO, ONE, sums=(ZERO, ZERO), count=100)),
    "backward_input, dweight": (
        ShapeError, lambda: F.backward_input(
            X3, X3, ZERO, ONE, local=SUMS, dweight=np.zeros(2, np.float32))),
    "backward_input, a read-only gradient": (
        ValueError, lambda: F.backward_input(
            X3, X3, ZERO, ONE, local=SUMS, dbias=np.broadcast_to(np.float32(0), 3))),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_FITTING)
def test_a_primitive_refuses_what_does_not_fit(case):
    """A compiled loop, or a kernel, would read and write beyond the end of such an array."""
    error, call = NOT_FITTING[case]
    with pytest.raises(error):
        call()
    assert not ZERO.any()
    assert (ONE == 1).all()
    assert (OTHER == 7).all()


@pytest.mark.parametrize("kind", ["contiguous", "channels-last"])
def test_a_collective_of_ones_own(kind):
    """The primitives with a framework's own sum, as the docstring of the module invites."""
    whole, dy_whole = normal((7, 3, 2, 2)), normal((7, 3, 2, 2), seed=5)
    expected, gradient = (
        reference.forward(whole, WEIGHT, BIAS),
        reference.backward(dy_whole, whole, WEIGHT),
    )
    cuts = np.cumsum([3, 0, 4])[:-1]
    parts = [p.reshape(len(p), 3, 4) for p in np.split(layouts(whole)["contiguous"], cuts)]
    dys = [p.reshape(len(p), 3, 4) for p in np.split(dy_whole, cuts)]
    if kind == "channels-last":
        parts, dys = (
            [p.transpose(0, 2, 1).reshape(-1, 3, 1).copy() for p in ps] for ps in (parts, dys)
        )
    local = [F.batch_moments(p) for p in parts]
    packed = sum(m.pack() for m in local)
    pooled = F.Moments.unpack(sum(m.count for m in local), packed)
    mean, _, invstd = F.finalize_moments(pooled, 1e-5)
    sums = [F.backward_reduce(d, p, mean, invstd) for d, p in zip(dys, parts, strict=True)]
    total = F.BackwardSums(*(sum(v) for v in zip(*sums, strict=True)))
    ys = [F.normalize(p, mean, invstd, WEIGHT, BIAS) for p in parts]
    dxs = [
        F.backward_input(d, p, mean, invstd, WEIGHT, sums=total, count=pooled.count)
        for d, p in zip(dys, parts, strict=True)
    ]
    if kind == "channels-last":
        ys, dxs = ([v.reshape(-1, 4, 3).transpose(0, 2, 1) for v in vs] for vs in (ys, dxs))
    assert reference.error(np.concatenate(ys), expected.y.reshape(7, 3, 4)) < 1e-5
    assert reference.error(np.concatenate(dxs), gradient.dx.reshape(7, 3, 4)) < 1e-5


def test_over_ranks_with_residual_and_relu():
    x, r, dy = (normal((8, 3, 2, 2), np.float64, seed) for seed in range(3))
    weight, bias = for_dtype(np.dtype(np.float64))
    cuts = [(0, 1), (1, 1), (1, 6), (6, 8)]

    def rank(comm):
        mine = slice(*cuts[comm.rank])
        options = {"comm": comm, "activation": "relu", "residual": r[mine], "name": "f"}
        y, saved = F.batch_norm_forward(x[mine], weight, bias, **options)
        return y, *F.batch_norm_backward(dy[mine], saved)

    results = run_ranks(4, rank)
    expected = reference.forward(x, weight, bias, residual=r, relu=True)
    gradient = reference.backward(dy, x, weight, kept=expected.y > 0)
    for i, value in enumerate((expected.y, gradient.dx)):
        actual = np.concatenate([result[i] for result in results])
        assert reference.error(actual, value) < 1e-12
    assert reference.error(sum(result[2] for result in results), gradient.dweight) < 1e-12
    assert reference.error(np.concatenate([result[4] for result in results]), gradient.dz) == 0
