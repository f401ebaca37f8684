"""The PyTorch modules in one process, beside PyTorch's own."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from rank_checks import Spy  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from cupybn import BatchNorm2d, DeviceError, DTypeError, SelfCommunicator, ShapeError  # noqa: E402
from cupybn.backends import by_type  # noqa: E402
from cupybn.forward_backward import Bound  # noqa: E402
from cupybn.interop import torch as interop  # noqa: E402
from cupybn.testing import run_ranks  # noqa: E402

torch.set_num_threads(1)
ALONE = SelfCommunicator()
SHAPES = {
    "BatchNorm1d": [(8, 5), (8, 5, 7)],
    "BatchNorm2d": [(4, 5, 6, 7)],
    "BatchNorm3d": [(2, 5, 3, 4, 5)],
    "SyncBatchNorm": [(8, 5), (4, 5, 6, 7)],
}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.7, "eps": 1e-2},
    {"affine": False},
    {"track_running_stats": False},
    {"bias": False},
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def pair(name, *args, **options):
    """Our module and PyTorch's, with the same parameters."""
    comm = {"comm": ALONE} if name == "SyncBatchNorm" else {}
    ours = getattr(interop, name)(*args, **options, **comm)
    theirs = getattr(torch.nn, name)(*args, **options)
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            values = torch.from_numpy(np.random.default_rng(i).uniform(0.5, 1.5, a.shape))
            a.copy_(values)
            b.copy_(values)
    return ours, theirs


def close(ours, theirs, dtype=None):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    dtype = dtype or ours.dtype
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if ours.numel():
        tolerance = TOLERANCE.get(dtype, 0) * max(1.0, float(theirs.abs().max()))
        assert float((ours - theirs).abs().max()) <= tolerance


def compare(ours, theirs, x, dy):
    a, b = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in "ab")
    y, expected = ours(a), theirs(b)
    close(y, expected)
    y.backward(dy)
    expected.backward(dy)
    close(a.grad, b.grad)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(p.grad, q.grad, x.dtype)
    for key, value in ours.state_dict().items():
        close(value, theirs.state_dict()[key], x.dtype)
    return y, expected, a.grad, b.grad


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_three_steps_and_evaluation(name, shape, options, dtype):
    ours, theirs = pair(name, 5, **options, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for training in (True, True, True, False):
        ours.train(training)
        theirs.train(training)
        x, dy = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(2))
        compare(ours, theirs, x, dy)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", ["float32", "half"])
def test_half_precision(dtype, parameters, training):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    ours, theirs = pair("BatchNorm2d", 5)
    for module in (ours, theirs):
        module.train(training)
        if parameters == "half":
            module.to(dtype)
    x, dy = (torch.randn(4, 5, 6, 7).to(dtype) for _ in range(2))
    compare(ours, theirs, x, dy)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(given):
    ours, theirs = pair("BatchNorm2d", 5)
    x = torch.randn(4, 5, 6, 7).to(given)
    with torch.autocast("cpu", torch.bfloat16):
        compare(ours, theirs, x, torch.randn(4, 5, 6, 7).to(given))
        weight = torch.randn(5, 5, 1, 1)
        results = [m(torch.nn.functional.conv2d(x.float(), weight)) for m in (ours, theirs)]
    assert results[0].dtype == torch.bfloat16
    close(*results)


