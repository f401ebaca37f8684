"""Trains a small convolutional network on scikit-learn's digits, with two images on each rank.

    mpiexec -n 4 python -m mpi4py examples/train_digits.py

Three ways, from the same parameters and with the same images in every step: (a) one process with
the whole batch, (b) all ranks with a share each, batch norm synchronised, (c) the same without
synchronisation. (a) and (b) are the same computation; in (c) each rank normalises with the
statistics of its own few images. The network is far too small for more ranks to make it faster.
``--help`` lists the options.

With ``--save FILE`` the training (b) leaves a checkpoint every 50 steps, and on SIGTERM or SIGUSR1
to any rank one more, before all ranks end with code 143; ``--resume FILE`` goes on from it: with as
many ranks exactly as if it had never stopped, with another number up to rounding, if ``--batch``
times the ranks stays the same. ``--timing`` ends (b) with a table of its messages: which layer
takes how long, and which rank the others wait for.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before NumPy is imported: threads of several ranks only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from network import Conv2d, Flatten, Linear, ReLU
from report import Course, plot, table
from training import Data, StopRequest, Training, accuracy

import cupybn
from cupybn.communicators import Communicator, MpiCommunicator, Timed
from cupybn.distributed import local_device, verify_sync

TRAINING_IMAGES = 900  # of 1797
STOPPED = 128 + signal.SIGTERM  # exit code


@dataclass(frozen=True)
class Way:
    """A way to train; `batch` is the number of images on each rank of `comm`."""

    title: str
    comm: Communicator
    batch: int
    sync: bool


def load_data(dtype: str) -> Data:
    """The digits in an order that is always the same, half of them for training."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = (images[order] / 8 - 1).reshape(-1, 1, 8, 8).astype(dtype)
    labels = labels[order]
    end = TRAINING_IMAGES
    return Data(images[:end], labels[:end], images[end:], labels[end:])


def build_network(seed: int, dtype: str) -> cupybn.Sequential:
    """(N, 1, 8, 8) images to (N, 10) logits; the same parameters for the same seed."""
    rng = np.random.default_rng(seed)
    layers: list[cupybn.Layer] = []
    for channels, channels_out, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 1)):
        layers += [
            Conv2d(channels, channels_out, stride=stride, bias=False, rng=rng, dtype=dtype),
            cupybn.BatchNorm2d(channels_out, dtype=dtype),
            ReLU(),
        ]
    return cupybn.Sequential(*layers, Flatten(), Linear(64 * 2 * 2, 10, rng=rng, dtype=dtype))


def run(way: Way, data: Data, args: argparse.Namespace) -> Course:
    """Trains a new network in one way; all ranks of ``way.comm`` call it, rank 0 takes notes."""
    device = local_device() if args.device == "cuda" else args.device
    if args.device == "cuda":  # where arrays are made
        import_module("cupy").cuda.Device(int(device.partition(":")[2])).use()
    network: cupybn.Layer = build_network(args.seed, args.dtype).to(device)
    if way.sync:
        network = cupybn.convert_sync_batchnorm(network, way.comm)
    training = Training(network, data, way.comm, batch=way.batch, seed=args.seed)
    course = Course(way.title)
    if args.resume:
        state = cupybn.load(args.resume)
        training.load_state_dict(state)
        course = Course(way.title, **state.metadata["course"])
    stop = StopRequest(way.comm) if args.save else None
    begin = time.perf_counter()
    for last in progress(training, args.epochs, way.title):
        if last:
            loss = training.pooled_loss() / training.steps_in_epoch
            if way.comm.rank == 0:
                course.losses.append(loss)
                course.accuracies.append(accuracy(network, data))
        course.stopped = stop is not None and stop.made()
        if args.save and (last or course.stopped or training.steps_done % args.save_every == 0):
            save(training, course, args.save)
        if course.stopped:
            break
    course.seconds = time.perf_counter() - begin
    if way.sync:
        verify_sync(network, way.comm)
    return course


