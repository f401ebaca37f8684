"""Graphs of PyTorch modules: compiled, exported, traced, scripted; meta and fake tensors."""

from __future__ import annotations

import copy
import io
import warnings

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from rank_checks import Spy, Two  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from cupybn import SelfCommunicator  # noqa: E402
from cupybn.interop import torch as interop  # noqa: E402

torch.set_num_threads(1)
ALONE = SelfCommunicator()
NORMS = {"BatchNorm1d": (6, 4, 5), "BatchNorm2d": (3, 4, 5, 6), "BatchNorm3d": (2, 4, 3, 4, 5)}
OPTIONS = [
    {},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
    torch.compiler.reset()


def convolutions(norms):
    """Two branches with batch norms, channels-last inside, operations in place."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
            self.first = norms.BatchNorm2d(4)
            self.left = torch.nn.Conv2d(4, 4, 1, bias=False)
            self.second = norms.BatchNorm2d(4, momentum=None)
            self.right = torch.nn.Conv2d(4, 4, 3, padding=1)
            self.third = norms.BatchNorm2d(4, affine=False)
            self.head = torch.nn.Linear(4, 2)
            self.last = norms.BatchNorm1d(2, eps=1e-3)

        def forward(self, x):
            x = torch.relu_(self.first(self.stem(x)))
            y = self.second(self.left(x))
            y += self.third(self.right(x))
            return self.last(self.head(torch.relu_(y).mean((2, 3))))

    torch.manual_seed(0)
    return Model().double()


def steps(model, run, n=3, sizes=(4,)):
    """Outputs, gradients and states of some steps."""
    found = []
    generator = torch.Generator().manual_seed(1)
    for i in range(n):
        x = torch.randn(sizes[i % len(sizes)], 3, 6, 5, generator=generator).double()
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        y = run(x)
        model.zero_grad()
        y.pow(3).sum().backward()
        found += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
        found += [values.clone() for values in model.state_dict().values()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
    return found


def same(ours, theirs, tolerance=1e-9):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "turned", "empty"])
def test_operators_are_what_they_say(layout, dtype):
    """Schema, fake tensors, autograd and AOT: PyTorch's own checks of an operator."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(4, 3, 5, 6).to(dtype)
    if layout == "columns":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "turned":
        x = x.transpose(2, 3)
    elif layout == "empty":
        x = x[:0]
    weight, bias, mean, var = (torch.rand(3, dtype=wide) for _ in range(4))
    counter = torch.tensor(3)
    given = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    mask = torch.rand(x.shape[0], *x.shape[2:]) < 0.8
    operators = torch.ops.cupybn
    tests = ("test_schema", "test_faketensor")
    if dtype == torch.float64:
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    for arguments in (
        (*given, mean, var, counter, 0.1, 1e-5),
        (*given, mean, var, counter, 0.1, 1e-5, mask),
        (x, weight, None, mean, var, None, None, 1e-5),
        (x, None, None, None, None, None, 0.1, 1e-5),
    ):
        torch.library.opcheck(operators.batch_norm.default, arguments, test_utils=tests)
    statistics = operators.batch_norm(x, *given[1:], None, None, None, 0.1, 1e-5)[1]
    dy = torch.randn(x.shape).to(dtype).requires_grad_()
    ddx = torch.randn(x.shape).to(dtype)
    arguments = (dy, *given, statistics, 1e-5, mask)
    torch.library.opcheck(operators.batch_norm_backward.default, arguments, test_utils=tests)
    arguments = (ddx, weight.detach(), None, dy.detach(), *given[:2], statistics, 1e-5, mask)
    tests = tests[:2]
    torch.library.opcheck(operators.batch_norm_double_backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize("name", list(NORMS))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_operator_has_the_bits_of_the_module(name, options):
    modules = [getattr(interop, name)(4, **options) for _ in "ab"]
    for _ in range(4):
        x = torch.randn(NORMS[name])
        x, z = x.requires_grad_(), x.detach().clone().requires_grad_()
        y, other = modules[0](x), modules[1]._operator(z)
        assert torch.equal(y, other)
        for tensor in (y, other):
            tensor.sin().sum().backward()
        assert torch.equal(x.grad, z.grad)
        for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        for key, value in modules[0].state_dict().items():
            assert torch.equal(value, modules[1].state_dict()[key]), key


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("sizes", [(4,), (4, 7, 5)], ids=str)
def test_local_batch_norms_compile_without_a_gap(backend, sizes):
    ours, theirs = convolutions(interop), convolutions(torch.nn)
    run = torch.compile(ours, fullgraph=True, backend=backend)
    same(steps(ours, run, sizes=sizes), steps(theirs, theirs, sizes=sizes))
    x = torch.randn(4, 3, 6, 5).double()
    ours.eval()
    same([run(x)], [theirs.eval()(x)])


def test_compiled_in_float32_half_precision_and_autocast():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        ours, theirs = (norms.BatchNorm2d(4) for norms in (interop, torch.nn))
        run = torch.compile(lambda x, m=ours: m(x * 2).sin(), fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x = torch.randn(4, 4, 5, 5).to(dtype)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = run(a), theirs(b * 2).sin()
            y.sum().backward()
            expected.sum().backward()
            same([y, ours.running_var], [expected, theirs.running_var], tolerance)
            same([a.grad, ours.weight.grad], [b.grad, theirs.weight.grad], max(tolerance, 1e-4))
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), interop.BatchNorm2d(4))
    run = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert run(torch.randn(2, 3, 6, 6)).dtype == torch.bfloat16


def test_many_layers_compiled_one_by_one_are_compiled_once():
    layers = [interop.BatchNorm2d(4) for _ in range(12)]
    counter = torch._dynamo.testing.CompileCounter()
    runs = [torch.compile(layer, backend=counter, fullgraph=True) for layer in layers]
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for run in runs:
            run(torch.randn(2, 4, 3, 3))
    assert all(layer.num_batches_tracked == 1 for layer in layers)


def test_a_compiled_forward_that_fails_changes_nothing():
    module = interop.BatchNorm2d(4)
    run = torch.compile(module, backend="aot_eager")
    run(torch.randn(3, 4, 5, 5))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match="more than 1 value per channel"):
        run(torch.randn(1, 4, 1, 1))
    for bad in (torch.randn(3, 5, 5, 5), torch.randn(3, 4)):
        with pytest.raises((ValueError, RuntimeError), match="expected"):
            run(bad)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_compiled_block_in_a_checkpoint_with_the_contexts_updates_once():
    from torch.utils.checkpoint import checkpoint

    module = interop.BatchNorm2d(4).double()
    plain = copy.deepcopy(module)
    run = torch.compile(lambda x: module(x).sin(), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 5, 5).double()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = checkpoint(run, a, use_reentrant=False, context_fn=interop.recompute_contexts)
    y.sum().backward()
    plain(b).sin().sum().backward()
    assert module.num_batches_tracked == 1
    same([a.grad, module.running_var], [b.grad, plain.running_var])


