"""What the CUDA kernels should take on a GPU, predicted from their launch plans: no GPU needed.

    python -m benchmarks.model [--dtype float16] [--batches 32 64 256] [--trip 0.28] ...

For the batch norms of ResNet-50 as rows (NCHW) and as columns (channels-last memory): blocks,
slices, trips to memory that the last block makes alone, its time (the tail), and the time of
forward and backward; then that time where a direction in one launch is chosen, or a dash, and what
all 53 take. :func:`explain` says what is chosen and why. Nothing of it was measured. What is
assumed are the arguments, by default about an H200:

* a kernel starts `launch` us after the one before it has ended;
* its blocks move `rate` bytes a us in all, and no more than what their loads in flight allow: a
  value comes `latency` us after its load; a multiprocessor alone moves `processor_rate`;
* where sums cross blocks, `trip` us for each store with its fence, each counter, and each batch of
  loads from the second-level cache; `barrier` us for each step in which a block's threads add;
* a block can have `shared` bytes of shared memory. Blocks of a resident kernel that are there at
  once load, add and write in step, and the next ones begin when they have ended.

A multiprocessor holds as many blocks of a kernel as RESIDENT says, which is what NVRTC's output for
sm_90 leaves room for; ``tests/test_sass.py`` compares. The second-level cache is left out: tensors
that fit into it are faster, in both layouts alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log2

from cupybn.backends.cuda.plan import VECTOR_BYTES, LaunchPlan, plan_launch, plan_resident

SHAPES = (  # channels, height and width: the 12 distinct ones of ResNet-50's 53 batch norms
    *((64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28)),
    *((256, 14), (512, 14), (1024, 14), (512, 7), (2048, 7)),
)
COUNTS = 1, 6, 1, 4, 7, 1, 5, 11, 1, 7, 5, 4  # of each shape
BATCHES = 32, 64, 256
LAYOUTS = "rows", "columns"
ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_BATCH = 8  # of loads, as in cuda/reduce.cuh


@dataclass(frozen=True)
class Assumptions:
    """Times in us, the rate in bytes a us."""

    multiprocessors: int = 132
    rate: float = 4.3e6
    latency: float = 0.8
    launch: float = 2.0
    trip: float = 0.28
    barrier: float = 0.04
    processor_rate: float = 5e4
    shared: int = 227 << 10


@dataclass(frozen=True)
class Kernel:
    """What a kernel does with tensors; `unroll` vectors of each are loaded before one is used."""

    name: str
    reads: int
    writes: int
    unroll: int
    reduces: bool


FORWARD = (Kernel("batch_moments", 1, 0, 4, True), Kernel("normalize", 1, 1, 4, False))
BACKWARD = (Kernel("backward_reduce", 2, 0, 2, True), Kernel("backward_input", 2, 1, 2, False))
RESIDENT_KERNELS = (
    Kernel("local_forward", 1, 1, 2, True),
    Kernel("local_backward", 2, 1, 2, True),
)
_RESERVED = 1024  # bytes of shared memory that every block has besides
_RESIDENT_THREADS = {
    True: 1024,
    False: 512,
}  # of rows, of runs: what cuda/resident.cuh leaves room for

# Blocks of a multiprocessor of sm_90, by kernel: rows, and runs (columns, short rows), in vectors
# of 8 (16-bit types) and of 4 elements (float32).
RESIDENT = {
    ("batch_moments", "rows"): {8: 4, 4: 4},
    ("batch_moments", "runs"): {8: 3, 4: 3},
    ("normalize", "rows"): {8: 4, 4: 3},
    ("normalize", "runs"): {8: 4, 4: 3},
    ("backward_reduce", "rows"): {8: 4, 4: 4},
    ("backward_reduce", "runs"): {8: 3, 4: 3},
    ("backward_input", "rows"): {8: 4, 4: 4},
    ("backward_input", "runs"): {8: 2, 4: 3},
}


@dataclass(frozen=True)
class Prediction:
    """Of one launch."""

    blocks: int
    slices: int
    trips: int
    tail: float
    time: float


def _tail(plan: LaunchPlan, assumed: Assumptions) -> tuple[int, float]:
    """Trips of the blocks that come last, each waiting for the one before, and their time."""
    if plan.slices == 1:
        return 0, 0.0
    at_once = plan.threads if plan.rows else max(1, plan.threads // plan.tile_channels)
    levels = [min(plan.group_slices, plan.slices)] + [plan.groups] * (plan.groups > 1)
    rounds = 1 if plan.rows else ceil(plan.tile_channels / plan.threads)
    trips = sum(2 + rounds * ceil(count / (_BATCH * at_once)) for count in levels) + 1
    steps = len(levels) * (4 + (10 if plan.rows else ceil(log2(at_once) / 3)))
    return trips, trips * assumed.trip + steps * assumed.barrier


def predict(
    kernel: Kernel, shape: tuple[int, int, int], itemsize: int, assumed: Assumptions
) -> Prediction:
    """The launch of a kernel over a tensor at 16-byte addresses.

    Raises:
        KeyError: of vectors this narrow nothing is known, or no block holds a channel.
    """
    if kernel in RESIDENT_KERNELS:
        found = predict_resident(kernel, shape, itemsize, assumed, always=True)
        if found is None:
            raise KeyError(f"{shape} streams")
        return found
    plan = plan_launch(shape, itemsize, VECTOR_BYTES, VECTOR_BYTES, assumed.multiprocessors)
    kind = "rows" if plan.rows else "runs"
    places = assumed.multiprocessors * RESIDENT[kernel.name, kind][plan.vector]
    plan = plan.over(places)
    unroll = (
        2 if kernel.name == "normalize" and kind == "runs" and plan.vector == 8 else kernel.unroll
    )
    blocks, tensors = plan.tiles * plan.slices, kernel.reads + kernel.writes
    in_flight = plan.threads * unroll * VECTOR_BYTES * kernel.reads
    of_block = shape[0] * shape[1] * shape[2] * itemsize * tensors / blocks
    spent = assumed.launch + assumed.latency
    for first in range(0, blocks, places):
        together = min(places, blocks - first)
        rate = min(assumed.rate, together * in_flight / assumed.latency * tensors / kernel.reads)
        spent += together * of_block / rate
    trips, tail = 0, 0.0
    if kernel.reduces:
        lanes = 1 if plan.rows else plan.threads // plan.line_vectors
        spent += assumed.barrier * (12 if plan.rows else 3 + 2 * ceil(log2(lanes)))
        trips, tail = _tail(plan, assumed)
    return Prediction(blocks, plan.slices, trips, tail, spent + tail)


def predict_resident(
    kernel: Kernel,
    shape: tuple[int, int, int],
    itemsize: int,
    assumed: Assumptions,
    always: bool = False,
) -> Prediction | None:
    """A direction in one launch where it is chosen, or wherever it is possible; else None."""
    device = assumed.multiprocessors, assumed.shared
    plan, _ = plan_resident(shape, itemsize, VECTOR_BYTES, *device, kernel.reads, always=always)
    if plan is None:
        return None
    of_block = plan.resident_bytes(kernel.reads) + plan.table_bytes + _RESERVED
    by_memory = (assumed.shared + _RESERVED) // of_block
    held = max(1, min(by_memory, _RESIDENT_THREADS[plan.rows] // plan.threads))
    lanes = 1 if plan.rows else plan.threads // plan.line_vectors
    steps = 12 if plan.rows else 3 + 2 * ceil(log2(lanes))
    spent = assumed.launch
    for first in range(0, plan.tiles, assumed.multiprocessors * held):
        together = min(assumed.multiprocessors * held, plan.tiles - first)
        working = min(assumed.multiprocessors, together)
        rate = min(assumed.rate, working * assumed.processor_rate)
        moved = together * plan.tile_bytes * (kernel.reads + kernel.writes)
        spent += moved / rate + assumed.latency + steps * assumed.barrier
    return Prediction(plan.tiles, 1, 0, 0.0, spent)


def explain(
    shape: tuple[int, int, int], dtype: str, multiprocessors: int = 132, shared: int = 227 << 10
) -> list[str]:
    """How one rank's forward and backward over an (N, C, L) tensor are launched, and why."""
    lines = []
    for direction, kernel in zip(("forward", "backward"), RESIDENT_KERNELS, strict=True):
        device = multiprocessors, shared
        _, why = plan_resident(shape, ITEMSIZES[dtype], VECTOR_BYTES, *device, kernel.reads)
        lines.append(f"{direction} {why}")
    return lines


