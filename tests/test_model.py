"""The model of the kernels' time: what it predicts of the plans, and that it would tell."""

from __future__ import annotations

import pytest

from benchmarks import model
from cupybn.backends.cuda import plan


@pytest.fixture(scope="module", params=["float16", "float32"])
def rows(request):
    return list(model.table(request.param, model.BATCHES, model.Assumptions()))


def test_the_table_has_every_shape_in_both_layouts(rows):
    assert len(rows) == 2 * 12 * 3
    assert len({(row.batch, row.channels, row.size, row.layout) for row in rows}) == len(rows)


def test_the_last_block_is_alone_for_at_most_10_us(rows):
    assert max(launch.tail for row in rows for launch in row.launches) <= 10


def test_columns_take_little_longer_than_rows(rows):
    for by_rows, columns in zip(rows[::2], rows[1::2], strict=True):
        assert columns.time <= 1.15 * by_rows.time, (columns, by_rows)


def test_partial_sums_that_wait_for_each_other_would_show(monkeypatch):
    """One load a trip, and all slices in one group: what the kernels did."""
    monkeypatch.setattr(model, "_BATCH", 1)
    monkeypatch.setattr(plan.LaunchPlan, "group_slices", property(lambda self: self.slices))
    found = model.table("float16", (32,), model.Assumptions())
    assert max(launch.tail for row in found for launch in row.launches) > 20


def test_main_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["model", "--batches", "8", "--trip", "0.5", "--dtype", "float32"]
    )
    model.main()
    lines = capsys.readouterr().out.splitlines()
    assert "predicted" in lines[0]
    assert "trip=0.5" in lines[0]
    assert len(lines) == 3 + 2 * 12