def test_a_checkpoint_inside_of_a_compiled_graph():
    from torch.utils.checkpoint import checkpoint

    results = []
    for norms, compiled in ((interop, True), (torch.nn, False)):
        torch.manual_seed(0)
        block = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), norms.BatchNorm2d(4), torch.nn.Tanh())
        block.double()

        def run(x, block=block):
            return checkpoint(block, x, use_reentrant=False).sum()

        function = torch.compile(run, fullgraph=True, backend="inductor") if compiled else block
        x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(3)).double()
        x.requires_grad_()
        function(x).sum().backward()
        results.append([x.grad, *block.state_dict().values()])
    same(*results)


def test_fullgraph_of_a_communicating_layer_names_the_way_out():
    module = interop.SyncBatchNorm(3, comm=ALONE)
    run = torch.compile(module, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="change the order of messages"):
        run(torch.randn(4, 3))
    assert module.num_batches_tracked == 0


# ---- torch.export, make_fx, fake and meta tensors ------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_export_saved_and_loaded(training, strict):
    ours, theirs = convolutions(interop).train(training), convolutions(torch.nn).train(training)
    x = torch.randn(4, 3, 6, 5).double()
    shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(ours, (x,), dynamic_shapes=shapes, strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for n in (4, 6):
        x = torch.randn(n, 3, 6, 5).double()
        same([loaded(x)], [theirs(x)])
    state = loaded.state_dict()
    for key, value in theirs.state_dict().items() if training else ():
        torch.testing.assert_close(state[key], value)
    torch.export.export(ours, (x,)).run_decompositions()


def test_export_of_a_synchronised_model():
    """In evaluation mode, and for one process in training too; over ranks it is refused."""
    net = interop.convert_sync_batchnorm(convolutions(torch.nn), Two())
    x = torch.randn(4, 3, 6, 5).double()
    torch.export.export(copy.deepcopy(net).eval(), (x,))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"first: a \w+ cannot be normalised over ranks"):
            torch.export.export(net, (x,))
    assert net.first.num_batches_tracked == 0
    for module in net.modules():  # the advice
        if isinstance(module, interop.SyncBatchNorm):
            module.comm = ALONE
    torch.export.export(net, (x,))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_of_a_training_step(mode):
    """Forward and backward in one graph."""

    def run(module):
        def step(x, weight, bias):
            parameters = {"weight": weight, "bias": bias}
            y = torch.func.functional_call(module, parameters, (x,))
            return torch.autograd.grad(y.sin().sum(), (x, weight, bias))

        return step

    options = {"track_running_stats": mode == "real", "dtype": torch.float64}
    ours, theirs = interop.BatchNorm2d(4, **options), torch.nn.BatchNorm2d(4, **options)
    inputs = [torch.randn(3, 4, 5, 5), torch.rand(4), torch.rand(4)]
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    graph = make_fx(run(ours), tracing_mode=mode)(*inputs)
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("cupybn.batch_norm.default" in name for name in names) == 1
    assert sum("cupybn.batch_norm_backward" in name for name in names) == 1
    same(graph(*inputs), run(theirs)(*inputs))


