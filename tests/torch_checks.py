"""What must hold of the PyTorch modules on ranks. Each ``check_*(comm)`` runs on every rank.

``test_torch_ranks.py`` runs them over threads, ``mpi/run_torch_checks.py`` over real MPI. All of
them return what must be the same on every rank.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from rank_checks import Spy, shard

from cupybn.interop import torch as interop

DOUBLE = torch.float64


def tensor(shape, seed, mean=0.5):
    values = np.random.default_rng(seed).standard_normal(shape) * 2 + mean
    return torch.from_numpy(values)


def sizes_of(comm):
    """Samples on each rank: uneven, and none on the second."""
    return [3, 0, 1, 5][: comm.size]


def seeded(cls, *args, seed=0, **options):
    module = cls(*args, dtype=DOUBLE, **options)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(tensor(parameter.shape, seed + i, mean=1))
    return module


class Net(torch.nn.Module):
    """Two branches side by side, as in a residual block, and a second batch norm after them."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(2, 4, 3, padding=1, bias=False, dtype=DOUBLE)
        self.left = torch.nn.BatchNorm2d(4, dtype=DOUBLE)
        self.second = torch.nn.Conv2d(2, 4, 1, bias=False, dtype=DOUBLE)
        self.right = torch.nn.BatchNorm2d(4, momentum=None, dtype=DOUBLE)
        self.last = torch.nn.BatchNorm2d(4, affine=False, dtype=DOUBLE)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(tensor(parameter.shape, i, mean=0.3))

    def forward(self, x):
        y = self.left(self.first(x)).relu() + self.right(self.second(x))
        return self.last(y)


def synchronised(comm):
    return interop.convert_sync_batchnorm(Net(), comm)


def train(net, x, target, total, comm=None, steps=4, run=lambda net, x: net(x)):
    """Some steps on sum((y - target)^2) / total; all states, as one vector."""
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        ((run(net, x) - target) ** 2).sum().div(total).backward()
        if comm is not None:
            interop.allreduce_gradients(net, comm, op="sum")
        optimizer.step()
    return torch.cat([values.to(DOUBLE).reshape(-1) for values in net.state_dict().values()])


def whole_batch(comm):
    samples = sum(sizes_of(comm))
    x, target = tensor((samples, 2, 5, 4), 1), tensor((samples, 4, 5, 4), 2)
    return x + torch.arange(samples).reshape(-1, 1, 1, 1), target


def check_like_one_process(comm):
    """Uneven shards, one of them empty: torch.nn's modules on the whole batch give the same."""
    x, target = whole_batch(comm)
    mine = [shard(values, comm, sizes_of(comm)) for values in (x, target)]
    expected = train(Net(), x, target, x.numel())
    states = train(synchronised(comm), *mine, x.numel(), comm)
    assert (states - expected).abs().max() < 1e-12, (states - expected).abs().max()
    if comm.size > 2:
        local = Net().train(len(mine[0]) > 0)  # without synchronisation
        assert (train(local, *mine, x.numel(), comm) - expected).abs().max() > 1e-3
    return states.numpy().tobytes()


def check_messages(comm):
    """One or two messages forward, one backward, in the same order on all ranks; none in eval."""
    spy = Spy(comm)
    net = synchronised(spy)
    x, _ = whole_batch(comm)
    x = shard(x, comm, sizes_of(comm))
    net(x).sum().backward()
    labels = [label for label, _ in spy.sent]
    names = ("left", "right", "last")
    if comm.size > 1:
        assert labels[:6] == [f"forward of '{name}'" for name in names for _ in range(2)]
        # Autograd runs what was made last first; the branches are as good as one after the other.
        assert labels[6:] == [f"backward of '{name}'" for name in reversed(names)]
    with torch.no_grad():
        net(x)
    assert len(spy.sent) == (len(labels) + 6 if comm.size > 1 else 0)
    before = len(spy.sent)
    net.eval()
    net(x).sum().backward()
    assert len(spy.sent) == before
    return labels