def progress(training: Training, epochs: int, title: str) -> Iterable[bool]:
    """The steps that are left; with a progress bar on rank 0, if that writes to a terminal."""
    steps = training.steps(epochs)
    if training.comm.rank != 0:
        return steps
    from tqdm import tqdm

    total, done = epochs * training.steps_in_epoch, training.steps_done
    return tqdm(
        steps, desc=title, total=total, initial=done, leave=False, mininterval=1,
        disable=None,  # no bar in a file
    )  # fmt: skip


def save(training: Training, course: Course, path: Path) -> None:
    """Rank 0 writes a checkpoint; all ranks call it."""
    state = training.state_dict()
    if training.comm.rank == 0:
        state.metadata["course"] = {"losses": course.losses, "accuracies": course.accuracies}
        cupybn.save(state, path)


def chosen_ways(args: argparse.Namespace, comm: Communicator) -> list[Way]:
    """All three ways, or the one that ``--sync`` or ``--no-sync`` asks for."""
    ranks = f"{comm.size} rank" + ("s" if comm.size > 1 else "")
    whole = args.batch * comm.size
    ways = [
        Way(f"(a) one process, batch {whole}", cupybn.SelfCommunicator(), whole, sync=False),
        Way(f"(b) {ranks}, synchronised", comm, args.batch, sync=True),
        Way(f"(c) {ranks}, not synchronised", comm, args.batch, sync=False),
    ]
    return ways if args.sync is None else [ways[1 if args.sync else 2]]


def positive(text: str) -> int:
    """An argument that must be a positive integer."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains on digits with a few images on each rank: in one process, with "
        "synchronised batch norm, and without."
    )
    add = parser.add_argument
    add("--sync", action=argparse.BooleanOptionalAction, help="only this way, not all three")
    add("--epochs", type=positive, default=8, help="default %(default)s")
    add("--batch", type=positive, default=2, help="images on each rank, default %(default)s")
    add("--seed", type=int, default=0, help="of parameters and order, default %(default)s")
    add(
        "--dtype",
        choices=("float32", "float64"),
        default="float64",
        help="default %(default)s; in float32, rounding drives (a) and (b) apart in the end",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    add("--plot", type=Path, default=Path("digits.png"), metavar="FILE", help="picture to write")
    add("--save", type=checkpoint, metavar="FILE", help="to write, .npz or .safetensors")
    add("--save-every", type=positive, default=50, metavar="STEPS", help="default %(default)s")
    add("--resume", type=checkpoint, metavar="FILE", help="a checkpoint to go on from")
    add("--timing", action="store_true", help="(b) alone: messages and seconds waited, by layer")
    args = parser.parse_args()
    if args.save or args.resume or args.timing:
        if args.sync is False:
            parser.error("without synchronisation every rank has statistics of its own: use --sync")
        args.sync = True
    return args


def checkpoint(name: str) -> Path:
    """A file name that ``cupybn.save`` takes."""
    path = Path(name)
    if path.suffix not in (".npz", ".safetensors"):
        raise argparse.ArgumentTypeError(f"{name} must end in .npz or .safetensors")
    return path


def check_extras() -> None:
    """Ends the program with advice if a package that only the example needs is missing."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"{error.name} is missing: pip install tqdm matplotlib scikit-learn"
        ) from error


def wait_asleep(world: Any) -> None:
    """A barrier; ranks that wait leave the cores to those at work, as ``Barrier()`` does not."""
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(0.01)


def main() -> None:
    from mpi4py import MPI

    args = parse_arguments()
    world = MPI.COMM_WORLD
    first = world.rank == 0
    if first:
        check_extras()
    data = world.bcast(load_data(args.dtype) if first else None)
    comm = MpiCommunicator(world)
    timed = Timed(comm) if args.timing else None
    courses = []
    for way in chosen_ways(args, timed or comm):
        if world.rank < way.comm.size:
            courses.append(run(way, data, args))
        wait_asleep(world)
    if timed:
        timed.report()
    if args.save and courses[-1].stopped:
        if first:
            print(f"Stopped by a signal: --resume {args.save} goes on from there.", flush=True)
        raise SystemExit(STOPPED)
    if first:
        print(table(courses))
        if args.sync is not True and world.size > 1:
            print("(c) is tested with the running statistics of rank 0: each rank has its own.")
        plot(courses, args.plot)
        print(f"Curves: {args.plot}")


if __name__ == "__main__":
    main()
