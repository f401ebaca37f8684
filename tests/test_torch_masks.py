"""``mask=`` of the PyTorch modules: the result is that of the valid values alone, packed."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from cupybn import CupyBNError, PeerError, SelfCommunicator  # noqa: E402
from cupybn.interop import torch as interop  # noqa: E402
from cupybn.testing import run_ranks  # noqa: E402

SHAPES = {1: (9, 3, 7), 2: (5, 3, 4, 6), 3: (3, 3, 2, 4, 5)}
ERRORS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAN = float("nan")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def data(shape, dtype=torch.float64, layout="rows", seed=0, share=0.5):
    """x, dy and a mask; NaN and Inf where x and dy are masked."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand((shape[0], *shape[2:]), generator=generator) < share
    x, dy = (x + 1).to(dtype), dy.to(dtype)
    x.movedim(1, -1)[~mask], dy.movedim(1, -1)[~mask] = NAN, float("inf")
    if layout == "columns":
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    return x, dy, mask


def packed(t, mask):
    """The valid values, (M, C) in float64."""
    return t.detach().movedim(1, -1)[mask != 0].double()


def build(kind, dtype=torch.float64, like=None, **options):
    """A module with a weight and a bias that are not 1 and 0."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    module = kind(3, dtype=wide, **options)
    if module.weight is not None:
        with torch.no_grad():
            module.weight.copy_(torch.tensor([0.5, -2.0, 1.5]))
            module.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    return module


def reference(x, dy, mask, **options):
    """PyTorch's own on the packed values: the module, y and dx after a step."""
    module = build(torch.nn.BatchNorm1d, **options)
    x = packed(x, mask).requires_grad_()
    y = module(x)
    y.backward(packed(dy, mask))
    return module, y.detach(), x.grad


def check(found, expected, mask, error):
    """Checks a tensor like x: valid values as expected, positive zeros elsewhere."""
    found = found.detach()
    scale = max(1.0, float(expected.abs().max()))
    assert float((packed(found, mask) - expected).abs().max()) <= error * scale
    elsewhere = found.movedim(1, -1)[mask == 0]
    assert not elsewhere.any()
    assert not torch.signbit(elsewhere).any()


def check_state(ours, theirs, error):
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(
            ours.state_dict()[name].double(), value.double(), rtol=error, atol=error
        )
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            ours.get_parameter(name).grad.double(), parameter.grad, rtol=error, atol=50 * error
        )


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dimensions", SHAPES)
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_training_is_that_of_the_packed_values(dtype, dimensions, layout):
    x, dy, mask = data(SHAPES[dimensions], dtype, layout)
    module = build(getattr(interop, f"BatchNorm{dimensions}d"), dtype)
    given = x.clone().requires_grad_()
    y = module(given, mask=mask)
    y.backward(dy)
    theirs, expected, dx = reference(x, dy, mask)
    assert y.dtype == dtype
    assert y.stride() == given.grad.stride() == x.stride()
    check(y, expected, mask, ERRORS[dtype])
    check(given.grad, dx, mask, ERRORS[dtype])
    check_state(module, theirs, ERRORS[dtype])


def test_without_the_mask_it_is_something_else():
    x, dy, mask = data(SHAPES[2])
    x, dy = (torch.nan_to_num(t, 3.0, 3.0) for t in (x, dy))
    found = build(interop.BatchNorm2d)(x)
    assert float((packed(found, mask) - reference(x, dy, mask)[1]).abs().max()) > 0.1


@pytest.mark.parametrize("shape", [(6, 3), *SHAPES.values()], ids=str)
@pytest.mark.parametrize("bytes_", [False, True])
def test_masks_of_bytes_of_any_stride(shape, bytes_):
    """Any nonzero byte is valid; and the usual ways before it do not matter."""
    x, dy, mask = data(shape, share=0.7)
    kind = getattr(interop, f"BatchNorm{max(1, len(shape) - 2)}d")
    module = build(kind)
    fresh = copy.deepcopy(module)
    for _ in range(3):
        module(torch.randn(shape, dtype=torch.float64))
    module.load_state_dict(fresh.state_dict())
    given = x.clone().requires_grad_()
    if bytes_:
        wide = torch.zeros((*mask.shape, 2), dtype=torch.uint8)
        wide[..., 0] = mask * 254
        mask = wide[..., 0]
    y = module(given, mask)
    y.backward(dy)
    theirs, expected, dx = reference(x, dy, mask)
    check(y, expected, mask, 1e-10)
    check(given.grad, dx, mask, 1e-10)
    check_state(module, theirs, 1e-10)