def check_backward_in_another_thread(comm):
    """As with CUDA tensors, whose backward runs in a thread of autograd's."""
    x, target = whole_batch(comm)
    mine = [shard(values, comm, sizes_of(comm)) for values in (x, target)]
    nets = [synchronised(comm) for _ in range(2)]
    for net, elsewhere in zip(nets, (False, True), strict=True):
        loss = ((net(mine[0]) - mine[1]) ** 2).sum()
        if elsewhere:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
    for here, there in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(here.grad, there.grad)


def slope(comm, value, inputs, which, index, eps=1e-6):
    """The slope of the ranks' sum in one element of an input; None: in another rank's."""
    values = []
    for step in (eps, -eps):
        moved = [tensor.detach().clone() for tensor in inputs]
        if index is not None:
            moved[which].view(-1)[index] += step
        values.append(comm.allreduce(np.array([value(*moved)]), "value")[0])
    return (values[0] - values[1]) / (2 * eps)


def differences(comm, value, inputs):
    """Central differences: in this rank's x, and in weight and bias, which all ranks share."""
    results = [torch.zeros_like(tensor) for tensor in inputs]
    for rank in range(comm.size):
        mine = rank == comm.rank
        for i in range(2 * 2 * sizes_of(comm)[rank]):
            numeric = slope(comm, value, inputs, 0, i if mine else None)
            if mine:
                results[0].view(-1)[i] = numeric
    for which in (1, 2):
        for i in range(inputs[which].numel()):
            results[which][i] = slope(comm, value, inputs, which, i)
    return results


