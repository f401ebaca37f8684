"""Masks of valid values: everything is that of the valid values alone, packed into one array."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from conftest import DTYPES, NUMBA, TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_checks import Spy
from test_functional import BIAS, WEIGHT, for_dtype
from test_layers import layer_for, layouts, normal, snapshot

import cupybn
from cupybn import DTypeError, PeerError, ShapeError, backends
from cupybn import functional as F
from cupybn.testing import run_ranks

SHAPES = [(4, 3, 5, 7), (3, 3, 10, 12), (9, 3), (5, 3, 101), (2, 3, 2, 2, 3), (300, 3, 2)]
OPTIONS = {
    "plain": (False, False),
    "relu": (True, False),
    "residual": (False, True),
    "relu and residual": (True, True),
}


@pytest.fixture(params=["numpy", "numba"])
def backend(request):
    if request.param == "numba" and not NUMBA:
        pytest.skip("Numba is not installed")
    return backends.use_cpu_backend(request.param)


def positions(shape, axis=1):
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]


def half(shape, seed=0, axis=1):
    """About half of the positions, at random."""
    return np.random.default_rng(seed).random(positions(shape, axis)) < 0.5


def spoiled(values, mask, axis=1):
    """The values, with NaN, Inf and huge numbers where they are masked."""
    values = values.copy(order="K")
    bad = np.array([np.nan, np.inf, -np.inf, 6e4], np.float32).astype(values.dtype)
    there = np.moveaxis(values, axis, -1)
    masked = mask == 0
    there[masked] = bad[np.arange(masked.sum() * there.shape[-1]) % 4].reshape(-1, there.shape[-1])
    return values


def textbook(x, dy, mask, weight, bias, residual=None, relu=False, axis=1, eps=1e-5, fixed=None):
    """y, mean, var, unbiased variance, dx, dweight, dbias and dresidual of the packed values."""
    values = (None if v is None else reference.packed(v, mask, axis) for v in (x, dy, residual))
    x, dy, residual = values
    options = {"eps": eps, "residual": residual, "relu": relu}
    if fixed is None:
        y, *statistics = reference.forward(x, weight, bias, **options)
    else:
        y, statistics = reference.normalized(x, *fixed, weight, bias, **options), [*fixed, None]
    kept = y > 0 if relu else None
    g = reference.backward(dy, x, weight, bias, eps=eps, kept=kept, fixed=fixed)
    y, dx, dresidual = (reference.unpacked(v, mask, axis) for v in (y, g.dx, g.dz))
    return y, *statistics, dx, g.dweight, g.dbias, dresidual


def zero_where_masked(array, mask, axis=1):
    """Whether it is positive zero in all masked places."""
    masked = np.moveaxis(array, axis, -1)[mask == 0].astype(np.float64)
    return not masked.any() and not np.signbit(masked).any()


def cases(shapes):
    """(backend, shape, dtype): all of them; Numba compiles other dtypes in CI alone."""
    compiles = [pytest.mark.compiles]
    return [
        pytest.param(b, s, d, marks=compiles if b == "numba" and d != np.float32 else [])
        for b in ("numpy", "numba")
        for d in DTYPES
        for s in shapes
    ]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend, shape, dtype", cases(SHAPES), ids=str, indirect=["backend"])
def test_the_result_is_that_of_the_packed_values(backend, shape, dtype, option):
    relu, has_residual = OPTIONS[option]
    tolerance, mask = TOLERANCE[dtype.name], half(shape)
    weight, bias = for_dtype(dtype)
    x, dy, residual = (spoiled(normal(shape, dtype, seed), mask) for seed in (1, 2, 3))
    residual = residual if has_residual else None
    options = {"activation": "relu" if relu else None, "residual": residual}
    y, saved = F.batch_norm_forward(x, weight, bias, mask=mask, **options)
    grads = F.batch_norm_backward(dy, saved)
    expected, mean, var, _, dx, dweight, dbias, dresidual = textbook(
        x, dy, mask, weight, bias, residual, relu
    )
    assert saved.count == mask.sum()
    assert reference.error(saved.mean, mean) < 1e-6
    assert reference.error(saved.var, var) < 1e-6
    assert reference.error(y, expected) < tolerance
    assert reference.error(grads.dx, dx) < tolerance
    assert reference.error(grads.dweight, dweight) < 10 * tolerance
    assert reference.error(grads.dbias, dbias) < 10 * tolerance
    assert zero_where_masked(y, mask)
    assert zero_where_masked(grads.dx, mask)
    assert (grads.dresidual is None) == (not has_residual)
    if has_residual:
        assert reference.error(grads.dresidual, dresidual) < tolerance
        assert zero_where_masked(grads.dresidual, mask)
        assert not np.shares_memory(grads.dresidual, dy)


@pytest.mark.parametrize("kind", list(layouts(np.zeros((1, 1, 1, 1)))))
@pytest.mark.parametrize("relu", [False, True])
def test_every_layout_of_x_and_mask_in_training_and_evaluation(backend, kind, relu):
    """Layers: running statistics, eval, out=, and masks of every form."""
    shape = (4, 3, 5, 6)
    plain = half(shape)
    x, r, dy = (spoiled(normal(shape, seed=seed), plain) for seed in (1, 2, 3))
    wide = np.zeros((4, 10, 6), np.uint8)
    wide[:, ::2] = plain
    read_only = plain.copy()
    read_only.flags.writeable = False
    masks = [plain, plain * np.uint8(255), wide[:, ::2], np.asfortranarray(plain), read_only]
    for mask in masks:
        layer = layer_for("f", activation="relu" if relu else None)
        y = layer.forward(layouts(x)[kind], r, mask=mask)
        out = layouts(dy)["contiguous"]
        dx, dresidual = layer.backward(out, out=out)
        assert dx is out
        expected = textbook(x, dy, plain, layer.weight, layer.bias, r, relu)
        assert reference.error(y, expected[0]) < 1e-5
        assert reference.error(layer.running_mean, 0.1 * expected[1]) < 1e-6
        assert reference.error(layer.running_var, 0.9 + 0.1 * expected[3]) < 1e-6
        assert reference.error(dx, expected[4]) < 1e-5
        assert reference.error(dresidual, expected[7]) < 1e-5
        fixed = layer.running_mean, layer.running_var
        layer.eval()
        y = layer.forward(layouts(x)[kind], r, mask=mask, save_for_backward=True)
        dx, dresidual = layer.backward(dy)
        expected = textbook(x, dy, plain, layer.weight, layer.bias, r, relu, fixed=fixed)
        assert reference.error(y, expected[0]) < 1e-5
        assert reference.error(dx, expected[4]) < 1e-5
        assert reference.error(dresidual, expected[7]) < 1e-5
        assert zero_where_masked(y, plain)
        assert zero_where_masked(dx, plain)


@pytest.mark.parametrize(
    ("backend", "shape", "dtype"),
    cases([(4, 3, 5, 6), (3, 3, 10, 12)]),
    ids=str,
    indirect=["backend"],
)
def test_every_layout_in_every_dtype(backend, dtype, shape):
    """Columns and rows of x, residual and dy, each with a layout of its own."""
    mask, tolerance, kinds = half(shape), TOLERANCE[dtype.name], list(layouts(np.zeros(shape)))
    x, r, dy = (spoiled(normal(shape, dtype, seed), mask) for seed in (1, 2, 3))
    layer = layer_for(dtype, activation="relu")
    expected = textbook(x, dy, mask, layer.weight, layer.bias, r, True)
    for i, kind in enumerate(kinds):
        other = kinds[(i + 1) % len(kinds)]
        y = layer.forward(layouts(x)[kind], layouts(r)[other], mask=mask)
        dx, dresidual = layer.backward(layouts(dy)[other])
        for found, wanted in ((y, expected[0]), (dx, expected[4]), (dresidual, expected[7])):
            assert reference.error(found, wanted) < tolerance
            assert zero_where_masked(found, mask)


def test_evaluation_in_place_and_channels_last_shapes():
    shape = (4, 5, 6, 3)
    mask = half(shape, axis=-1)
    x = spoiled(normal(shape), mask, axis=-1)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    expected = reference.normalized(np.where(mask[..., None], x, 0), mean, var, WEIGHT, axis=-1)
    y = F.batch_norm_inference(x, mean, var, WEIGHT, mask=mask, channel_axis=-1, out=x)
    assert y is x
    assert reference.error(y, np.where(mask[..., None], expected, 0)) < 1e-5
    layer = layer_for("f", cupybn.BatchNorm1d, track_running_stats=False).eval()
    x, mask = normal((9, 3)), half((9, 3))
    y = layer.forward(spoiled(x, mask), mask=mask)
    expected = textbook(x, x, mask, layer.weight, layer.bias)
    assert reference.error(y, expected[0]) < 1e-5


def test_without_the_mask_the_results_differ():
    """The negative control: what the tests above compare is not true without it."""
    shape = (4, 3, 5, 7)
    mask, weight, bias = half(shape), *for_dtype(np.dtype("f"))
    x, dy = normal(shape, seed=1), normal(shape, seed=2)
    x = np.where(mask[:, None], x, np.float32(0))  # as padding is
    y, saved = F.batch_norm_forward(x, weight, bias)
    dx = F.batch_norm_backward(dy, saved).dx
    expected = textbook(x, dy, mask, weight, bias)
    valid = np.broadcast_to(mask[:, None], shape)
    assert saved.count == mask.size
    assert np.abs(y - expected[0])[valid].max() > 0.1
    assert np.abs(dx - expected[4])[valid].max() > 0.01
    masked, of_mask = F.batch_norm_forward(x, weight, bias, mask=mask)
    assert reference.error(masked, expected[0]) < 1e-5
    assert np.abs(of_mask.var / saved.var - 1).min() > 0.1


def test_a_mask_of_ones_changes_next_to_nothing(backend):
    for shape in SHAPES:
        x, dy = normal(shape, seed=1), normal(shape, seed=2)
        results = []
        for mask in (None, np.ones(positions(shape), bool)):
            y, saved = F.batch_norm_forward(x, WEIGHT, BIAS, mask=mask)
            results.append((y, saved.mean, *F.batch_norm_backward(dy, saved)[:3]))
            assert saved.count == x.size // 3
        for mine, theirs in zip(*results, strict=True):
            assert reference.error(mine, theirs) < 1e-5


PATTERNS = st.sampled_from(["none", "all", "one value", "whole samples", "a few", "half", "most"])


def pattern(kind, n, length, rng):
    mask = np.zeros((n, length), bool)
    if kind == "one value":
        mask[rng.integers(n), rng.integers(length)] = True
    elif kind == "whole samples":
        mask[rng.random(n) < 0.5] = True
    elif kind != "none":
        share = {"all": 1, "a few": 0.05, "half": 0.5, "most": 0.95}[kind]
        mask = rng.random((n, length)) < share
    return mask


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 40), st.sampled_from([1, 2, 5, 49, 100]), PATTERNS,
    st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_mask(n, c, length, kind, relu, has_residual, compiled, seed):
    if compiled and not NUMBA:
        return
    rng = np.random.default_rng(seed)
    mask = pattern(kind, n, length, rng)
    x, dy, residual = (spoiled(normal((n, c, length), seed=seed + i), mask) for i in range(3))
    options = {"residual": residual if has_residual else None}
    options["activation"] = "relu" if relu else None
    backends.use_cpu_backend("numba" if compiled else "numpy")
    if mask.sum() == 1:
        with pytest.raises(ShapeError, match="more than 1 value per channel.*1 valid value"):
            F.batch_norm_forward(x, mask=mask, **options)
        return
    y, saved = F.batch_norm_forward(x, mask=mask, **options)
    grads = F.batch_norm_backward(dy, saved)
    assert saved.count == mask.sum()
    for array in (y, grads.dx, *([grads.dresidual] if has_residual else [])):
        assert zero_where_masked(array, mask)
    if not mask.any():
        assert (saved.mean == 0).all()
        return
    expected = textbook(x, dy, mask, None, None, options["residual"], relu)
    valid = mask.sum()
    steep = 1 / np.sqrt(expected[2].min() + 1e-5)  # how a rounding error of x grows in y
    assert reference.error(saved.mean, expected[1]) < 1e-5
    if not relu:  # else a value near 0 may fall on the other side
        assert reference.error(y, expected[0]) < 1e-5 * max(1, steep)
        assert reference.error(grads.dx, expected[4]) < 1e-4 * max(1, steep) ** 2
    assert valid > 1


def test_many_blocks_and_segments(backend):
    """More values than one block or segment holds, some of them all masked, and a large mean."""
    for shape in ((3, 2, 70_000), (140_001, 2), (40, 3, 4000), (2, 1100, 5)):
        mask = half(shape)
        mask[: len(mask) // 3] = 0
        x, dy = normal(shape, seed=1, mean=100), normal(shape, seed=2)
        y, saved = F.batch_norm_forward(spoiled(x, mask), mask=mask)
        grads = F.batch_norm_backward(spoiled(dy, mask), saved)
        expected = textbook(x, dy, mask, None, None)
        assert reference.error(saved.mean / 100, expected[1] / 100) < 1e-6
        assert reference.error(saved.var, expected[2]) < 1e-6
        assert reference.error(y, expected[0]) < 1e-4
        assert reference.error(grads.dx, expected[4]) < 1e-4


@pytest.mark.skipif(not NUMBA, reason="Numba is not installed")
def test_threads_change_no_bit():
    from cupybn.backends.cpu import pool

    backends.use_cpu_backend("numba")
    try:
        for shape in ((16, 8, 64, 64), (4096, 96), (64, 300, 7, 7)):
            mask = half(shape)
            x, dy = (spoiled(normal(shape, seed=seed), mask) for seed in (1, 2))
            found = []
            for threads in (1, 2, 5):
                pool.set_threads(threads)
                y, saved = F.batch_norm_forward(x, mask=mask)
                dx = F.batch_norm_backward(dy, saved).dx
                found.append((y.tobytes(), saved.mean.tobytes(), dx.tobytes()))
            assert found[0] == found[1] == found[2]
    finally:
        pool.set_threads(None)


def test_a_context_from_arrays_has_the_same_bits():
    for options in ({}, {"activation": "relu"}, {"activation": "relu", "residual": True}):
        shape = (4, 3, 5, 5)
        mask = half(shape)
        x, dy, r = (spoiled(normal(shape, seed=seed), mask) for seed in (1, 2, 3))
        options |= {"residual": r} if options.get("residual") else {}
        _, saved = F.batch_norm_forward(x, WEIGHT, BIAS, 1e-3, mask=mask, **options)
        arrays = saved.arrays()
        assert arrays["mask"].shape == mask.shape
        assert np.shares_memory(arrays["mask"], mask)
        other = F.Saved.from_arrays(eps=1e-3, activation=options.get("activation"), **arrays)
        for mine, theirs in zip(
            F.batch_norm_backward(dy, saved), F.batch_norm_backward(dy, other), strict=True
        ):
            assert (mine is None) == (theirs is None)
            assert mine is None or mine.tobytes() == theirs.tobytes()
        _, saved = F.batch_norm_forward(x, WEIGHT, mask=mask, save=False)
        assert saved.mask is None


def test_double_backward_is_that_of_the_packed_values():
    shape = (4, 3, 5)
    mask = half(shape)
    arrays = [normal(shape, np.float64, seed) for seed in range(4)]
    weight, a, b = (normal(3, np.float64, seed) for seed in (5, 6, 7))
    for options in (
        {},
        {"activation": "relu"},
        {"residual": 1},
        {"activation": "relu", "residual": 1},
    ):
        x, dy, ddx, r = arrays
        given = [spoiled(v, mask) for v in arrays]
        packed = [reference.packed(v, mask) for v in arrays]
        results = []
        for (x, dy, ddx, r), m in ((given, mask), (packed, None)):
            own = dict(options)
            if "residual" in own:
                own["residual"] = r
            _, saved = F.batch_norm_forward(x, weight, weight, mask=m, **own)
            own = {"ddresidual": r} if "residual" in own else {}
            results.append(F.batch_norm_double_backward(ddx, a, b, saved, dy, **own))
        mine, theirs = results
        for name in ("ddy", "dx"):
            found = getattr(mine, name)
            assert reference.error(reference.packed(found, mask), getattr(theirs, name)) < 1e-12
            assert zero_where_masked(found, mask)
        assert reference.error(mine.dweight, theirs.dweight) < 1e-12


def test_check_finite_looks_at_valid_values():
    layer = layer_for("f", check_finite=True)
    x, mask = normal((4, 3, 5, 5)), half((4, 3, 5, 5))
    layer.forward(spoiled(x, mask), mask=mask)
    before = snapshot(layer)
    x[np.broadcast_to(mask[:, None], x.shape)] = np.nan
    with pytest.raises(FloatingPointError):
        layer.forward(x, mask=mask)
    assert snapshot(layer) == before


def test_all_masked_leaves_the_state_alone(backend):
    layer = layer_for("f")
    x = np.full((4, 3, 5, 5), np.nan, np.float32)
    before = snapshot(layer)
    y = layer.forward(x, mask=np.zeros((4, 5, 5), bool))
    dx = layer.backward(x)
    assert snapshot(layer) == before
    assert not y.any()
    assert not dx.any()


SHARES = {
    "different": [0.5, 0.2, 0.8, 1.0],
    "one rank without": [0.5, None, 0.3, None],
    "a whole rank": [0.5, 0, 0.4, 0.1],
    "all but one rank": [0, 0.5, 0, 0],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("shares", SHARES)
def test_ranks_equal_the_packed_values_of_all(shares, ranks, dtype):
    """Different masks, none, and a rank without samples: y, dx, sums and running statistics."""
    sizes = [3, 5, 0 if ranks == 4 else 4, 2][:ranks]
    shape = (sum(sizes), 3, 4, 5)
    shares = [s if n else None for s, n in zip(SHARES[shares], sizes, strict=False)]
    if ranks == 1 and not shares[0]:
        shares = [0.5]
    draw = np.random.default_rng(1).random((shape[0], 4, 5))
    limits = np.repeat([1 if s is None else s for s in shares], sizes)
    mask = draw < limits[:, None, None]
    x, dy = normal(shape, dtype, 1), normal(shape, dtype, 2)
    weight = np.linspace(0.5, 1.5, 3).astype(dtype)
    expected = textbook(x, dy, mask, weight, None)
    tolerance = TOLERANCE[dtype]

    def rank(comm):
        part = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))
        own = None if shares[comm.rank] is None else mask[part]
        valid = mask[part]
        layer = cupybn.SyncBatchNorm(3, comm=comm, bias=False, dtype=dtype)
        layer.weight = weight
        mine, gradient = spoiled(x[part], valid), spoiled(dy[part], valid)
        y = layer.forward(mine, mask=own)
        assert layer.saved.count == mask.sum()
        dx = layer.backward(gradient)
        assert reference.error(y, expected[0][part]) < tolerance
        assert reference.error(dx, expected[4][part]) < tolerance
        assert reference.error(layer.running_mean, 0.1 * expected[1]) < 1e-6
        assert reference.error(layer.running_var, 0.9 + 0.1 * expected[3]) < 1e-6
        return layer.grads["weight"], [b.tobytes() for b in layer.buffers.values()]

    found = run_ranks(ranks, rank)
    assert reference.error(sum(g for g, _ in found), expected[5]) < 10 * tolerance
    assert all(state == found[0][1] for _, state in found)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.none() | PATTERNS), min_size=1, max_size=4),
       st.booleans(), st.integers(0, 2**32 - 1))  # fmt: skip
def test_any_masks_of_the_ranks(given, relu, seed):
    """Ranks with samples or none, each with a mask or without: the packed values of all."""
    rng, draw = np.random.default_rng(seed), np.random.default_rng(seed)
    masks = [np.ones((n, 5), bool) if kind is None else pattern(kind, n, 5, rng)
             if n else np.ones((0, 5), bool) for n, kind in given]  # fmt: skip
    valid, ends = np.concatenate(masks), np.cumsum([n for n, _ in given])
    x, dy = (draw.standard_normal((len(valid), 3, 5)) for _ in range(2))
    options = {"activation": "relu" if relu else None}

    def rank(comm):
        part = slice(ends[comm.rank] - given[comm.rank][0], ends[comm.rank])
        own = None if given[comm.rank][1] is None else masks[comm.rank]
        mine, gradient = spoiled(x[part], valid[part]), spoiled(dy[part], valid[part])
        try:
            y, saved = F.batch_norm_forward(mine, comm=comm, mask=own, **options)
        except ShapeError as error:
            return str(error)
        grads = F.batch_norm_backward(gradient, saved)
        mean, var = F.updated_running(np.zeros(3), np.ones(3), saved, 0.5)
        return y, grads.dx, grads.dweight, saved.count, mean, var

    found = run_ranks(len(given), rank)
    if valid.sum() == 1:
        assert all("1 valid value" in text or "1 value" in text for text in found)
        return
    y, dx = (np.concatenate([of_rank[i] for of_rank in found]) for i in range(2))
    assert zero_where_masked(y, valid)
    assert zero_where_masked(dx, valid)
    assert {of_rank[3] for of_rank in found} == {valid.sum()}
    if not valid.any():
        assert all(not mean.any() and (var == 1).all() for *_, mean, var in found)
        return
    expected = textbook(x, dy, valid, None, None, None, relu)
    steep = 1 / np.sqrt(expected[2].min() + 1e-5)
    assert reference.error(y, expected[0]) < 1e-10 * max(1, steep)
    assert reference.error(dx, expected[4]) < 1e-10 * max(1, steep) ** 2
    for *_, mean, var in found:
        assert reference.error(mean, 0.5 * expected[1]) < 1e-12
        assert reference.error(var, 0.5 + 0.5 * expected[3]) < 1e-12


def test_all_masked_everywhere_and_one_value_everywhere():
    def rank(comm):
        layer = cupybn.SyncBatchNorm(3, comm=comm)
        before = snapshot(layer)
        mask = np.zeros((2, 4), bool)
        x = np.full((2, 3, 4), np.nan, np.float32)
        y = layer.forward(x, mask=mask)
        assert not y.any()
        assert not layer.backward(x).any()
        assert snapshot(layer) == before
        mask[0, 0] = comm.rank == 1
        with pytest.raises(ShapeError, match="with a mask on this rank, 1 value on all 3 ranks"):
            layer.forward(x, mask=mask)
        assert snapshot(layer) == before

    run_ranks(3, rank)


BAD = {
    "a list": (DTypeError, [[True] * 4] * 2),
    "float": (DTypeError, np.ones((2, 4), np.float32)),
    "int64": (DTypeError, np.ones((2, 4), np.int64)),
    "with channels": (ShapeError, np.ones((2, 3, 4), bool)),
    "of one sample": (ShapeError, np.ones(4, bool)),
    "too long": (ShapeError, np.ones((2, 5), bool)),
    "a masked array": (DTypeError, np.ma.masked_array(np.ones((2, 4), bool))),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("bound", [False, True])
def test_a_bad_mask_on_one_rank_raises_on_all(case, bound):
    error, bad = BAD[case]
    x, good = normal((2, 3, 4)), np.ones((2, 4), bool)

    def rank(comm):
        spy = Spy(comm)
        layer = cupybn.SyncBatchNorm(3, comm=spy, name="bn")
        for _ in range(3 if bound else 0):
            layer.forward(x, mask=good)
        before, sent = snapshot(layer), len(spy.sent)
        if comm.rank == 1:
            with pytest.raises(error, match="mask"):
                layer.forward(x, mask=bad)
            assert [label for label, _ in spy.sent[sent:]] == [
                f"forward of 'bn', after {error.__name__}"
            ]
        else:
            with pytest.raises(PeerError, match="rank 1 failed"):
                layer.forward(x, mask=good)
        assert snapshot(layer) == before
        layer.forward(x, mask=good)  # the next call works
        layer.backward(x)

    run_ranks(2, rank)
    if not bound:
        with pytest.raises(error, match="mask"):
            F.batch_norm_inference(x, WEIGHT, WEIGHT, mask=bad)


def test_masks_add_no_message_and_no_setting():
    x, mask = normal((2, 3, 4)), half((2, 3, 4))

    def rank(comm):
        sent = []
        for own in (None, mask):
            spy = Spy(comm)
            layer = cupybn.SyncBatchNorm(3, comm=spy)
            layer.forward(x, mask=own)
            layer.backward(x)
            sent.append(spy.sent)
        assert sent[0] == sent[1]

    run_ranks(2, rank)


def test_sequential_hands_the_mask_to_what_takes_one():
    class Double(cupybn.Layer):
        def compute_forward(self, x):
            return 2 * x, None

        def compute_backward(self, dy, context):
            return 2 * dy

    class Pool(Double):
        def compute_forward(self, x):
            return x[..., ::2].copy(), None

    x, mask = normal((6, 3, 8)), half((6, 3, 8))
    inner = cupybn.Sequential(cupybn.BatchNorm1d(3))
    net = cupybn.Sequential({"a": cupybn.BatchNorm1d(3), "double": Double(), "inner": inner})
    y = net.forward(spoiled(x, mask), mask=mask)
    dx = net.backward(x)
    alone = [cupybn.BatchNorm1d(3), cupybn.BatchNorm1d(3)]
    expected = alone[1](2 * alone[0](x, mask=mask), mask=mask)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(dx, alone[0].backward(2 * alone[1].backward(x)))
    net = cupybn.Sequential(cupybn.BatchNorm1d(3), Pool(), cupybn.BatchNorm1d(3))
    before = snapshot(net[1])
    with pytest.raises(ShapeError, match=r"mask has shape \(6, 8\), expected \(6, 4\)"):
        net.forward(x, mask=mask)
    assert snapshot(net[1]) == before


def test_primitives_take_a_mask(backend):
    shape = (4, 3, 30)
    mask = half(shape)
    x, dy = spoiled(normal(shape, seed=1), mask), spoiled(normal(shape, seed=2), mask)
    expected = textbook(x, dy, mask, WEIGHT, BIAS)
    for each in (mask, mask.astype(np.uint8) * 7, np.asfortranarray(mask)):
        moments = F.batch_moments(x, mask=each)
        assert moments.count == mask.sum()
        mean, _, invstd = F.finalize_moments(moments, 1e-5)
        given = mean, invstd, WEIGHT, BIAS
        assert reference.error(F.normalize(x, *given, mask=each), expected[0]) < 1e-5
        sums = F.backward_reduce(dy, x, *given, mask=each)
        dx = F.backward_input(dy, x, *given, sums=sums, count=moments.count, mask=each)
        assert reference.error(dx, expected[4]) < 1e-5
    for bad, error in ((mask.T, ShapeError), (mask.astype("i4"), DTypeError), (3, DTypeError)):
        for call in (
            lambda bad=bad: F.batch_moments(x, mask=bad),
            lambda bad=bad: F.normalize(x, *given, mask=bad),
            lambda bad=bad: F.backward_reduce(dy, x, *given, mask=bad),
            lambda bad=bad: F.backward_input(dy, x, *given, mask=bad),
        ):
            with pytest.raises(error, match="mask"):
                call()
