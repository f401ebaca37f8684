"""Batched gradients, tensor subclasses and dispatch modes: as with PyTorch, or refused by name."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from rank_checks import Two  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.autograd.functional import hessian, jacobian  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from cupybn import PeerError, SelfCommunicator  # noqa: E402
from cupybn.interop import torch as interop  # noqa: E402
from cupybn.testing import run_ranks  # noqa: E402

torch.set_num_threads(1)
ALONE = SelfCommunicator()


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def pair(**options):
    """A synchronised module of one process, and PyTorch's."""
    modules = interop.SyncBatchNorm(2, comm=ALONE, **options), torch.nn.BatchNorm1d(2, **options)
    for module in modules:
        module.double()
        for value, parameter in enumerate(module.parameters()):
            torch.nn.init.constant_(parameter, 0.7 + value)
    return modules


# ---- batched gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_gradients_in_a_batch(options):
    """is_grads_batched, and vmap of a backward, with respect to the parameters too."""
    x, results = torch.randn(4, 2, 3).double(), []
    v = torch.randn(5, *x.shape).double()
    for module in pair(**options):
        for _ in range(3):
            z = x.clone().requires_grad_()
            y = module(z)
            wanted = [z, *module.parameters()]
            found = torch.autograd.grad(y, wanted, v, is_grads_batched=True, retain_graph=True)
            again = torch.vmap(
                lambda v, y=y, w=wanted: torch.autograd.grad(y, w, v, retain_graph=True)
            )(v)
            single = [torch.autograd.grad(y, wanted, each, retain_graph=True) for each in v]
            for a, b, c in zip(found, again, zip(*single, strict=True), strict=True):
                torch.testing.assert_close(a, torch.stack(c))
                torch.testing.assert_close(a, b)
        results.append(found)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_jacobians_and_hessians_in_a_batch():
    x, (ours, theirs) = torch.randn(4, 2).double(), pair()
    for create_graph in (False, True):
        options = {"vectorize": True, "create_graph": create_graph}
        torch.testing.assert_close(jacobian(ours, x, **options), jacobian(theirs, x, **options))

    def loss(module):
        return lambda x: module(x).pow(3).sum()

    expected = hessian(loss(theirs), x)
    for vectorize in (False, True):
        torch.testing.assert_close(hessian(loss(ours), x, vectorize=vectorize), expected)


@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=str)
def test_gradcheck_in_a_batch(options):
    ours, _ = pair(**options)
    x = torch.randn(4, 2).double().requires_grad_()
    assert gradcheck(ours, x, check_batched_grad=True)
    assert gradgradcheck(ours, x, check_batched_grad=True)


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_in_a_batch_are_refused_over_ranks(order):
    """By name, on every rank; and the ranks stay in step."""

    def rank(comm):
        module = interop.SyncBatchNorm(2, comm=comm, name="bn", dtype=torch.float64)
        x = torch.randn(4, 2).double().requires_grad_()
        y = module(x)
        if order == 2:
            (y,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        v = torch.randn(3, *y.shape).double()
        options = {"is_grads_batched": True, "retain_graph": True}
        with pytest.raises((RuntimeError, PeerError), match="several gradients at once|failed"):
            torch.autograd.grad(y, x, v, **options)
        single = [torch.autograd.grad(y, x, each, retain_graph=True) for each in v]  # the advice
        module(x)
        return len(single)

    assert run_ranks(2, rank, timeout=30) == [3, 3]


def test_one_rank_alone_with_gradients_in_a_batch_does_not_hang_the_other():
    def rank(comm):
        module = interop.SyncBatchNorm(2, comm=comm, name="bn")
        x = torch.randn(4, 2, requires_grad=True)
        y = module(x)
        v = torch.randn(3, *y.shape)
        given = {"is_grads_batched": True} if comm.rank else {}
        with pytest.raises(RuntimeError if comm.rank else PeerError, match="bn|several") as raised:
            torch.autograd.grad(y, x, v if comm.rank else v[0], **given)
        return str(raised.value)

    first, second = run_ranks(2, rank, timeout=30)
    assert "backward of 'bn': rank 1 failed" in first
    assert "call backward once for each" in second


# ---- subclasses ----------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A subclass in PyTorch's usual way: its results are of the class, too."""


def test_a_subclass_comes_out_as_it_went_in():
    x = torch.randn(4, 2).double()
    for ours, theirs in (
        pair(),
        (interop.SyncBatchNorm(2, comm=Two(), dtype=torch.float64), pair()[1]),
    ):
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            parameter.data.copy_(other.data)
        for _ in range(3):
            a = x.as_subclass(Tagged).requires_grad_()
            b = x.clone().requires_grad_()
            y, expected = ours(a), theirs(b)
            assert type(y) is Tagged
            torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)
            y.pow(3).sum().backward()
            expected.pow(3).sum().backward()
            if ours.comm is ALONE:
                torch.testing.assert_close(a.grad.as_subclass(torch.Tensor), b.grad)
                torch.testing.assert_close(ours.running_var, theirs.running_var)
        assert ours.num_batches_tracked == 3