def check_differences(comm):
    """First and second derivatives of a loss over all ranks."""
    module = interop.SyncBatchNorm(2, comm=comm, dtype=DOUBLE)
    samples = sizes_of(comm)[comm.rank]
    x = tensor((samples, 2, 2), 10 + comm.rank)
    weight, bias = tensor(2, 20), tensor(2, 30)
    factors = tensor((samples, 2, 2), 40 + comm.rank, mean=0)

    def normalised(x, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(module, parameters, (x,))

    def loss(x, weight, bias):
        return (factors * normalised(x, weight, bias).sin()).sum()

    def penalty(x, weight, bias):
        """The squared size of the gradients, as in a gradient penalty."""
        inputs = [t if t.requires_grad else t.requires_grad_() for t in (x, weight, bias)]
        value = loss(*inputs)
        gradients = torch.autograd.grad(value, inputs, create_graph=True)
        return sum((gradient.cos() * gradient).sum() for gradient in gradients)

    for function in (loss, penalty):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        dx, *local = torch.autograd.grad(function(*inputs), inputs)
        pooled = [torch.from_numpy(comm.allreduce(grad.numpy(), "pooled")) for grad in local]
        numeric = differences(comm, lambda *t: float(function(*t).detach()), inputs)  # noqa: B023
        for ours, theirs in zip((dx, *pooled), numeric, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def checkpointed(net, x):
    return torch.utils.checkpoint.checkpoint(
        net, x, use_reentrant=False, context_fn=interop.recompute_contexts
    )


def check_checkpoint(comm):
    """Recomputation sends nothing, updates nothing, and changes no bit of the training."""
    x, target = whole_batch(comm)
    mine = [shard(values, comm, sizes_of(comm)) for values in (x, target)]
    sent = []
    states = []
    for run in (lambda net, x: net(x), checkpointed):
        spy = Spy(comm)
        states.append(train(synchronised(spy), *mine, x.numel(), comm, run=run))
        sent.append(spy.sent)
    assert torch.equal(*states)
    assert sent[0] == sent[1]
    return states[0].numpy().tobytes()


def check_frozen_parts(comm):
    """Input without gradient on some ranks, frozen weights everywhere: all take part."""
    module = seeded(interop.SyncBatchNorm, 2, comm=comm)
    x = tensor((2, 2, 3), comm.rank)
    whole = torch.cat([tensor((2, 2, 3), rank) for rank in range(comm.size)]).requires_grad_()
    reference = torch.nn.BatchNorm1d(2, dtype=DOUBLE)
    reference.load_state_dict(module.state_dict())
    (reference(whole) ** 3).sum().backward()
    x.requires_grad_(comm.rank == 0)
    (module(x) ** 3).sum().backward()
    if comm.rank == 0:
        torch.testing.assert_close(x.grad, whole.grad[:2], rtol=1e-10, atol=1e-10)
    else:
        assert x.grad is None
    interop.allreduce_gradients(module, comm, op="sum")
    torch.testing.assert_close(module.weight.grad, reference.weight.grad, rtol=1e-10, atol=1e-10)
    module.weight.requires_grad_(False)
    module.bias.requires_grad_(False)
    module.weight.grad = module.bias.grad = None
    x = x.detach().requires_grad_()
    (module(x) ** 3).sum().backward()
    torch.testing.assert_close(x.grad, whole.grad[2 * comm.rank :][:2], rtol=1e-10, atol=1e-10)
    assert module.weight.grad is None


def check_masks(comm):
    """Other masks on each rank, none on the second, nothing valid on the third."""
    sizes = [3, 2, 2, 5][: comm.size]
    x, dy = (tensor((sum(sizes), 2, 3), seed) for seed in (1, 2))
    mask = tensor((sum(sizes), 3), 3) > 0
    mask[3:5], mask[5:7] = True, False
    reference, module = torch.nn.BatchNorm1d(2, dtype=DOUBLE), interop.SyncBatchNorm(2, comm=comm)
    packed, packed_dy = (t.movedim(1, -1)[mask].clone().requires_grad_() for t in (x, dy))
    y = reference(packed)
    y.backward(packed_dy)
    for t in (x, dy):
        t.movedim(1, -1)[~mask] = float("nan")
    mine = [shard(t, comm, sizes).clone() for t in (x, dy, mask)]
    valid, given = mine[2], mine[0].requires_grad_()
    out = module.double()(given, None if comm.rank == 1 else valid)
    out.backward(mine[1])
    ours = slice(int(mask[: sum(sizes[: comm.rank])].sum()), None)
    for found, expected in ((out, y), (given.grad, packed.grad)):
        found = found.detach().movedim(1, -1)
        assert not found[~valid].any()
        expected = expected.detach()[ours][: int(valid.sum())]
        torch.testing.assert_close(found[valid], expected, rtol=1e-10, atol=1e-10)
    interop.allreduce_gradients(module, comm, op="sum")
    torch.testing.assert_close(module.weight.grad, reference.weight.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.running_var, reference.running_var, rtol=1e-10, atol=1e-10)
    return module.running_var.numpy().tobytes()


def check_distributed(comm):
    """Parameters from one rank, bit for bit; gradients pooled, with one that is missing."""
    net = synchronised(comm)
    with torch.no_grad():
        net.first.weight += comm.rank
        net.left.running_mean += comm.rank
    net.register_buffer("steps", torch.tensor(comm.rank, dtype=torch.int32))
    if comm.size > 1:
        try:
            interop.verify_sync(net, comm)
        except RuntimeError as error:
            assert "'first.weight' and 2 more" in str(error)
        else:
            raise AssertionError("the ranks differ")
    version = net.first.weight._version
    interop.broadcast_parameters(net, comm, root=comm.size - 1)
    assert net.first.weight._version > version
    interop.verify_sync(net, comm)
    expected = Net().first.weight + (comm.size - 1)
    assert torch.equal(net.first.weight, expected)
    assert net.steps == comm.size - 1
    net.left.bias.requires_grad_(False)
    if comm.rank == 0:
        net.first.weight.grad = torch.ones_like(net.first.weight)
    interop.allreduce_gradients(net, comm)
    assert torch.equal(net.first.weight.grad, torch.full_like(net.first.weight, 1 / comm.size))
    assert torch.equal(net.right.bias.grad, torch.zeros(4, dtype=DOUBLE))
    assert net.left.bias.grad is None


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}