def test_all_valid_is_no_mask_and_none_valid_leaves_the_state_alone():
    x, _, mask = data(SHAPES[2], share=1.0)
    plain, module = build(interop.BatchNorm2d), build(interop.BatchNorm2d)
    assert mask.all()
    torch.testing.assert_close(module(x, mask), plain(x), rtol=0, atol=1e-14)
    before = copy.deepcopy(module.state_dict())
    given = torch.full_like(x, NAN).requires_grad_()
    y = module(given, torch.zeros_like(mask))
    y.backward(torch.full_like(x, NAN))
    assert not y.any()
    assert not given.grad.any()
    assert not module.weight.grad.any()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    mask.zero_()[0, 0, 0] = True
    with pytest.raises(ValueError, match="Expected more than 1 value per channel.*1 valid value"):
        module(x, mask)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_evaluation(tracks, grad):
    x, dy, mask = data(SHAPES[2])
    module, theirs = (
        build(kind, track_running_stats=tracks).eval()
        for kind in (interop.BatchNorm2d, torch.nn.BatchNorm1d)
    )
    for each in (module, theirs) if tracks else ():
        each.running_mean.fill_(0.5)
        each.running_var.fill_(4.0)
    with torch.set_grad_enabled(grad):
        given, values = x.clone().requires_grad_(grad), packed(x, mask).requires_grad_(grad)
        y, expected = module(given, mask), theirs(values)
    check(y, expected.detach(), mask, 1e-10)
    if grad:
        y.backward(dy)
        expected.backward(packed(dy, mask))
        check(given.grad, values.grad, mask, 1e-10)
        check_state(module, theirs, 1e-10)


def test_first_and_second_derivatives():
    x, _, mask = data((4, 3, 3, 2))
    x = torch.nan_to_num(x, 1.0).requires_grad_()
    module = build(interop.BatchNorm2d, track_running_stats=False)
    weight, bias = module.weight, module.bias

    def run(x, weight, bias):
        return module(x, mask)

    assert gradcheck(run, (x, weight, bias), check_batched_grad=True)
    assert gradgradcheck(run, (x, weight, bias), check_batched_grad=True)


