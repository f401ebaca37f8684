"""What must hold on ranks. Each ``check_*(comm)`` runs on every rank of a communicator, and raises.

``test_sync.py`` runs them over threads, ``mpi/run_checks.py`` over real MPI.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import reference

import cupybn
from cupybn import BatchNorm2d, SelfCommunicator, Sequential, SyncBatchNorm, distributed
from cupybn import functional as F
from cupybn.statistics import message_length
from cupybn.testing import check_gradients


class Spy:
    """A communicator that writes down what is sent: (label, length)."""

    def __init__(self, comm):
        self.comm, self.rank, self.size, self.sent = comm, comm.rank, comm.size, []

    def allreduce(self, message, label=""):
        self.sent.append((label, message.size))
        return self.comm.allreduce(message, label)


class Two:
    """A second rank with the same batch."""

    rank, size = 0, 2

    def allreduce(self, message, label=""):
        message *= 2
        return message


def normal(shape, dtype=np.float64, seed=0, mean=0.5, std=2.0):
    values = np.random.default_rng(seed).standard_normal(shape) * std + mean
    return values.astype(np.float64 if dtype == np.float64 else np.float32).astype(dtype)


def shard(values, comm, sizes=None):
    """This rank's consecutive part: equal ones, or of the given sizes."""
    sizes = [len(values) // comm.size] * comm.size if sizes is None else sizes
    begin = sum(sizes[: comm.rank])
    return values[begin : begin + sizes[comm.rank]]


def bits(layer):
    arrays = [*layer.named_parameters(), *layer.named_gradients(), *layer.named_buffers()]
    return [(name, array.tobytes()) for name, array in arrays]


def network(comm=None, dtype="float64", sync=True):
    """Two batch norms with a fixed linear map between them; `comm` None: not synchronised."""

    def norm(**options):
        if comm is None or not sync:
            return BatchNorm2d(4, dtype=dtype, **options)
        return SyncBatchNorm(4, comm=comm, dtype=dtype, **options)

    return Sequential({"a": norm(activation="relu"), "mix": Mix(), "b": norm()})


class Mix(cupybn.Layer):
    """Couples the channels, so that a batch norm's mistake reaches the next one."""

    matrix = np.random.default_rng(9).standard_normal((4, 4))

    def compute_forward(self, x):
        return np.einsum("nchw,cd->ndhw", x, self.matrix).astype(x.dtype), None

    def compute_backward(self, dy, context):
        return np.einsum("ndhw,cd->nchw", dy, self.matrix).astype(dy.dtype)


def sgd_step(net, x, target, total, comm=None, lr=0.1):
    """One step on sum((y - target)^2) / total values."""
    net.zero_grad()
    y = net.forward(x)
    net.backward((2 / total) * (y - target))
    if comm is not None:
        distributed.allreduce_gradients(net, comm, op="sum")
    gradients = dict(net.named_gradients())
    for name, parameter in net.named_parameters():
        parameter -= lr * gradients[name]


def equal(net, other, tolerance):
    for (name, a), b in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert reference.error(a, b) <= tolerance, (name, reference.error(a, b))


def check_four_models(comm):
    """Single process = sync on full batches = sync on shards; local on shards differs."""
    x, target = normal((4 * comm.size, 4, 3, 3)), normal((4 * comm.size, 4, 3, 3), seed=1)
    # A shift of each sample makes the shards' statistics unlike the whole batch's.
    x += np.arange(len(x)).reshape(-1, 1, 1, 1)
    single, full, shards, local = (network(c) for c in (None, comm, comm, None))
    for _ in range(5):
        sgd_step(single, x, target, x.size)
        sgd_step(full, x, target, x.size * comm.size, comm)
        mine = shard(x, comm), shard(target, comm)
        sgd_step(shards, *mine, x.size, comm)
        sgd_step(local, *mine, x.size, comm)
        equal(full, single, 1e-12) if comm.size == 1 else parameters_equal(full, single, 1e-12)
        equal(shards, single, 1e-12)
    if comm.size > 1:
        difference = reference.error(local.b.weight, single.b.weight)
        assert difference > 1e-3, difference


def parameters_equal(net, other, tolerance):
    pairs = zip(net.named_parameters(), other.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        assert reference.error(a, b) <= tolerance, name


def check_uneven_sizes(comm):
    """Rank i has (2, 2, 10^(i+1)) values; 100 steps with momentum 0.99."""
    parts = [normal((2, 2, 10 ** (i + 1)), seed=i, mean=i) for i in range(comm.size)]
    layer = SyncBatchNorm(2, momentum=0.99, comm=comm, dtype="float64")
    for _ in range(100):
        y = layer.forward(parts[comm.rank], save_for_backward=False)
    whole = np.concatenate([p.transpose(1, 0, 2).reshape(2, -1) for p in parts], axis=1)
    np.testing.assert_allclose(layer.running_mean, whole.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, whole.var(axis=1, ddof=1), rtol=1e-12)
    expected = reference.normalized(parts[comm.rank], whole.mean(axis=1), whole.var(axis=1))
    assert reference.error(y, expected) < 1e-12


def check_uneven_batches_train_alike(comm):
    """Local batch rank + 2: parameters equal the single-process run after every one of 5 steps."""
    sizes = [rank + 2 for rank in range(comm.size)]
    x, target = normal((sum(sizes), 4, 3, 3)), normal((sum(sizes), 4, 3, 3), seed=1)
    single, sync = network(), network(comm)
    for _ in range(5):
        sgd_step(single, x, target, x.size)
        sgd_step(sync, shard(x, comm, sizes), shard(target, comm, sizes), x.size, comm)
        equal(sync, single, 1e-12)


def check_empty_ranks(comm):
    """Rank 0 empty, then all ranks empty."""
    for dtype, tolerance in ((np.float16, 1e-3), (np.float32, 1e-5), (np.float64, 1e-12)):
        wide = "float64" if dtype == np.float64 else None
        layer = SyncBatchNorm(3, comm=comm, dtype=wide)
        sizes = [0, *[2] * (comm.size - 1)] if comm.size > 1 else [2]
        x, dy = (normal((sum(sizes), 3, 2, 2), dtype, seed) for seed in (0, 1))
        y = layer.forward(shard(x, comm, sizes))
        dx = layer.backward(shard(dy, comm, sizes))
        expected, gradient = reference.forward(x), reference.backward(dy, x)
        assert reference.error(y, shard(expected.y, comm, sizes)) < tolerance
        assert reference.error(dx, shard(gradient.dx, comm, sizes)) < tolerance
        assert reference.error(layer.running_var, 0.9 + 0.1 * expected.unbiased) < 1e-6
        layer.zero_grad()
        before = bits(layer)
        empty = np.empty((0, 3, 2, 2), dtype)
        y = layer.forward(empty)
        dx = layer.backward(empty)
        assert y.shape == dx.shape == empty.shape
        assert bits(layer) == before
        assert all(np.isfinite(a).all() for _, a in layer.named_buffers())


def check_one_value_in_all(comm):
    """One rank has one value per channel, the others none: an error on all, nothing written."""
    spy = Spy(comm)
    layer = SyncBatchNorm(3, comm=spy)
    before = bits(layer)
    x = np.ones((1 if comm.rank == comm.size - 1 else 0, 3), np.float32)
    try:
        layer.forward(x)
    except cupybn.ShapeError as error:
        assert "Expected more than 1 value per channel when training" in str(error)
    else:
        raise AssertionError("no error")
    assert bits(layer) == before
    assert len(spy.sent) == int(comm.size > 1)  # all know, nobody has to be told
    if comm.size > 1:  # one value a rank is fine
        layer.forward(np.full((1, 3), comm.rank, np.float32))


def check_large_means(comm):
    """Mean 1e4 and 1e6, standard deviation 1."""
    for mean, dtype, tolerance in (
        (1e4, np.float32, 1e-5),
        (1e6, np.float32, 1e-5 if comm.size == 1 else 1e-3),
        (1e4, np.float64, 1e-9),
        (1e6, np.float64, 1e-9),
    ):
        whole = normal((16 * comm.size, 3, 7, 7), dtype, mean=mean, std=1.0)
        layer = SyncBatchNorm(3, comm=comm, dtype=None if dtype == np.float32 else "float64")
        y = layer.forward(shard(whole, comm))
        expected = reference.forward(whole)
        assert np.abs(layer.saved.var / expected.var - 1).max() < tolerance, (mean, dtype)
        # y follows the variance: half its relative error, times the largest |y|
        limit = 1e-5 if tolerance <= 1e-5 else 5e-4 * np.abs(expected.y).max()
        assert np.abs(y - shard(expected.y, comm)).max() < limit, (mean, dtype)


def check_y_at_large_means(comm):
    """y is within 1e-5 of float64 at mean 1e4 and 1e6: the mean is float64 and split."""
    for mean in (1e4, 1e6):
        whole = normal((16 * comm.size, 3, 7, 7), np.float32, mean=mean, std=1.0)
        layer = SyncBatchNorm(3, comm=comm)
        y = layer.forward(shard(whole, comm))
        exact = reference.normalized(whole, whole.mean(axis=(0, 2, 3), dtype="d"), layer.saved.var)
        assert np.abs(y - shard(exact, comm)).max() < 1e-5


def check_constants(comm):
    """Variance 0 and 1e-10, eps 1e-5 and tiny: no NaN, and running_var takes the 0."""
    for value, eps in itertools.product((0.0, 0.1, -3.3333, 1e4, 1e6 / 3), (1e-5, 1e-30)):
        layer = SyncBatchNorm(2, eps=eps, comm=comm)
        x = np.full((4 + comm.rank, 2, 3), value, np.float32)
        y = layer.forward(x)
        var = layer.saved.var
        dx = layer.backward(np.ones_like(x))
        limit = 1e-15 * eps  # as exact as `invstd` tells
        if comm.size > 1:
            limit += 1e-15 * float(x[0, 0, 0]) ** 2
        assert ((var >= 0) & (var <= limit)).all(), (value, var)
        if comm.size == 1:
            assert (layer.running_var == np.float32(0.9)).all()
        assert np.isfinite(y).all()
        assert np.isfinite(dx).all()
        x = (value + 1e-5 * normal((64, 2, 3), seed=comm.rank, mean=0, std=1)).astype(np.float32)
        assert np.isfinite(layer.forward(x)).all()


def check_many_half_values(comm):
    """More than 65504 float16 values per channel and rank: counts are exact."""
    layer = SyncBatchNorm(1, comm=comm)
    x = normal((1, 1, 70001), np.float16, seed=comm.rank)
    y = layer.forward(x)
    assert layer.saved.count == 70001 * comm.size
    assert np.isfinite(y).all()
    assert np.isfinite(layer.running_var).all()


def check_messages(comm):
    """One message a direction, two forward for float64 data, none in eval, none at size one."""
    for c in (1, 128, 129, 2048):
        for dtype, forward in ((np.float16, 1), (np.float32, 1), (np.float64, 2)):
            wide = "float64" if dtype == np.float64 else None
            spy = Spy(comm)
            layer = SyncBatchNorm(c, comm=spy, dtype=wide, name="layer")
            x = normal((4, c), dtype, seed=comm.rank)
            layer.backward(layer.forward(x))
            there, back = "forward of 'layer'", "backward of 'layer'"
            length = message_length(c)
            expected = [(there, length)] * forward + [(back, length)] if comm.size > 1 else []
            assert spy.sent == expected, spy.sent
            layer.eval()
            layer.backward(layer.forward(x, save_for_backward=True))
            untracked = SyncBatchNorm(c, track_running_stats=False, comm=spy, dtype=wide).eval()
            untracked.backward(untracked.forward(x, save_for_backward=True))
            assert spy.sent == expected
    assert [message_length(c) for c in (1, 128, 129, 2048)] == [272, 272, 528, 4112]


def check_every_split(comm):
    """All ways to deal 8 samples to the ranks equal one process."""
    for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-12)):
        wide = None if dtype == np.float32 else "float64"
        x, dy = normal((8, 3, 2, 2), dtype), normal((8, 3, 2, 2), dtype, seed=1)
        single = BatchNorm2d(3, dtype=wide)
        y = single.forward(x)
        dx = single.backward(dy)
        for cuts in itertools.combinations_with_replacement(range(9), comm.size - 1):
            edges = [0, *cuts, 8]
            mine = slice(edges[comm.rank], edges[comm.rank + 1])
            layer = SyncBatchNorm(3, comm=comm, dtype=wide)
            for mine_of, whole in ((layer.forward(x[mine]), y), (layer.backward(dy[mine]), dx)):
                difference = np.abs(mine_of - whole[mine]).max(initial=0)
                assert difference <= tolerance * np.abs(whole).max(), cuts
            for name, array in layer.named_buffers():
                assert reference.error(array, single.buffers[name]) <= tolerance, (name, cuts)
            distributed.allreduce_gradients(layer, comm, op="sum")
            for name, array in layer.named_gradients():
                assert reference.error(array, single.grads[name]) <= tolerance, (name, cuts)


