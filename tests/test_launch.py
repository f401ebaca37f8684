"""Launch plans: every element once, within the limits of a device, in wide words."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest
from cuda_variants import geometries
from hypothesis import given, settings
from hypothesis import strategies as st

from cupybn.backends.cuda.plan import (
    MAX_SLICES,
    MAX_TILE_CHANNELS,
    MAX_TILES,
    RESIDENT_THREADS,
    THREADS,
    plan_launch,
    plan_resident,
)

COUNTED = 2**31  # of vectors in a row, and of vectors and samples in a slice, by kernels
ISSUE_SHAPES = [
    *product((1, 2, 3, 8, 33), (1, 2, 3, 31, 32, 33, 65, 127, 1025),
             (1, 2, 3, 9, 15, 49, 64, 196, 784, 3136, 10007)),
    (2, 70000, 1), (2, 70000, 2), (880801, 1, 1), (4, 1, 81), (4, 9, 1),
]  # fmt: skip
RESNET = [
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14),
    (1024, 14), (512, 14), (512, 7), (2048, 7),
]  # fmt: skip


def visits(plan, shape, misalignment):
    """How often each element is owned by a thread: what ``cuda/geometry.cuh`` does, in NumPy.

    `misalignment`: elements by which the tensor's address lies behind a vector boundary.
    """
    n, c, length = shape
    size, v = n * c * length, plan.vector
    if plan.flat:
        return np.bincount(np.arange(plan.grid[0] * plan.threads * 8), minlength=size)[:size]
    if plan.rows:
        per_row = length // v
        index = np.arange(plan.slices * plan.slice_length)
        index = index[index < n * per_row]
        base = (index // per_row)[:, None] * c * length + np.arange(c) * length
        k = (index % per_row)[:, None]
        start = k * v + (-(base + misalignment) % v if plan.ragged else np.zeros_like(base))
        whole = start + v <= length
        assert plan.ragged or whole.all()
        flat = ((base + start)[whole][:, None] + np.arange(v)).reshape(-1)
        if plan.ragged:
            row = (np.arange(n)[:, None] * c + np.arange(c)) * length
            head, j = -(row + misalignment)[:, :, None] % v, np.arange(2 * v)
            tail = (length - head) % v
            element = np.where(j < v, j, length - 2 * v + j) + row[:, :, None]
            flat = np.append(flat, element[np.where(j < v, j < head, j >= 2 * v - tail)])
    else:
        lines = -(-n // plan.line_samples)
        line = np.arange(plan.slices * plan.slice_length)
        line = line[line < lines]
        pitch = plan.line_samples * c * length
        assert plan.tile_channels * plan.line_samples * length % v == 0
        assert pitch % v == 0
        run = np.arange(plan.grid[0] * plan.tile_channels * plan.line_samples * length)
        run = run[run < pitch]
        flat = (line[:, None] * pitch + run).reshape(-1)
        assert plan.ragged or flat.size == size
        if plan.ragged:
            rest = np.arange(size - size % 8, size)
            assert pitch == plan.tile_channels * plan.line_samples * length
            flat = np.append(flat[flat < size - size % 8], rest)
    return np.bincount(flat, minlength=size)


def check(shape, itemsize, alignment, congruence, whole_bytes=False, multiprocessors=132):
    whole = plan_launch(shape, itemsize, alignment, congruence, multiprocessors, whole_bytes)
    assert whole.slices == 1
    plan = whole.over(3 * multiprocessors)
    v, tiles, slices = plan.vector, *plan.grid
    assert 1 <= tiles <= MAX_TILES
    assert 1 <= slices <= MAX_SLICES
    assert 32 <= plan.threads <= THREADS
    assert plan.threads % 32 == 0
    assert v * itemsize <= congruence
    if not plan.flat:
        assert (plan.rows, v, plan.ragged) in set(geometries(itemsize))
        assert plan.ragged or v * itemsize <= alignment
        assert 1 <= plan.tile_channels <= MAX_TILE_CHANNELS
        shift = 0 if alignment >= v * itemsize else alignment // itemsize
        assert not plan.rows or not plan.ragged or not whole_bytes
        if not plan.rows:
            assert v * itemsize <= alignment
            slots = plan.tile_channels * plan.line_samples * shape[2] // v
            assert slots <= plan.threads
            assert plan.line_samples == 1 or (plan.tile_channels == shape[1] and tiles == 1)
    else:
        assert whole_bytes
        shift = 0
    if shape[0] * shape[1] * shape[2] <= 2_000_000:
        assert (visits(plan, shape, shift) == 1).all() or plan.flat
    return plan


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("whole_bytes", [False, True])
def test_every_element_of_the_listed_shapes_has_one_owner(itemsize, whole_bytes):
    for shape in ISSUE_SHAPES:
        if shape[0] * shape[1] * shape[2] <= 300_000:
            check(shape, itemsize, 16, 16, whole_bytes)
            check(shape, itemsize, itemsize, 16, whole_bytes)
            check(shape, itemsize, itemsize, itemsize, whole_bytes)


@settings(max_examples=300, deadline=None)
@given(
    st.tuples(st.integers(1, 50), st.integers(1, 300), st.integers(1, 80)),
    st.sampled_from([2, 4, 8]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([1, 16, 132]),
)
def test_every_element_of_any_shape_has_one_owner(
    shape, itemsize, aligned, differ, whole, processors
):
    alignment = min(16, itemsize << aligned)
    congruence = min(16, max(alignment, itemsize << differ))
    check(shape, itemsize, alignment, congruence, whole, processors)


@pytest.mark.parametrize("n", [1, 8, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_resnet_shapes_come_in_wide_vectors(n, itemsize):
    for c, side in RESNET:
        for shape in ((n, c, side * side), (n * side * side, c, 1)):
            for whole_bytes in (False, True):
                plan = check(shape, itemsize, 16, 16, whole_bytes)
                assert plan.vector * itemsize == 16
                assert not plan.ragged
                assert not plan.flat


def test_few_channels_are_split_over_many_blocks():
    for shape in ((64, 64, 12544), (256, 3, 50176), (800_000, 64, 1), (4_000_000, 3, 1)):
        plan = check(shape, 2, 16, 16)
        assert 0.9 <= plan.grid[0] * plan.slices / (3 * 132) <= 1


@pytest.mark.parametrize("places", [2 * 40, 4 * 108, 3 * 132, 4 * 132, 6 * 142])
@pytest.mark.parametrize("c", [3, 64, 100, 256, 300, 512, 600, 1024, 2048])
def test_blocks_fill_the_device(c, places):
    """Once, where the tiles leave that open; no wave is left half empty for want of slices."""
    for shape in ((5000, c, 3136), (5000 * 3136, c, 1)):
        plan = plan_launch(shape, 2, 16, 16, 132).over(places)
        blocks = plan.tiles * plan.slices
        assert blocks / (-(-blocks // places) * places) >= 0.83
        if plan.tiles <= 0.1 * places:
            assert 0.85 * places <= blocks <= places


@pytest.mark.parametrize("shape", [(401408, 64, 1), (401408, 128, 1), (700, 8, 49), (4, 3, 10**6)])
def test_groups_of_slices_are_as_many_as_a_few_batches_hold(shape):
    """What the last block of a group adds, and what the last of the groups adds."""
    for itemsize, places in product((2, 4, 8), (2 * 132, 4 * 132)):
        plan = plan_launch(shape, itemsize, 16, 16, 132).over(places)
        rows_at_once = 8 * max(1, plan.threads // plan.tile_channels)
        assert min(plan.group_slices, plan.slices) <= 4 * rows_at_once
        assert plan.groups <= 3 * rows_at_once
        assert plan.groups == -(-plan.slices // plan.group_slices)


def test_shared_memory_lets_a_multiprocessor_hold_three_blocks_of_columns():
    """Beside the 3 KB of a kernel's tables, in the 64 KB of sm_75."""
    for itemsize, c in product((2, 4, 8), (64, 128, 256, 2048)):
        plan = plan_launch((100_000, c, 1), itemsize, 16, 16, 132)
        assert 3 * (plan.shared_bytes + 3200) <= 64 << 10


