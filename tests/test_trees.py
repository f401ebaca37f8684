"""Trees of layers: lists of them, other dtypes and devices, and what beginners do to them."""

from __future__ import annotations

import copy
import pickle
import sys

import numpy as np
import pytest

import cupybn
from cupybn import BatchNorm1d, BatchNorm2d, Layer, LayerList, Sequential, SyncBatchNorm
from cupybn.testing import check_gradients

X = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32)


class Blocks(Layer):
    """A layer that runs a list of layers."""

    def __init__(self, n=2):
        super().__init__()
        self.blocks = LayerList(BatchNorm2d(3) for _ in range(n))

    def compute_forward(self, x, *, save_for_backward=True):
        contexts = []
        for block in self.blocks:
            x, context = block.run_forward(x, save_for_backward)
            contexts.append(context)
        return x, contexts

    def compute_backward(self, dy, context):
        for block, inner in zip(reversed(list(self.blocks)), reversed(context), strict=True):
            dy = block.compute_backward(dy, inner)
        return dy


def test_a_list_of_layers():
    net = Blocks()
    assert [name for name, _ in net.named_layers()] == ["", "blocks", "blocks.0", "blocks.1"]
    assert [name for name, _ in net.named_parameters()] == [
        "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias"
    ]  # fmt: skip
    assert net.blocks[1].path == "blocks.1"
    assert net.blocks[-1] is net.blocks[1]
    assert list(net.blocks) == [net.blocks[0], net.blocks[1]]
    assert net.blocks.append(BatchNorm2d(3, activation="relu")) is net.blocks
    assert len(net.blocks) == 3
    assert net.blocks[2].path == "blocks.2"
    check_gradients(net, X)
    net(X)
    fresh = Blocks(3)
    assert fresh.load_state_dict(net.state_dict()) == ([], [])
    assert repr(net).count("BatchNorm2d(3") == 3
    cupybn.convert_sync_batchnorm(net, cupybn.SelfCommunicator())
    assert all(type(block) is SyncBatchNorm for block in net.blocks)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert len(other.blocks) == 3
        assert other.blocks[2] is not net.blocks[2]


def test_what_a_list_of_layers_refuses():
    with pytest.raises(TypeError, match="LayerList takes Layers, got ndarray"):
        LayerList([BatchNorm2d(3), np.ones(3)])
    with pytest.raises(IndexError):
        LayerList()[0]
    net = Blocks()
    with pytest.raises(TypeError, match=r"^blocks: a LayerList has no forward; .*Sequential"):
        net.blocks(X)
    with pytest.raises(ValueError, match="contains this very layer"):
        net.blocks.append(net)


def test_a_sequential_is_a_list_that_runs_its_layers():
    net = Sequential(BatchNorm2d(3)).append(BatchNorm2d(3, activation="relu"))
    assert [name for name, _ in net.named_layers()] == ["", "0", "1"]
    assert (net(X) >= 0).all()
    with pytest.raises(ValueError, match="already has an attribute '1'"):
        Sequential({"1": BatchNorm2d(3)}).append(BatchNorm2d(3))


# ---- layers where nobody would find them -------------------------------------------------------


@pytest.mark.parametrize(
    "hide",
    [
        lambda bn: [bn],
        lambda bn: (bn, 3),
        lambda bn: {"bn": bn},
        lambda bn: {bn},
        lambda bn: [None, bn],
        lambda bn: [[bn], [bn]],
        lambda bn: {"block": (bn, np.tanh)},
    ],
    ids=["list", "tuple", "dict", "set", "later", "nested", "named"],
)
def test_layers_in_a_plain_list_are_an_error_that_names_the_list_to_use(hide):
    """At the assignment; and, of what was put in afterwards, where the tree is walked."""

    class Net(Layer):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

    with pytest.raises(TypeError, match=r"^Net\.layers: layers in a .*cupybn\.LayerList"):
        Net(hide(BatchNorm2d(3)))
    net = Sequential(Net([]))
    net[0].layers.append(hide(BatchNorm2d(3)))
    for walk in (
        net.state_dict,
        net.zero_grad,
        net.eval,
        lambda: list(net.named_parameters()),
        lambda: cupybn.convert_sync_batchnorm(net),
        lambda: net.to(dtype=np.float64),
    ):
        with pytest.raises(TypeError, match=r"^Net\.layers: .*cupybn\.LayerList"):
            walk()
    assert net.training


