"""What must hold of interop.jax on ranks. Each ``check_*(comm)`` runs on every rank over MPI.

Ranks as threads of one process will not do here: they would share JAX's threads, and wait for each
other in them. Every check returns what must be the same on every rank.
"""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from mpi4py import MPI
from rank_checks import Spy

from cupybn import functional
from cupybn.collective import CollectiveCall
from cupybn.communicators import MpiCommunicator
from cupybn.interop import jax as interop

EPS = 1e-5
WIDTH, CHANNELS, BRANCHES = 6, 4, 4


def batches(ranks, dtype=np.float64):
    """Very uneven batches: 3, 2000, 0, 50."""
    sizes = [3, 2000, 0, 50][:ranks]
    rng = np.random.default_rng(5)
    return [(0.5 + rng.standard_normal((size, WIDTH))).astype(dtype) for size in sizes]


def parameters(dtype=np.float64, depth=BRANCHES, width=WIDTH, channels=CHANNELS):
    rng = np.random.default_rng(7)
    return [
        {
            "matrix": jnp.asarray(rng.standard_normal((width, channels)), dtype),
            "weight": jnp.asarray(1 + 0.2 * rng.standard_normal(channels), dtype),
            "bias": jnp.asarray(rng.standard_normal(channels), dtype),
        }
        for _ in range(depth)
    ]


def plain(x, weight, bias, name):
    """In pure JAX, of a whole batch in one process."""
    mean, var = x.mean(0), x.var(0)
    return (x - mean) / jnp.sqrt(var + EPS) * weight + bias


def synchronised(comm):
    def norm(x, weight, bias, name):
        return interop.batch_norm(x, weight, bias, comm=comm, name=name)[0]

    return norm


def branch(norm, name):
    def run(p, x):
        return jax.nn.softplus(norm(x @ p["matrix"], p["weight"], p["bias"], name))

    return run


def side_by_side(norm, wrap=lambda f: f, used=range(BRANCHES)):
    """Four branches that do not depend on each other; only those of `used` go into the loss."""

    def loss(params, x):
        ys = [wrap(branch(norm, f"branch{i}"))(p, x) for i, p in enumerate(params)]
        return sum(((i + 1) * (ys[i] ** 2).sum() for i in used), jnp.zeros((), x.dtype))

    return loss


def in_a_row(norm, scan=jax.lax.scan):
    """Three layers of one shape, by a scan."""

    def loss(params, x):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

        def body(x, p):
            return branch(norm, "layer")(p, x), x.sum()

        y, sums = scan(body, x, stacked)
        return (y**2).sum() + 0.1 * sums.sum()

    return loss


def nested(norm, jit=lambda f: f):
    """A jit inside, around two branches."""

    def loss(params, x):
        def two(first, second, x):
            return branch(norm, "left")(first, x) + branch(norm, "right")(second, x)

        return (jit(two)(params[0], params[1], x) ** 2).sum() + (
            branch(norm, "after")(params[2], x) ** 3
        ).sum()

    return loss


MODELS = {
    "side by side": (side_by_side, {}, BRANCHES, CHANNELS),
    "checkpoint": (side_by_side, {"wrap": interop.checkpoint}, BRANCHES, CHANNELS),
    "scan": (in_a_row, {"scan": interop.scan}, 3, WIDTH),
    "jit": (nested, {"jit": interop.jit}, 3, CHANNELS),
}


def pooled(comm, tree):
    """The sum of the ranks' trees: gradients and losses of shards."""
    return jax.tree.map(lambda leaf: comm.allreduce(np.array(leaf, np.float64)), tree)


def worst(actual, expected):
    """The largest error of each array, by the array's largest value."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


def order(comm, step, *args, runs=2):
    """The labels of a few runs' messages, with caches cleared between: XLA may choose anew."""
    spy, orders = Spy(comm), []
    for _ in range(runs):
        jax.clear_caches()
        spy.sent.clear()
        jax.block_until_ready(jax.jit(step(spy))(*args))
        orders.append(tuple(label for label, _ in spy.sent))
    assert len(set(orders)) == 1, set(orders)
    return orders[0]


