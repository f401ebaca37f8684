"""How a kernel covers an (N, C, L) tensor: grid, block, vector width, slices. Integers only.

The terms are those of ``cuda/geometry.cuh``: rows, where a block owns one channel, and runs, where
it owns a tile of neighbouring channels that together are a whole number of vectors; a slice is the
share of one block in them: so many vectors of a channel, or so many lines of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

THREADS = 256
MAX_TILE_CHANNELS = 256
MAX_SLICES = 65535  # CUDA's limit of grid.y
MAX_TILES = 2**31 - 1  # and of grid.x
WARP = 32
BYTE = 8

VECTOR_BYTES = 16
_SHORT_ROW_BYTES = 512  # shorter rows leave a warp's access in several places of memory
_RUN_BYTES = 256  # what a run should at least be, for the same reason
_SLICE_BYTES = 32 << 10  # a smaller share of a channel is not worth a block
_BLOCKS_PER_MULTIPROCESSOR = 8  # two waves of four: enough loads in flight, and an even end


@dataclass(frozen=True)
class LaunchPlan:
    """One launch.

    Attributes:
        rows: one channel a block; else runs.
        vector: elements of a vector.
        ragged: rows or the tensor may begin or end inside of a vector.
        grid: tiles of channels, slices.
        threads: of a block.
        slice_length: vectors (rows) or lines (runs) of a slice.
        tile_channels: channels of a tile.
        line_samples: samples of a line.
        flat: one thread for eight neighbouring values, whatever their channels.
    """

    rows: bool
    vector: int
    ragged: bool
    grid: tuple[int, int]
    threads: int
    slice_length: int
    tile_channels: int = 1
    line_samples: int = 1
    flat: bool = False

    @property
    def slices(self) -> int:
        return self.grid[1]


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
        whole_bytes: a thread, or neighbouring lanes of a warp, must own whole bytes of a bit mask.
    """
    rows = _plan_rows(shape, itemsize, alignment, congruence, multiprocessors, whole_bytes)
    found = (
        _plan_runs(shape, itemsize, alignment, multiprocessors, whole_bytes, rows.vector) or rows
    )
    if whole_bytes and found.rows and (found.ragged or shape[2] % BYTE):
        found = _plan_flat(shape)
    if found.grid[0] > MAX_TILES:
        raise ValueError(f"a tensor of shape {shape} needs {found.grid[0]} blocks")
    return found


def _plan_rows(
    shape: tuple[int, int, int],
    itemsize: int,
    alignment: int,
    congruence: int,
    multiprocessors: int,
    whole_bytes: bool,
) -> LaunchPlan:
    n, c, length = shape
    vector = VECTOR_BYTES // itemsize
    # those of ragged rows do not begin with a byte of a mask
    if length < vector or (alignment if whole_bytes else congruence) < VECTOR_BYTES:
        vector = 1
    ragged = length % vector != 0 or alignment < vector * itemsize
    total = n * (length // vector)
    threads = min(THREADS, _round_up(_ceil(total, 2), WARP))
    # what is read by the element costs a thread as much as a vector
    alone = 2 * n * vector if ragged else 0
    slices = _slices(c, (total + alone) * vector * itemsize, multiprocessors)
    slice_length = _round_up(_ceil(total, slices), threads)
    grid = (c, _ceil(total, slice_length))
    return LaunchPlan(True, vector, ragged, grid, threads, slice_length)


def _plan_runs(
    shape: tuple[int, int, int],
    itemsize: int,
    alignment: int,
    multiprocessors: int,
    whole_bytes: bool,
    row_vector: int,
) -> LaunchPlan | None:
    """Runs in the widest vectors there are, where single rows are short, ragged or narrower."""
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
    n, c, length = shape
    channels, samples = unit // gcd(unit, length), 1
    if c % channels:
        channels, samples = c, unit // gcd(unit, c * length)
    slots = channels * samples * length // vector
    ragged = n % samples != 0
    too_large = slots > THREADS or channels > MAX_TILE_CHANNELS
    if too_large or (ragged and vector * itemsize < VECTOR_BYTES):
        return None
    lines = _ceil(n, samples)
    while channels < c and 2 * slots <= THREADS and 2 * channels <= MAX_TILE_CHANNELS:
        too_short = slots * vector * itemsize < _RUN_BYTES
        idle = THREADS // slots > lines
        if not (too_short or idle or _ceil(c, 2 * channels) >= 2 * multiprocessors):
            break
        channels, slots = 2 * channels, 2 * slots
    threads = _round_up(slots * min(THREADS // slots, lines), WARP)
    tiles = _ceil(c, channels)
    slices = _slices(tiles, n * min(channels, c) * length * itemsize, multiprocessors)
    slice_length = _round_up(_ceil(lines, slices), threads // slots)
    grid = (tiles, _ceil(lines, slice_length))
    return LaunchPlan(False, vector, ragged, grid, threads, slice_length, channels, samples)


def _plan_flat(shape: tuple[int, int, int]) -> LaunchPlan:
    n, c, length = shape
    blocks = _ceil(_ceil(n * c * length, BYTE), THREADS)
    return LaunchPlan(False, 1, False, (blocks, 1), THREADS, 0, flat=True)


def _slices(tiles: int, tile_bytes: int, multiprocessors: int) -> int:
    wanted = _ceil(_BLOCKS_PER_MULTIPROCESSOR * multiprocessors, tiles)
    return max(1, min(wanted, tile_bytes // _SLICE_BYTES, MAX_SLICES))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil(a, b) * b
