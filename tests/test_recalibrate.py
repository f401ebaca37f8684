"""recalibrate and fold; over ranks, and real MPI, also in check_recalibrate of rank_checks.py."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from conftest import DTYPES
from rank_checks import Mix, Spy, bits, network, normal

import cupybn
from cupybn import BatchNorm1d, BatchNorm2d, Layer, Sequential, SyncBatchNorm
from cupybn.communicators import ThreadCommunicator
from cupybn.testing import run_ranks

ALONE = cupybn.SelfCommunicator()


def modes(layer):
    return [each.training for _, each in layer.named_layers()]


class Noise(Layer):
    """Does something in training mode that it must not do here."""

    def compute_forward(self, x):
        assert not self.training
        return x, None


class Raising(Layer):
    """Ends the forward on a batch of 3 samples."""

    def compute_forward(self, x):
        if len(x) == 3:
            raise LookupError("a layer of the user's")
        return x, None


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_statistics_are_exact(momentum):
    batches = [normal((n, 4, 5), seed=n, mean=n) for n in (1, 7, 2, 30)]
    layer = BatchNorm1d(4, momentum=momentum, dtype="float64")
    layer.forward(batches[3])
    layer.running_mean, layer.weight = normal(4, seed=8), normal(4, seed=9)
    weight, saved = layer.weight.copy(), layer.saved
    layer.grads["weight"][...] = 5
    cupybn.recalibrate(layer, ((batch, "a label") for batch in batches), ALONE)
    whole = np.concatenate(batches)
    np.testing.assert_allclose(layer.running_mean, whole.mean(axis=(0, 2)), rtol=1e-13)
    np.testing.assert_allclose(layer.running_var, whole.var(axis=(0, 2), ddof=1), rtol=1e-13)
    averaged = np.mean([batch.var(axis=(0, 2), ddof=1) for batch in batches], axis=0)
    assert np.abs(averaged / layer.running_var - 1).min() > 0.1  # what averaging would give
    assert layer.num_batches_tracked == 4
    assert (layer.weight == weight).all()
    assert (layer.grads["weight"] == 5).all()
    assert layer.saved is saved
    before = layer.running_mean.copy()
    layer.forward(batches[0])  # tracks as it did before
    assert layer.num_batches_tracked == 5
    assert (layer.running_mean != before).all()


def test_deeper_layers_see_batches_normalised_by_their_own_statistics():
    net, batches = network(), [normal((3, 4, 2, 2), seed=s, mean=s) for s in range(4)]
    cupybn.recalibrate(net, batches, ALONE)
    mixed = []
    for batch in batches:
        y = np.maximum(reference.forward(batch).y, 0)
        mixed.append(np.einsum("nchw,cd->ndhw", y, Mix.matrix))
    whole = np.concatenate(mixed)
    np.testing.assert_allclose(net.b.running_mean, whole.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(net.b.running_var, whole.var(axis=(0, 2, 3), ddof=1), rtol=1e-12)


def test_modes_are_restored_and_other_layers_evaluate():
    norm, untracked = BatchNorm1d(3), BatchNorm1d(3, track_running_stats=False)
    net = Sequential(Noise(), norm, norm, untracked)
    untracked.eval()
    before = modes(net)
    assert before == [True, True, True, False]
    cupybn.recalibrate(net, [normal((5, 3), np.float32)], ALONE)
    assert modes(net) == before
    net.eval()
    cupybn.recalibrate(net, [normal((5, 3), np.float32, mean=0), normal((5, 3), "f4")], ALONE)
    assert modes(net) == [False] * 4
    assert norm.num_batches_tracked == 2
    # The shared layer was given the batches and, normalised, themselves.
    x = np.concatenate([normal((5, 3), np.float32, mean=0), normal((5, 3), "f4")])
    assert reference.error(norm.running_mean, x.mean(axis=0) / 2) < 1e-5


@pytest.mark.parametrize("sync", [True, False])
def test_messages(sync):
    """Without synchronised layers two at the end; with them one more a step."""

    def rank(comm):
        spy = Spy(comm)
        net = network(spy, sync=sync)
        cupybn.recalibrate(net, [normal((3, 4, 2, 2), seed=s) for s in range(2 - comm.rank)], spy)
        return [label for label, _ in spy.sent]

    end = ["recalibrate"] * 2
    step = ["a step of recalibrate", *["forward of 'a'"] * 2, *["forward of 'b'"] * 2]
    expected = [*step, *step, step[0], *end] if sync else end
    assert run_ranks(2, rank) == [expected] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rank_without_any_batch(dtype):
    """It has to make up an empty one, of the shape and dtype of the others'."""
    x = normal((9, 3, 4), dtype)

    def rank(comm):
        layer = SyncBatchNorm(3, comm=comm, dtype="float64" if dtype == np.float64 else None)
        cupybn.recalibrate(layer, [x] if comm.rank == 1 else [], comm)
        return layer.running_mean, layer.running_var

    for mean, var in run_ranks(3, rank):
        expected = reference.forward(x)
        assert reference.error(mean, expected.mean) < 1e-6
        assert reference.error(var, expected.unbiased) < 1e-6


