"""Side by side with PyTorch's own batch norm on the CPU, where PyTorch is installed."""

from __future__ import annotations

import numpy as np
import pytest
import reference

import cupybn

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

CASES = [
    (cupybn.BatchNorm1d, torch.nn.BatchNorm1d, (8, 5)),
    (cupybn.BatchNorm1d, torch.nn.BatchNorm1d, (8, 5, 7)),
    (cupybn.BatchNorm2d, torch.nn.BatchNorm2d, (4, 5, 6, 7)),
    (cupybn.BatchNorm3d, torch.nn.BatchNorm3d, (2, 5, 3, 4, 5)),
]
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.7, "eps": 1e-2},
    {"affine": False},
    {"track_running_stats": False},
]


@pytest.mark.parametrize(("ours", "theirs", "shape"), CASES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_three_steps_and_evaluation(ours, theirs, shape, options, dtype):
    layer = ours(5, **options, dtype=dtype)
    module = theirs(5, **options, dtype=getattr(torch, dtype))
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    rng = np.random.default_rng(0)
    if layer.weight is not None:
        layer.weight[...] = rng.uniform(0.5, 1.5, 5)
        layer.bias[...] = rng.standard_normal(5)
        module.load_state_dict({k: torch.from_numpy(v) for k, v in layer.state_dict().items()})
    for training in (True, True, True, False):
        layer.train(training)
        module.train(training)
        x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
        tx = torch.from_numpy(x).requires_grad_()
        y, ty = layer.forward(x, save_for_backward=True), module(tx)
        ty.backward(torch.from_numpy(dy))
        assert reference.error(y, ty.detach().numpy()) < tolerance
        assert reference.error(layer.backward(dy), tx.grad.numpy()) < tolerance
    for name, parameter in module.named_parameters():
        assert reference.error(layer.grads[name], parameter.grad.numpy()) < tolerance
    state = module.state_dict()
    assert list(state) == list(layer.state_dict())
    for name, array in layer.state_dict().items():
        assert reference.error(array, state[name].numpy()) < tolerance
        assert array.dtype == state[name].numpy().dtype
    fresh = ours(5, **options, dtype=dtype)
    assert repr(fresh.load_state_dict(state)) == "<All keys matched successfully>"
    for name, array in fresh.state_dict().items():
        np.testing.assert_array_equal(array, state[name].numpy())


@pytest.mark.parametrize(
    ("shape", "cls", "module"),
    [
        ((2, 5, 3, 3), cupybn.BatchNorm1d, torch.nn.BatchNorm1d),
        ((2, 5), cupybn.BatchNorm2d, torch.nn.BatchNorm2d),
        ((2, 5, 3, 3), cupybn.BatchNorm3d, torch.nn.BatchNorm3d),
    ],
)
def test_messages_are_the_same(shape, cls, module):
    x = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match="expected") as ours:
        cls(5)(x)
    with pytest.raises(ValueError, match="expected") as theirs:
        module(5)(torch.from_numpy(x))
    assert str(ours.value) == str(theirs.value)


def test_tensors_as_input_and_state():
    x = torch.randn(4, 5, 3, 3)
    layer, module = cupybn.BatchNorm2d(5), torch.nn.BatchNorm2d(5)
    assert reference.error(layer(x), module(x).detach().numpy()) < 1e-5
    last = x.to(memory_format=torch.channels_last)
    assert layer(last).transpose(0, 2, 3, 1).flags.c_contiguous
    assert cupybn.BatchNorm2d(5).load_state_dict(module.state_dict()) == ([], [])


def test_repr_is_the_same_up_to_what_torch_added():
    theirs = repr(torch.nn.BatchNorm2d(4)).replace("bias=True, ", "")
    assert theirs == repr(cupybn.BatchNorm2d(4))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_and_inf_stay_in_their_channel(poison, dtype):
    layer, module = (
        cupybn.BatchNorm2d(5, dtype=dtype),
        torch.nn.BatchNorm2d(5).to(getattr(torch, dtype)),
    )
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((4, 5, 3, 3)).astype(dtype) for _ in range(2))
    x[1, 2, 0, 0] = poison
    tx = torch.from_numpy(x).requires_grad_()
    y, ty = layer.forward(x), module(tx)
    ty.backward(torch.from_numpy(dy))
    pairs = [
        (y.swapaxes(0, 1), ty.detach().numpy().swapaxes(0, 1)),
        (layer.backward(dy).swapaxes(0, 1), tx.grad.numpy().swapaxes(0, 1)),
        (layer.grads["weight"], module.weight.grad.numpy()),
        (layer.running_mean, module.running_mean.numpy()),
        (layer.running_var, module.running_var.numpy()),
    ]
    others = [0, 1, 3, 4]
    for ours, theirs in pairs:
        assert reference.error(ours[others], theirs[others]) < 1e-5
        assert not np.isfinite(ours[2]).any()
        assert not np.isfinite(theirs[2]).any()
    assert reference.error(layer.grads["bias"], module.bias.grad.numpy()) < 1e-5
