"""Trains a small ResNet in PyTorch on scikit-learn's digits, with two images on each rank.

    mpiexec -n 4 python -m mpi4py examples/torch_sync_mpi.py
    torchrun --nproc-per-node 4 examples/torch_sync_mpi.py

Under mpiexec the ranks' messages go over MPI; under torchrun over a process group of gloo (NCCL
with ``--device cuda``), without MPI or mpi4py.

The same three ways as ``train_digits.py``: (a) one process with the whole batch and PyTorch's own
batch norm, (b) all ranks with a share each, its batch norms converted by ``cupybn.interop.torch``,
(c) the same without converting. After the first steps the states of (b) and (c) are compared with
that of (a), number by number.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before NumPy is imported: threads of several ranks only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

try:
    import torch
    from torch import distributed
except ImportError as error:
    raise SystemExit("PyTorch is missing: pip install torch") from error
from report import Course, table
from torch.nn.functional import cross_entropy

import cupybn
from cupybn.communicators import Communicator, MpiCommunicator
from cupybn.interop.torch import (
    ProcessGroupCommunicator,
    allreduce_gradients,
    broadcast_parameters,
    convert_sync_batchnorm,
    verify_sync,
)

RATE = 0.02
COMPARED = 100  # steps, before rounding drives even equal computations apart


class Data(NamedTuple):
    """Images (N, 1, 8, 8) from -1 to 1 and labels (N,), as tensors."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


class Way(NamedTuple):
    """A way to train; `batch` is the number of images on each rank of `comm`."""

    title: str
    comm: Communicator
    batch: int
    sync: bool