@dataclass(frozen=True)
class Row:
    """Forward and backward of one batch norm; `resident`: in one launch, where that is chosen."""

    batch: int
    channels: int
    size: int
    layout: str
    forward: tuple[Prediction, ...]
    backward: tuple[Prediction, ...]
    resident: tuple[Prediction | None, Prediction | None]

    @property
    def streaming(self) -> tuple[float, float]:
        """The time of forward and backward in two launches each."""
        return sum(p.time for p in self.forward), sum(p.time for p in self.backward)

    @property
    def chosen(self) -> tuple[float, float]:
        """The time of forward and backward as they are launched if nobody asks for anything."""
        forward, backward = (
            time if alone is None else alone.time
            for time, alone in zip(self.streaming, self.resident, strict=True)
        )
        return forward, backward

    @property
    def launches(self) -> tuple[Prediction, ...]:
        return self.forward + self.backward

    @property
    def time(self) -> float:
        return sum(launch.time for launch in self.launches)


def table(dtype: str, batches: tuple[int, ...], assumed: Assumptions) -> Iterator[Row]:
    """Rows of a table: of each batch and shape first as rows, then as columns."""
    for batch in batches:
        for channels, size in SHAPES:
            for layout in LAYOUTS:
                pixels = size * size
                rows = layout == "rows"
                shape = (batch, channels, pixels) if rows else (batch * pixels, channels, 1)
                forward, backward = (
                    tuple(predict(kernel, shape, ITEMSIZES[dtype], assumed) for kernel in kernels)
                    for kernels in (FORWARD, BACKWARD)
                )
                first, second = (
                    predict_resident(kernel, shape, ITEMSIZES[dtype], assumed)
                    for kernel in RESIDENT_KERNELS
                )
                yield Row(batch, channels, size, layout, forward, backward, (first, second))


