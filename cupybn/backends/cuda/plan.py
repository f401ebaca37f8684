"""How a kernel covers an (N, C, L) tensor: grid, block, vector width, slices. Integers only.

The terms are those of ``cuda/geometry.cuh``: rows, where a block owns one channel, and runs, where
it owns a tile of neighbouring channels that together are a whole number of vectors; a slice is one
block's share of them: some vectors of a channel, or some lines of a run. A resident kernel keeps a
tile in a block's shared memory between the sums and the write: it is read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

THREADS = 256
MAX_TILE_CHANNELS = 256
MAX_SLICES = 65535  # CUDA's limit of grid.y
MAX_TILES = 2**31 - 1  # and of grid.x
WARP = 32
BYTE = 8

VECTOR_BYTES = 16
_SHORT_ROW_BYTES = 512  # with shorter rows a warp's access is in several places of memory
_RUN_BYTES = 128  # the least length of a run: whole cache lines
_SLICE_BYTES = 16 << 10  # a smaller share of a channel is not worth a block
_COUNTED = 1 << 30  # of a row's vectors and a slice's vectors or samples: kernels count in 32 bits
_FULL = 0.85  # of the places for blocks is full enough
_TRIED = 8
_BATCH = 8  # as in cuda/reduce.cuh
_PAIR_BYTES = 16  # two doubles
RESIDENT_THREADS = 512  # as in cuda/resident.cuh
_SECTOR_BYTES = 32  # of memory, moved as a whole
# Bytes that a multiprocessor could move in the time of a direction's second launch.
_LAUNCH_BYTES = 128 << 10


@dataclass(frozen=True)
class LaunchPlan:
    """One launch; as it is planned first, a block takes a tile whole.

    Attributes:
        rows: one channel a block; else runs.
        vector: elements of a vector.
        ragged: rows or the tensor may begin or end inside of a vector.
        tiles: of channels.
        threads: of a block.
        length: vectors (rows) or lines (runs) of a tile.
        step: vectors or lines that a block takes at once.
        tile_bytes: bytes of the tensor in a tile.
        tile_channels: channels of a tile.
        line_samples: samples of a line.
        line_vectors: vectors of a line in a tile (runs).
        slices: blocks that share a tile.
        flat: one thread for eight neighbouring values, whatever their channels.
    """

    rows: bool
    vector: int
    ragged: bool
    tiles: int
    threads: int
    length: int
    step: int
    tile_bytes: int
    tile_channels: int = 1
    line_samples: int = 1
    line_vectors: int = 0
    slices: int = 1
    flat: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        return self.tiles, self.slices

    @property
    def slice_length(self) -> int:
        """Vectors or lines of a slice; the last one may have fewer."""
        return _round_up(_ceil(self.length, self.slices), self.step)

    @property
    def group_slices(self) -> int:
        """Slices whose sums are added by the last of them, before those of the groups are added.

        For runs, as many as one batch of loads holds. One channel, in rows, needs no groups; nor do
        a few batches, which take no longer than groups would.
        """
        at_once = _BATCH * max(1, self.threads // self.tile_channels)
        return self.slices if self.rows or self.slices <= 4 * at_once else at_once

    @property
    def groups(self) -> int:
        return _ceil(self.slices, self.group_slices)

    @property
    def shared_bytes(self) -> int:
        """Memory in which a reduction over runs adds its threads' sums, and keeps its channels'."""
        if self.rows:
            return 0
        lanes = self.threads // self.line_vectors
        sums = max(1, lanes // 2) * self.line_vectors * self.vector
        return _PAIR_BYTES * (self.tile_channels + max(sums, self.threads, self.tile_channels))

    @property
    def kept_vectors(self) -> int:
        """Vectors of a tensor in a tile."""
        return self.length * max(1, self.line_vectors)

    @property
    def kept_begin(self) -> int:
        """Where they begin in shared memory, in vectors: behind the memory of the sums."""
        return self.shared_bytes // VECTOR_BYTES

    @property
    def table_bytes(self) -> int:
        """At least the static shared memory of a resident kernel."""
        return 1 << 10 if self.rows else 17 << 10 if self.vector == 2 else 11 << 10

    def resident_bytes(self, tensors: int) -> int:
        """Dynamic shared memory of a block that keeps its tile of so many tensors."""
        return self.shared_bytes + VECTOR_BYTES * tensors * self.kept_vectors

    def with_threads(self, most: int) -> LaunchPlan:
        """The plan for blocks of at most so many threads."""
        if self.rows:
            threads = step = min(most, _round_up(_ceil(self.length, 2), WARP))
        else:
            step = min(most // self.line_vectors, self.length)
            threads = _round_up(self.line_vectors * step, WARP)
            step = threads // self.line_vectors
        return replace(self, threads=threads, step=step)

    def over(self, places: int) -> LaunchPlan:
        """The plan in slices, for a device with places for so many blocks at once.

        They fill it once, if they can: a second wave would wait for the last block of the first. If
        tiles then leave many places empty, slices are smaller, and more.
        """
        if self.flat:
            return self
        least = _ceil(self.length * self.line_samples, _COUNTED)
        most = max(least, min(self.tile_bytes // _SLICE_BYTES, MAX_SLICES))
        once = max(least, places // self.tiles)
        slices = most
        if most > once:
            slices = max(
                range(once, min(most + 1, once + _TRIED)), key=lambda n: self._full(n, places)
            )
        slices = _ceil(self.length, _round_up(_ceil(self.length, slices), self.step))
        return replace(self, slices=slices)

    def _full(self, slices: int, places: int) -> float:
        """The part of the places that blocks take over all waves, if it is less than enough."""
        blocks = self.tiles * slices
        return min(_FULL, blocks / (_ceil(blocks, places) * places))


def plan_launch(
    shape: tuple[int, int, int],
    itemsize: int,
    alignment: int,
    congruence: int,
    multiprocessors: int,
    whole_bytes: bool = False,
) -> LaunchPlan:
    """The launch for a tensor of at least one element.

    Args:
        shape: (N, C, L).
        itemsize: bytes of an element.
        alignment: the power of two, in bytes, of which every tensor's address is a multiple.
        congruence: the power of two by which the addresses differ in whole multiples.
        multiprocessors: of the device.
        whole_bytes: a thread, or neighbouring lanes of a warp, must own whole bytes of ReLU bits.
    """
    rows = _plan_rows(shape, itemsize, alignment, congruence, whole_bytes)
    found = (
        _plan_runs(shape, itemsize, alignment, multiprocessors, whole_bytes, rows.vector) or rows
    )
    if whole_bytes and found.rows and (found.ragged or shape[2] % BYTE):
        found = _plan_flat(shape)
    if found.tiles > MAX_TILES:
        raise ValueError(f"a tensor of shape {shape} needs {found.tiles} blocks")
    return found


def _plan_rows(
    shape: tuple[int, int, int],
    itemsize: int,
    alignment: int,
    congruence: int,
    whole_bytes: bool,
) -> LaunchPlan:
    n, c, length = shape
    vector = VECTOR_BYTES // itemsize
    narrow = not vector <= length <= vector * _COUNTED
    # vectors of ragged rows do not begin at a byte of ReLU bits
    if narrow or (alignment if whole_bytes else congruence) < VECTOR_BYTES:
        vector = 1
    ragged = length % vector != 0 or alignment < vector * itemsize
    total = n * (length // vector)
    # an element read by itself costs a thread as much as a vector
    alone = 2 * n * vector if ragged else 0
    tile_bytes = (total + alone) * vector * itemsize
    return LaunchPlan(True, vector, ragged, c, 0, total, 0, tile_bytes).with_threads(THREADS)


def _plan_runs(
    shape: tuple[int, int, int],
    itemsize: int,
    alignment: int,
    multiprocessors: int,
    whole_bytes: bool,
    row_vector: int,
) -> LaunchPlan | None:
    """Runs in the widest possible vectors, if single rows are short, ragged or narrower."""
    length = shape[2]
    vector = max(1, min(alignment, VECTOR_BYTES) // itemsize)
    while vector:
        unit = max(vector, BYTE) if whole_bytes else vector
        narrower = vector < row_vector and not (whole_bytes and length % BYTE)
        long = length % unit == 0 and length * itemsize >= _SHORT_ROW_BYTES
        if length > 1 and (narrower or long):
            return None
        found = _fit_run(shape, itemsize, vector, unit, multiprocessors)
        if found is not None:
            return found
        vector //= 2
    return None


def _fit_run(
    shape: tuple[int, int, int], itemsize: int, vector: int, unit: int, multiprocessors: int
) -> LaunchPlan | None:
    """Runs of a multiple of `unit` elements, or None if there are none that fit into a block."""
    found = None
    for found in _runs(shape, itemsize, vector, unit):
        too_short = found.line_vectors * vector * itemsize < _RUN_BYTES
        idle = THREADS // found.line_vectors > found.length
        many = _ceil(shape[1], 2 * found.tile_channels) >= 2 * multiprocessors
        if not (too_short or idle or many):
            break
    return found


def _runs(
    shape: tuple[int, int, int], itemsize: int, vector: int, unit: int
) -> Iterator[LaunchPlan]:
    """Runs of a multiple of `unit` elements that fit into a block, each wider than the last."""
    n, c, length = shape
    channels, samples = unit // gcd(unit, length), 1
    if c % channels:
        channels, samples = c, unit // gcd(unit, c * length)
    ragged = n % samples != 0
    if ragged and vector * itemsize < VECTOR_BYTES:
        return
    while channels <= MAX_TILE_CHANNELS and channels * samples * length <= THREADS * vector:
        yield LaunchPlan(
            rows=False,
            vector=vector,
            ragged=ragged,
            tiles=_ceil(c, channels),
            threads=0,
            length=_ceil(n, samples),
            step=0,
            tile_bytes=n * min(channels, c) * length * itemsize,
            tile_channels=channels,
            line_samples=samples,
            line_vectors=channels * samples * length // vector,
        ).with_threads(THREADS)
        if channels >= c:
            return
        channels *= 2


def plan_resident(
    shape: tuple[int, int, int],
    itemsize: int,
    alignment: int,
    multiprocessors: int,
    shared: int,
    tensors: int,
    *,
    whole_bytes: bool = False,
    always: bool = False,
) -> tuple[LaunchPlan | None, str]:
    """The launch that keeps `tensors` tensors in shared memory, and why; or None: they stream.

    It is chosen if the busiest multiprocessor then moves less than if all of them streamed twice
    over the tensors, with a launch more.

    Args:
        shared: bytes of shared memory that the device gives a block.
        tensors: that are read: x forward, x and dy backward; one is written.
        always: wherever they fit.
        The others: as :func:`plan_launch`.
    """
    if alignment < VECTOR_BYTES:
        return None, f"streams: an address is no multiple of {VECTOR_BYTES} bytes"
    plan = plan_launch(shape, itemsize, alignment, alignment, multiprocessors, whole_bytes)
    if plan.flat or plan.ragged or plan.vector * itemsize < VECTOR_BYTES:
        return None, f"streams: not in whole vectors of {VECTOR_BYTES} bytes"
    plans = [plan]
    if not plan.rows:
        unit = max(plan.vector, BYTE) if whole_bytes else plan.vector
        plans = list(_runs(shape, itemsize, plan.vector, unit))
        plans = [p for p in plans if p.line_vectors * VECTOR_BYTES >= _SECTOR_BYTES] or plans
    available = shared - plan.table_bytes
    plans = [_with_more_threads(p, available, tensors) for p in plans]
    least = min(p.resident_bytes(tensors) for p in plans)
    plans = [p for p in plans if p.resident_bytes(tensors) <= available]
    if not plans:
        return None, f"streams: takes {least} bytes of shared memory, a block has {available}"
    # blocks of the busiest multiprocessor; smaller ones take as long
    shares = [_ceil(p.tiles, multiprocessors) * max(p.tile_bytes, _SLICE_BYTES) for p in plans]
    _, _, plan = min(zip(shares, map(_is_short, plans), plans, strict=True), key=lambda x: x[:2])
    moved = (tensors + 1) * _ceil(plan.tiles, multiprocessors) * plan.tile_bytes
    streamed = _ceil((2 * tensors + 1) * shape[0] * shape[1] * shape[2] * itemsize, multiprocessors)
    if moved > streamed + _LAUNCH_BYTES and not always:
        why = f"{plan.tiles} tiles of {plan.tile_bytes} bytes leave multiprocessors idle"
        return None, f"streams: {why}"
    kept = plan.resident_bytes(tensors)
    why = f"{plan.tiles} blocks of {plan.threads} threads, {kept} of {available} bytes"
    return plan, f"resident: {why} of shared memory each"


def _with_more_threads(plan: LaunchPlan, available: int, tensors: int) -> LaunchPlan:
    """The plan with more threads in a block, if a multiprocessor holds only one block."""
    more = plan.with_threads(RESIDENT_THREADS)
    alone = 2 * plan.resident_bytes(tensors) > available >= more.resident_bytes(tensors)
    return more if alone else plan


def _is_short(plan: LaunchPlan) -> bool:
    return not plan.rows and plan.line_vectors * VECTOR_BYTES < _RUN_BYTES


def _plan_flat(shape: tuple[int, int, int]) -> LaunchPlan:
    n, c, length = shape
    blocks = _ceil(_ceil(n * c * length, BYTE), THREADS)
    return LaunchPlan(False, 1, False, blocks, THREADS, 0, 1, 0, flat=True)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil(a, b) * b