def test_second_derivatives_of_poisoned_values():
    x, dy, mask = data(SHAPES[2])
    results = []
    for module, x, dy, options in (  # noqa: B020
        (build(interop.BatchNorm2d), x.clone(), dy, {"mask": mask}),
        (build(torch.nn.BatchNorm1d), packed(x, mask), packed(dy, mask), {}),
    ):
        x.requires_grad_()
        dy = dy.clone().requires_grad_()
        inputs = x, module.weight, module.bias
        grads = torch.autograd.grad(module(x, **options), inputs, dy, create_graph=True)
        ddx = torch.cos(grads[0].detach())
        value = (grads[0] * ddx).sum() + (grads[1] * 2).sum() + grads[2].square().sum()
        results.append(torch.autograd.grad(value, (dy, x, module.weight)))
    (ddy, dx, dweight), (expected_ddy, expected_dx, expected_dweight) = results
    check(ddy, expected_ddy, mask, 1e-10)
    check(dx, expected_dx, mask, 1e-10)
    torch.testing.assert_close(dweight, expected_dweight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_without_a_gap(training):
    x, dy, mask = data(SHAPES[2])
    plain = build(interop.BatchNorm2d).train(training)
    module = copy.deepcopy(plain)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        given = [x.clone().requires_grad_() for _ in range(2)]
        outputs = compiled(given[0], mask), plain(given[1], mask)
        for y in outputs:
            y.backward(dy)
        assert torch.equal(*outputs)
        assert torch.equal(given[0].grad, given[1].grad)
    for a, b in zip(module.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_exported_traced_and_recorded(training):
    x, _, mask = data(SHAPES[2], share=0.7)
    module = build(interop.BatchNorm2d).train(training)
    expected = copy.deepcopy(module)(x, mask)
    exported = torch.export.export(copy.deepcopy(module), (x,), {"mask": mask}).module()
    assert torch.equal(exported(x, mask=mask), expected)
    other = torch.ones_like(mask)
    given = torch.nan_to_num(x, 1.0)
    assert torch.equal(exported(given, mask=other).isfinite(), torch.ones_like(x, dtype=torch.bool))
    traced = torch.jit.trace(copy.deepcopy(module), (x, mask), check_trace=False)
    traced.load_state_dict(module.state_dict())
    assert torch.equal(traced(x, mask), expected)
    graph = torch.fx.symbolic_trace(Masked(copy.deepcopy(module)))
    assert torch.equal(graph(x, mask), expected)


class Masked(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, mask):
        return self.norm(x, mask=mask)


def test_scripted_takes_no_mask():
    x, _, mask = data(SHAPES[2])
    scripted = torch.jit.script(build(interop.BatchNorm2d).eval())
    assert scripted(x).shape == x.shape
    with pytest.raises(torch.jit.Error, match="scripted, and takes no mask"):
        scripted(x, mask)


def test_a_checkpoint_recomputes_with_the_mask():
    x, dy, mask = data(SHAPES[2])
    results = []
    for recomputed in (False, True):
        module, given = build(interop.BatchNorm2d), x.clone().requires_grad_()
        factor = torch.ones_like(x).requires_grad_()  # whose gradient is y * dy

        def run(x, mask, module=module, factor=factor):
            return module(x, mask) * factor

        options = {"use_reentrant": False, "context_fn": interop.recompute_contexts}
        y = (partial(checkpoint, run, **options) if recomputed else run)(given, mask)
        y.backward(torch.nan_to_num(dy, 1.0, 2.0))
        results.append([given.grad, factor.grad, module.weight.grad, *module.buffers()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("subject", ["plain", "compiled", "fake"])
def test_bad_masks_are_refused_before_anything_moves(subject, training):
    module = build(interop.BatchNorm2d).train(training)
    x = torch.randn(SHAPES[2], dtype=torch.float64)
    good = torch.ones(5, 4, 6, dtype=torch.bool)
    bad = {
        "mask has shape": [good[:, None], good[:4], good[0], good.expand(5, 4, 6)[..., :1]],
        "mask is torch": [good.double(), good.int(), good.to(torch.int8)],
        "mask is on meta": [good.to("meta")],
        "mask must be a torch.Tensor": [good.numpy()] if subject == "plain" else [],
    }
    before = copy.deepcopy(module.state_dict())
    run = module
    if subject == "compiled":
        torch._dynamo.reset()
        run = torch.compile(module, backend="eager")
    for message, masks in bad.items():
        for mask in masks if subject == "plain" else masks[:1]:
            if subject == "fake" and "meta" not in message:
                with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    given = mode.from_tensor(x), mode.from_tensor(mask)
                    with pytest.raises((CupyBNError, RuntimeError), match=message):
                        run(*given)
                continue
            with pytest.raises((CupyBNError, torch._dynamo.exc.TorchDynamoException)) as raised:
                run(x, mask)
            assert message in str(raised.value)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def rank_step(comm, parts, bad=None):
    """y, dx, gradients and state of this rank's part; a mask may be None."""
    x, dy, mask = parts[comm.rank]
    module = build(interop.SyncBatchNorm, comm=comm, name="norm")
    given = x.clone().requires_grad_()
    try:
        y = module(given, mask if bad is None or comm.rank else bad)
    except CupyBNError as error:
        found = type(error), module.num_batches_tracked.item()
        module(torch.ones_like(x).cumsum(0))  # the next call works
        return found
    y.backward(dy)
    return y.detach(), given.grad, [p.grad for p in module.parameters()], module


def parts_of_ranks():
    """A rank with a mask, one without, one that is all masked, one without samples."""
    parts = [data((n, 3, 4, 6), seed=n) for n in (5, 2, 3, 0)]
    x, dy, mask = parts[1]
    parts[1] = torch.nan_to_num(x, 1.0), torch.nan_to_num(dy, 1.0, 2.0), None
    x, dy, mask = parts[2]
    parts[2] = torch.full_like(x, NAN), torch.full_like(dy, NAN), torch.zeros_like(mask)
    return parts


@pytest.mark.parametrize("ranks", [2, 4])
def test_over_ranks_with_and_without_masks(ranks):
    parts = parts_of_ranks()[:ranks]
    masks = [
        torch.ones((x.shape[0], *x.shape[2:]), dtype=torch.bool) if mask is None else mask
        for x, _, mask in parts
    ]
    x, dy, mask = *(torch.cat([p[i] for p in parts]) for i in range(2)), torch.cat(masks)
    theirs, y, dx = reference(x, dy, mask)
    results = run_ranks(ranks, rank_step, parts)
    check(torch.cat([r[0] for r in results]), y, mask, 1e-10)
    check(torch.cat([r[1] for r in results]), dx, mask, 1e-10)
    for i, parameter in enumerate(theirs.parameters()):
        found = sum(r[2][i] for r in results)
        torch.testing.assert_close(found, parameter.grad, rtol=1e-10, atol=1e-10)
    for *_, module in results:
        for name, value in theirs.state_dict().items():
            found = module.state_dict()[name]
            torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "bad",
    [torch.ones(5, 4, 5, dtype=torch.bool), torch.ones(5, 4, 6), np.ones((5, 4, 6), bool)],
    ids=["shape", "dtype", "array"],
)
def test_a_bad_mask_of_one_rank_is_told_to_the_others(bad):
    found = run_ranks(2, rank_step, parts_of_ranks()[:2], bad)
    assert issubclass(found[0][0], CupyBNError)
    assert found[1][0] is PeerError
    assert found[0][1] == found[1][1] == 0


def test_recalibrate_with_masks():
    batches = [data((n, 3, 4, 6), seed=n) for n in (4, 3)]
    module = Masked(build(interop.BatchNorm2d))
    interop.recalibrate(
        module, [(x, mask) for x, _, mask in batches], SelfCommunicator(), masked=True
    )
    values = torch.cat([packed(x, mask) for x, _, mask in batches])
    torch.testing.assert_close(module.norm.running_mean, values.mean(0))
    torch.testing.assert_close(module.norm.running_var, values.var(0))
    with pytest.raises(TypeError, match="pairs"):
        interop.recalibrate(module, [batches[0][0]], SelfCommunicator(), masked=True)