def test_make_fx_over_ranks_is_refused_and_the_others_are_told():
    spy = Spy(Two())  # not ranks as threads: PyTorch traces in one thread of a process
    module = interop.SyncBatchNorm(3, comm=spy, name="bn")
    with pytest.raises(RuntimeError, match="bn: a Tensor cannot be normalised over ranks"):
        make_fx(module)(torch.randn(4, 3))
    assert [label for label, _ in spy.sent] == ["forward of 'bn', after RuntimeError"]
    assert module.num_batches_tracked == 0
    assert module(torch.randn(4, 3)).shape == (4, 3)


def test_meta_tensors_need_no_communicator():
    module = interop.SyncBatchNorm(4, device="meta")
    assert module(torch.randn(3, 4, device="meta")).shape == (3, 4)
    assert module._comm.resolved is None


@pytest.mark.parametrize("name", list(NORMS))
def test_meta_and_fake_tensors_have_shapes_and_cost_nothing(name):
    for ours, theirs in (
        (getattr(interop, name)(4), getattr(torch.nn, name)(4)),
        (interop.SyncBatchNorm(4, comm=Two()), getattr(torch.nn, name)(4)),
    ):
        for training in (True, False):
            results = []
            for module in (ours, theirs):
                moved = copy.deepcopy(module).train(training).to("meta")
                x = torch.randn(NORMS[name], device="meta", requires_grad=True)
                y = moved(x)
                y.sum().backward()
                results.append([y, x.grad, moved.weight.grad, moved.running_mean])
            for a, b in zip(*results, strict=True):
                assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.randn(NORMS[name], requires_grad=True)
            y = ours.train()(x)
            y.sum().backward()
            assert y.shape == x.grad.shape == NORMS[name]
        assert ours.num_batches_tracked == 0


