"""The examples, run as a user runs them; and the claims that they make.

As a script, under mpiexec, this file trains the digits three ways and writes every step's state to
the file named by its argument.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from conftest import rank_environment
from masked_sequences import build_network as build_masked
from masked_sequences import load_data as load_sequences
from masked_sequences import padded
from network import SGD, Conv2d, Flatten, Linear, ReLU, softmax_cross_entropy
from train_digits import build_network, load_data
from training import Training

import cupybn
from cupybn.communicators import MpiCommunicator
from cupybn.testing import check_gradients

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STEPS = 50
BATCH = 2
ROW = re.compile(r"^(\([abc]\)) .*?(\d+\.\d{4}) +(\d+\.\d)% +\d+\.\d$", re.MULTILINE)


def run_example(name, *args, path=(), check=True):
    """One process of an example, with more folders to import from; its output as text."""
    env = rank_environment()
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), env["PYTHONPATH"]])
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def test_quickstart():
    output = run_example("quickstart.py").stdout
    assert "the same of y:  mean 0.000, standard deviation 1.000" in output
    assert "evaluation of one sample: (1, 4, 16, 16)" in output
    assert "<All keys matched successfully>" in output


def test_custom_framework():
    output = run_example("custom_framework.py").stdout
    error = re.search(r"largest error (\S+)$", output.strip())
    assert error is not None, output
    assert float(error[1]) < 1e-8


def rows_of(output):
    """(way, loss, accuracy in percent) of each row of the table."""
    return [(way, float(loss), float(share)) for way, loss, share in ROW.findall(output)]


@pytest.mark.mpi
def test_train_digits_three_ways(mpirun, tmp_path):
    picture = tmp_path / "curves.png"
    script = EXAMPLES / "train_digits.py"
    output = mpirun(4, script, "--epochs", 1, "--plot", picture).stdout
    (a, loss_a, share_a), (b, loss_b, share_b), (c, loss_c, _) = rows_of(output)
    assert (a, b, c) == ("(a)", "(b)", "(c)")
    assert (loss_b, share_b) == (loss_a, share_a)
    assert loss_c > 1.1 * loss_a
    assert share_a > 85
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "option", "way"), [(3, "--sync", "(b)"), (2, "--no-sync", "(c)")]
)
def test_train_digits_one_way(mpirun, tmp_path, ranks, option, way):
    picture = tmp_path / "curves.png"
    options = [option, "--epochs", 2, "--batch", 7, "--dtype", "float32", "--plot", picture]
    output = mpirun(ranks, EXAMPLES / "train_digits.py", *options).stdout
    [(found, _, share)] = rows_of(output)
    assert found == way
    assert share > 80
    assert ("running statistics of rank 0" in output) == (option == "--no-sync")
    assert picture.exists()


def test_train_digits_timing(mpirun, tmp_path):
    options = ["--timing", "--epochs", 1, "--batch", 30, "--plot", tmp_path / "curves.png"]
    output = mpirun(2, EXAMPLES / "train_digits.py", *options).stdout
    assert [way for way, *_ in rows_of(output)] == ["(b)"]
    rows = [line.split(maxsplit=7) for line in output.splitlines()]
    messages = {row[7]: int(row[0]) for row in rows if len(row) == 8 and row[0].isdecimal()}
    steps = 15
    assert messages["backward of '1'"] == steps
    assert messages["allreduce_gradients"] == steps
    assert re.search(r"^rank [01] waited least", output, re.MULTILINE)


def test_train_digits_names_the_extra_when_a_package_is_missing(tmp_path):
    (tmp_path / "tqdm.py").write_text("raise ModuleNotFoundError('gone', name='tqdm')\n")
    process = run_example("train_digits.py", path=[tmp_path], check=False)
    assert process.returncode == 1
    assert "tqdm is missing: pip install tqdm matplotlib scikit-learn" in process.stderr


def reason_for_no_device():
    try:
        cupybn.distributed.local_device()
    except cupybn.DeviceError as error:
        return str(error)
    return ""


@pytest.mark.skipif(not reason_for_no_device(), reason="this machine has a CUDA device")
def test_train_digits_without_cuda_says_so():
    process = run_example("train_digits.py", "--device", "cuda", check=False)
    assert process.returncode == 1
    assert f"DeviceError: {reason_for_no_device()}" in process.stderr


def trajectory(data, comm, *, batch, sync):
    """Parameters and buffers after each step, two arrays (STEPS, values)."""
    network = build_network(seed=0, dtype="float64")
    if sync:
        network = cupybn.convert_sync_batchnorm(network, comm)
    steps = Training(network, data, comm, batch=batch, seed=1).steps(epochs=STEPS)
    kinds = [network.named_parameters, network.named_buffers]
    course = [
        [np.concatenate([array.ravel() for _, array in kind()]) for kind in kinds]
        for _ in islice(steps, STEPS)
    ]
    return [np.array(states) for states in zip(*course, strict=True)]


def write_trajectories(path):
    """Trains on the ranks of COMM_WORLD; rank 0 writes, and also trains as a single process."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    comm = MpiCommunicator(world)
    data = world.bcast(load_data("float64") if comm.rank == 0 else None)
    # 12 whole batches of 8 images an epoch, then one of 3: rank 3 gets none of it.
    data = replace(data, images=data.images[:99], labels=data.labels[:99])
    b = trajectory(data, comm, batch=BATCH, sync=True)
    c = trajectory(data, comm, batch=BATCH, sync=False)
    if comm.rank == 0:
        alone = cupybn.SelfCommunicator()
        a = trajectory(data, alone, batch=BATCH * comm.size, sync=False)
        ways = {"a": a, "b": b, "c": c}
        np.savez(path, **{f"{way} {i}": ways[way][i] for way in ways for i in range(2)})


