"""Merging, pooling and the message, in pure NumPy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupybn.statistics import (
    HEADER,
    Moments,
    message_length,
    pack_message,
    pack_poison,
    pack_texts,
    padded_length,
    pool_moments,
    read_header,
    unpack_texts,
)

PAYLOAD = np.arange(8.0)


def summed(messages):
    return np.sum(messages, axis=0, dtype=messages[0].dtype)


def test_message_layout():
    message = pack_message(256, "a", 12, PAYLOAD)
    assert message.shape == (256,)
    assert message[2] == 12
    np.testing.assert_array_equal(message[HEADER : HEADER + 8], PAYLOAD)
    assert not message[HEADER + 8 :].any()


@pytest.mark.parametrize("c", [1, 100, 120, 121, 1000, 2040, 2041, 70000])
def test_length_is_a_power_of_two_that_fits(c):
    length = message_length(c)
    assert length >= HEADER + 2 * c
    assert length >= 256
    assert length & (length - 1) == 0
    assert length == 256 or length < 2 * (HEADER + 2 * c)
    assert padded_length(0) == 256


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float32])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64, 4096])
def test_fingerprints_agree_exactly_when_equal(ranks, dtype):
    payload = PAYLOAD.astype(dtype)
    same = [pack_message(256, "forward of 'bn1'", 5, payload)] * ranks
    header = read_header(summed(same), ranks)
    assert header.agree
    assert header.failed == 0
    if dtype != np.float32:
        assert header.count == 5 * ranks
    if ranks > 1:
        for odd in (0, ranks // 2, ranks - 1):
            mixed = (
                same[:odd] + [pack_message(256, "forward of 'bn2'", 5, payload)] + same[odd + 1 :]
            )
            assert not read_header(summed(mixed), ranks).agree


@given(st.lists(st.integers(0, 5), min_size=2, max_size=9))
@settings(max_examples=300, deadline=None)
def test_any_mixture_of_calls_is_seen(calls):
    for dtype in (np.float64, np.float32):
        messages = [pack_message(256, f"call {call}", 1, PAYLOAD.astype(dtype)) for call in calls]
        assert read_header(summed(messages), len(calls)).agree == (len(set(calls)) == 1)


def test_different_names_have_different_fingerprints():
    messages = {
        pack_message(256, f"layer {i}", 0, PAYLOAD)[3:HEADER].tobytes() for i in range(20000)
    }
    assert len(messages) == 20000


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float32])
def test_poison_names_a_single_rank(dtype):
    good = [pack_message(256, "a", 5, PAYLOAD.astype(dtype)) for _ in range(3)]
    header = read_header(summed([*good, pack_poison(256, 3, dtype)]), 4)
    assert (header.failed, header.failed_rank) == (1, 3)
    two = [pack_poison(256, rank, dtype) for rank in (0, 2)]
    header = read_header(summed([*good[:2], *two]), 4)
    assert (header.failed, header.failed_rank) == (2, None)


def test_the_fingerprint_is_the_same_in_every_process():
    code = (
        "import numpy as np; from cupybn.statistics import pack_message;"
        "print(pack_message(256, 'x', 0, np.zeros(1)).tobytes().hex())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_texts():
    texts = ["forward of 'a'", "x" * 300, "größer"]
    table = summed([pack_texts(text, rank, 3) for rank, text in enumerate(texts)])
    assert unpack_texts(table, 3) == [texts[0], "x" * 256, texts[2]]


def merge_over(parts, exact):
    """What pool_moments gives each of many ranks, without any communicator."""
    locals_ = [
        Moments(
            len(p), p.mean(0) if len(p) else np.zeros(p.shape[1]), ((p - p.mean(0)) ** 2).sum(0)
        )
        if len(p)
        else Moments(0, np.zeros(p.shape[1]), np.zeros(p.shape[1]))
        for p in parts
    ]
    count = sum(m.count for m in locals_)
    if not exact:
        total = sum(m.pack() for m in locals_)
        return pool_moments(locals_[0], lambda c, p: (count, total), len(parts), exact)
    weighted = sum(m.mean * m.count for m in locals_)
    mean = weighted / count
    spread = sum(m.m2 + m.count * (m.mean - mean) ** 2 for m in locals_)
    answers = iter([weighted, spread])
    return pool_moments(locals_[0], lambda c, p: (count, next(answers)), len(parts), exact)


@pytest.mark.parametrize("exact", [True, False])
def test_4096_ranks(exact):
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 6, 4096)
    parts = [rng.standard_normal((n, 3)) + 2.0 for n in sizes]
    pooled = merge_over(parts, exact)
    whole = np.concatenate(parts)
    assert pooled.count == sizes.sum()
    np.testing.assert_allclose(pooled.mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(pooled.m2, ((whole - whole.mean(0)) ** 2).sum(0), rtol=1e-12)


def test_one_rank_is_untouched():
    local = Moments(3, np.ones(2), np.ones(2))
    assert pool_moments(local, None, 1, exact=False) is local


def test_merge_is_chan():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((5, 2)) + 1e6, rng.standard_normal((9, 2)) + 1e6

    def of(v):
        return Moments(len(v), v.mean(0), ((v - v.mean(0)) ** 2).sum(0))

    merged, whole = of(a).merge(of(b)), of(np.concatenate([a, b]))
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-15)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-9)
    empty = Moments(0, np.zeros(2), np.zeros(2))
    assert of(a).merge(empty) is not None
    assert empty.merge(empty).count == 0
    np.testing.assert_array_equal(empty.merge(of(a)).mean, of(a).mean)
