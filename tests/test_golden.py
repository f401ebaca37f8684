"""Files that were written once are loaded for ever. tests/golden/make.py wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cupybn
from cupybn import BatchNorm1d, Sequential

FOLDER = Path(__file__).resolve().parent / "golden"
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
    assert files == {f"{name}{suffix}" for name in NAMES for suffix in (".npz", ".safetensors")}


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
