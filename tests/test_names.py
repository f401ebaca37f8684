"""State dicts under the names of other frameworks, and back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import BFLOAT16

import cupybn
from cupybn import StateDict
from cupybn.interop.names import CONVENTIONS, convert_state_dict

FRAMEWORKS = list(CONVENTIONS)
KEYS = {
    "pytorch": ["a.0.weight", "a.0.bias", "a.0.running_mean", "a.0.running_var",
                "a.0.num_batches_tracked"],
    "chainer": ["a/0/gamma", "a/0/beta", "a/0/avg_mean", "a/0/avg_var", "a/0/N"],
    "keras": ["a/0/gamma", "a/0/beta", "a/0/moving_mean", "a/0/moving_variance"],
    "flax": ["params/a/0/scale", "params/a/0/bias", "batch_stats/a/0/mean", "batch_stats/a/0/var"],
}  # fmt: skip


def trained(seed=0):
    layer = cupybn.BatchNorm1d(3)
    rng = np.random.default_rng(seed)
    layer.weight[...] = rng.standard_normal(3)
    layer.bias[...] = rng.standard_normal(3)
    layer(rng.standard_normal((5, 3)).astype(np.float32))
    return layer


def nested():
    inner = cupybn.Sequential(trained())
    return cupybn.Sequential({"a": inner, "bn": trained(1)})


def assert_same(converted, state):
    assert list(converted) == list(state)
    for name, array in state.items():
        np.testing.assert_array_equal(converted[name], array, strict=True)


@pytest.mark.parametrize("target", KEYS)
def test_the_keys(target):
    state = cupybn.Sequential({"a": cupybn.Sequential(trained())}).state_dict()
    converted = convert_state_dict(state, "cupybn", target)
    assert list(converted) == KEYS[target]
    for array, key in zip(state.values(), KEYS[target], strict=False):
        assert np.shares_memory(converted[key], array)


@pytest.mark.parametrize(
    "target, key",
    [("pytorch", "running_var"), ("chainer", "avg_var"), ("keras", "moving_variance"),
     ("flax", "batch_stats/var")],
)  # fmt: skip
def test_the_keys_of_a_single_layer(target, key):
    converted = convert_state_dict(trained().state_dict(), "cupybn", target)
    assert key in converted
    assert convert_state_dict(converted, target).keys() <= trained().state_dict().keys()


@pytest.mark.parametrize("there, back", list(itertools.product(FRAMEWORKS, FRAMEWORKS)))
@pytest.mark.parametrize("count", [None, 5, {"a.0": 5, "bn": 2}], ids=str)
def test_round_trips(there, back, count):
    state = nested().state_dict()
    first = convert_state_dict(state, "cupybn", there, count=count)
    second = convert_state_dict(first, there, back, count=count)
    last = convert_state_dict(second, back, "cupybn", count=count)
    counted = {"keras", "flax"}.isdisjoint({there, back})
    expected = {k: v for k, v in state.items() if counted or "num_batches" not in k}
    if count is None:
        assert_same(last, expected)
    assert list(last) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(last[name], array, rtol=1e-6)
        assert last[name].dtype == array.dtype
    assert last.metadata == {p: {"version": 2 if counted else 1} for p in ("a.0", "bn")}
    target = nested()
    target.bn.num_batches_tracked = 7
    assert target.load_state_dict(last) == ([], [])
    assert target.bn.num_batches_tracked == (1 if counted else 7)


def test_the_variance_is_corrected_where_the_conventions_differ():
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    layer = cupybn.BatchNorm1d(3, momentum=1.0)
    layer(x)
    biased, unbiased = x.var(axis=0), x.var(axis=0, ddof=1)
    state = layer.state_dict()
    before = {name: array.copy() for name, array in state.items()}
    for framework, key, expected in [
        ("pytorch", "running_var", unbiased),
        ("chainer", "avg_var", unbiased),
        ("keras", "moving_variance", biased),
        ("flax", "batch_stats/var", biased),
    ]:
        corrected = convert_state_dict(state, "cupybn", framework, count=5)
        np.testing.assert_allclose(corrected[key], expected, rtol=1e-6)
        np.testing.assert_allclose(
            convert_state_dict(state, "cupybn", framework)[key], unbiased, rtol=1e-6
        )
        again = convert_state_dict(corrected, framework, "chainer", count=5)
        np.testing.assert_allclose(again["avg_var"], unbiased, rtol=1e-6)
    assert_same(state, before)


@pytest.mark.parametrize("dtype", [np.float16, *BFLOAT16, np.float64])
def test_the_dtype_is_kept(dtype):
    state = {"running_mean": np.ones(2, dtype), "running_var": np.ones(2, dtype)}
    corrected = convert_state_dict(state, "cupybn", "flax", count=4)
    assert corrected["batch_stats/var"].dtype == dtype
    np.testing.assert_array_equal(corrected["batch_stats/var"].astype(float), 0.75)


def test_spellings_that_frameworks_write():
    mean, var = np.ones(2), np.full(2, 4.0)
    for source, state in [
        ("chainer", {"/bn/avg_mean": mean, "/bn/avg_var": var}),  # namedparams
        ("keras", {"bn/moving_mean:0": mean, "bn/moving_variance:0": var}),  # Keras 2
    ]:
        expected = {"bn.running_mean": mean, "bn.running_var": var}
        assert_same(convert_state_dict(state, source), expected)


@pytest.mark.parametrize(
    "source, more, message",
    [
        ("pytorch", ["conv.weight", "conv.bias"], r"'conv\.weight', 'conv\.bias'\. Pass only"),
        ("pytorch", ["bn.gamma"], r"'bn\.gamma'"),
        ("chainer", ["fc/W"], "'fc/W'"),
        ("flax", ["params/dense/kernel"], "'params/dense/kernel'"),
        ("flax", ["params/bn/mean"], "'params/bn/mean'"),
        ("flax", ["bn/scale"], "'bn/scale'"),
        ("keras", ["layer_norm/gamma"], "'layer_norm/gamma'"),
        ("keras", ["a.b/gamma"], "dots and slashes"),
        ("pytorch", ["a/b.weight"], "dots and slashes"),
        ("pytorch", [".weight"], "dots and slashes"),
        ("keras", ["/bn/moving_mean"], "twice"),
    ],
)
def test_keys_that_do_not_belong(source, more, message):
    state = convert_state_dict(cupybn.Sequential({"bn": trained()}).state_dict(), "cupybn", source)
    with pytest.raises(ValueError, match=message):
        convert_state_dict({**state, **dict.fromkeys(more, np.ones(3))}, source)


def test_arguments_that_are_none():
    state = trained().state_dict()
    for arguments in ({"source": "caffe"}, {"target": "caffe"}):
        with pytest.raises(ValueError, match="'caffe' is none of cupybn, pytorch, chainer"):
            convert_state_dict(state, **arguments)
    for count in (1, 0, {"other": 5}, 5.5, float("nan"), "5"):
        with pytest.raises(ValueError, match='count must be an integer of at least 2 .* for ""'):
            convert_state_dict(state, "cupybn", "flax", count=count)
    with pytest.raises(cupybn.DTypeError, match="^running_var"):
        convert_state_dict({**state, "running_var": [1.0]})


def test_pytorch_there_and_back():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm1d(3, affine=False))
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32))
    module[0](x)
    module[1](x[:, :, 0, 0])
    state = module.state_dict()
    for other in FRAMEWORKS:
        for count in (None, {"0": 16, "1": 4}):
            foreign = convert_state_dict(state, "pytorch", other, count=count)
            back = convert_state_dict(foreign, other, "pytorch", count=count)
            fresh = torch.nn.Sequential(
                torch.nn.BatchNorm2d(3), torch.nn.BatchNorm1d(3, affine=False)
            )
            result = fresh.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()})
            assert repr(result) == "<All keys matched successfully>"
            for name, tensor in fresh.state_dict().items():
                if "num_batches" not in name or other in ("cupybn", "pytorch", "chainer"):
                    torch.testing.assert_close(tensor, state[name])
    ours = cupybn.Sequential(cupybn.BatchNorm2d(3), cupybn.BatchNorm1d(3, affine=False))
    ours.load_state_dict(convert_state_dict(state))
    np.testing.assert_array_equal(ours[1].running_var, state["1.running_var"].numpy())


def test_the_result_can_be_saved(tmp_path):
    state = convert_state_dict(nested().state_dict(), "cupybn", "flax")
    assert isinstance(state, StateDict)
    cupybn.save(state, tmp_path / "flax.npz")
    assert_same(cupybn.load(tmp_path / "flax.npz"), state)


@pytest.mark.parametrize("framework", ["keras", "flax", "chainer", "pytorch"])
@pytest.mark.parametrize("training_on", [False, True], ids=["inference", "training on"])
def test_which_running_variance_comes_over(framework, training_on):
    """Without a count the predictions are kept; with it, what training here would have kept."""
    rng = np.random.default_rng(3)
    batches, eps = rng.standard_normal((4, 5, 3)) * 2 + 1, 1e-3
    unbiased = framework in ("chainer", "pytorch")
    mean, var = np.zeros(3), np.ones(3)
    for batch in batches:  # a training of theirs
        mean = 0.9 * mean + 0.1 * batch.mean(axis=0)
        var = 0.9 * var + 0.1 * batch.var(axis=0, ddof=unbiased)
    names = CONVENTIONS[framework]
    theirs = {
        names.key(("bn",), "weight"): np.full(3, 1.5),
        names.key(("bn",), "bias"): np.full(3, -2.0),
        names.key(("bn",), "running_mean"): mean,
        names.key(("bn",), "running_var"): var,
    }
    count = 5 if training_on else None
    ours = convert_state_dict(theirs, framework, count=count)
    layer = cupybn.BatchNorm1d(3, eps=eps, dtype="float64").eval()
    layer.load_state_dict(ours.part("bn"))

    x = rng.standard_normal((7, 3))
    predicted = (x - mean) / np.sqrt(var + eps) * 1.5 - 2.0
    if not training_on or unbiased:
        np.testing.assert_allclose(layer(x), predicted, rtol=1e-12)
    else:
        assert abs(layer(x) - predicted).max() > 0.01

    trained_here = cupybn.BatchNorm1d(3, dtype="float64")
    for batch in batches:
        trained_here(batch)
    start = 0.9**4  # which is biased and unbiased at once, and is corrected with the rest
    expected = trained_here.running_var + start * (5 / 4 - 1) * (not unbiased)
    assert np.allclose(layer.running_var, expected, rtol=1e-12) == (training_on or unbiased)
