"""Layers in one process: options, layouts, modes, bad input, and what they leave untouched."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import reference
from conftest import BFLOAT16, DTYPES, TOLERANCE

import cupybn
from cupybn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer, Sequential, SyncBatchNorm, backends
from cupybn.backends import numpy as numpy_backend
from cupybn.testing import check_gradients

ALONE = cupybn.SelfCommunicator()


def normal(shape, dtype=np.float32, seed=0, mean=0.5, std=2.0):
    values = np.random.default_rng(seed).standard_normal(shape) * std + mean
    return values.astype(np.float64 if np.dtype(dtype) == np.float64 else np.float32).astype(dtype)


def layer_for(dtype, cls=BatchNorm2d, c=3, **options):
    layer = cls(c, dtype="float64" if np.dtype(dtype) == np.float64 else None, **options)
    if layer.weight is not None:
        layer.weight[...] = np.linspace(0.5, 1.5, c)
    if layer.bias is not None:
        layer.bias[...] = np.linspace(-1, 1, c)
    return layer


def snapshot(layer):
    arrays = [*layer.named_parameters(), *layer.named_gradients(), *layer.named_buffers()]
    return [(name, array.tobytes()) for name, array in arrays]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "cls, shape",
    [
        (BatchNorm1d, (8, 3)), (BatchNorm1d, (8, 3, 5)), (BatchNorm2d, (4, 3, 5, 7)),
        (BatchNorm3d, (2, 3, 3, 4, 5)), (SyncBatchNorm, (8, 3)),
        (SyncBatchNorm, (2, 3, 2, 2, 2, 2)),
    ],
)  # fmt: skip
def test_forward_backward_and_statistics(cls, shape, dtype):
    options = {"comm": ALONE} if cls is SyncBatchNorm else {}
    layer = layer_for(dtype, cls, **options)
    x, dy = normal(shape, dtype, 1), normal(shape, dtype, 2)
    y = layer.forward(x)
    dx = layer.backward(dy)
    expected = reference.forward(x, layer.weight, layer.bias)
    gradient = reference.backward(dy, x, layer.weight, layer.bias)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    assert (y.dtype, y.shape, dx.dtype, dx.shape) == (dtype, shape, dtype, shape)
    assert reference.error(y, expected.y) < tolerance
    assert reference.error(dx, gradient.dx) < tolerance
    assert reference.error(layer.grads["weight"], gradient.dweight) < 1e-5
    assert reference.error(layer.grads["bias"], gradient.dbias) < 1e-5
    assert reference.error(layer.running_mean, 0.1 * expected.mean) < 1e-6
    assert reference.error(layer.running_var, 0.9 + 0.1 * expected.unbiased) < 1e-6
    assert layer.num_batches_tracked == 1


def test_momentum_none_averages_all_batches():
    layer = BatchNorm1d(3, momentum=None, dtype="float64")
    batches = [normal((10, 3), np.float64, seed) for seed in range(5)]
    for x in batches:
        layer(x)
    means = np.mean([x.mean(axis=0) for x in batches], axis=0)
    variances = np.mean([x.var(axis=0, ddof=1) for x in batches], axis=0)
    np.testing.assert_allclose(layer.running_mean, means, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, variances, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_momentum_weighs_the_new_batch(momentum):
    layer = BatchNorm1d(3, momentum=momentum, dtype="float64")
    x = normal((10, 3), np.float64)
    layer(x)
    np.testing.assert_allclose(layer.running_mean, momentum * x.mean(axis=0), rtol=1e-12)
    new = (1 - momentum) + momentum * x.var(axis=0, ddof=1)
    np.testing.assert_allclose(layer.running_var, new, rtol=1e-12)


def test_absent_arrays_read_as_none():
    layer = BatchNorm2d(3, affine=False, track_running_stats=False)
    assert layer.weight is None
    assert layer.running_mean is None
    assert layer.state_dict() == {}
    assert list(BatchNorm2d(3, bias=False).params) == ["weight"]
    x = normal((4, 3, 2, 2))
    y = layer(x)
    assert reference.error(y, reference.forward(x).y) < 1e-5
    assert reference.error(layer.backward(x), reference.backward(x, x).dx) < 1e-5
    with pytest.raises(ValueError, match="has no weight"):
        layer.weight = np.ones(3, np.float32)


def test_without_tracking_evaluation_uses_its_own_batch():
    layer = BatchNorm2d(3, track_running_stats=False).eval()
    x = normal((4, 3, 2, 2))
    y = layer.forward(x, save_for_backward=True)
    assert reference.error(y, reference.forward(x).y) < 1e-5
    assert reference.error(layer.backward(x**2), reference.backward(x**2, x).dx) < 1e-5


@pytest.mark.parametrize("momentum", [0.1, None])
def test_tracking_that_is_switched_later(momentum):
    """As in PyTorch: the option decides about updates, the arrays that are there about the rest."""
    layer, twin = (BatchNorm2d(3, momentum=momentum) for _ in range(2))
    layer(X), twin(X)
    layer.track_running_stats = False
    before = snapshot(layer)
    layer(X)
    assert snapshot(layer) == before
    np.testing.assert_array_equal(layer.eval()(X), twin.eval()(X))
    layer = BatchNorm2d(3, momentum=momentum, track_running_stats=False)
    layer.track_running_stats = True
    np.testing.assert_array_equal(layer(X), twin.train()(X))
    np.testing.assert_array_equal(layer.eval()(X), twin.train()(X))
    cupybn.recalibrate(layer, [X], ALONE)  # nothing to recalibrate
    layer.load_state_dict(dict(layer.state_dict()))


@pytest.mark.parametrize("relu", [False, True])
def test_evaluation_uses_running_statistics_and_backward_takes_them_as_constants(relu):
    layer = layer_for(np.float32, activation="relu" if relu else None)
    for seed in range(3):
        layer(normal((4, 3, 5, 5), seed=seed))
    layer.eval()
    before = snapshot(layer)
    x, dy = normal((2, 3, 4, 4), seed=7), normal((2, 3, 4, 4), seed=8)
    y = layer.forward(x, save_for_backward=True)
    fixed = layer.running_mean, layer.running_var
    expected = reference.normalized(x, *fixed, layer.weight, layer.bias, relu=relu)
    assert reference.error(y, expected) < 1e-5
    assert snapshot(layer) == before
    kept = expected > 0 if relu else None
    gradient = reference.backward(dy, x, layer.weight, layer.bias, fixed=fixed, kept=kept)
    assert reference.error(layer.backward(dy), gradient.dx) < 1e-5
    assert reference.error(layer.grads["weight"], gradient.dweight) < 1e-5
    assert reference.error(layer.grads["bias"], gradient.dbias) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_residual_and_relu(dtype, relu):
    layer = layer_for(dtype, activation="relu" if relu else None)
    x, r, dy = (normal((4, 3, 5, 5), dtype, seed) for seed in range(3))
    y = layer.forward(x, r)
    dx, dresidual = layer.backward(dy)
    expected = reference.forward(x, layer.weight, layer.bias, residual=r, relu=relu)
    kept = np.asarray(y) > 0 if relu else None
    gradient = reference.backward(dy, x, layer.weight, layer.bias, kept=kept)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    assert reference.error(y, expected.y) < tolerance
    assert reference.error(dx, gradient.dx) < tolerance
    if relu:
        assert reference.error(dresidual, gradient.dz) == 0
        assert 0.2 < kept.mean() < 0.9
    else:
        assert dresidual is dy


def test_central_differences():
    x, residual = normal((3, 2, 2, 3), np.float64), normal((3, 2, 2, 3), np.float64, 5)
    for options in (
        {}, {"affine": False}, {"bias": False}, {"activation": "relu"},
        {"track_running_stats": False}, {"momentum": None}, {"channel_axis": 1, "eps": 0.1},
    ):  # fmt: skip
        for training in (True, False):
            layer = layer_for(np.float64, c=2, **options)
            layer(x + 1)
            layer.train(training)
            check_gradients(layer, x)
            check_gradients(layer, x, residual=residual)
    check_gradients(layer_for(np.float64, SyncBatchNorm, 3, comm=ALONE, channel_axis=-1), x)


def test_check_gradients_can_fail():
    class Wrong(BatchNorm2d):
        def compute_backward(self, dy, context, **options):
            return super().compute_backward(dy, context, **options) * 1.01

    with pytest.raises(AssertionError, match=r"gradients differ; the worst: dx\["):
        check_gradients(Wrong(2, dtype="float64"), normal((3, 2, 2, 2), np.float64))


# ---- layouts -------------------------------------------------------------------------------------


def layouts(values):
    """The same (N, C, H, W) values in every memory layout a caller may come with."""
    wide = np.zeros(tuple(2 * n for n in values.shape), values.dtype)
    wide[tuple(slice(0, 2 * n, 2) for n in values.shape)] = values
    readonly = values.copy()
    readonly.flags.writeable = False
    return {
        "contiguous": values.copy(),
        "channels-last": values.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2),
        "fortran": np.asfortranarray(values),
        "transposed": values.transpose(3, 2, 1, 0).copy().transpose(3, 2, 1, 0),
        "negative strides": values[::-1, :, ::-1].copy()[::-1, :, ::-1],
        "strided slice": wide[tuple(slice(0, 2 * n, 2) for n in values.shape)],
        "read-only": readonly,
    }


@pytest.mark.parametrize("x_kind", list(layouts(np.zeros((1, 1, 1, 1)))))
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 3, 5, 6), (2, 65, 3, 3), (3, 1, 4, 4), (2, 3, 1, 1)], ids=str
)
def test_every_layout_gives_the_contiguous_answer(x_kind, dtype, shape):
    x, dy = normal(shape, dtype, 1), normal(shape, dtype, 2)
    for dy_kind, other_dy in layouts(dy).items():
        layer, plain = (layer_for(dtype, c=shape[1]) for _ in range(2))
        y, expected = layer.forward(layouts(x)[x_kind]), plain.forward(x)
        dx, expected_dx = layer.backward(other_dy), plain.backward(dy)
        tolerance = TOLERANCE[dtype.name]
        assert reference.error(y, expected) < tolerance, dy_kind
        assert reference.error(dx, expected_dx) < tolerance, dy_kind
        if x_kind == "channels-last":
            assert y.transpose(0, 2, 3, 1).flags.c_contiguous
            assert dx.transpose(0, 2, 3, 1).flags.c_contiguous
        elif x_kind == "contiguous":
            assert y.flags.c_contiguous
            assert dx.flags.c_contiguous


def test_dy_of_stride_zero():
    layer, plain = layer_for(np.float32), layer_for(np.float32)
    x = normal((4, 3, 5, 6))
    layer(x), plain(x)
    dy = np.broadcast_to(np.float32(0.7), x.shape)
    np.testing.assert_array_equal(layer.backward(dy), plain.backward(np.full(x.shape, 0.7, "f")))


@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (4, 7, 3), (8, 3), (2, 3, 4, 5, 3)], ids=str)
def test_channels_last_shapes(shape):
    x, dy = normal(shape, seed=1), normal(shape, seed=2)
    layer = layer_for(np.float32, SyncBatchNorm, comm=ALONE, channel_axis=-1)
    for memory in (x, np.moveaxis(np.moveaxis(x, -1, 1).copy(), 1, -1)):
        layer.zero_grad()
        y, dx = layer.forward(memory), layer.backward(dy)
        expected = reference.forward(x, layer.weight, layer.bias, axis=-1)
        gradient = reference.backward(dy, x, layer.weight, layer.bias, axis=-1)
        assert reference.error(y, expected.y) < 1e-5
        assert reference.error(dx, gradient.dx) < 1e-5
        assert reference.error(layer.grads["weight"], gradient.dweight) < 1e-5
        assert y.strides == memory.strides


def test_out():
    layer, plain = layer_for(np.float32), layer_for(np.float32)
    x, dy, r = (normal((4, 3, 5, 6), seed=seed) for seed in range(3))
    for out in (np.empty_like(x), layouts(x)["fortran"], layouts(x)["channels-last"]):
        assert layer.forward(x, out=out) is out
        np.testing.assert_array_equal(out, plain.forward(x))
        mine = dy.copy()
        assert layer.backward(mine, out=mine) is mine
        np.testing.assert_array_equal(mine, plain.backward(dy))
    woven = np.zeros((*x.shape[:3], 12), np.float32)
    woven[..., ::2] = x
    layer.forward(woven[..., ::2], out=woven[..., 1::2])  # in one buffer, but no value in common
    np.testing.assert_array_equal(woven[..., 1::2], plain.forward(x))
    before = snapshot(layer)
    with pytest.raises(ValueError, match="out overlaps x, which backward needs"):
        layer.forward(x, out=x)
    frozen = np.empty_like(x)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        layer.forward(x, out=frozen)
    assert snapshot(layer) == before
    layer.forward(x, r)
    with pytest.raises(ValueError, match="returned as dresidual"):
        layer.backward(dy, out=dy)
    layer.backward(dy)
    layer.forward(x)
    buffer = np.empty(x.size + 1, np.float32)
    shifted, start = buffer[1:].reshape(x.shape), buffer[:-1].reshape(x.shape)
    start[...] = dy
    with pytest.raises(ValueError, match="pass dy itself or another array"):
        layer.backward(start, out=shifted)
    with pytest.raises(ValueError, match="the x of forward"):
        layer.backward(dy, out=x)
    with pytest.raises(cupybn.ShapeError, match="out has shape"):
        layer.backward(dy, out=np.empty((4, 3, 5, 5), np.float32))
    layer.eval()
    mine = x.copy()
    with pytest.raises(ValueError, match="out overlaps x, which backward needs"):
        layer.forward(mine, out=mine, save_for_backward=True)
    np.testing.assert_array_equal(mine, x)
    assert layer.forward(mine, out=mine) is mine
    np.testing.assert_array_equal(mine, layer.forward(x))


# ---- the contract of Layer -----------------------------------------------------------------------


def test_gradients_accumulate_and_contexts_are_reentrant():
    layer = layer_for(np.float64)
    xs = [normal((4, 3, 2, 2), np.float64, seed) for seed in range(3)]
    contexts = []
    for x in xs:
        layer.forward(x)
        contexts.append(layer.saved)
    for x, context in zip(reversed(xs), reversed(contexts), strict=True):
        dx = layer.backward(x**2, context)
        np.testing.assert_allclose(dx, reference.backward(x**2, x, layer.weight).dx, atol=1e-12)
    layer.forward(xs[0])
    mine = layer.saved
    layer.backward(xs[1] ** 2, contexts[1])  # somebody else's context: ours stays
    assert layer.saved is mine
    layer.backward(xs[0] ** 2)
    total = sum(reference.backward(x**2, x).dweight for x in [*xs, xs[0], xs[1]])
    np.testing.assert_allclose(layer.grads["weight"], total, rtol=1e-12)
    assert layer.saved is None
    layer.zero_grad()
    assert not layer.grads["weight"].any()


def test_backward_needs_a_saved_forward():
    layer = BatchNorm2d(3)
    x = normal((4, 3, 2, 2))
    with pytest.raises(RuntimeError, match="backward without a saved forward.*save_for_backward"):
        layer.backward(x)
    layer.eval()
    layer.forward(x)
    with pytest.raises(RuntimeError, match="save_for_backward=True"):
        layer.backward(x)
    layer.train()
    layer.forward(x, save_for_backward=False)
    assert layer.saved is None
    layer.forward(x)
    with pytest.raises(cupybn.ShapeError, match=r"dy has shape \(1, 3, 2, 2\), expected \(4, 3"):
        layer.backward(x[:1])
    assert layer.saved is not None  # a failed backward keeps its context
    layer.backward(x)
    with pytest.raises(TypeError, match="must be a context of this layer"):
        layer.backward(x, saved="something")


def test_a_non_saving_forward_leaves_the_saved_context_alone():
    layer = BatchNorm2d(3)
    layer.forward(normal((4, 3, 2, 2)))
    context = layer.saved
    layer.eval()(normal((2, 3, 1, 1)))
    assert layer.saved is context


def test_assignment_copies_into_registered_arrays():
    layer = BatchNorm2d(3)
    weight, count = layer.weight, layer.num_batches_tracked
    layer.weight -= 0.25 * np.ones(3, np.float32)
    layer.bias = np.arange(3, dtype=np.float32)
    layer.num_batches_tracked = 7
    assert layer.weight is weight is layer.params["weight"]
    assert (weight == 0.75).all()
    assert layer.num_batches_tracked is count
    assert count == 7
    with pytest.raises(cupybn.ShapeError, match=r"weight has shape \(3,\)"):
        layer.weight = np.ones(4, np.float32)
    with pytest.raises(cupybn.DTypeError, match="weight is float32"):
        layer.weight = np.ones(3)
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        _ = layer.wait


class Scale(Layer):
    """The smallest layer with a parameter and a buffer, as a user would write it."""

    def __init__(self, inner=None):
        super().__init__()
        self.register_parameter("factor", np.full((), 2.0))
        self.register_buffer("calls", np.zeros((), np.int64))
        self.register_buffer("unused", None)
        if inner is not None:
            self.inner = inner

    def compute_forward(self, x):
        self.calls += 1
        return x * self.factor, x

    def compute_backward(self, dy, context):
        self.grads["factor"] += (dy * context).sum()
        return dy * self.factor


def test_layers_of_ones_own():
    layer = Scale()
    check_gradients(layer, normal((2, 3), np.float64))
    assert layer.calls == 0  # check_gradients works on a copy
    assert layer.unused is None
    assert list(layer.state_dict()) == ["factor", "calls"]
    with pytest.raises(ValueError, match="already has an attribute 'factor'"):
        layer.register_parameter("factor", np.ones(1))
    with pytest.raises(ValueError, match="dot"):
        layer.register_buffer("a.b", np.ones(1))
    for bad in ([1.0], 3.0, "ones", np.ma.ones(2)):
        with pytest.raises(cupybn.DTypeError, match="number .*array"):
            layer.register_buffer("number", bad)
    with pytest.raises(cupybn.DTypeError, match="number is int64; a parameter is trained"):
        layer.register_parameter("number", np.ones(2, np.int64))
    assert list(layer.state_dict()) == ["factor", "calls"]
    with pytest.raises(NotImplementedError, match="must implement compute_forward"):
        Layer().forward(np.ones(3))


def test_a_layer_that_forgets_to_initialise_its_base():
    class Forgetful(Layer):
        def __init__(self):
            self.inner = BatchNorm2d(3)

    with pytest.raises(AttributeError, match=r"__init__ must call super\(\).__init__\(\) first"):
        Forgetful()


def test_a_layer_that_needs_no_context():
    class Negate(Layer):
        def compute_forward(self, x):
            return -x, None

        def compute_backward(self, dy, context):
            return -dy

    layer = Negate()
    check_gradients(layer, normal((2, 3), np.float64))
    layer(X)
    np.testing.assert_array_equal(layer.backward(X), -X)
    with pytest.raises(RuntimeError, match="backward without a saved forward"):
        layer.backward(X)


def test_trees_paths_and_shared_layers():
    shared = Scale()
    net = Sequential({"a": Scale(BatchNorm2d(3)), "b": shared, "c": shared})
    names = [name for name, _ in net.named_parameters()]
    assert names == ["a.factor", "a.inner.weight", "a.inner.bias", "b.factor"]
    assert [name for name, _ in net.named_layers()] == ["", "a", "a.inner", "b"]
    assert net.a.inner.path == "a.inner"
    outer = Scale()
    outer.net = net
    assert net.a.inner.path == "net.a.inner"
    assert "c.calls" in net.state_dict()
    with pytest.raises(ValueError, match="cannot hold itself"):
        net.a.inner.outer = outer
    outer.net = None
    assert outer.children == {}
    assert outer.net is None
    assert not any(layer.training for _, layer in net.eval().named_layers())


def test_sequential_keeps_contexts_apart_even_for_a_shared_layer():
    shared = Scale()
    net = Sequential(shared, layer_for(np.float64), shared)
    check_gradients(net, normal((4, 3, 2, 2), np.float64))
    assert len(net) == 3
    assert net[2] is shared
    net.forward(normal((4, 3, 2, 2), np.float64), save_for_backward=False)
    assert net.saved is None
    with pytest.raises(TypeError, match="Sequential takes Layers, got function"):
        Sequential(lambda x: x)


def test_reset():
    net = Sequential(layer_for(np.float32))
    net(normal((4, 3, 2, 2)))
    net.reset_running_stats()
    net.reset_parameters()
    fresh, state = Sequential(BatchNorm2d(3)).state_dict(), net.state_dict()
    for name, array in fresh.items():
        np.testing.assert_array_equal(state[name], array)


def test_weight_init():
    np.random.seed(3)
    weight = BatchNorm2d(1000, weight_init="uniform").weight
    assert 0 <= weight.min() < 0.05 < 0.95 < weight.max() < 1
    layer = BatchNorm2d(3, weight_init=lambda shape: np.full(shape, 0.5))
    assert (layer.weight == 0.5).all()
    assert layer.weight.dtype == np.float32
    with pytest.raises(ValueError, match="weight_init must be"):
        BatchNorm2d(3, weight_init="zeros")
    with pytest.raises(cupybn.ShapeError, match="weight_init gave shape"):
        BatchNorm2d(3, weight_init=lambda shape: np.ones(4))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_deepcopy_and_pickle(duplicate):
    net = Sequential(layer_for(np.float32), SyncBatchNorm(3, comm=ALONE))
    net(normal((4, 3, 2, 2)))
    other = duplicate(net)
    for (_, a), (_, b) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a is not b
    assert other.saved is None
    assert net.saved is not None
    assert repr(other).count("BatchNorm") == 2
    if duplicate is copy.deepcopy:
        assert other[1].comm is ALONE
    else:
        other.eval()(normal((4, 3, 2, 2)))
        with pytest.raises(RuntimeError, match="1: this layer was unpickled.*set layer.comm"):
            other.train()(normal((4, 3, 2, 2)))
        assert pickle.loads(pickle.dumps(other))[1]._comm.detached
        other[1].comm = ALONE
    other(normal((4, 3, 2, 2)))


def test_repr():
    assert repr(BatchNorm2d(4)) == (
        "BatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)"
    )
    layer = SyncBatchNorm(
        4, bias=False, channel_axis=-1, activation="relu", dtype="float64", name="a"
    )
    assert repr(layer).endswith(
        "track_running_stats=True, bias=False, channel_axis=-1, activation='relu', "
        "dtype='float64', name='a')"
    )
    assert repr(Sequential(BatchNorm2d(4))).split("\n")[1].startswith("  (0): BatchNorm2d(4, ")


# ---- bad input -----------------------------------------------------------------------------------

X = normal((2, 3, 5, 5))
BAD_INPUT = [
    (BatchNorm1d, X, cupybn.ShapeError, r"expected 2D or 3D input \(got 4D input\)"),
    (BatchNorm2d, normal((2, 3)), cupybn.ShapeError, r"expected 4D input \(got 2D input\)"),
    (BatchNorm3d, X, cupybn.ShapeError, r"expected 5D input \(got 4D input\)"),
    (SyncBatchNorm, X[0, 0, 0], cupybn.ShapeError, r"expected at least 2D input \(got 1D input\)"),
    (
        BatchNorm2d, normal((2, 4, 5, 5)), cupybn.ShapeError,
        r"expected 3 channels on axis 1, got 4 \(input shape \(2, 4, 5, 5\)\)",
    ),
    (
        BatchNorm2d, normal((1, 3, 1, 1)), cupybn.ShapeError,
        r"Expected more than 1 value per channel when training, got input size \(1, 3, 1, 1\)",
    ),
    (BatchNorm2d, X.astype(np.int64), cupybn.DTypeError, "unsupported dtype int64"),
    (BatchNorm2d, X.astype(np.complex64), cupybn.DTypeError, "unsupported dtype complex64"),
    (BatchNorm2d, X.astype(">f4"), cupybn.DTypeError, r"dtype >f4.* \.astype\(np\.float32\)"),
    (BatchNorm2d, np.ma.masked_greater(X, 1), cupybn.DTypeError, r"masked array.*\.filled\("),
    (BatchNorm2d, X.astype(np.float64), cupybn.DTypeError, "input is float64.*dtype='float64'"),
    (BatchNorm2d, X.tolist(), cupybn.DTypeError, "input must be a NumPy or CuPy array.*got list"),
    (BatchNorm2d, None, cupybn.DTypeError, "got NoneType"),
]  # fmt: skip


@pytest.mark.parametrize("cls, x, exception, message", BAD_INPUT)
def test_bad_input_changes_nothing(cls, x, exception, message):
    layer = layer_for(np.float32, cls, **({"comm": ALONE} if cls is SyncBatchNorm else {}))
    before = snapshot(layer)
    with pytest.raises(exception, match=message):
        layer.forward(x)
    assert snapshot(layer) == before
    assert layer.saved is None


@pytest.mark.parametrize(
    "options, exception, message",
    [
        ({"residual": X[:1]}, cupybn.ShapeError, r"residual has shape \(1, 3, 5, 5\), expected"),
        ({"residual": X.astype("d")}, cupybn.DTypeError, "residual is float64, expected float32"),
        ({"out": X.astype("d")}, cupybn.DTypeError, "out is float64"),
        ({"out": X.tolist()}, cupybn.DTypeError, "out must be a ndarray, got list"),
        ({"out": np.ma.zeros(X.shape, "f")}, cupybn.DTypeError, "out is a masked array"),
    ],
)
def test_bad_options_of_forward(options, exception, message):
    layer = BatchNorm2d(3)
    before = snapshot(layer)
    with pytest.raises(exception, match=message):
        layer.forward(X, **options)
    assert snapshot(layer) == before


def test_bad_dy_changes_nothing():
    layer = BatchNorm2d(3)
    layer.forward(X)
    before = snapshot(layer)
    for dy, exception in ((X.astype("d"), cupybn.DTypeError), ([1.0], cupybn.DTypeError)):
        with pytest.raises(exception, match="dy"):
            layer.backward(dy)
    assert snapshot(layer) == before


@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
        ({"num_features": 2.0}, TypeError, "num_features must be an integer"),
        ({"eps": 0}, ValueError, "eps must be positive, got 0"),
        ({"eps": -1e-5}, ValueError, "eps must be positive"),
        ({"eps": float("nan")}, ValueError, "eps must be positive"),
        ({"eps": None}, ValueError, "eps must be positive, got None"),
        ({"eps": "1e-5"}, ValueError, "eps must be positive"),
        ({"momentum": 1.5}, ValueError, r"momentum must lie in \[0, 1\], got 1.5"),
        ({"momentum": -0.1}, ValueError, "momentum must lie in"),
        ({"activation": "gelu"}, ValueError, "activation must be None or 'relu'"),
        ({"channel_axis": 2}, ValueError, "channel_axis must be 1 or -1"),
        ({"channel_axis": 1.0}, ValueError, "channel_axis must be 1 or -1"),
        ({"weight_init": np.ones(3)}, ValueError, "weight_init must be 'ones', 'uniform' or a f"),
        ({"dtype": "float16"}, cupybn.DTypeError, "must be float32 or float64, got float16"),
        ({"device": "tpu"}, cupybn.DeviceError, "device must be"),
        ({"device": "cuda:x"}, cupybn.DeviceError, "device must be"),
        ({"comm": "world"}, TypeError, "comm must be an mpi4py communicator.*got str"),
        ({"comm": cupybn.SelfCommunicator}, TypeError, "comm must be"),
    ],
)
def test_bad_constructor_arguments(arguments, exception, message):
    cls = SyncBatchNorm if "comm" in arguments else BatchNorm2d
    with pytest.raises(exception, match=message):
        cls(**{"num_features": 3, **arguments})


def test_options_changed_later_are_checked_too():
    layer = BatchNorm2d(3)
    before = snapshot(layer)
    layer.eps = -1
    with pytest.raises(ValueError, match="eps must be positive"):
        layer(X)
    layer.eps, layer.momentum = 1e-5, 7
    with pytest.raises(ValueError, match="momentum must lie in"):
        layer(X)
    assert snapshot(layer) == before


def test_a_negative_running_variance_is_nan_without_a_warning():
    layer = BatchNorm2d(3).eval()
    layer.running_var[1] = -1
    np.testing.assert_array_equal(np.isnan(layer(X)).any(axis=(0, 2, 3)), [False, True, False])


def test_one_value_per_channel_is_fine_in_evaluation():
    layer = BatchNorm2d(3).eval()
    assert layer(normal((1, 3, 1, 1))).shape == (1, 3, 1, 1)
    with pytest.raises(cupybn.ShapeError, match="Expected more than 1 value"):
        BatchNorm2d(3, track_running_stats=False).eval()(normal((1, 3, 1, 1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batches_change_nothing(dtype):
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        layer = layer_for(dtype)
        before = snapshot(layer)
        y = layer.forward(np.empty(shape, dtype))
        dx = layer.backward(np.empty(shape, dtype))
        assert (y.shape, y.dtype, dx.shape, dx.dtype) == (shape, dtype, shape, dtype)
        assert snapshot(layer) == before


def test_check_finite():
    x = X.copy()
    x[0, 1, 0, 0] = np.nan
    layer, guarded = BatchNorm2d(3), BatchNorm2d(3, check_finite=True)
    layer(x)
    assert np.isnan(layer.running_mean).tolist() == [False, True, False]
    before = snapshot(guarded)
    with pytest.raises(FloatingPointError, match="NaN or Inf in .* batch, in channel 1"):
        guarded(x)
    assert snapshot(guarded) == before
    guarded(X)
    untracked = BatchNorm2d(3, check_finite=True, track_running_stats=False).eval()
    assert np.isnan(untracked(x)[:, 1]).all()  # evaluation lets through what it is given


def test_relu_lets_no_gradient_through_at_zero():
    for residual in (None, np.zeros_like(X)):
        layer = BatchNorm2d(3, activation="relu")
        x = np.full_like(X, 2.0)
        assert not layer.forward(x, residual).any()
        layer.backward(np.ones_like(X))
        assert not layer.grads["bias"].any()


@pytest.mark.parametrize("where", ["normalize", "packbits", "counter"])
def test_memory_that_runs_out_late_changes_nothing(monkeypatch, where):
    layer, r = BatchNorm2d(3, activation="relu"), X.copy()
    layer(X)
    before, backend = snapshot(layer), backends.cpu_backend()

    def fails(*args, **options):
        raise MemoryError

    if where == "counter":
        monkeypatch.setattr(backend, "int", fails, raising=False)
    elif where == "normalize":
        for name in {"normalize", "local_forward"} & set(vars(backend)):
            monkeypatch.setattr(backend, name, fails)
    else:
        packs = (np, "packbits") if backend is numpy_backend else (backend.load(), "pack_bits")
        monkeypatch.setattr(*packs, fails)
    with pytest.raises(MemoryError):
        layer.forward(X, r)
    assert snapshot(layer) == before


def test_an_interrupt_after_the_kernel_leaves_strided_statistics_and_their_counter(monkeypatch):
    layer = BatchNorm2d(3)
    layer.buffers["running_mean"] = np.repeat(layer.running_mean, 2)[::2]
    layer(X)  # compiles
    before, backend = snapshot(layer), backends.cpu_backend()
    forward = backend.local_forward

    def interrupted(*args, **options):
        forward(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend, "local_forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layer(X)
    assert snapshot(layer) == before
    layer(X)
    plain = BatchNorm2d(3)
    for _ in range(2):
        plain(X)
    assert layer.num_batches_tracked == 2
    assert layer.running_mean.tobytes() == plain.running_mean.tobytes()


def test_more_than_65504_half_values():
    layer = BatchNorm2d(2)
    x = normal((2, 2, 256, 257), np.float16)
    y = layer(x)
    assert layer.saved.count == 2 * 256 * 257
    assert isinstance(layer.saved.count, int)
    assert reference.error(y, reference.forward(x).y) < 1e-3
    assert np.isfinite(layer.running_var).all()


@pytest.mark.skipif(not BFLOAT16, reason="ml_dtypes is not installed")
def test_bfloat16_goes_with_float32_parameters():
    layer = BatchNorm2d(3)
    y = layer(X.astype(BFLOAT16[0]))
    assert y.dtype == BFLOAT16[0]
    assert layer.weight.dtype == np.float32


class WithDLPack:
    """Another library's array: nothing but DLPack."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def test_foreign_arrays():
    layer, plain = BatchNorm2d(3), BatchNorm2d(3)
    np.testing.assert_array_equal(layer(WithDLPack(X)), plain(X))
    np.testing.assert_array_equal(layer.backward(WithDLPack(X)), plain.backward(X))
    layer.load_state_dict({k: WithDLPack(v) for k, v in plain.state_dict().items()})