def check_gradients(comm):
    """Of models over ranks, against pure JAX with the whole batch in one process."""
    dtype = jnp.result_type(float)
    parts, orders = batches(comm.size, dtype), []
    whole, x = jnp.asarray(np.concatenate(parts)), jnp.asarray(parts[comm.rank])
    start = sum(len(part) for part in parts[: comm.rank])
    for model, options, depth, channels in MODELS.values():
        params = parameters(dtype, depth, channels=channels)

        def step(comm, model=model, options=options):
            loss = model(synchronised(comm), **options)
            return interop.ordered_value_and_grad(loss, argnums=(0, 1))

        orders.append(order(comm, step, params, x))
        value, (grads, dx) = jax.jit(step(comm))(params, x)
        expected = jax.jit(jax.value_and_grad(model(plain), argnums=(0, 1)))(params, whole)
        # In float32 the products with matrices round as well, here and there.
        limit = 1e-12 if dtype == np.float64 else 2e-4
        assert worst(pooled(comm, (value, grads)), (expected[0], expected[1][0])) < limit
        if len(x):
            assert worst(dx, expected[1][1][start : start + len(x)]) < limit
    return orders


def check_float32(comm):
    """The function alone, to 1e-5, with a weight and without, channels last and with a ReLU."""
    rng = np.random.default_rng(3)
    shape = (30 * comm.size, 5, 2, 3)
    x, dy = (3 + rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    weight, bias = (1 + rng.standard_normal(shape[1]).astype(np.float32) for _ in range(2))
    mine = slice(30 * comm.rank, 30 * comm.rank + 30)
    saved = []
    for affine in ((weight, bias), (None, None)):
        for activation in (None, "relu"):
            for channel_axis in (1, -1):

                def loss(x, weight, bias, dy, last=channel_axis == -1, relu=activation):
                    x = jnp.moveaxis(x, 1, -1) if last else x
                    y, _ = interop.batch_norm(
                        x, weight, bias, comm=comm, name="a", activation=relu,
                        channel_axis=-1 if last else 1,
                    )  # fmt: skip
                    return ((jnp.moveaxis(y, -1, 1) if last else y) * dy).sum()

                wanted = (0,) if affine[0] is None else (0, 1, 2)
                ordered = jax.jit(interop.ordered_value_and_grad(loss, wanted))
                _, grads = ordered(x[mine], *affine, dy[mine])
                _, context = functional.batch_norm_forward(x, *affine, activation=activation)
                expected = functional.batch_norm_backward(dy, context)
                assert worst(grads[0], expected.dx[mine]) < 1e-5
                if len(grads) == 3:
                    sums = pooled(comm, grads[1:])
                    assert worst(sums, (expected.dweight, expected.dbias)) < 1e-5
                saved.append(context.count)
    return saved


def plain_masked(x, weight, bias, mask):
    """In pure JAX, (N, C), of the rows that are valid."""
    valid = mask[:, None] != 0
    count = valid.sum()
    mean = jnp.where(valid, x, 0).sum(0) / count
    d = jnp.where(valid, x - mean, 0)
    return jnp.where(valid, d / jnp.sqrt((d**2).sum(0) / count + EPS) * weight + bias, 0)


def check_masks(comm):
    """Of some ranks, with NaN where masked; a rank has none, and one has nothing valid."""
    rng, sizes = np.random.default_rng(9), [7, 3, 4, 0][: comm.size]
    x = rng.standard_normal((sum(sizes), WIDTH))
    mask = rng.random(len(x)) < 0.6
    mask[7:10], mask[10:] = True, False
    dy = rng.standard_normal(x.shape)
    weight, bias = 1 + rng.standard_normal((2, WIDTH))
    expected = jax.grad(lambda *args: (plain_masked(*args, mask) * dy).sum(), (0, 1, 2))
    expected = expected(x, weight, bias)
    start = sum(sizes[: comm.rank])
    mine = slice(start, start + sizes[comm.rank])
    poisoned, of_y = np.where(mask[:, None], x, np.nan), np.where(mask[:, None], dy, np.inf)

    def loss(x, weight, bias, mask, dy):
        valid = None if comm.rank == 1 else mask
        y, statistics = interop.batch_norm(x, weight, bias, comm=comm, name="a", mask=valid)
        return jnp.vdot(jax.lax.stop_gradient(jnp.where(y == 0, 0, dy)), y), (y, statistics)

    orders = []
    for kind in (bool, np.uint8):
        step = jax.jit(interop.ordered_value_and_grad(loss, (0, 1, 2), has_aux=True))
        valid = mask[mine].astype(kind) * kind(2)
        args = poisoned[mine], weight, bias, valid, of_y[mine]
        (_, (y, statistics)), (dx, *sums) = step(*args)
        assert statistics.count == mask.sum()
        assert not np.any(np.asarray(y)[~mask[mine]])
        assert not np.any(np.asarray(dx)[~mask[mine]])
        if mask[mine].any():
            assert np.abs(dx - expected[0][mine]).max() < 1e-12
            assert worst(y, plain_masked(x, weight, bias, mask)[mine]) < 1e-12
        assert worst(pooled(comm, sums), expected[1:]) < 1e-12
        orders.append(float(statistics.count))
    return orders


def check_what_one_rank_ignores(comm):
    """Branches, gradients, the value: the messages are the same, and so are the numbers."""
    x, params = jnp.asarray(batches(comm.size)[comm.rank]), parameters()
    last = comm.rank == comm.size - 1
    orders = []
    for used in ([0, 1, 3], [0, 1, 2], []):

        def step(comm, used=used):
            loss = side_by_side(synchronised(comm), used=used if last else range(BRANCHES))
            return interop.ordered_value_and_grad(loss)

        orders.append(order(comm, step, params, x))
        assert len(orders[-1]) == 3 * BRANCHES, orders[-1]  # float64: two messages forward
    for keep in (
        lambda value, grads: value,
        lambda value, grads: grads[1]["bias"],
        lambda value, grads: None,
        lambda value, grads: value * jnp.zeros((0, 1)),
    ):

        def part(comm, keep=keep):
            loss = side_by_side(synchronised(comm))
            ordered = interop.ordered_value_and_grad(loss)
            return lambda *args: (keep if last else lambda *both: both)(*ordered(*args))

        orders.append(order(comm, part, params, x))
    return orders


def check_forward_alone(comm):
    x, params = jnp.asarray(batches(comm.size)[comm.rank]), parameters()

    def step(comm):
        return interop.in_order(side_by_side(synchronised(comm)))

    labels = order(comm, step, params, x)
    assert len(labels) == 2 * BRANCHES

    def nothing(comm):
        ordered = step(comm)

        def call(*args):
            value = ordered(*args)
            return None if comm.rank == comm.size - 1 else value

        return call

    assert order(comm, nothing, params, x) == labels
    whole = jnp.asarray(np.concatenate(batches(comm.size)))
    value = pooled(comm, jax.jit(step(comm))(params, x))
    assert worst(value, side_by_side(plain)(params, whole)) < 1e-12
    # Values that are not traced, one call after the other.
    eager = pooled(comm, side_by_side(synchronised(comm))(params, x))
    assert worst(eager, value) < 1e-12
    return labels


def check_running_statistics(comm):
    parts = batches(comm.size)
    whole = np.concatenate(parts)
    zero, one = jnp.zeros(WIDTH), jnp.ones(WIDTH)

    @jax.jit
    @interop.in_order
    def step(x):
        _, statistics = interop.batch_norm(x, comm=comm, name="a")
        return statistics, interop.updated_running(zero, one, statistics, 0.25)

    statistics, (mean, var) = step(jnp.asarray(parts[comm.rank]))
    assert statistics.count == len(whole)
    np.testing.assert_allclose(statistics.var, whole.var(0), rtol=1e-12)
    np.testing.assert_allclose(mean, 0.25 * whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(var, 0.75 + 0.25 * whole.var(0, ddof=1), rtol=1e-12)
    _, (mean, var) = step(jnp.zeros((0, WIDTH)))
    assert not mean.any()
    assert (var == 1).all()
    return mean.tolist()


def raised(function, *args):
    try:
        jax.block_until_ready(function(*args))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def check_errors_reach_every_rank(comm):
    """Also in the backward; and the next call works."""
    x, params = jnp.asarray(batches(comm.size)[comm.rank]), parameters()
    loss = side_by_side(synchronised(comm))
    good = jax.jit(interop.ordered_value_and_grad(loss))
    last = comm.rank == comm.size - 1
    bad = [dict(p) for p in params]
    if last:
        bad[2]["weight"] = jnp.ones(CHANNELS + 1)
    text = raised(good, bad, x)
    peer = f"rank {comm.size - 1} failed"
    assert (
        "weight has shape (5,)" if last else f"PeerError: forward of 'branch2': {peer}"
    ) in text, text
    jax.block_until_ready(good(params, x))

    @jax.jit
    @interop.in_order
    def masked(x):
        mask = jnp.ones(len(x), bool)
        return interop.batch_norm(
            x, comm=comm, name="masked", mask=mask[:, None] if last else mask
        )[0]

    text = raised(masked, jnp.ones((4, WIDTH)))
    assert (
        "mask has shape (4, 1)" if last else f"PeerError: forward of 'masked': {peer}"
    ) in text, text
    jax.block_until_ready(good(params, x))

    backward = functional.batch_norm_backward

    def without_memory(dy, saved):
        with patch.object(CollectiveCall, "payload", side_effect=MemoryError("no room")):
            return backward(dy, saved)

    broken = patch.object(functional, "batch_norm_backward", without_memory)
    with broken if last else nullcontext():
        text = raised(good, params, x)
    assert (
        "MemoryError: no room" if last else f"PeerError: backward of 'branch3': {peer}"
    ) in text, text
    jax.block_until_ready(good(params, x))

    spare = MpiCommunicator(MPI.COMM_WORLD.Dup())  # a mismatch closes it

    @jax.jit
    @interop.in_order
    def mismatch(x):
        return interop.batch_norm(x, comm=spare, name=f"of rank {spare.rank}")[0]

    text = raised(mismatch, x)
    if comm.size > 1:
        assert "CollectiveMismatchError" in text, text
        assert "forward of 'of rank 0'" in text, text
    jax.block_until_ready(good(params, x))
    return "raised"


def check_refusals(comm):
    """What could be in another order on each rank is refused where it is traced."""
    x, params = jnp.asarray(batches(comm.size)[comm.rank]), parameters()
    loss = side_by_side(synchronised(comm))
    for wrong in (jax.jit(loss), jax.grad(loss), jax.jit(jax.grad(loss))):
        text = raised(wrong, params, x)
        assert text.startswith("RuntimeError: batch_norm branch0 is traced where"), text
    for transform in (jax.jit, jax.checkpoint, lambda f: lambda *args: jax.vjp(f, *args)[0]):
        inner = side_by_side(synchronised(comm), wrap=transform)
        for wrapper in (interop.ordered_value_and_grad, interop.in_order):
            text = raised(jax.jit(wrapper(inner)), params, x)
            assert text.startswith("RuntimeError: batch_norm is called inside a jax.jit"), text
    rows = interop.in_order(in_a_row(synchronised(comm)))
    text = raised(jax.jit(rows), parameters(depth=3, channels=WIDTH), x)
    assert "which does not carry the order of messages" in text, text
    value = jax.jit(interop.in_order(loss))(params, x)  # nothing is left open
    return float(pooled(comm, value))


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}