def test_what_cannot_be_had_over_ranks_is_refused_by_name_and_told_to_all():
    """On one rank alone: the others raise, and the next call works."""
    from torch.fx.experimental.proxy_tensor import make_fx

    calls = {
        "a Wrapper cannot be normalised over ranks": lambda module, x: module(
            torch.Tensor._make_wrapper_subclass(Wrapper, (4, 2))
        ),
        "a Tensor cannot be normalised over ranks": lambda module, x: make_fx(module)(x),
        r"the transforms of torch\.func": lambda module, x: torch.vmap(module)(x[None]),
    }

    def rank(comm):
        module = interop.SyncBatchNorm(2, comm=comm, name="bn")
        x = torch.randn(4, 2)
        for text, call in calls.items():
            if comm.rank:
                with pytest.raises(RuntimeError, match=f"bn: {text}"):
                    call(module, x)
            else:
                with pytest.raises(PeerError, match="forward of 'bn': rank 1 failed"):
                    module(x)
            assert module.num_batches_tracked == 0
        module(x)
        return module.running_mean.tolist()

    first, second = run_ranks(2, rank, timeout=30)
    assert first == second


class Wrapper(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} of a Wrapper")


def test_a_wrapper_is_asked_about_the_operator():
    """Of one process: the subclass says what it does not know, by the name of the operator."""
    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, (4, 2))
    module = interop.BatchNorm1d(2)
    with pytest.raises(NotImplementedError, match="cupybn.batch_norm.default of a Wrapper"):
        module(wrapper)
    assert module.num_batches_tracked == 0