def check_central_differences(comm):
    """Gradients over ranks of uneven and empty batches, in float64."""
    x = normal(((comm.rank * 2) % 3 + (comm.size == 1) * 3, 2, 2), seed=comm.rank)
    if comm.size == 2:
        x = normal((comm.rank + 2, 2, 2), seed=comm.rank)
    r = normal(x.shape, seed=50 + comm.rank)
    for options in ({}, {"affine": False}, {"activation": "relu"}, {"eps": 0.1, "bias": False}):
        layer = SyncBatchNorm(2, comm=comm, dtype="float64", **options)
        check_gradients(layer, x, comm=comm)
        check_gradients(layer, x, comm=comm, residual=r)
        check_gradients(layer.eval(), x, comm=comm)


def double_backward_case(comm, affine, relu, residual, some_empty):
    """The inputs of a scalar that has a double backward, by name; float64, uneven batches."""
    sizes = [(rank * 2) % 3 for rank in range(comm.size)] if some_empty else [2, 3, 1, 2]
    shape = (3 if comm.size == 1 else sizes[comm.rank], 2, 2)
    data = ("x", "dy", "ddx") + (("r", "ddr") if residual else ())
    seeds = {name: 100 * i + comm.rank for i, name in enumerate(data)}
    case = {name: normal(shape, seed=seed) for name, seed in seeds.items()}
    if affine:
        case["weight"], case["bias"] = normal(2, seed=7), normal(2, seed=8, std=0.5)
        case["ddweight"], case["ddbias"] = (normal(2, seed=s + comm.rank) for s in (900, 950))
    return case, {"activation": "relu"} if relu else {}


