"""Files that were written once are loaded for ever. tests/golden/make.py wrote them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

import cupybn
from cupybn import BatchNorm1d, BatchNorm2d, SelfCommunicator, Sequential, SyncBatchNorm

FOLDER = Path(__file__).resolve().parent / "golden"
OBJECTS = {
    "layer": ("layer.pickle", "layer_arrays.npz"),
    "net": ("net.pickle", "net_arrays.npz"),
    "module": ("module.pt", "module_arrays.npz"),
}
NAMES = ["version_1", "version_2", "without_metadata", "nested", "formats", "pytorch"]

golden = pytest.mark.parametrize("suffix", [".npz", ".safetensors"])


def load(name, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="the extra safetensors is not installed")
    return cupybn.load(FOLDER / f"{name}{suffix}")


def assert_layer(layer, *, weight, bias, running_mean, running_var, num_batches_tracked):
    expected = {"weight": weight, "bias": bias, "running_mean": running_mean,
                "running_var": running_var}  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(layer, name), np.float32(values), strict=True)
    assert layer.num_batches_tracked == num_batches_tracked


V1 = {
    "weight": [0.5, -1.25, 2.0],
    "bias": [1.0, 0.0, -3.5],
    "running_mean": [0.125, -7.0, 1e-3],
    "running_var": [4.0, 0.0625, 1e3],
}


def test_every_file_has_its_test():
    files = {path.name for path in FOLDER.iterdir() if path.suffix != ".py" and path.is_file()}
    states = {f"{name}{suffix}" for name in NAMES for suffix in (".npz", ".safetensors")}
    objects = {name for files in OBJECTS.values() for name in files}
    assert files == states | objects


@golden
@pytest.mark.parametrize("name", ["version_1", "without_metadata"])
def test_version_1(name, suffix):
    state = load(name, suffix)
    assert state.metadata == ({"": {"version": 1}} if name == "version_1" else {})
    layer = BatchNorm1d(3)
    layer.num_batches_tracked = 41
    assert layer.load_state_dict(state) == ([], [])
    assert_layer(layer, **V1, num_batches_tracked=41)


@golden
def test_version_2(suffix):
    state = load("version_2", suffix)
    assert state.metadata == {"": {"version": 2}}
    layer = BatchNorm1d(3)
    assert layer.load_state_dict(state) == ([], [])
    assert_layer(layer, **V1, num_batches_tracked=12345678901)
    assert layer.state_dict().metadata == state.metadata


@golden
def test_nested(suffix):
    net = Sequential({"stem": BatchNorm1d(3), "blocks": Sequential(BatchNorm1d(3))})
    net.blocks[0].num_batches_tracked = 41
    assert net.load_state_dict(load("nested", suffix)) == ([], [])
    assert_layer(net.stem, **V1, num_batches_tracked=12345678901)
    twice = {name: [2 * value for value in values] for name, values in V1.items()}
    assert_layer(net.blocks[0], **twice, num_batches_tracked=41)


@golden
def test_pytorch(suffix):
    state = load("pytorch", suffix)
    assert state.metadata == {
        "": {"version": 1}, "bn": {"version": 2},
        "block": {"version": 1}, "block.0": {"version": 2},
    }  # fmt: skip
    net = Sequential({"bn": BatchNorm1d(3), "block": Sequential(BatchNorm1d(3, affine=False))})
    net.block[0].num_batches_tracked = 41
    assert net.load_state_dict(state) == ([], [])
    for layer in (net.bn, net.block[0]):
        np.testing.assert_allclose(layer.running_mean, [0.2, 0.4, 0.6], rtol=2e-7)
        np.testing.assert_allclose(layer.running_var, [1.1, 1.7, 2.7], rtol=2e-7)
        assert layer.num_batches_tracked == 1
    np.testing.assert_array_equal(net.bn.weight, [1, 1, 1])
    np.testing.assert_array_equal(net.bn.bias, [0, 0, 0])


@golden
def test_formats(suffix):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the extra bfloat16 is not installed")
    state = load("formats", suffix)
    assert state.metadata == {"a/b": {"text": "ü", "list": [1, 2.5, None, True]}}
    counts = np.array([[-2, -1, 0], [1, 2, 3]])
    names = [name.removeprefix("of ") for name in state if name.startswith("of ")]
    assert len(names) == 19
    for name in names:
        dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        array = state[f"of {name}"]
        assert (array.dtype, array.dtype.byteorder) == (dtype, dtype.byteorder)
        np.testing.assert_array_equal(array, counts.astype(dtype), strict=True)
    np.testing.assert_array_equal(state["transposed"], [[0, 3], [1, 4], [2, 5]])
    assert (state["empty"].shape, state["empty"].dtype) == ((0, 2), np.float32)
    assert (state["größe/名"].shape, state["größe/名"].item()) == ((), 1.5)
    assert list(state)[-3:] == ["transposed", "empty", "größe/名"]


# ---- whole objects, as pickle and torch.save wrote them ------------------------------------------


def unpickled(name):
    """The object, and the arrays that are recorded of it."""
    file, arrays = OBJECTS[name]
    with np.load(FOLDER / arrays) as recorded:
        return pickle.loads((FOLDER / file).read_bytes()), dict(recorded)


def part(recorded, which):
    return {
        name.removeprefix(which): array
        for name, array in recorded.items()
        if name.startswith(which)
    }


def arrays_of(layer):
    gradients = {f"gradient of {name}": gradient for name, gradient in layer.named_gradients()}
    return layer.state_dict() | gradients


def assert_arrays(arrays, expected, rtol=0):
    assert list(arrays) == list(expected)
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_allclose(arrays[name], array, rtol=rtol, atol=rtol, err_msg=name)


def assert_goes_on(layer, recorded):
    """Two steps more, as in make.py."""
    for x, y in zip(recorded["x"], recorded["y"], strict=True):
        found = layer.forward(x)
        np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4)
        layer.zero_grad()
        layer.backward(2 * found - 1)
        for (_, parameter), (_, gradient) in zip(
            layer.named_parameters(), layer.named_gradients(), strict=True
        ):
            parameter -= np.float32(0.01) * gradient
    assert_arrays(arrays_of(layer), part(recorded, "trained "), rtol=1e-4)


def test_pickled_layer():
    layer, recorded = unpickled("layer")
    assert type(layer) is BatchNorm2d
    assert (layer.momentum, layer.activation, layer.training) == (0.2, "relu", True)
    assert_arrays(arrays_of(layer), part(recorded, "kept "))
    assert_goes_on(layer, recorded)


def test_pickled_net():
    net, recorded = unpickled("net")
    assert [path for path, _ in net.named_layers()] == [
        "", "inner", "inner.0", "inner.1", "layer", "converted"
    ]  # fmt: skip
    assert_arrays(arrays_of(net), part(recorded, "kept "))
    synchronised = [layer for _, layer in net.named_layers() if isinstance(layer, SyncBatchNorm)]
    assert [layer.label for layer in synchronised] == ["named", "converted"]
    for layer in synchronised:
        with pytest.raises(RuntimeError, match=r"this layer was unpickled.*set layer\.comm"):
            layer.forward(recorded["x"][0])
        layer.comm = SelfCommunicator()
    assert_goes_on(net, recorded)
    reverted = cupybn.revert_sync_batchnorm(net)
    assert type(reverted.converted) is BatchNorm2d
    assert type(reverted.inner[1]) is SyncBatchNorm  # made directly


def test_pytorch_module():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    file, arrays = OBJECTS["module"]
    module = torch.load(FOLDER / file, weights_only=False)
    with np.load(FOLDER / arrays) as loaded:
        recorded = dict(loaded)

    def state():
        return {name: tensor.numpy() for name, tensor in module.state_dict().items()}

    assert_arrays(state(), part(recorded, "kept "))
    x = torch.from_numpy(recorded["x"])
    with pytest.raises(RuntimeError, match=r"named: this layer was unpickled"):
        module.sync(torch.zeros(2, 4))
    module.sync.comm = SelfCommunicator()
    for batch, y in zip(x, recorded["y"], strict=True):
        found = module(batch)
        np.testing.assert_allclose(found.detach(), y, rtol=1e-4, atol=1e-4)
        module.zero_grad()
        (found**2 - found).sum().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.01 * parameter.grad
    assert_arrays(state(), part(recorded, "trained "), rtol=1e-4)
