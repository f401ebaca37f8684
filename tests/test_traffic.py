"""The figures that `make traffic` prints stay where the design wants them."""

from __future__ import annotations

import pytest
from cuda_tools import need
from ptx.launch import missing
from traffic import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    Figures,
    counted_kernels,
    measure,
    measure_mask,
    shortfalls,
)


@pytest.mark.ptx
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic_is_at_the_floor(layout, dtype):
    """Of 8 samples, as `make traffic` takes, or of fewer that have 800,000 values."""
    need(missing())
    figures = []
    with counted_kernels():
        for c, size in SHAPES:
            batch = min(8, -(-800_000 // (c * size**2)))
            figures += measure(c, size, layout, dtype, batch)
    assert len(figures) == 3 * len(SHAPES)
    assert not {f[:5]: shortfalls(f) for f in figures if shortfalls(f)}


@pytest.mark.ptx
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_is_read_once_a_pass(layout, dtype):
    """A byte a position, of columns one a vector, which comes from memory once a tile of channels;
    tensors are read and written as without it.
    """
    need(missing())
    passes = {"forward": 2, "backward": 2, "inference": 1}
    for shape in ((64, 56), (256, 14), (512, 7)):
        with counted_kernels():
            masked, plain = (
                measure_mask(*shape, layout, dtype, masked) for masked in (True, False)
            )
        for direction, found in masked.items():
            assert found.bytes == [1.0] * passes[direction]
            assert all(0.5 < fetched < 1.5 for fetched in found.fetched), (shape, found.fetched)
            assert sorted(found.others) == sorted(plain[direction].others)  # by chance of address
            assert not plain[direction].bytes


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"bytes_over_floor": 1.05}, ["bytes"]),
        ({"bytes_over_floor": 0.9}, ["bytes"]),
        ({"sector_use": 0.93}, ["sector"]),
        ({"sector_use": 0.93, "size": 7}, []),
        ({"width": 14.0, "sector_use": 0.5}, ["sector", "width"]),
    ],
)
def test_shortfalls_are_named(changed, missed):
    figures = Figures(64, 56, "rows", "float16", "forward", 1.0, 1.0, 16.0, 1.0, 0.0)
    found = shortfalls(figures._replace(**changed))
    assert [text.split()[0] for text in found] == missed