def penalty(comm, case, options):
    """This rank's part of the scalar that batch_norm_double_backward differentiates."""
    _, saved = F.batch_norm_forward(
        case["x"],
        case.get("weight"),
        case.get("bias"),
        comm=comm,
        residual=case.get("r"),
        **options,
    )
    grads = F.batch_norm_backward(case["dy"], saved)
    value = np.vdot(case["ddx"], grads.dx)
    if "weight" in case:
        value += case["ddweight"] @ grads.dweight + case["ddbias"] @ grads.dbias
    if "r" in case:
        value += np.vdot(case["ddr"], grads.dresidual)
    return value, saved


def check_double_backward(comm):
    """Against central differences of batch_norm_backward: uneven and empty ranks, one message."""
    for affine, relu, residual, some_empty in [
        (True, False, False, True),
        (False, False, False, False),
        (True, True, False, False),
        (True, True, True, True),
        (True, False, True, False),
    ]:
        case, options = double_backward_case(comm, affine, relu, residual, some_empty)
        spy = Spy(comm)
        _, saved = penalty(spy, case, options)
        del spy.sent[:]
        result = F.batch_norm_double_backward(
            case["ddx"], case.get("ddweight"), case.get("ddbias"), saved, case["dy"],
            ddresidual=case.get("ddr"),
        )  # fmt: skip
        sent = [("double backward of a batch norm", message_length(8))] if comm.size > 1 else []
        assert spy.sent == sent
        expected = {"dy": result.ddy, "x": result.dx}
        if affine:
            expected["weight"] = comm.allreduce(result.dweight.copy(), "dweight")
        compare_with_differences(comm, case, options, expected)