def test_lists_of_layers_that_are_children_too_are_fine():
    net = Blocks()
    net.order = [net.blocks[1], net.blocks[0]]
    net.sizes, net.names = [1] * 1000, {"a": "b"}
    loop = []
    loop.append(loop)
    net.loop = loop
    assert len(net.state_dict()) == 10
    again = copy.deepcopy(net)
    assert again.order[0] is again.blocks[1]


# ---- misspelt keywords -------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [BatchNorm1d, BatchNorm2d, cupybn.BatchNorm3d, SyncBatchNorm])
def test_a_misspelt_keyword_names_the_class_that_was_called(cls):
    class Own(cls):
        pass

    for called in (cls, Own):
        name = called.__qualname__
        with pytest.raises(TypeError) as raised:
            called(3, chanel_axis=-1)
        assert str(raised.value).startswith(f"{name}.__init__() got an unexpected keyword")
        assert "'chanel_axis'" in str(raised.value)
        with pytest.raises(TypeError) as raised:
            called()
        assert str(raised.value).startswith(f"{name}.__init__() missing 1 required")
        layer = called(num_features=3, channel_axis=-1)
        assert type(copy.deepcopy(layer)) is called
        assert layer.channel_axis == -1


# ---- errors of a layer of one's own ------------------------------------------------------------