def test_aot_module_and_flop_counters():
    from functorch.compile import aot_module, nop
    from torch.utils.flop_counter import FlopCounterMode

    ours, theirs = convolutions(interop), convolutions(torch.nn)
    same(steps(ours, aot_module(ours, nop), n=2), steps(theirs, theirs, n=2))
    counts = []
    for norms in (interop, torch.nn):
        model = convolutions(norms)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(4, 3, 6, 5).double()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    synchronised = interop.convert_sync_batchnorm(convolutions(torch.nn), Two())
    with FlopCounterMode(display=False) as counter:  # runs as always, and sends its messages
        synchronised(torch.randn(4, 3, 6, 5).double()).sum().backward()
    assert counter.get_total_flops() == counts[0]


# ---- fx, TorchScript -----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["local", "synchronised"])
def test_symbolic_trace_takes_batch_norms_for_leaves(kind, training):
    model = convolutions(interop if kind == "local" else torch.nn).train(training)
    if kind == "synchronised":
        interop.convert_sync_batchnorm(model, ALONE)
    other = convolutions(torch.nn).train(training)
    graph = torch.fx.symbolic_trace(model)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert {"first", "second", "third", "last"} <= set(targets)
    x = torch.randn(4, 3, 6, 5).double()
    same([graph(x), graph.first.running_mean], [other(x), other.first.running_mean])


def test_prepare_fx_of_quantisation():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    for norms in (interop, torch.nn):
        model = convolutions(norms).float().eval()
        x = torch.randn(4, 3, 6, 5)
        prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
        same([prepared(x)], [model(x)], 1e-5)
        assert norms is torch.nn or "first" in dict(prepared.named_modules())


@pytest.mark.parametrize("training", [True, False])
def test_jit_trace(training):
    ours, theirs = convolutions(interop).train(training), convolutions(torch.nn).train(training)
    x = torch.randn(4, 3, 6, 5).double()
    traced = torch.jit.trace(copy.deepcopy(ours), x, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    theirs(x)  # as tracing did
    for n in (4, 4, 6):
        x = torch.randn(n, 3, 6, 5).double()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = loaded(a), theirs(b)
        y.sin().sum().backward()
        expected.sin().sum().backward()
        same([y, a.grad], [expected, b.grad])
    if training:
        state = loaded.state_dict()
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(state[key], value)


def test_jit_trace_over_ranks_is_refused():
    module = interop.SyncBatchNorm(3, comm=Two())
    with pytest.raises(RuntimeError, match="cannot be normalised over ranks"):
        torch.jit.trace(module, torch.randn(4, 3))
    assert module.num_batches_tracked == 0
    torch.jit.trace(module.eval(), torch.randn(4, 3))


def test_jit_script_in_evaluation_mode():
    models = [convolutions(interop), interop.convert_sync_batchnorm(convolutions(torch.nn), Two())]
    x = torch.randn(4, 3, 6, 5).double()
    for model in models:
        model.first.running_mean += 0.5
        expected = model.eval()(x)
        scripted = torch.jit.script(model)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        for module in (scripted, torch.jit.load(buffer)):
            assert torch.equal(module(x), expected)
            assert list(module.state_dict()) == list(model.state_dict())
        assert type(model.first).__module__.startswith("cupybn")  # is as it was
        with pytest.raises((ValueError, RuntimeError, torch.jit.Error), match="expected"):
            scripted.first(x[0, 0, 0])
        with pytest.raises(torch.jit.Error, match="scripted, and cannot train"):
            scripted.train()(x)
    trained = torch.jit.script(interop.SyncBatchNorm(3, track_running_stats=False).eval())
    x = torch.randn(4, 3)
    same([trained(x)], [torch.nn.functional.batch_norm(x, None, None, training=True)], 1e-5)


def test_warnings_are_those_of_pytorch():
    """Compiling gives no warning of this package's own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(interop.BatchNorm2d(4), backend="aot_eager")(torch.randn(2, 4, 3, 3))
    assert not [str(each.message) for each in caught if "cupybn" in str(each.filename)]