def compare_with_differences(comm, case, options, expected, step=1e-5):
    def slope(array, index):
        values = []
        for sign in (1, -1):
            if index is not None:
                before = array[index]
                array[index] = before + sign * step
            values.append(comm.allreduce(np.array([penalty(comm, case, options)[0]]), "penalty")[0])
            if index is not None:
                array[index] = before
        return (values[0] - values[1]) / (2 * step)

    for name, gradient in expected.items():
        array = case[name]
        for rank in range(1 if name == "weight" else comm.size):
            mine = rank == comm.rank or name == "weight"
            size = int(comm.allreduce(np.array([array.size * (comm.rank == rank)]), "size")[0])
            numeric = [slope(array, np.unravel_index(i, array.shape) if mine else None)
                       for i in range(size)]  # fmt: skip
            if mine:
                assert reference.error(gradient.reshape(-1), numeric) < 1e-7, (name, numeric)


def check_sums(comm):
    """Sums of arrays in either order, of NaN and Inf, of any length: the same bits everywhere."""
    for length in (61, 272, 1000, 4112, 32784):
        total = comm.allreduce(normal((length,), seed=comm.rank), "a sum")
        pieces = np.zeros((comm.size, length))
        pieces[comm.rank] = total
        assert (comm.allreduce(pieces, "the sums") == total).all(), length
    for order in "CF":
        table = np.arange(6.0).reshape(2, 3).copy(order)
        total = comm.allreduce(table * (comm.rank + 1), "a table")
        assert (total == table * (comm.size * (comm.size + 1) / 2)).all()
    with np.errstate(all="raise"):
        total = comm.allreduce(np.array([np.inf if comm.rank else -np.inf, 1e308]), "a sum")
    assert np.isnan(total[0]) == (comm.size > 1)
    assert np.isinf(total[1]) == (comm.size > 1)


