"""The JAX function: in one process, and the checks of jax_checks.py over MPI ranks."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, rank_environment

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402

from cupybn import DeviceError, functional  # noqa: E402
from cupybn.communicators import SelfCommunicator  # noqa: E402
from cupybn.interop import jax as interop  # noqa: E402

MPI = Path(__file__).parent / "mpi"
ALONE = SelfCommunicator()
CHECKS = (
    "gradients", "float32", "masks", "what_one_rank_ignores", "forward_alone",
    "running_statistics", "errors_reach_every_rank", "refusals",
)  # fmt: skip


def run(mpirun, n, *names, timeout=110, **env):
    names = [f"check_{name}" for name in names]
    env = {"JAX_PLATFORMS": "cpu", "CUPYBN_TIMEOUT": "60", **env}
    return mpirun(n, MPI / "run_jax_checks.py", *names, timeout=timeout, env=env, check=False)


def check(mpirun, n, *names, **env):
    job = run(mpirun, n, *names, **env)
    passed = [f"check_{name}" for name in names]
    assert (job.returncode, sorted(job.stdout.split())) == (0, sorted(passed)), job.stderr


@pytest.fixture(scope="module")
def job_of_all(mpirun):
    """All checks on n ranks, in one job: to start JAX takes longer than most of them."""
    jobs = {}

    def job(n):
        if n not in jobs:
            jobs[n] = run(mpirun, n, *CHECKS, timeout=280, JAX_ENABLE_X64="1")
        return jobs[n]

    return job


@pytest.mark.mpi
@pytest.mark.timeout(300)
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", CHECKS)
def test_over_mpi(job_of_all, name, n):
    """A check that fails ends the job, and those after it did not pass either."""
    job = job_of_all(n)
    assert f"check_{name}" in job.stdout.split(), job.stderr
    assert job.returncode == 0 or name != CHECKS[-1]


@pytest.mark.mpi
@pytest.mark.parametrize(("n", "x64"), [(1, "1"), (2, "0"), (3, "1")])
def test_gradients_over_mpi(mpirun, n, x64):
    """The numbers of ranks that are not above; and JAX without float64, as it is if not asked."""
    check(mpirun, n, "gradients", "float32", JAX_ENABLE_X64=x64)


@pytest.mark.mpi
def test_over_mpi_with_the_checks_of_jax(mpirun):
    names = ("gradients", "masks", "forward_alone", "running_statistics")
    check(mpirun, 2, *names, JAX_ENABLE_X64="1", JAX_ENABLE_CHECKS="1")


@pytest.mark.mpi
def test_flax_over_ranks_is_flax_in_one_process(mpirun):
    pytest.importorskip("flax", reason="Flax is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    printed = mpirun(3, ROOT / "examples" / "flax_digits.py", "--steps", 20, timeout=110).stdout
    together, apart = map(float, re.findall(r"synchronised +(\S+)", printed))
    assert together < 1e-13, printed
    assert apart > 1e-4, printed


def test_the_module_for_flax_has_its_state_and_takes_a_mask(monkeypatch):
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    monkeypatch.syspath_prepend(ROOT / "examples")
    from flax_digits import SyncBatchNorm

    x, mask = jax.random.normal(jax.random.key(0), (6, 5, 3)), jnp.arange(30).reshape(6, 5) % 3 > 0
    for options in ({}, {"use_bias": False}, {"use_scale": False}):
        theirs = nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
        mine = SyncBatchNorm(3, rngs=nnx.Rngs(0), comm=ALONE, name="a", **options)
        assert (
            nnx.to_pure_dict(nnx.state(mine)).keys() == nnx.to_pure_dict(nnx.state(theirs)).keys()
        )
        for given in (None, mask):
            y = mine(x if given is None else jnp.where(given[..., None], x, jnp.nan), mask=given)
            wide = None if given is None else given[..., None]
            valid = True if given is None else wide
            expected = jnp.where(valid, theirs(x, mask=wide), 0)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(mine.mean[...], theirs.mean[...], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(mine.var[...], theirs.var[...], rtol=1e-5, atol=1e-6)


def norm(x, weight=None, bias=None, **options):
    return interop.batch_norm(x, weight, bias, comm=ALONE, name="a", **options)[0]


def plain(x, weight, bias):
    mean, var = x.mean((0, 2), keepdims=True), x.var((0, 2), keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-5) * weight[:, None] + bias[:, None]


def case(dtype=np.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 3, 5)), dtype)
    return x, jnp.asarray([0.5, 1, 1.5]), jnp.asarray([-1.0, 0, 1])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_and_gradients_of_one_process(dtype, compiled):
    x, weight, bias = case(dtype)

    def loss(f, *args):
        return (jnp.sin(f(*args).astype(jnp.float32)) * jnp.arange(120).reshape(8, 3, 5)).sum()

    mine, theirs = (jax.value_and_grad(partial(loss, f), (0, 1, 2)) for f in (norm, plain))
    value, grads = (jax.jit(mine) if compiled else mine)(x, weight, bias)
    expected, expected_grads = theirs(x.astype(jnp.float32), weight, bias)
    tolerance = {jnp.float32: 1e-5}.get(dtype, 2e-2)
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    for grad, other, like in zip(grads, expected_grads, (x, weight, bias), strict=True):
        assert grad.dtype == like.dtype
        np.testing.assert_allclose(
            grad.astype(np.float32), other, rtol=tolerance, atol=tolerance * abs(other).max()
        )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"channel_axis": -1}, {"activation": "relu"}], ids=str)
def test_a_mask_leaves_the_valid_values(options, compiled):
    """As if they had been packed; NaN and Inf elsewhere are in nothing."""
    x, weight, bias = case()
    dy = jax.random.normal(jax.random.key(1), x.shape)
    mask = jax.random.bernoulli(jax.random.key(0), 0.6, (8, 5))
    last = partial(jnp.moveaxis, source=1, destination=-1)
    packed, packed_dy = last(x)[mask], last(dy)[mask]
    x, dy = jnp.where(mask[:, None], x, jnp.nan), jnp.where(mask[:, None], dy, jnp.inf)
    if "channel_axis" in options:
        x, dy, last = last(x), last(dy), lambda array: array

    def step(x, dy, mask, **options):
        y, vjp = jax.vjp(partial(norm, mask=mask, **options), x, weight, bias)
        return y, *vjp(dy)

    run = partial(step, **options)
    y, dx, *sums = (jax.jit(run) if compiled else run)(x, dy, mask)
    relu = options.get("activation")
    expected, expected_dx, *others = step(packed, packed_dy, None, activation=relu)
    for found, wanted in ((y, expected), (dx, expected_dx)):
        np.testing.assert_allclose(last(found)[mask], wanted, rtol=1e-5, atol=1e-5)
        assert not last(found)[~mask].any()
    for found, wanted in zip(sums, others, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_vjp_may_be_called_twice_and_keeps_arrays_alone():
    x, weight, bias = case()
    y, vjp = jax.vjp(norm, x, weight, bias)
    for first, second in zip(vjp(y), vjp(y), strict=True):
        np.testing.assert_array_equal(first, second)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(vjp))


def test_a_gradient_that_nobody_asks_for_leaves_nothing():
    x, weight, bias = case()
    mask = jnp.ones((8, 5), bool)

    def discarded():
        for options in ({}, {"mask": mask}):
            call = partial(norm, **options)
            jax.vjp(call, x, weight, bias)
            jax.jit(lambda *args: jax.vjp(call, *args)[0])(x, weight, bias)  # noqa: B023

    def alive():
        gc.collect()
        contexts = sum(type(found) is functional.Saved for found in gc.get_objects())
        return contexts, len(jax.live_arrays())

    discarded()
    before = alive()
    for _ in range(3):
        discarded()
    assert alive() == before


def test_equal_calls_are_compiled_once():
    x, weight, bias = case()
    interop._host.cache_clear()
    for _ in range(5):
        jax.grad(lambda x: norm(x, weight, bias).sum())(x)
    assert interop._host.cache_info().currsize == 2


def test_statistics_are_constants():
    def through(x):
        _, statistics = interop.batch_norm(x, comm=ALONE)
        return (statistics.mean * statistics.var).sum()

    x = case()[0]
    assert through(x) != 0
    assert not jax.grad(through)(x).any()


def refused(function, *args):
    with pytest.raises(NotImplementedError) as raised:
        function(*args)
    return str(raised.value)


def test_what_jax_cannot_make_of_it_is_refused_by_name():
    x, weight, bias = case()
    call = partial(norm, weight=weight, bias=bias)
    both = jnp.stack([x, x])
    for mapped in (
        jax.vmap(call),
        jax.jit(jax.vmap(call)),
        jax.vmap(jax.grad(lambda x: call(x).sum())),
    ):
        assert "cannot be used under jax.vmap" in refused(mapped, both)
    assert "cannot be used under jax.vmap" in refused(jax.jacrev(call), x)
    penalty = jax.grad(lambda x: (jax.grad(lambda x: (call(x) ** 3).sum())(x) ** 2).sum())
    assert "batch_norm_double_backward" in refused(penalty, x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(call, (x,), (x,))
    through = jax.grad(interop.in_order(lambda x: (call(x) ** 2).sum()))
    assert "put ordered_value_and_grad in the place of jax.grad" in refused(through, x)


def test_a_gradient_inside_another_wrapper_is_refused():
    x = case()[0]
    inner = interop.ordered_value_and_grad(lambda x: (norm(x) ** 2).sum())
    for compiled in (inner, jax.jit(inner)):
        with pytest.raises(RuntimeError, match="it has to be the outermost"):
            interop.in_order(lambda x, step=compiled: step(x)[0])(x)
    inner(x)


def test_shards_and_other_devices_are_refused(monkeypatch):
    x = case()[0]
    mesh = jax.make_mesh((1,), ("i",))
    spec = jax.sharding.PartitionSpec("i")
    sharded = jax.shard_map(norm, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    assert "jax.shard_map" in refused(sharded, placed)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(DeviceError, match="on the CPU, but x is on gpu: set JAX_PLATFORMS"):
        jax.jit(norm)(x)
    with jax.default_device(jax.devices("cpu")[0]):
        jax.jit(norm)(x)


@pytest.mark.parametrize("bad", ["weight", "dtype", "ndim", "axis", "one value", "mask", "kind"])
def test_errors_are_cupybns_in_jaxs(bad):
    x, weight, bias = case()
    options, text = {}, {
        "weight": "ShapeError: weight has shape (2,), expected (3,)",
        "dtype": "DTypeError: unsupported dtype int32",
        "ndim": "ShapeError: expected at least 2D input (got 1D input)",
        "axis": "ValueError: channel_axis must be 1 or -1, got 2",
        "one value": "Expected more than 1 value per channel when training",
        "mask": "ShapeError: mask has shape (8,), expected (8, 5)",
        "kind": "DTypeError: mask is float32, expected bool or uint8",
    }[bad]  # fmt: skip
    if bad == "weight":
        weight = weight[:2]
    elif bad == "axis":
        options = {"channel_axis": 2}
    elif bad in ("mask", "kind"):
        options = {"mask": jnp.ones(8, bool) if bad == "mask" else jnp.ones((8, 5))}
    x = {"dtype": x.astype(int), "ndim": x[0, :, 0], "one value": x[:1, :, :1]}.get(bad, x)
    call = partial(norm, **options)
    for function in (call, jax.jit(call)):
        with pytest.raises(jax.errors.JaxRuntimeError) as raised:
            jax.block_until_ready(function(x, weight, bias))
        assert text in str(raised.value)
    norm(*case())


def test_the_wrappers_keep_auxiliary_results_and_arguments():
    x, weight, bias = case()

    def loss(weight, x, *, scale):
        y = norm(x, weight, bias)
        return (y**2).sum() * scale, {"y": y, "step": 3, "name": True}

    ordered = interop.ordered_value_and_grad(loss, has_aux=True)
    (value, aux), grad = ordered(weight, x, scale=2.0)
    (expected, others), other = jax.value_and_grad(loss, has_aux=True)(weight, x, scale=2.0)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(grad, other)
    np.testing.assert_array_equal(aux["y"], others["y"])
    assert aux["step"] == 3
    negative = interop.ordered_value_and_grad(lambda w, x: loss(w, x, scale=1.0)[0], argnums=(-1,))
    np.testing.assert_allclose(negative(weight, x)[1][0], jax.grad(
        lambda x: loss(weight, x, scale=1.0)[0])(x), rtol=1e-6)  # fmt: skip


def test_importing_cupybn_imports_no_jax():
    code = "import sys, cupybn, cupybn.interop; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=rank_environment(), cwd=ROOT)