def totals(rows: list[Row], batch: int, layout: str) -> str:
    """What all batch norms of ResNet-50 take, streaming and as they are launched."""
    own = [row for row in rows if (row.batch, row.layout) == (batch, layout)]
    times = [[*row.streaming, *row.chosen] for row in own]
    each = [
        sum(count * us for count, us in zip(COUNTS, part, strict=True)) / 1e3
        for part in zip(*times, strict=True)
    ]
    streaming, chosen = (" + ".join(f"{ms:.2f}" for ms in part) for part in (each[:2], each[2:]))
    gain = sum(each[:2]) / sum(each[2:])
    return f"{streaming} streaming, {chosen} as chosen, {gain:.2f} times"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(ITEMSIZES), default="float16")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    for name, value in vars(Assumptions()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    assumed = Assumptions(**{name: getattr(args, name) for name in vars(Assumptions())})
    print(f"predicted, us; {args.dtype}; {assumed}")
    print("of batch_moments . normalize . backward_reduce . backward_input; the tails of both sums")
    heads = "blocks", "slices", "trips", "tail", "fwd", "bwd", "columns / rows", "in one launch"
    print(
        f"{'shape':>18} layout  {heads[0]:>23} {heads[1]:>19} {heads[2]:>7}", *heads[3:], sep="  "
    )
    rows = list(table(args.dtype, tuple(args.batches), assumed))
    for row in rows:
        if row.layout == "rows":
            by_rows = row
        shape = f"({row.batch}, {row.channels}, {row.size}, {row.size})"
        blocks = " . ".join(f"{launch.blocks:4}" for launch in row.launches)
        slices = " . ".join(f"{launch.slices:3}" for launch in row.launches)
        sums = row.launches[::2]
        trips = " . ".join(f"{launch.trips:2}" for launch in sums)
        tails = " . ".join(f"{launch.tail:4.1f}" for launch in sums)
        forward, backward = row.streaming
        ratio = "" if row.layout == "rows" else f"{row.time / by_rows.time:.2f}"
        print(f"{shape:>18} {row.layout:7} {blocks}  {slices}  {trips}  {tails}", end="")
        alone = " ".join(f"{p.time:6.1f}" if p else "     -" for p in row.resident)
        print(f"  {forward:6.1f} {backward:6.1f}  {ratio:4}  {alone}")
    for batch in args.batches:
        for layout in LAYOUTS:
            print(f"all 53, N = {batch}, {layout}, ms: {totals(rows, batch, layout)}")


if __name__ == "__main__":
    main()
