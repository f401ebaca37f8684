"""Merging, pooling and the message, in pure NumPy."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupybn import CollectiveMismatchError, PeerError
from cupybn.backends import numpy as backend
from cupybn.collective import CollectiveCall
from cupybn.communicators.base import refused
from cupybn.statistics import (
    COUNT,
    HEADER,
    Moments,
    failed_ranks,
    failure_header,
    header_words,
    message_length,
    pack_texts,
    padded_length,
    unpack_texts,
)


def summed(messages):
    return np.sum(messages, axis=0, dtype=messages[0].dtype)


def header(dtype, text, count):
    words = header_words(dtype, text).copy()
    words[COUNT] = count
    return words


class Answering:
    """A communicator whose messages all add up to the same header."""

    rank = 0

    def __init__(self, total, ranks):
        self.total, self.size = total, ranks

    def allreduce(self, message, label=""):
        if "mismatch" in label:
            return np.zeros_like(message)
        return np.concatenate([self.total, message[HEADER:]])


def read(total, text, ranks):
    """The result of a summed header for a rank that sent `text`: the count, or an error."""
    comm = Answering(total, ranks)
    call = CollectiveCall(comm, "a call", padded_length(0), text, dtype=total.dtype)
    call.payload(np.zeros(0), 0)
    try:
        return call.allreduce()[0]
    except (PeerError, CollectiveMismatchError) as error:
        return type(error)
    finally:
        refused.pop(id(comm), None)


@pytest.mark.parametrize("c", [1, 100, 128, 129, 1000, 2048, 2049, 70000])
def test_length_is_a_header_and_a_power_of_two_that_fits(c):
    payload = message_length(c) - HEADER
    assert payload >= 256
    assert payload & (payload - 1) == 0
    assert 2 * c <= payload
    assert payload == 256 or payload < 4 * c
    assert message_length(64) == message_length(128) == HEADER + 256
    assert message_length(2048) == HEADER + 4096
    assert padded_length(0) == padded_length(1) == HEADER + 256


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float32])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64, 4096])
def test_fingerprints_agree_exactly_when_equal(ranks, dtype):
    same = [header(dtype, "forward of 'bn1'", 5)] * ranks
    assert read(summed(same), "forward of 'bn1'", ranks) == 5 * ranks
    if ranks > 1:
        for odd in (0, ranks // 2, ranks - 1):
            mixed = same[:odd] + [header(dtype, "forward of 'bn2'", 5)] + same[odd + 1 :]
            for own in ("forward of 'bn1'", "forward of 'bn2'"):  # every rank sees it
                assert read(summed(mixed), own, ranks) is CollectiveMismatchError


@given(st.lists(st.integers(0, 5), min_size=2, max_size=9))
@settings(max_examples=300, deadline=None)
def test_any_mixture_of_calls_is_seen(calls):
    for dtype in (np.float64, np.float32):
        messages = [header(dtype, f"call {call}", 1) for call in calls]
        expected = len(calls) if len(set(calls)) == 1 else CollectiveMismatchError
        for own in set(calls):
            assert read(summed(messages), f"call {own}", len(calls)) == expected


def summed_pieces(pieces):
    """The header that ranks with these fingerprints, in every place, add up to."""
    words = np.zeros(HEADER)
    words[3:15] = [sum(pieces), sum(f * f for f in pieces)] * 6
    return words


@pytest.mark.parametrize("odd_one", [0, 1, 2])
def test_fingerprints_that_nearly_agree_do_not(odd_one):
    """Also if the mean is an integer all the same, and if they differ by 1 in 2**52."""
    for ranks in (2, 3, 4, 1000, *range(4000, 4097)):
        for f in ((1 << 20) - 1, (1 << 20) - 2, 1_000_001, 3):
            same = [f] * ranks
            assert (summed_pieces(same) == ranks * summed_pieces([f])).all()
            off = same[2:] + [[f - 1, f], [f - 1, f + 1], [f - 2, f - 1]][odd_one]
            for own in set(off):
                differs = summed_pieces(off) != ranks * summed_pieces([own])
                assert differs.any(), (ranks, f, own)


def test_different_names_have_different_fingerprints():
    messages = {header(np.float64, f"layer {i}", 0).tobytes() for i in range(20000)}
    assert len(messages) == 20000


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float32])
def test_a_failure_names_a_single_rank(dtype):
    good = [header(dtype, "a", 5)] * 3
    total = summed([*good, failure_header(dtype, 3)])
    assert failed_ranks(total) == (1, 3)
    assert read(total, "a", 4) is PeerError
    total = summed([*good[:2], failure_header(dtype, 0), failure_header(dtype, 2)])
    assert failed_ranks(total)[0] == 2
    assert read(total, "a", 4) is PeerError


def test_the_fingerprint_is_the_same_in_every_process():
    code = (
        "import numpy as np; from cupybn.statistics import header_words;"
        "print(header_words(np.float64, 'x').tobytes().hex())"
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


@pytest.mark.parametrize("exact", [True, False])
def test_4096_ranks(exact):
    """Both forms of the message, merged over many ranks without any communicator."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 6, 4096)
    parts = [rng.standard_normal((n, 3, 1)) + 2.0 for n in sizes]
    payloads = np.zeros((len(parts), 3 if exact else 6))
    locals_ = [
        backend.batch_moments(part, payload=payload)
        for part, payload in zip(parts, payloads, strict=True)
    ]
    count, total = sum(m.count for m in locals_), payloads.sum(axis=0)
    if exact:
        for local, payload in zip(locals_, payloads, strict=True):
            backend.recentre_moments(local, total, count, payload)
        pooled, form = Moments(count, total, payloads.sum(axis=0)), "recentred"
    else:
        pooled, form = Moments(count, *np.split(total, 2)), "pooled"
    mean, var, _ = backend.finalize_moments(pooled, 1e-5, form=form)
    whole = np.concatenate(parts)[:, :, 0]
    assert count == sizes.sum()
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(var, whole.var(0), rtol=1e-12)