def test_groups_of_ranks_pool_over_all():
    """Layers synchronised in groups, one of them of a single rank; the data set is of all ranks."""
    groups = [*ThreadCommunicator.group(2), *ThreadCommunicator.group(1)]
    batches = [[normal((3, 2), seed=10 * r + k, mean=r) for k in range(3 - r)] for r in range(3)]

    def rank(comm):
        layer = SyncBatchNorm(2, comm=groups[comm.rank], dtype="float64")
        cupybn.recalibrate(layer, batches[comm.rank], comm)
        return layer.running_mean, layer.running_var

    whole = np.concatenate([b for of_rank in batches for b in of_rank])
    for mean, var in run_ranks(3, rank):
        np.testing.assert_allclose(mean, whole.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(var, whole.var(axis=0, ddof=1), rtol=1e-12)


def used_up():
    yield normal((4, 4, 2, 2), seed=3)
    raise OSError("the disk is gone")


FAULTS = {
    "batches raise": (OSError, used_up),
    "wrong shape": (cupybn.ShapeError, lambda: [normal((4, 5, 2, 2))]),
    "wrong dtype": (cupybn.DTypeError, lambda: [normal((4, 4, 2, 2), np.float32)]),
    "no array": (cupybn.DTypeError, lambda: ["a path"]),
    "not iterable": (TypeError, lambda: 5),
    "a layer raises": (LookupError, lambda: [normal((3, 4, 2, 2))]),
}


# Where a layer of the user's raises before a synchronised one, nobody can tell the ranks in that.
CASES = [(what, False) for what in FAULTS] + [(what, True) for what in list(FAULTS)[:-1]]


@pytest.mark.parametrize("what, sync", CASES)
def test_a_rank_that_fails(what, sync):
    """Everything is as it was on every rank, and nobody waits."""
    error, batches = FAULTS[what]

    def rank(comm):
        net = Sequential(Raising(), network(comm, sync=sync))
        before, was = bits(net), modes(net)
        good = [normal((4, 4, 2, 2), seed=s) for s in range(2)]
        odd = comm.rank == 1
        with pytest.raises(error if odd else cupybn.PeerError):
            cupybn.recalibrate(net, batches() if odd else good, comm)
        assert bits(net) == before
        assert modes(net) == was
        assert all("observe" not in vars(layer) for _, layer in net.named_layers())
        cupybn.recalibrate(net, good, comm)  # the ranks are in step
        assert bits(net) != before

    run_ranks(3, rank)


def test_a_read_only_statistic():
    def rank(comm):
        net = Sequential(BatchNorm1d(4), BatchNorm1d(4))
        if comm.rank == 1:
            net[1].running_var.flags.writeable = False
        before = bits(net)
        error, text = (
            (ValueError, "1.running_var is read") if comm.rank else (cupybn.PeerError, None)
        )
        with pytest.raises(error, match=text):
            cupybn.recalibrate(net, [np.ones((9, 4), np.float32)], comm)
        assert bits(net) == before

    run_ranks(2, rank)


@pytest.mark.parametrize("sync", [True, False])
def test_no_batches_anywhere(sync):
    def rank(comm):
        net = network(comm, sync=sync)
        before = bits(net)
        with pytest.raises(ValueError, match="there are no batches on any rank"):
            cupybn.recalibrate(net, iter([]), comm)
        assert bits(net) == before

    run_ranks(2, rank)


def test_a_communicator_that_is_too_small():
    def rank(comm):
        layer = SyncBatchNorm(3, comm=comm)
        with pytest.raises(ValueError, match="synchronised over 2 ranks, but comm has 1"):
            cupybn.recalibrate(layer, [], ALONE)
        assert layer.training

    run_ranks(2, rank)


def test_another_tree_is_seen():
    def rank(comm):
        net = Sequential(BatchNorm1d(3), BatchNorm1d(3 + comm.rank))
        with pytest.raises(
            cupybn.CollectiveMismatchError,
            match=r"rank 1: recalibrate: 1 batch norms .*, '': 4 channels",
        ):
            cupybn.recalibrate(net[0] if comm.rank == 0 else net[1], [], comm)

    run_ranks(2, rank)


def test_what_is_no_layer():
    with pytest.raises(TypeError, match="expected a Layer, got list"):
        cupybn.recalibrate([BatchNorm1d(4)], [], ALONE)


def test_trees_without_running_statistics():
    net = Sequential(Noise(), BatchNorm1d(3, track_running_stats=False))
    cupybn.recalibrate(net, [np.ones((2, 3), np.float32)], ALONE)


def convolution(x, weight, bias):
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
    return np.einsum("nchwij,dcij->ndhw", windows, weight) + bias.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_folding_into_a_convolution_and_a_linear_map(options, dtype):
    x, kernel = normal((3, 2, 6, 6), np.dtype(dtype)), normal((5, 2, 3, 3), np.dtype(dtype), seed=1)
    bias = normal(5, np.dtype(dtype), seed=2)
    layer = BatchNorm2d(5, dtype=dtype, **options)
    for i, (_, array) in enumerate([*layer.named_parameters(), *layer.named_buffers()][:-1]):
        array[...] = np.abs(normal(5, array.dtype, seed=20 + i)) + 0.5
    scale, shift = cupybn.fold(layer)
    assert scale.dtype == shift.dtype == dtype
    layer.eval()
    expected = layer.forward(convolution(x, kernel, bias))
    folded = convolution(x, kernel * scale[:, None, None, None], bias * scale + shift)
    limit = 1e-5 if dtype == "float32" else 1e-13
    assert reference.error(folded, expected) < limit
    rows, matrix = x[:, :, 0, 0], kernel[:, :, 0, 0]
    expected = layer.forward((rows @ matrix.T + bias)[:, :, None, None])[:, :, 0, 0]
    folded = rows @ (matrix * scale[:, None]).T + bias * scale + shift
    assert reference.error(folded, expected) < limit


def test_fold_comes_before_the_activation_and_copies():
    layer = BatchNorm1d(3, activation="relu").eval()
    layer.running_mean = normal(3, np.float32)
    scale, shift = cupybn.fold(layer)
    x = normal((8, 3), np.float32, seed=1)
    assert reference.error(np.maximum(scale * x + shift, 0), layer.forward(x)) < 1e-6
    scale[...] = shift[...] = 0
    assert layer.running_mean.any()


def test_what_cannot_be_folded():
    with pytest.raises(TypeError, match="fold takes a batch norm, got Sequential"):
        cupybn.fold(Sequential())
    with pytest.raises(ValueError, match="no statistics to fold"):
        cupybn.fold(BatchNorm1d(3, track_running_stats=False))


def test_masked_batches_count_their_valid_values():
    rng = np.random.default_rng(3)
    pairs = []
    for n in (1, 7, 2, 30):
        x, mask = normal((n, 4, 5), seed=n, mean=n), rng.random((n, 5)) < 0.5
        pairs.append((np.where(mask[:, None], x, np.nan), mask))
    pairs += [
        (normal((2, 4, 5), seed=50), None),
        (np.full((3, 4, 5), np.inf), np.zeros((3, 5), "?")),
    ]
    layer = Sequential({"a": BatchNorm1d(4, dtype="float64"), "b": Noise()})
    cupybn.recalibrate(layer, iter(pairs), ALONE, masked=True)
    whole = [x if m is None else x.transpose(0, 2, 1)[m].T[None] for x, m in pairs]
    whole = np.concatenate([x.transpose(1, 0, 2).reshape(4, -1) for x in whole], axis=1)
    np.testing.assert_allclose(layer.a.running_mean, whole.mean(axis=1), rtol=1e-13)
    np.testing.assert_allclose(layer.a.running_var, whole.var(axis=1, ddof=1), rtol=1e-13)
    assert layer.a.num_batches_tracked == 6
    before = bits(layer)
    with pytest.raises(TypeError, match="pairs"):
        cupybn.recalibrate(layer, [pairs[0], pairs[1][0]], ALONE, masked=True)
    assert bits(layer) == before


def test_masked_batches_over_ranks():
    """Ranks have different numbers of batches, and one batch has no mask."""
    x = normal((12, 4, 5), seed=5)
    mask = np.random.default_rng(6).random((12, 5)) < 0.4
    mask[4:6] = True
    valid = x.transpose(0, 2, 1)[mask]
    spoiled = np.where(mask[:, None], x, np.nan)
    parts = [[(spoiled[:4], mask[:4])], [(x[4:6], None)], [(spoiled[6:9], mask[6:9])]]
    parts[0].append((spoiled[9:], mask[9:]))

    def rank(comm):
        layer = SyncBatchNorm(4, comm=comm, dtype="float64")
        cupybn.recalibrate(layer, parts[comm.rank], comm, masked=True)
        np.testing.assert_allclose(layer.running_mean, valid.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, valid.var(axis=0, ddof=1), rtol=1e-12)

    run_ranks(3, rank)
