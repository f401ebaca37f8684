"""The short way of a usual step: its bits are those of the long one, and nothing else takes it."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from cupybn.backends import by_type  # noqa: E402
from cupybn.interop import torch as interop  # noqa: E402
from cupybn.interop.torch import autograd, direct, modules  # noqa: E402

SHAPE = (6, 3, 4, 5)


@pytest.fixture
def taken(monkeypatch):
    """Which way each forward and backward took."""
    found = []

    def watched(way, function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            found.extend([] if result is None else [way])
            return result

        return call

    for direction in ("forward", "backward"):
        run = watched(f"short {direction}", getattr(direct.Direct, direction))
        monkeypatch.setattr(direct.Direct, direction, run)
    for module, name in ((modules, "run_forward"), (autograd, "run_backward")):
        run = watched(name.replace("run", "long").replace("_", " "), getattr(module, name))
        monkeypatch.setattr(module, name, run)
    return found


def tensor(seed, shape=SHAPE, dtype=torch.float32, layout="rows"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "columns" else x


def step(module, x, dy):
    """y, dx and all gradients and buffers after a step."""
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


def same_bits(found, expected):
    return all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_both_ways_have_the_same_bits(taken, monkeypatch, dtype, layout):
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    long, short = (interop.BatchNorm2d(3, dtype=kind) for _ in range(2))
    for i in range(4):
        x, dy = (tensor(seed, dtype=dtype, layout=layout) for seed in (i, 10 + i))
        found = step(short, x, dy)
        with monkeypatch.context() as patch:
            patch.setattr(direct, "is_usual", lambda: False)
            assert same_bits(found, step(long, x, dy))
    assert taken.count("short forward") == taken.count("short backward") == 2
    assert taken.count("long forward") == taken.count("long backward") == 6


def expanded(module, x, dy):
    return x, dy[:1, :1, :1, :1].expand_as(dy)


def negated(module, x, dy):
    """Memory in which the values have the other sign."""
    return [torch._neg_view(t) for t in (x, dy)]


def weight_in_steps(module, x, dy):
    module.weight.data = torch.randn(6, generator=torch.Generator().manual_seed(3))[::2]
    return x, dy


def negated_weight(module, x, dy):
    module.weight.data = torch._neg_view(module.weight.data)
    return x, dy


def statistics_in_steps(module, x, dy):
    module.running_mean = torch.zeros(6)[::2]
    return x, dy


def counter_of_32_bits(module, x, dy):
    module.num_batches_tracked = module.num_batches_tracked.int()
    return x, dy


def without_a_counter(module, x, dy):
    module.num_batches_tracked = None
    return x, dy


def parametrised(module, x, dy):
    torch.nn.utils.parametrize.register_parametrization(module, "weight", torch.nn.Softplus())
    return x, dy


OF_DATA = (expanded, negated)


@pytest.mark.parametrize(
    "change",
    [
        *OF_DATA,
        weight_in_steps,
        negated_weight,
        statistics_in_steps,
        counter_of_32_bits,
        without_a_counter,
        parametrised,
    ],
)
def test_what_is_unusual_after_usual_steps_is_right(taken, change):
    ours, theirs = interop.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    for i in range(7):
        x, dy = tensor(i), tensor(10 + i)
        if i == 3:
            taken.clear()
        if i == 3 or (i > 3 and change in OF_DATA):
            for module in (ours, theirs):
                given = change(module, x, dy)
            x, dy = given
        found = step(ours, x, dy)
        for a, b in zip(found, step(theirs, x, dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    usual = change is parametrised
    assert ("short backward" in taken) == usual
    assert ("short forward" in taken) == (usual or change is expanded)


def test_a_weight_that_was_cut_is_refused(taken):
    """Memory that is where it was, and shorter."""
    module = interop.BatchNorm2d(3)
    for i in range(3):
        step(module, tensor(i), tensor(i))
    assert "short forward" in taken
    before = [buffer.clone() for buffer in module.buffers()]
    module.weight.data = module.weight.data[:2]
    with pytest.raises(ValueError, match="weight"):
        step(module, tensor(5), tensor(5))
    assert same_bits(module.buffers(), before)


def test_memory_that_was_freed_is_refused(taken):
    module = interop.BatchNorm2d(3)
    for i in range(3):
        step(module, tensor(i), tensor(i))
    assert "short forward" in taken
    x, before = tensor(5), [buffer.clone() for buffer in module.buffers()]
    x.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="its memory was freed"):
        module(x)
    assert same_bits(module.buffers(), before)


def test_a_kernel_that_fails_changes_nothing(taken, monkeypatch):
    module = interop.BatchNorm2d(3)
    for i in range(3):
        step(module, tensor(i), tensor(i))
    before = [t.clone() for t in module.state_dict().values()]

    def failing(*args, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(by_type[np.ndarray], "local_forward", failing)
        with pytest.raises(MemoryError):
            module(tensor(5))
    assert same_bits(module.state_dict().values(), before)


@pytest.mark.parametrize("inside", [nullcontext, torch.no_grad])
def test_who_looks_on_sees_the_operator(taken, inside):
    """A mode that is entered after usual steps is not passed over."""
    from torch.utils.flop_counter import FlopCounterMode

    module = interop.BatchNorm2d(3)
    for i in range(3):
        step(module, tensor(i), tensor(i))
    taken.clear()
    with inside(), FlopCounterMode(display=False):
        module(tensor(5))
    assert taken == []


def test_the_version_of_the_statistics_goes_up(taken):
    module = interop.BatchNorm2d(3)
    for i in range(4):
        versions = [buffer._version for buffer in module.buffers()]
        step(module, tensor(i), tensor(i))
        assert all(b._version > v for b, v in zip(module.buffers(), versions, strict=True))
    assert taken[-2:] == ["short forward", "short backward"]