class Broken(Layer):
    """Cannot do without samples, as a layer that nobody tried with an empty batch."""

    def compute_forward(self, x):
        return x - x.max(axis=0), None

    def compute_backward(self, dy, context):
        return dy.reshape(dy.shape[0], -1).max(axis=1)[len(dy) // 0]


def where(error):
    return getattr(error, "__notes__", [str(error).splitlines()[-1]])


def test_an_error_of_a_layer_of_ones_own_says_which_layer():
    net = Sequential({"head": Sequential(BatchNorm2d(3), Broken()), "tail": Broken()})
    with pytest.raises(ValueError, match="zero-size array") as raised:
        net(X[:0], save_for_backward=False) if net.eval() else None
    assert where(raised.value) == ["forward of 'head.1'"]
    net.train()
    net(X)
    with pytest.raises(ZeroDivisionError) as raised:
        net.backward(X)
    assert where(raised.value) == ["backward of 'tail'"]
    with pytest.raises(ValueError, match="zero-size") as raised:
        Broken()(X[:0])
    assert where(raised.value) == ["forward of 'Broken'"]


def test_an_error_of_a_batch_norm_says_it_once():
    net = Sequential({"head": Blocks()})
    with pytest.raises(cupybn.DTypeError, match="float64") as raised:
        net(X.astype(np.float64))
    assert where(raised.value) == ["forward of 'head.blocks.0'"]
    assert str(raised.value).count("forward of") == (sys.version_info < (3, 11))


# ---- other dtypes ------------------------------------------------------------------------------


def dtypes(net):
    named = [*net.named_parameters(), *net.named_gradients(), *net.named_buffers()]
    return {
        array.dtype.name
        for name, array in named
        if "num_batches" not in name and "table" not in name
    }


class Scale(Layer):
    """With a dtype in its state only, and an integer in it."""

    def __init__(self):
        super().__init__()
        self.register_parameter("factor", np.ones((), np.float32))
        self.register_buffer("table", np.arange(3))

    def compute_forward(self, x):
        return x * self.factor, x

    def compute_backward(self, dy, x):
        self.grads["factor"] += (dy * x).sum()
        return dy * self.factor


def test_to_another_dtype():
    net = Sequential(BatchNorm2d(3), Scale(), SyncBatchNorm(3, comm=cupybn.SelfCommunicator()))
    for _ in range(3):  # bound calls too
        net.backward(net(X))
    before = net.state_dict()
    assert net.to(dtype=np.float64) is net
    assert dtypes(net) == {"float64"}
    assert net[1].table.dtype == np.arange(3).dtype
    assert net[0].num_batches_tracked.dtype == np.int64
    assert net[0].dtype == np.float64
    for name, array in net.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(cupybn.DTypeError, match="make the layer with dtype='float32'"):
        net(X)
    y = net(X.astype(np.float64))
    assert y.dtype == np.float64
    assert net.backward(y).dtype == np.float64
    net.to("cpu", dtype="float32")
    assert dtypes(net) == {"float32"}
    assert net(X).dtype == np.float32


def test_to_the_same_dtype_or_to_nothing_changes_nothing():
    net = Sequential(BatchNorm2d(3), Scale())
    arrays = [array for _, array in [*net.named_parameters(), *net.named_buffers()]]
    for same in (net.to(), net.to("cpu"), net.to(None), net.to(dtype=np.float32)):
        after = [array for _, array in [*same.named_parameters(), *same.named_buffers()]]
        assert all(a is b for a, b in zip(arrays, after, strict=True))


@pytest.mark.parametrize("dtype", [np.float16, np.int64, "complex64", "no dtype", X])
def test_a_dtype_that_no_layer_has_changes_nothing(dtype):
    net = Sequential(Scale(), BatchNorm2d(3))
    with pytest.raises(TypeError):
        net.to(dtype=dtype)
    assert dtypes(net) == {"float32"}
    net(X)


def test_a_forward_from_before_cannot_go_backward_in_another_dtype():
    layer = BatchNorm2d(3)
    y = layer(X)
    layer.to(dtype=np.float64)
    with pytest.raises(cupybn.DTypeError):
        layer.backward(y)
    assert not layer.grads["weight"].any()


def test_arrays_that_layers_share_stay_shared():
    first, second = Scale(), Scale()
    second.params["factor"] = first.params["factor"]
    net = Sequential(first, second, first)
    net.to(dtype=np.float64)
    assert net[0].factor is net[1].factor
    assert net[2] is net[0]
    assert net[0].factor.dtype == np.float64


def test_values_too_large_for_the_dtype_become_inf():
    layer = BatchNorm1d(2, dtype=np.float64)
    layer.running_var = np.array([1e300, 1.0])
    with np.errstate(all="raise"):
        layer.to(dtype=np.float32)
    assert np.isinf(layer.running_var[0])


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [np.float32, np.float64])
@pytest.mark.parametrize("x", [np.float16, np.float32, np.float64])
def test_gradients_of_layers_of_any_dtype_are_checked_in_float64(layer, x):
    bn = BatchNorm2d(3, dtype=layer, activation="relu")
    net = Sequential(bn, Scale())
    before = {name: array.tobytes() for name, array in net.state_dict().items()}
    check_gradients(net, X.astype(x))
    check_gradients(bn, X.astype(x), residual=X.astype(x))
    assert {name: array.tobytes() for name, array in net.state_dict().items()} == before
    assert bn.dtype == layer


def test_a_wrong_gradient_of_a_float32_layer_is_found():
    class Wrong(Scale):
        def compute_backward(self, dy, x):
            return super().compute_backward(dy, x) * np.float32(1.01)

    check_gradients(Scale(), X)
    with pytest.raises(AssertionError, match="gradients differ"):
        check_gradients(Wrong(), X)


@pytest.mark.parametrize("x", [np.arange(6).reshape(2, 3), [[1.0, 2.0]], X > 0])
def test_gradients_are_of_floating_arrays(x):
    with pytest.raises(cupybn.DTypeError):
        check_gradients(BatchNorm1d(3), x)
