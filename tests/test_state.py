"""State dicts in memory: names, versions, all or nothing."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import numpy as np
import pytest
from conftest import BFLOAT16
from hypothesis import given, settings
from hypothesis import strategies as st

import cupybn
from cupybn import BatchNorm1d, BatchNorm2d, Sequential, StateDict, SyncBatchNorm

NAMES = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def trained(c=4, seed=0):
    layer = BatchNorm2d(c)
    rng = np.random.default_rng(seed)
    layer.weight[...] = rng.standard_normal(c)
    layer(rng.standard_normal((3, c, 2, 2)).astype(np.float32))
    return layer


def bits(layer):
    return {name: (array.dtype, array.tobytes()) for name, array in layer.state_dict().items()}


def test_names_order_copies_and_metadata():
    layer = trained()
    state = layer.state_dict()
    assert list(state) == NAMES
    assert state.metadata == {"": {"version": 2}}
    assert state["num_batches_tracked"].shape == ()
    assert state["num_batches_tracked"].dtype == np.int64
    state["weight"][...] = 99
    assert (layer.weight != 99).all()
    net = Sequential({"bn": layer})
    assert list(net.state_dict()) == [f"bn.{name}" for name in NAMES]
    assert net.state_dict().metadata == {"": {"version": 1}, "bn": {"version": 2}}


def test_round_trip_in_place():
    source, target = trained(), BatchNorm2d(4)
    weight = target.weight
    result = target.load_state_dict(source.state_dict())
    assert target.weight is weight
    assert bits(target) == bits(source)
    assert result == ([], [])
    assert repr(result) == "<All keys matched successfully>"


def test_a_sync_layer_and_a_plain_one_share_their_state():
    sync = SyncBatchNorm(4)
    sync.load_state_dict(trained().state_dict())
    assert bits(sync) == bits(trained())


@pytest.mark.parametrize("metadata", [None, {"": {"version": 1}}, {"": {}}, {}])
def test_version_1_has_no_num_batches_tracked(metadata):
    state = dict(trained().state_dict())
    del state["num_batches_tracked"]
    state = state if metadata is None else StateDict(state, metadata=metadata)
    target = trained(seed=1)
    target.num_batches_tracked = 41
    assert target.load_state_dict(state) == ([], [])
    assert target.num_batches_tracked == 41
    np.testing.assert_array_equal(target.weight, trained().weight)


def test_a_copy_keeps_the_versions():
    state = trained().state_dict()
    copies = (
        state.copy(), StateDict(state), state | {"weight": state["weight"]}, copy.copy(state),
        copy.deepcopy(state), pickle.loads(pickle.dumps(state)),
    )  # fmt: skip
    for each in copies:
        assert type(each) is StateDict
        assert each.metadata == {"": {"version": 2}}
        assert list(each) == list(state)
    copies[0].metadata[""]["version"] = 1
    assert state.metadata == {"": {"version": 2}}


def test_version_2_must_have_it():
    state = trained().state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(cupybn.StateDictError, match='Missing key.*"num_batches_tracked"'):
        BatchNorm2d(4).load_state_dict(state)


def test_metadata_of_pytorch():
    state = OrderedDict(trained().state_dict())
    state._metadata = OrderedDict({"": {"version": 3}})
    with pytest.raises(cupybn.StateDictError, match=r"version 3 .* newer than version 2"):
        BatchNorm2d(4).load_state_dict(state)
    state._metadata[""]["version"] = 2
    assert BatchNorm2d(4).load_state_dict(state) == ([], [])


def test_a_subclass_upgrades_older_states():
    class Renamed(BatchNorm1d):
        version = 3

        def upgrade_state_dict(self, state, prefix, version):
            super().upgrade_state_dict(state, prefix, version)
            if version < 3 and f"{prefix}gamma" in state:
                state[f"{prefix}weight"] = state.pop(f"{prefix}gamma")

    old = BatchNorm1d(3).state_dict()
    old["gamma"] = old.pop("weight") * 5
    net, nested = Sequential({"a": Renamed(3)}), StateDict(metadata={"a": {"version": 2}})
    nested.update({f"a.{name}": array for name, array in old.items()})
    net.load_state_dict(nested)
    assert (net.a.weight == 5).all()
    assert "a.gamma" in nested  # the caller's dict is not edited
    assert net.state_dict().metadata["a"] == {"version": 3}


def test_only_version_1_may_lack_the_counter_whatever_came_after():
    class Later(BatchNorm1d):
        version = 4

    for version, missing in ((1, []), (2, ["num_batches_tracked"]), (3, ["num_batches_tracked"])):
        state = StateDict(Later(3).state_dict(), metadata={"": {"version": version}})
        del state["num_batches_tracked"]
        assert Later(3).load_state_dict(state, strict=False).missing_keys == missing


def breaking(state, how):
    if how == "missing":
        del state["running_mean"]
    elif how == "unexpected":
        state["extra"] = np.ones(1)
    elif how == "shape":
        state["num_batches_tracked"] = np.ones(5, np.int64)
    elif how == "no array":
        state["running_var"] = [1.0] * 4
    elif how == "integers for floats":
        state["running_var"] = np.ones(4, np.int64)
    elif how == "floats for integers":
        state["num_batches_tracked"] = np.ones(())
    elif how == "text":
        state["running_var"] = np.array(["a"] * 4)
    elif how == "raw bytes":
        state["running_var"] = np.zeros(4, "V2")
    elif how == "masked":
        state["running_var"] = np.ma.ones(4)
    elif how == "version":
        state.metadata[""]["version"] = 9
    elif how == "a version that is no number":
        state.metadata[""]["version"] = "2"
    elif how == "metadata that is no dict":
        state.metadata = 2
    return state


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", r'Missing key\(s\) in state_dict: "running_mean"\.'),
        ("unexpected", r'Unexpected key\(s\) in state_dict: "extra"\.'),
        ("shape", r"size mismatch for num_batches_tracked: .*\(5,\).*\(\)"),
        ("no array", "running_var must be a NumPy or CuPy array"),
        ("integers for floats", "dtype mismatch for running_var: int64"),
        ("floats for integers", "dtype mismatch for num_batches_tracked: float64"),
        ("text", "dtype mismatch for running_var"),
        ("raw bytes", "dtype mismatch for running_var"),
        ("masked", "running_var is a masked array"),
        ("version", 'version 9 of the state for ""'),
        ("a version that is no number", 'has no integer version for ""'),
        ("metadata that is no dict", 'has no integer version for ""'),
    ],
)
def test_all_or_nothing(how, message):
    layer = trained(seed=2)
    before = bits(layer)
    with pytest.raises(cupybn.StateDictError, match=message) as raised:
        layer.load_state_dict(breaking(trained().state_dict(), how))
    assert str(raised.value).startswith("Error(s) in loading state_dict for BatchNorm2d:\n\t")
    assert bits(layer) == before


def test_every_error_is_listed():
    state = breaking(breaking(trained().state_dict(), "missing"), "unexpected")
    state["weight"] = np.ones(5, np.float32)
    with pytest.raises(cupybn.StateDictError) as raised:
        BatchNorm2d(4).load_state_dict(state)
    assert str(raised.value).count("\n\t") == 3


def test_not_strict():
    state = breaking(breaking(trained().state_dict(), "missing"), "unexpected")
    layer = BatchNorm2d(4)
    assert layer.load_state_dict(state, strict=False) == (["running_mean"], ["extra"])
    np.testing.assert_array_equal(layer.weight, state["weight"])
    before = bits(layer)
    with pytest.raises(cupybn.StateDictError, match="size mismatch for weight"):
        layer.load_state_dict({"weight": np.ones(7, np.float32)}, strict=False)
    assert bits(layer) == before
    with pytest.raises(TypeError, match="Expected state_dict to be dict-like, got <class 'int'>"):
        layer.load_state_dict(5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, *BFLOAT16])
def test_other_precisions_are_converted(dtype):
    state = {k: v.astype(dtype) if v.ndim else v for k, v in trained().state_dict().items()}
    layer = BatchNorm2d(4)
    layer.load_state_dict(state)
    np.testing.assert_array_equal(layer.weight, state["weight"].astype(np.float32))
    assert layer.weight.dtype == np.float32


def test_a_state_may_hold_the_layers_own_arrays():
    net = Sequential({"a": trained(seed=1), "b": trained(seed=2)})
    swapped = {f"{there}.{name}": net.children[here].weight for here, there, name in (
        ("a", "b", "weight"), ("b", "a", "weight"))}  # fmt: skip
    a, b = net.a.weight.copy(), net.b.weight.copy()
    net.load_state_dict(swapped, strict=False)
    np.testing.assert_array_equal(net.a.weight, b)
    np.testing.assert_array_equal(net.b.weight, a)


def test_values_too_large_become_inf_without_breaking_the_load():
    layer, state = trained(), trained(seed=3).state_dict()
    state["running_var"] = np.full(4, 1e300)
    with np.errstate(all="raise"):
        layer.load_state_dict(state)
    assert np.isinf(layer.running_var).all()


def test_a_read_only_array_is_refused_before_anything_is_written():
    layer = trained()
    layer.running_var.flags.writeable = False
    before = bits(layer)
    with pytest.raises(cupybn.StateDictError, match="running_var is read-only"):
        layer.load_state_dict(trained(seed=3).state_dict())
    assert bits(layer) == before


def test_a_shared_layer_has_both_names():
    layer = trained()
    net = Sequential({"a": layer, "b": layer})
    state = net.state_dict()
    assert len(state) == 10
    net.load_state_dict(state)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_any_tree_round_trips(sizes, seed):
    def tree():
        return Sequential({f"l{i}": Sequential(BatchNorm1d(c)) for i, c in enumerate(sizes)})

    source, target = tree(), tree()
    rng = np.random.default_rng(seed)
    for _, array in [*source.named_parameters(), *source.named_buffers()]:
        array[...] = rng.integers(-9, 9, array.shape)
    target.load_state_dict(source.state_dict())
    assert bits(source) == bits(target)


def test_the_part_of_a_layer_and_a_state_under_a_prefix():
    """The versions come along: without them, a state counts as version 1."""
    net = Sequential({"a": Sequential(trained(seed=1)), "ab": trained(seed=2), "c": Sequential()})
    state = net.state_dict()
    for prefix in ("a", "a."):
        part = state.part(prefix)
        assert list(part) == [f"0.{name}" for name in NAMES]
        assert part.metadata == {"": {"version": 1}, "0": {"version": 2}}
        assert part["0.weight"] is state["a.0.weight"]
    assert state.part("a.0").metadata == {"": {"version": 2}}
    assert state.part("c") == {}
    assert state.part("c").metadata == {"": {"version": 1}}
    assert BatchNorm2d(4).load_state_dict(state.part("ab")) == ([], [])
    assert state.part("").metadata == state.metadata
    for prefix in ("d", "a.1", "b"):
        with pytest.raises(KeyError, match=r"a\.0\.weight"):
            state.part(prefix)

    for prefix in ("x.y", "x.y."):
        moved = state.with_prefix(prefix)
        assert list(moved) == [f"x.y.{name}" for name in state]
        assert set(moved.metadata) == {"x.y", "x.y.a", "x.y.a.0", "x.y.ab", "x.y.c"}
        again = moved.part("x.y")
        assert list(again) == list(state)
        assert again.metadata == state.metadata
    assert list(state.with_prefix("")) == list(state)
    moved.metadata["x.y.ab"]["version"] = 1
    assert state.metadata["ab"] == {"version": 2}


def test_states_put_together_keep_the_versions_of_both():
    """Else a counter that is missing would not be noticed: version 1 had none."""
    first, second = trained(seed=1).state_dict(), trained(seed=2).state_dict()
    together = first.with_prefix("0") | second.with_prefix("1")
    merged = first.with_prefix("0")
    merged |= second.with_prefix("1")
    for state in (together, merged):
        assert type(state) is StateDict
        assert state.metadata == {"0": {"version": 2}, "1": {"version": 2}}
        del state["1.num_batches_tracked"]
        with pytest.raises(cupybn.StateDictError, match=r'Missing key.*"1\.num_batches_tracked"'):
            Sequential(BatchNorm2d(4), BatchNorm2d(4)).load_state_dict(state)
    torchs = OrderedDict(second)
    torchs._metadata = OrderedDict({"": {"version": 1}})
    assert (first | torchs).metadata == {"": {"version": 1}}
    assert (first | dict(second)).metadata == {"": {"version": 2}}
    merged |= {"x": np.ones(1)}
    assert merged.metadata == together.metadata