def calibration_batches(comm):
    """Batches by rank and step: of any size, the last rank none, rank 0 three, the others one."""
    counts = [3] if comm.size == 1 else [3, *[1] * (comm.size - 2), 0]
    return [
        [normal((1 + (rank + 2 * k) % 4, 4, 3, 3), seed=10 * rank + k, mean=rank + k)
         for k in range(n)]
        for rank, n in enumerate(counts)
    ]  # fmt: skip


def check_recalibrate(comm):
    """Ranks with different numbers of batches equal one process, synchronised or not."""
    batches = calibration_batches(comm)
    steps = [np.concatenate([b[k] for b in batches if k < len(b)]) for k in range(3)]
    everything = [batch for of_rank in batches for batch in of_rank]
    for sync, one_process in ((True, steps), (False, everything)):
        single, net = network(), network(comm, sync=sync)
        cupybn.recalibrate(single, one_process, SelfCommunicator())
        cupybn.recalibrate(net, iter(batches[comm.rank]), comm)
        for path in ("a", "b"):
            mine, theirs = net.children[path], single.children[path]
            np.testing.assert_allclose(mine.running_mean, theirs.running_mean, 1e-12, 1e-12)
            np.testing.assert_allclose(mine.running_var, theirs.running_var, 1e-12)
            assert mine.num_batches_tracked == len(everything)
        whole = np.concatenate(everything)
        np.testing.assert_allclose(net.a.running_mean, whole.mean(axis=(0, 2, 3)), 1e-12)
        np.testing.assert_allclose(net.a.running_var, whole.var(axis=(0, 2, 3), ddof=1), 1e-12)
        distributed.verify_sync(net, comm)


