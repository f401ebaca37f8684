"""revert_sync_batchnorm, lazy batch norms, recalibrate, fold, selective checkpointing."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import (  # noqa: E402
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch_checks import DOUBLE, Net, seeded, tensor  # noqa: E402

from cupybn import PeerError, SelfCommunicator, ShapeError  # noqa: E402
from cupybn.interop import torch as interop  # noqa: E402
from cupybn.testing import run_ranks  # noqa: E402

torch.set_num_threads(1)
ALONE = SelfCommunicator()
NAMES = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
SHAPES = {"BatchNorm1d": (4, 3, 2), "BatchNorm2d": (4, 3, 2, 2), "BatchNorm3d": (4, 3, 2, 2, 2)}


def outcome(function):
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None, ""


# ---- revert_sync_batchnorm -----------------------------------------------------------------------


@pytest.mark.parametrize("package", [torch.nn, interop], ids=["torch", "ours"])
@pytest.mark.parametrize("name", NAMES)
def test_reverting_brings_back_class_hooks_mode_and_check(package, name):
    old = seeded(getattr(package, name), 3)
    net = torch.nn.Sequential(old, torch.nn.Sequential(old), torch.nn.ReLU())
    text, calls = repr(net), []
    handle = old.register_forward_hook(lambda *args: calls.append(1))
    interop.convert_sync_batchnorm(net, ALONE)
    net[0](tensor(SHAPES[name], 0)).sum().backward()
    net[0].eval()
    tensors = {key: id(value) for key, value in net.state_dict(keep_vars=True).items()}
    assert interop.revert_sync_batchnorm(net) is net
    new = net[0]
    assert type(new) is type(old)
    assert net[1][0] is new
    assert not new.training
    assert repr(net) == text
    assert set(vars(new)) == set(vars(old))
    assert tensors == {key: id(value) for key, value in net.state_dict(keep_vars=True).items()}
    assert new.num_batches_tracked == 1
    new.train()(tensor(SHAPES[name], 0))
    handle.remove()
    new(tensor(SHAPES[name], 0))
    assert calls == [1, 1]
    with pytest.raises(ValueError, match="expected"):
        new(tensor((4, 3, 2, 2, 2, 2), 0))
    # And once more, from the beginning.
    interop.convert_sync_batchnorm(net, ALONE)
    assert isinstance(net[0], interop.SyncBatchNorm)
    assert type(interop.revert_sync_batchnorm(pickle.loads(pickle.dumps(net)))[0]) is type(old)
    assert type(interop.revert_sync_batchnorm(copy.deepcopy(net))[0]) is type(old)
    assert type(interop.revert_sync_batchnorm(net, skip="0")[0]) is interop.SyncBatchNorm


def test_reverting_pytorchs_own_synchronised_one_and_one_made_directly():
    group = object()
    theirs = torch.nn.SyncBatchNorm(3)
    theirs.process_group = group
    net = torch.nn.Sequential(theirs, interop.SyncBatchNorm(3, name="direct"))
    interop.convert_sync_batchnorm(net, SelfCommunicator())
    interop.revert_sync_batchnorm(net)
    assert type(net[0]) is torch.nn.SyncBatchNorm
    assert net[0].process_group is group
    assert isinstance(net[1].comm, SelfCommunicator)
    assert net[1].name == "direct"
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        interop.revert_sync_batchnorm(3)


def test_a_reverted_module_trains_as_one_that_never_was_converted():
    nets = Net(), interop.revert_sync_batchnorm(interop.convert_sync_batchnorm(Net(), ALONE))
    for net in nets:
        net(tensor((4, 2, 4, 4), 0)).square().sum().backward()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a.grad, b.grad)


# ---- lazy batch norms ----------------------------------------------------------------------------


def lazy(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 1, dtype=DOUBLE), torch.nn.LazyBatchNorm2d(dtype=DOUBLE)
    )


def test_a_lazy_batch_norm_is_synchronised_from_its_first_forward_on():
    nets = lazy(), lazy()  # not in the threads, which share PyTorch's generator

    def train(comm):
        net = interop.convert_sync_batchnorm(nets[comm.rank], comm)
        calls = []
        net[1].register_forward_hook(lambda *args: calls.append(1))
        optimizer = None
        for step in range(3):
            x = tensor((2 + comm.rank, 2, 3, 3), [step, comm.rank])
            loss = net(x).square().mul(x[:, :1]).sum()
            optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.01)
            optimizer.zero_grad()
            loss.backward()
            interop.allreduce_gradients(net, comm, op="sum")
            optimizer.step()
        assert type(net[1]) is interop.SyncBatchNorm
        assert (net[1].name, net[1].num_features, len(calls)) == ("1", 4, 3)
        return net.state_dict()

    one, two = run_ranks(2, train, timeout=20)
    net = lazy()
    for step in range(3):
        x = torch.cat([tensor((2 + rank, 2, 3, 3), [step, rank]) for rank in range(2)])
        loss = net(x).square().mul(x[:, :1]).sum()
        if step == 0:
            optimizer = torch.optim.SGD(net.parameters(), 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(one[key], value, rtol=1e-10, atol=1e-10)
        assert torch.equal(one[key], two[key])


def test_a_lazy_batch_norm_takes_a_state_before_its_first_forward():
    state = seeded(torch.nn.BatchNorm2d, 4).state_dict()
    net = interop.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.LazyBatchNorm2d()), ALONE)
    net[0].load_state_dict(state)
    net(torch.randn(2, 4, 3, 3))
    assert type(net[0]) is interop.SyncBatchNorm
    assert torch.equal(net[0].weight, state["weight"].float())
    bare = torch.nn.LazyBatchNorm2d(affine=False, track_running_stats=False)
    bare = interop.convert_sync_batchnorm(bare, ALONE)
    bare(torch.randn(2, 4, 3, 3))
    assert bare.num_features == 4


def test_a_lazy_batch_norm_is_reverted_before_and_after_its_first_forward():
    for forward, cls in ((False, torch.nn.LazyBatchNorm2d), (True, torch.nn.BatchNorm2d)):
        net = interop.convert_sync_batchnorm(lazy(), ALONE)
        assert interop.convert_sync_batchnorm(net, ALONE) is net  # twice changes nothing
        if forward:
            net(tensor((2, 2, 3, 3), 0))
        interop.revert_sync_batchnorm(net)
        assert type(net[1]) is cls
        net(tensor((2, 2, 3, 3), 0))
        assert type(net[1]) is torch.nn.BatchNorm2d
        assert not {"name", "_comm", "_was", "_bindings"} & set(vars(net[1]))


@pytest.mark.parametrize("bad", [torch.zeros(3), None, [[1.0]]], ids=["1D", "None", "a list"])
def test_a_bad_first_input_of_a_lazy_one_is_told_to_all(bad):
    def forward(comm):
        net = interop.convert_sync_batchnorm(torch.nn.LazyBatchNorm1d(), comm)
        net.name = "lazy"
        result = outcome(lambda: net(torch.randn(4, 3) if comm.rank else bad))
        net(torch.randn(4, 3))
        return result

    (own, message), (peers, told) = run_ranks(2, forward, timeout=20)
    assert own in (ShapeError, TypeError), message
    assert peers is PeerError
    assert "forward of 'lazy': rank 0 failed" in told


# ---- recalibrate and fold ------------------------------------------------------------------------


class Mixed(torch.nn.Module):
    """A batch norm of torch.nn and one of this library, a frozen dropout, and no statistics."""

    def __init__(self, comm):
        super().__init__()
        self.first = seeded(torch.nn.BatchNorm1d, 3)
        self.drop = torch.nn.Dropout(0.5)
        self.second = seeded(interop.SyncBatchNorm, 3, comm=comm)
        self.none = torch.nn.BatchNorm1d(3, track_running_stats=False, dtype=DOUBLE)

    def forward(self, x):
        return self.none(self.second(self.drop(self.first(x)).tanh()))


def batches_of(rank):
    return [tensor((size, 3), [rank, size]) for size in ([4, 6], [3], [], [2, 7, 2])[rank]]


@pytest.mark.parametrize("n", [1, 4])
def test_recalibrate_takes_the_statistics_of_all_batches_of_all_ranks(n):
    def calibrated(comm):
        module = Mixed(comm).train(comm.rank == 0)
        module.drop.eval()
        modes = [part.training for part in module.modules()]
        state = copy.deepcopy(module.state_dict())
        batches = ((x, "label") for x in batches_of(comm.rank)) if n == 1 else batches_of(comm.rank)
        interop.recalibrate(module, batches, comm)
        assert modes == [part.training for part in module.modules()]
        assert not module.first._forward_pre_hooks
        assert module.second.track_running_stats
        after = module.state_dict()
        assert all(torch.equal(after[key], state[key]) for key in state if key.endswith("bias"))
        return after

    states = run_ranks(n, calibrated, timeout=20)
    assert torch._dynamo.eval_frame._stance.stance == "default"
    for key, value in states[0].items():
        assert all(torch.equal(value, state[key]) for state in states), key
    whole = torch.cat([x for rank in range(n) for x in batches_of(rank)])
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(states[0]["first.running_mean"], whole.mean(0))
    close(states[0]["first.running_var"], whole.var(0))
    number = sum(len(batches_of(rank)) for rank in range(n))
    assert states[0]["first.num_batches_tracked"] == number
    if n == 1:  # of what the first one, with each batch's own statistics, gives the second
        first = seeded(torch.nn.BatchNorm1d, 3)
        inner = torch.cat([first(x).tanh() for x in batches_of(0)]).detach()
        close(states[0]["second.running_mean"], inner.mean(0))
        close(states[0]["second.running_var"], inner.var(0))


def test_recalibrate_is_all_or_nothing():
    def failing(comm):
        module = Mixed(comm)
        before = copy.deepcopy(module.state_dict())

        def batches():
            yield tensor((4, 3), 0)
            if comm.rank == 0:
                raise OSError("the disk is gone")
            yield tensor((4, 3), 1)

        result = outcome(lambda: interop.recalibrate(module, batches(), comm))
        assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
        assert module.training
        assert not module.first._forward_pre_hooks
        return result

    (own, _), (peers, told) = run_ranks(2, failing, timeout=20)
    assert (own, peers) == (OSError, PeerError)
    assert "rank 0 failed" in told
    for bad in ([], [3], [np.ones((4, 3))]):
        module = Mixed(ALONE)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises((ValueError, TypeError), match="no batches|must be a torch"):
            interop.recalibrate(module, bad, ALONE)
        assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        interop.recalibrate(3, [], ALONE)
    with pytest.raises(ValueError, match="'0' is lazy: run a forward"):
        interop.recalibrate(torch.nn.Sequential(torch.nn.LazyBatchNorm1d()), [], ALONE)
    interop.recalibrate(torch.nn.ReLU(), [], ALONE)


def test_recalibrate_sees_what_a_compiled_module_is_given():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    compiled = torch.compile(module, backend="eager")
    # Compiled in the state that recalibrate makes: graphs of before know nothing of its hooks.
    module.eval()
    module[1].training, module[1].track_running_stats = True, False
    with torch.no_grad():
        compiled(torch.randn(4, 3))
    module[1].track_running_stats = True
    batches = [torch.randn(4, 3), torch.randn(4, 3)]
    interop.recalibrate(compiled, batches, ALONE)
    inner = torch.cat([module[0](x) for x in batches]).detach()
    torch.testing.assert_close(module[1].running_mean, inner.mean(0))
    torch.testing.assert_close(module[1].running_var, inner.var(0))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("package", [torch.nn, interop], ids=["torch", "ours"])
def test_fold_is_evaluation(package, options):
    norm = seeded(package.BatchNorm2d, 3, **options)
    norm(tensor((4, 3, 2, 2), 0))
    norm.eval()
    scale, shift = interop.fold(norm)
    x = tensor((4, 3, 2, 2), 1)
    folded = x * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(folded, norm(x).detach(), rtol=1e-13, atol=1e-13)
    assert not scale.requires_grad
    assert scale.dtype == norm.running_mean.dtype
    assert interop.fold(norm.float())[0].dtype == torch.float32


def test_fold_says_what_it_cannot_fold():
    with pytest.raises(TypeError, match="fold takes a batch norm, got Linear"):
        interop.fold(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no statistics to fold"):
        interop.fold(torch.nn.BatchNorm1d(3, track_running_stats=False))


# ---- selective checkpointing ---------------------------------------------------------------------


def block():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4, dtype=DOUBLE),
        seeded(interop.SyncBatchNorm, 4, comm=ALONE, name="bn"),
        torch.nn.ReLU(),
        torch.nn.Linear(4, 4, dtype=DOUBLE),
    )


class Products(TorchDispatchMode):
    """Counts the linear maps that are computed."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("save", ["matrix products", "everything", "nothing"])
def test_selective_checkpointing_together_with_the_statistics(save, early_stop):
    def policy(ctx, op, *args, **kwargs):
        product = op is torch.ops.aten.addmm.default
        keep = save == "everything" or (save == "matrix products" and product)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    selective = partial(create_selective_checkpoint_contexts, policy)
    results = []
    for context_fn in (None, partial(interop.recompute_contexts, selective)):
        net, x = block(), tensor((5, 3), 1).requires_grad_()
        if context_fn is None:
            net(x).square().sum().backward()
        else:
            with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop), Products() as seen:
                y = checkpoint(net, x, use_reentrant=False, context_fn=context_fn)
                y.square().sum().backward()
            assert seen.number == 2 + (2 - early_stop if save == "nothing" else 0)
        assert net[1].num_batches_tracked == 1
        results.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)