@pytest.mark.mpi
def test_fifty_steps_are_those_of_one_process_only_when_synchronised(mpirun, tmp_path):
    path = tmp_path / "trajectories.npz"
    mpirun(4, __file__, path)
    with np.load(path) as states:
        for i, kind in enumerate(("parameters", "buffers")):
            a, b, c = (states[f"{way} {i}"] for way in "abc")
            assert len(a) == STEPS
            assert np.ptp(a, axis=0).max() > 0.1, kind
            scale = np.maximum(1, np.abs(a))
            assert (np.abs(b - a) / scale).max() < 1e-9, kind
            assert (np.abs(c - a) / scale).max(axis=1).min() > 1e-3, kind


@pytest.mark.mpi
def test_masked_sequences(mpirun, tmp_path):
    picture, script = tmp_path / "curves.png", EXAMPLES / "masked_sequences.py"
    output = mpirun(2, script, "--epochs", 3, "--plot", picture).stdout
    (a, loss_a, share_a), (b, loss_b, share_b) = rows_of(output)
    assert (a, b) == ("(a)", "(b)")
    assert loss_a < 0.9 * loss_b
    assert share_a > share_b
    off = [float(percent) for percent in re.findall(r"off by (\S+)%", output)]
    assert off[0] < 0.01
    assert off[1] > 30
    assert picture.stat().st_size > 10_000


def test_padding_changes_a_masked_network_by_rounding_alone():
    """Forward and backward of a batch, and of the same with more padding, in training mode."""
    sequences, labels = load_sequences()
    x, mask = padded(sequences[:12])
    more = [np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, 40)]) for array in (x, mask)]
    changes = []
    for masked in (True, False):
        results = []
        for values, valid in ((x, mask), more):
            network = build_masked(cupybn.SelfCommunicator(), masked)
            logits = network.forward(values, mask=valid)
            network.backward(softmax_cross_entropy(logits, labels[:12], 12)[1])
            results.append([logits, *(grad for _, grad in network.named_gradients())])
        changes.append(max(np.abs(m - t).max() for m, t in zip(*results, strict=True)))
    assert changes[0] < 1e-5
    assert changes[1] > 0.01


def generator():
    return np.random.default_rng(3)