def test_a_small_channel_is_not_split():
    assert check((32, 64, 49), 2, 16, 16).slices == 1
    assert check((32, 2048, 1), 4, 16, 16).slices == 1


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1 << 33), (1 << 33, 1, 1), (1 << 20, 70000, 1), (1 << 16, 2, 1 << 17), (3, 1 << 24, 9)],
)
def test_more_than_two_to_the_31_elements_fit_the_grid(shape):
    for itemsize, alignment, whole_bytes in product((2, 8), (2, 16), (False, True)):
        check(shape, itemsize, max(alignment, itemsize), 16, whole_bytes)


def test_a_tensor_beyond_the_grid_is_refused():
    with pytest.raises(ValueError, match="blocks"):
        plan_launch((1, 1 << 40, 1024), 4, 16, 16, 132)


@pytest.mark.parametrize("shared", [48, 99, 227])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_every_element_of_a_resident_launch_has_one_owner_and_one_place(itemsize, shared):
    """In blocks whose tiles fit. A vector's place is its number in the tile: cuda/resident.cuh."""
    found = 0
    for shape, whole_bytes, tensors in product(ISSUE_SHAPES, (False, True), (1, 2)):
        if shape[0] * shape[1] * shape[2] > 300_000:
            continue
        plan, why = plan_resident(
            shape, itemsize, 16, 132, shared << 10, tensors, whole_bytes=whole_bytes, always=True
        )
        assert why.startswith("streams: " if plan is None else "resident: ")
        if plan is None:
            continue
        found += 1
        assert plan.slices == 1
        assert plan.vector * itemsize == 16
        assert not plan.ragged
        assert not plan.flat
        assert plan.threads <= RESIDENT_THREADS
        assert plan.threads % 32 == 0
        assert plan.resident_bytes(tensors) + plan.table_bytes <= shared << 10
        assert plan.kept_vectors * 16 >= plan.tile_bytes
        assert (visits(plan, shape, 0) == 1).all()
        if plan.rows:
            assert plan.step == plan.threads
        else:
            assert plan.step * plan.line_vectors <= plan.threads
            unit = max(plan.vector, 8) if whole_bytes else plan.vector
            assert plan.tile_channels * plan.line_samples * shape[2] % unit == 0
        last = plan.kept_vectors - 1  # of the thread that comes last in the last round
        step = plan.step if plan.rows else plan.step * plan.line_vectors
        assert last // step == (plan.length - 1) // plan.step
    assert found > 100