def check_groups(comm):
    """split_comm: groups of any size, their layers' calls between those of all the ranks."""
    x = normal((4 * comm.size, 3, 2), seed=3)
    mine = shard(x, comm)
    everyone = reference.forward(x).y
    for group_size in (1, 2, np.int64(3), comm.size, 100):
        group = distributed.split_comm(comm, group_size)
        begin = comm.rank // group_size * group_size
        end = min(begin + group_size, comm.size)
        assert (group.size, group.rank) == (end - begin, comm.rank - begin)
        inner, outer = (SyncBatchNorm(3, comm=c, dtype="float64") for c in (group, comm))
        a, b = inner(mine), outer(mine)
        db, da = outer.backward(b), inner.backward(a)
        part = x[4 * begin : 4 * end]
        own = slice(4 * group.rank, 4 * group.rank + 4)
        expected = reference.forward(part).y
        for found, wanted in (
            (a, expected[own]),
            (da, reference.backward(expected, part).dx[own]),
            (b, shard(everyone, comm)),
            (db, shard(reference.backward(everyone, x).dx, comm)),
        ):
            assert np.abs(found - wanted).max() < 1e-9
        distributed.allreduce_gradients(inner, group)
        distributed.broadcast_parameters(inner, group)
        distributed.verify_sync(inner, group)
        if hasattr(group, "Free"):
            group.Free()


def check_alone_is_plain(comm):
    """SyncBatchNorm on one rank has the same bits as BatchNorm."""
    sync, plain = SyncBatchNorm(3, comm=SelfCommunicator()), BatchNorm2d(3)
    if comm.size == 1:
        sync.comm = comm
    x, dy = normal((4, 3, 5, 5), np.float32), normal((4, 3, 5, 5), np.float32, seed=1)
    for _ in range(3):
        assert sync(x).tobytes() == plain(x).tobytes()
        assert sync.backward(dy).tobytes() == plain.backward(dy).tobytes()
    assert bits(sync) == bits(plain)


def check_same_bits(comm, steps=20):
    """Buffers and parameters have the same bits on all ranks after 20 steps. Returns their hash."""
    net = network(comm, "float32")
    for step in range(steps):
        x = normal((3 + comm.rank, 4, 3, 3), np.float32, seed=100 * step + comm.rank)
        sgd_step(net, x, np.zeros_like(x), 100.0, comm)
    distributed.verify_sync(net, comm)
    return hashlib.sha256(
        repr(net.state_dict().items()).encode() + str(bits(net)).encode()
    ).hexdigest()


def check_distributed(comm):
    """allreduce_gradients, broadcast_parameters and verify_sync."""
    net = network(comm, "float32")
    for i, (_, grad) in enumerate(net.named_gradients()):
        grad[...] = i + comm.rank
    spy = Spy(comm)
    distributed.allreduce_gradients(net, spy)
    mean = (comm.size - 1) / 2
    assert all((g == i + mean).all() for i, (_, g) in enumerate(net.named_gradients()))
    assert len(spy.sent) == (comm.size > 1)
    # Never as many bytes as a message of float64 values, which MPI could not tell apart.
    assert all(length % 2 == 1 for _, length in spy.sent)
    distributed.verify_sync(net, comm)
    special = np.array([-0.0, np.nan, np.inf, 1e-45 * (comm.rank + 1)], np.float32)
    net.b.weight = special if comm.rank == comm.size - 1 else np.zeros(4, np.float32)
    net.a.num_batches_tracked = 2**53 + comm.rank
    if comm.size > 1:
        try:
            distributed.verify_sync(net, comm)
        except cupybn.CollectiveMismatchError as error:
            assert "'b.weight' and 1 more" in str(error), error
        else:
            raise AssertionError("verify_sync saw nothing")
    distributed.broadcast_parameters(net, comm, root=comm.size - 1)
    expected = np.array([-0.0, np.nan, np.inf, 1e-45 * comm.size], np.float32)
    assert net.b.weight.tobytes() == expected.tobytes()
    assert net.a.num_batches_tracked == 2**53 + comm.size - 1
    distributed.verify_sync(net, comm)


CHECKS = {name: fn for name, fn in list(globals().items()) if name.startswith("check_")}
del CHECKS["check_gradients"]