@pytest.mark.parametrize(
    ("stride", "padding", "bias", "size"),
    [(1, 1, True, (4, 4)), (2, 1, False, (5, 4)), (2, 0, True, (6, 5)), (1, 2, False, (3, 3))],
)
def test_conv2d(stride, padding, bias, size):
    rng = generator()
    options = {"stride": stride, "padding": padding, "bias": bias, "dtype": "float64"}
    layer = Conv2d(2, 3, rng=rng, **options)
    if bias:
        layer.bias += rng.standard_normal(3)
    x = rng.standard_normal((2, 2, *size))
    edges = (padding, padding)
    padded = np.pad(x, ((0, 0), (0, 0), edges, edges))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    expected = np.einsum("nchwij,ocij->nohw", windows[:, :, ::stride, ::stride], layer.weight)
    if bias:
        expected += layer.bias[:, None, None]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12, atol=1e-12)
    check_gradients(layer, x)


def test_linear():
    rng = generator()
    layer = Linear(4, 3, rng=rng, dtype="float64")
    layer.bias += rng.standard_normal(3)
    x = rng.standard_normal((5, 4))
    np.testing.assert_allclose(layer(x)[2], [w @ x[2] for w in layer.weight] + layer.bias)
    check_gradients(layer, x)


@pytest.mark.parametrize("layer", [ReLU(), Flatten()])
def test_layers_without_parameters(layer):
    check_gradients(layer, generator().standard_normal((2, 3, 2, 2)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layers_keep_the_dtype_take_empty_batches_and_add_to_gradients(dtype):
    network = build_network(seed=0, dtype=dtype)
    x = generator().standard_normal((3, 1, 8, 8)).astype(dtype)
    dy = np.ones((3, 10), dtype)
    gradients = []
    for batch in (3, 0, 3):
        assert network(x[:batch]).dtype == dtype
        assert network.backward(dy[:batch]).dtype == dtype
        gradients.append({name: grad.copy() for name, grad in network.named_gradients()})
    once, with_empty, twice = gradients
    for name in once:
        np.testing.assert_array_equal(with_empty[name], once[name])
        np.testing.assert_array_equal(twice[name], 2 * once[name])
    assert np.abs(once["0.weight"]).max() > 0


def test_sgd_with_momentum():
    layer = cupybn.BatchNorm1d(2, dtype="float64")
    layer.grads["bias"][...] = [1.0, -2.0]
    optimizer = SGD(layer, rate=0.1, momentum=0.5)
    optimizer.step()
    optimizer.step()
    np.testing.assert_allclose(layer.bias, [-0.1 * (1 + 1.5), 0.2 * (1 + 1.5)], rtol=1e-15)
    np.testing.assert_array_equal(layer.weight, [1, 1])


class Loss(cupybn.Layer):
    """The loss as a layer, for ``check_gradients``."""

    def compute_forward(self, x, labels):
        return softmax_cross_entropy(x, labels, count=7)

    def compute_backward(self, dy, context):
        return dy * context


def test_loss():
    logits = 3 * generator().standard_normal((5, 4))
    labels = np.array([0, 3, 1, 1, 2])
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -sum(np.log(chances[i, label]) for i, label in enumerate(labels)) / 7
    assert softmax_cross_entropy(logits, labels, count=7)[0] == pytest.approx(expected, rel=1e-12)
    assert np.isfinite(softmax_cross_entropy(1e4 * logits, labels, count=7)[0])
    check_gradients(Loss(), logits, labels=labels)


def test_losses_and_gradients_of_uneven_parts_add_up():
    logits = generator().standard_normal((5, 4))
    labels = np.array([0, 3, 1, 1, 2])
    loss, dlogits = softmax_cross_entropy(logits, labels, count=5)
    parts = [softmax_cross_entropy(logits[s], labels[s], 5) for s in np.split(np.arange(5), [3, 3])]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(np.concatenate([part for _, part in parts]), dlogits, rtol=1e-12)


if __name__ == "__main__":
    write_trajectories(Path(sys.argv[1]))