@pytest.mark.parametrize(
    ("shape", "tensors", "blocks", "channels"),
    [
        ((32, 256, 3136), 1, 256, 1),
        ((32, 1024, 196), 1, 512, 2),  # as narrow as it goes: more blocks, as much for each
        ((1568, 2048, 1), 1, 128, 16),  # 32 bytes a run, for as many multiprocessors
        ((8, 70000, 1), 1, 274, 256),  # not in 4375 blocks of 256 bytes
        ((512, 64, 1), 2, 4, 16),
        ((8, 16, 1), 1, 1, 16),
    ],
)
def test_the_tiles_of_a_resident_launch(shape, tensors, blocks, channels):
    plan, why = plan_resident(shape, 2, 16, 132, 227 << 10, tensors)
    assert plan is not None, why
    assert (plan.tiles, plan.tile_channels) == (blocks, channels)


@pytest.mark.parametrize("shape", [(64, 64, 12544), (40, 24, 2352), (25088, 256, 1)])
def test_what_would_leave_multiprocessors_idle_or_does_not_fit_streams(shape):
    plan, why = plan_resident(shape, 2, 16, 132, 227 << 10, 1)
    assert plan is None
    assert re.match(r"streams: (takes \d+ bytes|\d+ tiles of \d+ bytes leave)", why)


@pytest.mark.parametrize("places", [1, 500])
@pytest.mark.parametrize(
    "shape", [(1, 1, 2**35), (3, 2, 2**34 + 7), (2**35, 1, 1), (2**34 + 1, 3, 1), (2**33, 70, 1)]
)
@pytest.mark.parametrize("alignment", [2, 16])
def test_kernels_count_in_32_bits_whatever_the_size(shape, alignment, places):
    plan = plan_launch(shape, 2, alignment, alignment, 132).over(places)
    assert plan.slice_length * plan.line_samples < COUNTED
    assert plan.slices * plan.slice_length >= plan.length
    assert not plan.rows or plan.vector == 1 or shape[2] // plan.vector < COUNTED