def test_a_dtensor_is_refused_by_name_and_its_local_part_is_taken():
    """It knows no strategy for the operator; over ranks it is refused before that."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = distribute_tensor(torch.randn(4, 2), mesh, [Shard(0)])
        for distributed in (False, True):
            module = interop.SyncBatchNorm(2, comm=ALONE)
            module = distribute_module(module, mesh) if distributed else module
            match = r"cupybn\.batch_norm\.default .*(mixed .*DTensor|strategy)"
            with pytest.raises((RuntimeError, NotImplementedError), match=match):
                module(x)
            assert int(module.num_batches_tracked) == 0
        module = interop.SyncBatchNorm(2, comm=Two(), name="bn")
        with pytest.raises(RuntimeError, match=r"bn: a DTensor cannot.* pass \.to_local\(\)"):
            module(x)
        module(x.to_local())  # the advice
        assert module.num_batches_tracked == 1
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sparse_and_nested_input_is_told_to_all_ranks():
    bad = [
        lambda: torch.eye(4, 2).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(3, 2)]),
    ]

    def rank(comm):
        module = interop.SyncBatchNorm(2, comm=comm, name="bn")
        for make in bad:
            error = (TypeError, ValueError, RuntimeError) if comm.rank else PeerError
            with pytest.raises(error):
                module(make() if comm.rank else torch.randn(4, 2))
        module(torch.randn(4, 2))
        return int(module.num_batches_tracked)

    assert run_ranks(2, rank, timeout=30) == [1, 1]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # with 2.14
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of unpack_dual
def test_forward_mode_is_refused():
    module, x = interop.SyncBatchNorm(2, comm=ALONE, name="bn"), torch.randn(4, 2)
    for _ in range(3):
        module(x)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="bn: the transforms.*forward-mode differentiation"):
            module(forward_ad.make_dual(x, x))
        assert module.num_batches_tracked == 3
        module(x)
    assert module.num_batches_tracked == 4


def parameters(module):
    return dict(module.named_parameters())


def loss_of(module):
    return lambda given, x: torch.func.functional_call(module, given, (x,)).sum()


TRANSFORMS = {
    "vmap": lambda m, x: torch.vmap(m)(x[None]),
    "vmap of models": lambda m, x: torch.vmap(loss_of(m), (0, None))(
        {name: value.detach()[None] for name, value in m.named_parameters()}, x
    ),
    "grad": lambda m, x: torch.func.grad(lambda x: m(x).sum())(x),
    "grad of parameters": lambda m, x: torch.func.grad(loss_of(m))(parameters(m), x),
    "grad_and_value": lambda m, x: torch.func.grad_and_value(loss_of(m))(parameters(m), x),
    "vjp": lambda m, x: torch.func.vjp(m, x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,)),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
    "jacfwd": lambda m, x: torch.func.jacfwd(m)(x),
    "hessian": lambda m, x: torch.func.hessian(lambda x: m(x).sum())(x),
    "functionalize": lambda m, x: torch.func.functionalize(m)(x),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # with 2.14
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jvp's
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_functions_are_refused(name):
    """On one process; and on one of two ranks, of which the other one hears. Nothing moves."""
    match = r"bn: the transforms of torch\.func.*autograd\.grad"

    def rank(comm):
        module, x = interop.SyncBatchNorm(2, comm=comm, name="bn"), torch.randn(4, 2)
        if comm.rank == comm.size - 1:
            with pytest.raises(RuntimeError, match=match):
                TRANSFORMS[name](module, x)
        else:
            with pytest.raises(PeerError, match="forward of 'bn': rank 1 failed"):
                module(x)
        assert module.num_batches_tracked == 0
        module(x)
        assert module.num_batches_tracked == 1
        if comm is ALONE and name != "functionalize":
            TRANSFORMS[name](module.eval(), x)  # the advice; PyTorch's jvp is not for two threads
        return module.running_mean.tolist()

    rank(ALONE)
    first, second = run_ranks(2, rank, timeout=30)
    assert first == second


def test_functional_call_is_no_transform():
    """By itself it computes with other parameters, as with PyTorch's."""
    x, results = torch.randn(4, 2).double(), []
    for module in pair():
        given = {name: value.detach() * 2 for name, value in module.named_parameters()}
        for value in given.values():
            value.requires_grad_()
        for _ in range(3):
            y = torch.func.functional_call(module, given, (x,))
        found = torch.autograd.grad(y.pow(3).sum(), list(given.values()))
        results.append([y, *found, module.running_var, module.weight])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- modes ---------------------------------------------------------------------------------------


class Listing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_operators_and_changes_nothing():
    x, results = torch.randn(4, 2).double(), []
    for listed in (False, True):
        module, _ = pair()
        z = x.clone().requires_grad_()
        if listed:
            with Listing() as mode:
                module(z).pow(3).sum().backward()
            assert "cupybn.batch_norm.default" in mode.names
            assert "cupybn.batch_norm_backward.default" in mode.names
        else:
            module(z).pow(3).sum().backward()
        results.append([z.grad, module.weight.grad, *module.state_dict().values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