@pytest.mark.parametrize("data", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "parameters", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("affine", [True, False])
def test_dtypes_that_do_not_go_together_are_those_of_pytorch(data, parameters, affine):
    ours, theirs = pair("BatchNorm2d", 3, affine=affine, dtype=parameters)
    x = torch.randn(2, 3, 4, 4).to(data)
    try:
        expected = theirs(x)
    except RuntimeError:
        with pytest.raises(DTypeError, match="input goes with"):
            ours(x)
        assert ours.num_batches_tracked == 0
    else:
        close(ours(x), expected)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": lambda x: x[:, :, ::2],
    "turned": lambda x: x.transpose(2, 3),
    "samples inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "flipped": lambda x: x.flip(2),
    "expanded": lambda x: x[:1, :, :1].expand(4, -1, 6, -1),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dy_layout", ["contiguous", "channels_last", "expanded"])
def test_memory_formats(layout, dy_layout):
    ours, theirs = pair("BatchNorm2d", 5)
    x = LAYOUTS[layout](torch.randn(4, 5, 6, 7))
    dy = torch.randn(x.shape)
    if dy_layout == "channels_last":
        dy = dy.contiguous(memory_format=torch.channels_last)
    elif dy_layout == "expanded":
        dy = torch.ones(()).expand(x.shape)
    y, expected, dx, dx_expected = compare(ours, theirs, x, dy)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        kept = expected.is_contiguous(memory_format=memory_format)
        assert y.is_contiguous(memory_format=memory_format) == kept
        kept = dx_expected.is_contiguous(memory_format=memory_format)
        assert dx.is_contiguous(memory_format=memory_format) == kept or dy_layout != "contiguous"


def test_gradients_have_the_memory_format_of_the_input():
    """As they come from autograd: in ``.grad`` of a leaf they would be put into its format."""
    module = interop.BatchNorm2d(5)
    x = torch.randn(4, 5, 6, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = module(x)
    (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sin().sum(), x)
    for gradient in (dx, ddx):
        assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_3d():
    ours, theirs = pair("BatchNorm3d", 5)
    x = torch.randn(2, 5, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    y, _, dx, _ = compare(ours, theirs, x, torch.randn(x.shape))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert dx.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_copied(monkeypatch, layout, dtype):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    seen = {}
    backend = by_type[np.ndarray]
    forward, local_forward = Bound.forward, backend.local_forward

    def spied(self, call, x, params, **options):
        seen.update({"x": x, "mean": options["running"][0], "var": options["running"][1]})
        return forward(self, call, x, params, **options)

    def spied_backend(x3, y3, weight, bias, *args, **options):
        seen.update({"x3": x3, "y3": y3, "weight": weight, "bias": bias})
        return local_forward(x3, y3, weight, bias, *args, **options)

    monkeypatch.setattr(Bound, "forward", spied)
    monkeypatch.setattr(backend, "local_forward", spied_backend)
    module = interop.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4).to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    expected = {"x3": x, "weight": module.weight, "bias": module.bias}
    bound = expected | {"x": x, "mean": module.running_mean, "var": module.running_var}
    for call in range(4):  # the last two by the short way
        seen.clear()
        tensors = (bound if call < 2 else expected) | {"y3": module(x)}
        addresses = {name: array.ctypes.data for name, array in seen.items()}
        assert addresses == {name: tensor.data_ptr() for name, tensor in tensors.items()}


def test_parameters_may_be_strided(monkeypatch):
    modules = [interop.BatchNorm2d(3), interop.BatchNorm2d(3)]
    values = torch.randn(2, 3)
    backend, seen, results = by_type[np.ndarray], [], []
    backward = backend.local_backward

    def spied(dy3, x3, dx3, transform, **options):
        seen.extend([dy3, x3, dx3, *transform, *options.values()])
        backward(dy3, x3, dx3, transform, **options)

    monkeypatch.setattr(backend, "local_backward", spied)
    for module, wide in zip(modules, (values, values.repeat_interleave(2, 1)), strict=True):
        module.weight, module.bias = (
            torch.nn.Parameter(row[:: wide.shape[1] // 3]) for row in wide
        )
        x = torch.linspace(-1, 2, 96).reshape(2, 3, 4, 4).requires_grad_()
        y = module(x)
        y.backward(y.detach().cos())
        results.append([y, x.grad, module.weight.grad, module.bias.grad])
    assert not modules[1].weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(array.flags.carray for array in seen if isinstance(array, np.ndarray))


@pytest.mark.parametrize("name", list(SHAPES))
def test_constructors_names_and_text(name):
    cls, other = getattr(interop, name), getattr(torch.nn, name)
    positional = (4, 1e-3, 0.3, True, False)
    rest = (None, "cpu", torch.float64) if name == "SyncBatchNorm" else ("cpu", torch.float64)
    ours, theirs = cls(*positional, *rest), other(*positional, *rest)
    comm = ", comm=MPI.COMM_WORLD)" if name == "SyncBatchNorm" else ")"
    assert repr(ours) == repr(theirs)[:-1] + comm
    assert ours.weight.dtype == torch.float64
    names = list(inspect.signature(other.__init__).parameters)
    if name == "SyncBatchNorm":
        names[names.index("process_group")] = "comm"
        known = list(inspect.signature(cls.__init__).parameters)
        assert known[: len(names) - 1] == names[:-1]
    assert repr(cls(4, bias=False)) == repr(other(4, bias=False))[:-1] + comm
    assert isinstance(ours, torch.nn.Module)
    assert isinstance(ours, torch.nn.modules.batchnorm._BatchNorm)


class WithoutConstructor(interop.BatchNorm2d):
    """A subclass of a user's, which has no constructor of its own."""


@pytest.mark.parametrize("cls", [getattr(interop, name) for name in SHAPES] + [WithoutConstructor])
def test_a_misspelt_keyword_is_told_with_the_class(cls):
    for arguments, options in (((4,), {"epsilon": 1}), ((), {}), ((4, *range(20)), {})):
        with pytest.raises(TypeError, match=rf"^{cls.__name__}\.__init__\(\) "):
            cls(*arguments, **options)
    assert isinstance(pickle.loads(pickle.dumps(cls(4))), cls)


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dicts_load_both_ways(name, options):
    ours, theirs = pair(name, 3, **options)
    x = torch.randn(SHAPES[name][0])[:, :3]
    ours(x)
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert state._metadata == theirs.state_dict()._metadata
    assert str(theirs.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, state[key])
        assert value.dtype == state[key].dtype
    fresh = pair(name, 3, **options)[0]
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, state[key])


def test_version_1_states_have_no_counter():
    state = torch.nn.BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    module = interop.SyncBatchNorm(3)
    module.load_state_dict(state, strict=True)
    assert module.num_batches_tracked == 0


def test_deepcopy_pickle_and_communicators():
    spy = Spy(ALONE)
    module = interop.SyncBatchNorm(3, comm=spy, name="bn")
    module(torch.randn(4, 3))
    twin = copy.deepcopy(module)
    assert twin.comm is spy
    assert twin.name == "bn"
    twin(torch.randn(4, 3))
    assert (int(module.num_batches_tracked), int(twin.num_batches_tracked)) == (1, 2)
    assert "comm" not in module.state_dict()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for loaded in (pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert loaded.comm is None
        loaded.eval()(torch.randn(4, 3))
        with pytest.raises(RuntimeError, match=r"bn: this layer was unpickled.*set layer\.comm"):
            loaded.train()(torch.randn(4, 3))
        loaded.comm = ALONE
        loaded(torch.randn(4, 3))
    with pytest.raises(TypeError, match="comm must be"):
        interop.SyncBatchNorm(3, comm=3)
    with pytest.raises(TypeError, match="comm must be"):
        loaded.comm = "world"


def test_moves_between_dtypes():
    ours, theirs = pair("BatchNorm1d", 5)
    for dtype in (torch.float64, torch.float32):
        for module in (ours, theirs):
            module.to(dtype).zero_grad()
        compare(ours, theirs, torch.randn(4, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("BatchNorm1d", (2, 5, 3, 3)),
        ("BatchNorm2d", (2, 5)),
        ("BatchNorm3d", (2, 5, 3, 3)),
        ("SyncBatchNorm", (5,)),
        ("BatchNorm1d", (1, 5)),
        ("BatchNorm2d", (1, 5, 1, 1)),
    ],
)
def test_errors_read_like_pytorchs(name, shape):
    ours, theirs = pair(name, 5)
    with pytest.raises(ValueError, match="xpected") as expected:
        theirs(torch.zeros(shape))
    for _ in range(4):  # the signature is bound by then
        with pytest.raises(ValueError, match="xpected") as raised:
            ours(torch.zeros(shape))
    assert ours.num_batches_tracked == 0
    assert str(raised.value) == str(expected.value).replace("torch.Size([", "(").replace("])", ")")


@pytest.mark.parametrize("x", [torch.zeros(4, 3), torch.zeros(4, 5).long(), [[1.0]], None])
def test_bad_input_changes_nothing(x):
    module = interop.SyncBatchNorm(5, comm=ALONE, momentum=None)
    module(torch.randn(4, 5))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises((ShapeError, DTypeError)):
        module(x)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    module.momentum = 3
    with pytest.raises(ValueError, match="momentum must lie"):
        module(torch.randn(4, 5))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_an_empty_batch_is_no_batch_however_often_it_comes():
    module = interop.BatchNorm1d(3)
    for _ in range(4):
        module(torch.zeros(0, 3)).sum().backward()
    assert module.num_batches_tracked == 0
    assert torch.equal(module.running_var, torch.ones(3))
    assert torch.equal(module.weight.grad, torch.zeros(3))


def test_a_module_on_another_device_than_its_input():
    module = interop.SyncBatchNorm(3, comm=ALONE, device="meta")
    with pytest.raises(DeviceError, match="weight is on meta, but the input is on cpu"):
        module(torch.randn(4, 3))


def test_empty_batch():
    module = interop.SyncBatchNorm(3, comm=ALONE)
    x = torch.zeros(0, 3, 4, requires_grad=True)
    y = module(x)
    (y**2).sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 4)
    assert torch.equal(module.weight.grad, torch.zeros(3))
    assert module.num_batches_tracked == 0
    assert torch.equal(module.running_var, torch.ones(3))


@pytest.mark.parametrize("shape", [(5, 3), (3, 3, 2), (2, 3, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_gradcheck_and_gradgradcheck(shape, options):
    module = pair("SyncBatchNorm", 3, **options, dtype=torch.float64)[0]
    names = [name for name, _ in module.named_parameters()]
    inputs = [torch.randn(shape, dtype=torch.float64), *module.parameters()]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]

    def forward(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert gradcheck(forward, inputs)
    assert gradgradcheck(forward, inputs)


def test_third_derivatives_are_refused():
    module = interop.BatchNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    (first,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first and second derivatives, no third ones"):
        second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first and second derivatives, no third ones"):
        torch.autograd.grad(second.square().sum(), x)  # which once_differentiable would let pass


class Block(torch.nn.Module):
    def __init__(self, comm=ALONE, inner=None):
        super().__init__()
        self.a = interop.SyncBatchNorm(3, comm=comm, name="a")
        self.mix = torch.nn.Linear(3, 3)
        self.b = interop.SyncBatchNorm(3, comm=comm, name="b", momentum=None)
        self.inner = inner

    def forward(self, x):
        x = self.b(self.mix(self.a(x)).relu())
        return x if self.inner is None else run_checkpointed(self.inner, x)


def run_checkpointed(block, x, **options):
    options = {"use_reentrant": False, "context_fn": interop.recompute_contexts} | options
    return checkpoint(block, x, **options)


def gradients_and_state(block, x, run, times=1):
    x = x.clone().requires_grad_()
    y = run(block, x)
    for i in range(times):
        (y**2).sum().backward(retain_graph=i + 1 < times)
    values = [x.grad, y.detach(), *(p.grad for p in block.parameters())]
    return values, list(block.state_dict().values())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpoint_is_the_same_bit_for_bit(nested, times, early_stop):
    from torch.utils.checkpoint import set_checkpoint_early_stop

    torch.manual_seed(0)
    block = Block(inner=Block(inner=Block()) if nested else None)
    plain, recomputed = copy.deepcopy(block), copy.deepcopy(block)
    x = torch.randn(6, 3)
    if nested:  # the plain one must not recompute inside
        plain.inner.inner.forward = Block.forward.__get__(plain.inner.inner)
    with set_checkpoint_early_stop(early_stop):
        expected = gradients_and_state(plain, x, lambda block, x: block(x), times)
        actual = gradients_and_state(recomputed, x, run_checkpointed, times)
    for ours, theirs in zip(expected, actual, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    assert recomputed.a.num_batches_tracked == 1


def test_several_checkpoints_before_one_backward():
    torch.manual_seed(0)
    block = Block()
    twin = copy.deepcopy(block)
    x = torch.randn(6, 3)

    def twice(run):
        def forward(block, x):
            return run(block, run(block, x) + 1)

        return forward

    expected = gradients_and_state(block, x, twice(lambda block, x: block(x)))
    actual = gradients_and_state(twin, x, twice(run_checkpointed))
    for ours, theirs in zip(expected, actual, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_a_recomputation_inside_a_forward_is_not_recorded():
    """A checkpointed function that differentiates a checkpoint inside it."""
    block, inner = Block(), Block()
    twins = copy.deepcopy((block, inner))

    def forward(block, inner, run):
        def penalised(x):
            z = x * 1
            y = run(inner, z)
            (slope,) = torch.autograd.grad((y**2).sum(), z, retain_graph=True)
            return block(y + slope)

        return penalised

    def plain(block, x):
        return block(x)

    x = torch.randn(6, 3)
    expected = gradients_and_state(block, x, lambda block, x: forward(block, inner, plain)(x))
    actual = gradients_and_state(
        twins[0],
        x,
        lambda block, x: run_checkpointed(forward(block, twins[1], run_checkpointed), x),
    )
    for ours, theirs in zip(expected, actual, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_a_checkpoint_without_the_contexts_is_refused(options):
    block = Block()
    y = checkpoint(block, torch.randn(6, 3, requires_grad=True), **options)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    with pytest.raises(RuntimeError, match="context_fn=cupybn.interop.torch.recompute_contexts"):
        y.sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_a_recomputation_that_goes_another_way_is_refused():
    block = Block()
    turns = []

    def fickle(x):
        turns.append(0)
        first, second = (block.a, block.b) if len(turns) == 1 else (block.b, block.a)
        return second(first(x))

    y = run_checkpointed(fickle, torch.randn(6, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="recomputed otherwise.*now b with input.*forward was a"):
        y.sum().backward()


def test_saved_tensor_hooks_and_changes_in_place():
    module = interop.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    plain = x.clone().requires_grad_()
    (module(plain) ** 2).sum().backward()
    hooked = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        y = module(hooked)
    (y**2).sum().backward()
    torch.testing.assert_close(hooked.grad, plain.grad)
    z = x.clone().requires_grad_() * 1
    y = module(z)
    z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = module(x.clone().requires_grad_())
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_no_grad_and_inference_mode():
    ours, theirs = pair("BatchNorm2d", 3)
    x = torch.randn(4, 3, 5, 5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = ours(x)
            close(y, theirs(x))
        assert not y.requires_grad
    for key, value in ours.state_dict().items():
        close(value, theirs.state_dict()[key], torch.float32)


def test_backward_runs_in_any_thread():
    module = interop.BatchNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    loss = (module(x) ** 3).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    other = x.detach().clone().requires_grad_()
    (module(other) ** 3).sum().backward()
    assert torch.equal(x.grad, other.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_compiled_with_a_gap_in_the_graph():
    torch.compiler.reset()
    bn = interop.SyncBatchNorm(3, comm=ALONE, momentum=None)
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), bn, torch.nn.ReLU())
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend="eager")
    x = torch.randn(4, 3)
    for _ in range(2):
        y, expected = compiled(x), net(x)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
    assert torch.equal(net[0].weight.grad, twin[0].weight.grad)
    assert twin[1].num_batches_tracked == 2


# ---- converting ----------------------------------------------------------------------------------


def tree():
    shared = torch.nn.BatchNorm1d(3)
    return torch.nn.ModuleDict({
        "conv": torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3, eps=1e-3)),
        "one": shared,
        "two": shared,
        "theirs": torch.nn.SyncBatchNorm(3, momentum=None),
        "ours": interop.BatchNorm3d(3, affine=False),
        "already": interop.SyncBatchNorm(3, comm=None),
        "instance": torch.nn.InstanceNorm2d(3),
    })  # fmt: skip


def test_convert_keeps_everything():
    net = tree()
    net["conv"].eval()
    calls = []
    handle = net["one"].register_forward_hook(lambda *args: calls.append(0))
    before = {name: id(tensor) for name, tensor in net.state_dict(keep_vars=True).items()}
    texts = {name: part.extra_repr() for name, part in net.named_modules()}
    assert interop.convert_sync_batchnorm(net, ALONE) is net
    assert before == {name: id(t) for name, t in net.state_dict(keep_vars=True).items()}
    for name, part in net.named_modules():
        text = part.extra_repr()
        assert text.removesuffix(", comm=SelfCommunicator()") == texts[name].partition(", comm")[0]
    norms = {n: m for n, m in net.named_modules() if isinstance(m, interop.SyncBatchNorm)}
    assert list(norms) == ["conv.1", "one", "theirs", "ours", "already"]
    assert all(m.name == n and m.comm is ALONE for n, m in norms.items())
    assert net["two"] is net["one"]
    assert not net["conv"][1].training
    assert net["one"].training
    assert type(net["instance"]) is torch.nn.InstanceNorm2d
    assert "process_group" not in vars(net["theirs"])
    net["one"](torch.randn(4, 3))
    assert calls == [0]
    handle.remove()
    net["one"](torch.randn(4, 3))
    assert calls == [0]
    assert isinstance(interop.SyncBatchNorm.convert_sync_batchnorm(tree()["one"]), torch.nn.Module)


def test_a_shared_batch_norm_is_skipped_by_either_path_and_names_stay():
    net = tree()
    net["already"].name = "own"
    interop.convert_sync_batchnorm(net, ALONE, skip="two")
    assert net["one"] is net["two"]
    assert type(net["one"]) is torch.nn.BatchNorm1d
    assert net["already"].name == "own"


def test_convert_a_module_that_is_a_batch_norm():
    old = torch.nn.BatchNorm2d(3)
    new = interop.convert_sync_batchnorm(old, ALONE)
    assert type(new) is interop.SyncBatchNorm
    assert type(old) is torch.nn.BatchNorm2d
    assert new.weight is old.weight
    assert new.running_var is old.running_var
    new.weight = None
    assert old.weight is not None


class Own(torch.nn.BatchNorm2d):
    pass


def test_convert_refuses_what_it_would_break():
    other = Own(3)
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Sequential(other))
    with pytest.raises(TypeError, match=r"'1\.0' is a Own, a subclass"):
        interop.convert_sync_batchnorm(net, ALONE)
    assert type(net[0]) is torch.nn.BatchNorm2d
    interop.convert_sync_batchnorm(net, ALONE, skip="1.0")
    assert type(net[0]) is interop.SyncBatchNorm
    assert net[1][0] is other
    with pytest.raises(ValueError, match="skip names no part of the module: 'nothing'"):
        interop.convert_sync_batchnorm(net, ALONE, skip=["nothing"])
    with pytest.raises(TypeError, match="comm must be"):
        interop.convert_sync_batchnorm(net, 7)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got BatchNorm2d"):
        interop.convert_sync_batchnorm(BatchNorm2d(3), ALONE)


def test_the_communicator_of_the_world_is_looked_up_late():
    module = interop.convert_sync_batchnorm(torch.nn.BatchNorm1d(3))
    assert module.comm is None
    assert module._comm.resolved is None
    module.eval()(torch.randn(4, 3))
    assert module._comm.resolved is None


def test_an_activity_of_one_thread_is_not_another_ones():
    """Recomputing on one rank, while another one is in a first forward, as threads."""

    def step(comm):
        block = Block(comm)
        torch.manual_seed(1)
        x = torch.randn(6, 3, requires_grad=True)
        (run_checkpointed(block, x) ** 2).sum().backward()
        return int(block.a.num_batches_tracked)

    assert run_ranks(3, step, timeout=30) == [1, 1, 1]


def test_a_parametrised_weight_is_computed_once_a_forward():
    """And the one that is computed is the one that is used and differentiated."""
    computed = []

    class Drawn(torch.nn.Module):
        def forward(self, weight):
            computed.append(weight + torch.rand(()))
            return computed[-1]

    module = interop.BatchNorm1d(3)
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Drawn())
    x = torch.randn(8, 3, requires_grad=True)
    for n in range(1, 5):  # unbound and bound
        computed.clear()
        y = module(x)
        assert len(computed) == 1, n
        expected = torch.nn.functional.batch_norm(x, None, None, computed[0], None, True)
        torch.testing.assert_close(y, expected)
    with FlopCounterMode(display=False):  # as an operator
        computed.clear()
        y = module(x)
    assert len(computed) == 1
    expected = torch.nn.functional.batch_norm(x, None, None, computed[0], None, True)
    torch.testing.assert_close(y, expected)


def test_a_module_with_a_communicator_of_its_own_is_asked_every_time():
    asked = []

    class Own(interop.BatchNorm1d):
        def communicator(self):
            asked.append(True)
            return super().communicator()

    module = Own(3)
    for n in range(1, 5):
        module(torch.randn(8, 3))
        assert len(asked) == n


@pytest.mark.parametrize("layout", ["rows", "channels last", "turned", "transposed"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 2, 4, 5)], ids=str)
def test_y_takes_operations_in_place_in_any_memory_format(shape, layout):
    """The pattern of ResNets: ReLU(inplace=True), out += identity, on channels-last input."""
    x = torch.randn(shape)
    if layout == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "turned":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "transposed":  # of a transformer's (N, L, C), without a copy
        x = torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    name = {5: "BatchNorm3d", 4: "BatchNorm2d"}.get(len(shape), "BatchNorm1d")
    modules = getattr(interop, name)(3), getattr(torch.nn, name)(3)
    for _ in range(3):  # unbound and bound
        given = [x.detach().clone(memory_format=torch.preserve_format) for _ in range(2)]
        outs = []
        for module, leaf in zip(modules, given, strict=True):
            y = module(leaf.requires_grad_())
            assert not y._is_view()
            y += 0.5
            outs.append(torch.relu_(y))
            outs[-1].square().sum().backward()
            assert not leaf.grad._is_view()
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*(leaf.grad for leaf in given))