class Block(torch.nn.Module):
    """Two convolutions beside a shortcut, as in ResNet."""

    def __init__(self, channels: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(channels, channels_out, 3, stride, padding=1, bias=False),
            torch.nn.BatchNorm2d(channels_out),
            torch.nn.ReLU(),
            torch.nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(channels_out),
        )
        self.shortcut = torch.nn.Sequential()
        if (channels, stride) != (channels_out, 1):
            self.shortcut.append(torch.nn.Conv2d(channels, channels_out, 1, stride, bias=False))
            self.shortcut.append(torch.nn.BatchNorm2d(channels_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def build_network(seed: int, dtype: str, device: str) -> torch.nn.Module:
    """(N, 1, 8, 8) images to (N, 10) logits; the same parameters for the same seed."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        Block(16, 32, 2),
        Block(32, 64, 2),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    )
    return network.to(device, getattr(torch, dtype))


def load_data(count: int, dtype: str, device: str) -> Data:
    """The digits in an order that is always the same, `count` of them for training."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.from_numpy((images[order] / 8 - 1).reshape(-1, 1, 8, 8))
    x = x.to(device, getattr(torch, dtype))
    y = torch.from_numpy(labels[order]).to(device)
    return Data(x[:count], y[:count], x[count:], y[count:])


def train(
    network: torch.nn.Module, data: Data, way: Way, epochs: int, seed: int
) -> Iterator[tuple[int, float]]:
    """Trains in place; yields the epoch and this rank's part of the loss after each step."""
    comm = way.comm
    broadcast_parameters(network, comm)
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9)
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        order = rng.permutation(len(data.images))
        for start in range(0, len(order), way.batch * comm.size):
            chosen = order[start : start + way.batch * comm.size]
            mine = np.array_split(chosen, comm.size)[comm.rank]
            # A sum over nothing on a rank without images: its backward has to run as well. Divided
            # by the count of all ranks, losses and gradients are then summed, not averaged.
            logits = network(data.images[mine])
            loss = cross_entropy(logits, data.labels[mine], reduction="sum") / len(chosen)
            optimizer.zero_grad()
            loss.backward()
            allreduce_gradients(network, comm, op="sum")
            optimizer.step()
            yield epoch, loss.item()


def accuracy(network: torch.nn.Module, data: Data) -> float:
    """The share of the test images that are recognised, with this rank's running statistics."""
    network.eval()
    with torch.no_grad():
        right = network(data.test_images).argmax(dim=1) == data.test_labels
    network.train()
    return float(right.double().mean())


def state_of(network: torch.nn.Module) -> np.ndarray[Any, Any]:
    """All parameters and running statistics in one vector."""
    parts = [values.detach().cpu().double().reshape(-1) for values in network.state_dict().values()]
    return torch.cat(parts).numpy()


def run(way: Way, args: argparse.Namespace) -> tuple[Course, np.ndarray[Any, Any]]:
    """Trains a new network in one way; returns its course, and its state after some steps."""
    device = args.device
    if device == "cuda":
        device = cupybn.distributed.local_device()
    data = load_data(args.images, args.dtype, device)
    network = build_network(args.seed, args.dtype, device)
    if way.sync:
        network = convert_sync_batchnorm(network, way.comm)
    per_epoch = -(-len(data.images) // (way.batch * way.comm.size))
    steps: Any = train(network, data, way, args.epochs, args.seed)
    if way.comm.rank == 0:
        from tqdm import tqdm

        total = per_epoch * args.epochs
        steps = tqdm(steps, desc=way.title, total=total, leave=False, mininterval=1)
    course, losses, compared = Course(way.title), np.zeros(args.epochs), np.zeros(0)
    begin = time.perf_counter()
    for step, (epoch, loss) in enumerate(steps, start=1):
        losses[epoch] += loss / per_epoch
        if step == min(COMPARED, per_epoch * args.epochs):
            compared = state_of(network)
        if step % per_epoch == 0 and way.comm.rank == 0:
            course.accuracies.append(accuracy(network, data))
    course.losses = way.comm.allreduce(losses, "losses").tolist()
    course.seconds = time.perf_counter() - begin
    if way.sync:
        verify_sync(network, way.comm)
    return course, compared


def positive(text: str) -> int:
    """An argument that must be a positive integer."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a ResNet in PyTorch with a few images on each rank: in one process, "
        "with synchronised batch norm, and without."
    )
    add = parser.add_argument
    # 899: the last step of an epoch leaves one of four ranks without an image.
    add("--images", type=positive, default=899, help="to train on, of 1797, default %(default)s")
    add("--epochs", type=positive, default=2, help="default %(default)s")
    add("--batch", type=positive, default=2, help="images on each rank, default %(default)s")
    add("--seed", type=int, default=0, help="of parameters and order, default %(default)s")
    add("--dtype", choices=("float32", "float64"), default="float64", help="default %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    return parser.parse_args()


def check_extras() -> None:
    """Ends the program with advice if a package that only the example needs is missing."""
    try:
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"{error.name} is missing: pip install tqdm matplotlib scikit-learn"
        ) from error


def join_ranks(device: str) -> tuple[Communicator, Callable[[], None]]:
    """The communicator of all ranks, and a barrier in which they leave the cores to others."""
    if distributed.is_torchelastic_launched():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        distributed.init_process_group(backend)
        comm = ProcessGroupCommunicator()
        return comm, distributed.barrier
    from mpi4py import MPI

    def wait_asleep() -> None:
        request = MPI.COMM_WORLD.Ibarrier()
        while not request.Test():
            time.sleep(0.01)

    return MpiCommunicator(MPI.COMM_WORLD), wait_asleep


def main() -> None:
    args = parse_arguments()
    check_extras()
    comm, wait = join_ranks(args.device)
    ranks = f"{comm.size} rank" + ("s" if comm.size > 1 else "")
    whole = args.batch * comm.size
    ways = [
        Way(f"(a) one process, batch {whole}", cupybn.SelfCommunicator(), whole, sync=False),
        Way(f"(b) {ranks}, synchronised", comm, args.batch, sync=True),
        Way(f"(c) {ranks}, not synchronised", comm, args.batch, sync=False),
    ]
    courses, states = [], []
    for way in ways:
        if comm.rank < way.comm.size:
            course, state = run(way, args)
            courses.append(course)
            states.append(state)
        wait()
    if comm.rank == 0:
        print(table(courses))
        print(
            f"Largest difference from (a) after {COMPARED} steps, in all {states[0].size} numbers"
        )
        print("of the state, the statistics included, relative to the larger of 1 and the number:")
        for way, state in zip(ways[1:], states[1:], strict=True):
            error = np.abs(state - states[0]) / np.maximum(1, np.abs(states[0]))
            print(f"  {way.title}: {error.max():.1e}")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