RANKS = 4096


def one_after_the_other(moments):
    return reduce(Moments.merge, moments)


def in_pairs(moments):
    while len(moments) > 1:
        moments = [a.merge(b) for a, b in zip(moments[::2], moments[1::2], strict=True)]
    return moments[0]


def through_the_message(moments):
    """Header and payload of every rank, summed as recursive doubling does."""
    messages = [
        np.concatenate([header(np.float64, "forward of 'bn'", m.count), m.pack()]) for m in moments
    ]
    while len(messages) > 1:
        messages = [a + b for a, b in zip(messages[::2], messages[1::2], strict=True)]
    count = read(messages[0][:HEADER], "forward of 'bn'", RANKS)
    return Moments.unpack(count, messages[0][HEADER:])


@pytest.mark.parametrize("pooled", [one_after_the_other, in_pairs, through_the_message])
@pytest.mark.parametrize("sizes", ["even", "uneven", "mostly empty", "one has all"])
def test_the_moments_of_4096_ranks(sizes, pooled):
    """Against exactly rounded sums of all values, at 1e-12; means up to 6 deviations from 0."""
    rng = np.random.default_rng(2)
    counts = {
        "even": np.full(RANKS, 5),
        "uneven": rng.integers(0, 12, RANKS),
        "mostly empty": rng.integers(1, 9, RANKS) * (rng.random(RANKS) < 0.05),
        "one has all": np.where(np.arange(RANKS) == 1234, 9000, 0),
    }[sizes]
    offsets = [0.0, 3.0, -20.0]
    parts = [
        rng.standard_normal((n, 3)) * [1.0, 0.5, 5.0] + offsets + 0.1 * rng.standard_normal(3)
        for n in counts
    ]
    moments = pooled([
        Moments(len(p), p.mean(0), ((p - p.mean(0)) ** 2).sum(0)) if len(p)
        else Moments(0, np.zeros(3), np.zeros(3))
        for p in parts
    ])  # fmt: skip
    whole = np.concatenate(parts)
    assert moments.count == len(whole) == counts.sum()
    for channel, values in enumerate(whole.T):
        mean = math.fsum(values) / len(values)
        m2 = math.fsum((v - mean) ** 2 for v in values)
        assert abs(moments.mean[channel] - mean) <= 1e-12 * abs(mean) + 1e-15
        assert abs(moments.m2[channel] - m2) <= 1e-12 * m2


@pytest.mark.parametrize("odd", [0, 2047, 4095])
def test_one_of_4096_ranks_is_found_out(odd):
    headers = [header(np.float64, "forward of 'bn'", 5) for _ in range(RANKS)]
    headers[odd] = failure_header(np.float64, odd)
    assert failed_ranks(summed(headers)) == (1, odd)
    assert read(summed(headers), "forward of 'bn'", RANKS) is PeerError
    headers[odd] = header(np.float64, "forward of 'bm'", 5)
    for own in ("forward of 'bn'", "forward of 'bm'"):
        assert read(summed(headers), own, RANKS) is CollectiveMismatchError
    headers[odd] = header(np.float64, "forward of 'bn'", 2**40)
    assert read(summed(headers), "forward of 'bn'", RANKS) == 2**40 + 5 * (RANKS - 1)


def test_merge_is_chan():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((5, 2)) + 1e6, rng.standard_normal((9, 2)) + 1e6

    def of(v):
        return Moments(len(v), v.mean(0), ((v - v.mean(0)) ** 2).sum(0))

    merged, whole = of(a).merge(of(b)), of(np.concatenate([a, b]))
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-15)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-9)
    empty = Moments(0, np.zeros(2), np.zeros(2))
    np.testing.assert_array_equal(of(a).merge(empty).m2, of(a).m2)
    assert empty.merge(empty).count == 0
    np.testing.assert_array_equal(empty.merge(of(a)).mean, of(a).mean)
