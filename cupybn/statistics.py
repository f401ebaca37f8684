"""Counts, means and second moments: how they merge, and the message that sums them over ranks.

All numbers here are float64, whatever the data. Formulas: Chan, Golub and LeVeque, "Updating
formulae and a pairwise algorithm for computing sample variances" (1979), for ``merge``; the pooled
form ``count * mean``, ``m2 + count * mean**2`` is the same sum taken about zero: it weights
exactly, and is a single SUM over any number of ranks.

A message is ``[16 header words | payload]``. The payload's length is a power of two of at least 256
numbers, so that forward and backward, and layers of neighbouring sizes, meet in one collective and
are told apart by the header instead of ending the job. The header is not part of that power of two:
most layers have a power of two of channels, and their messages would be twice as long.

Header words: ranks that failed; the sum of (rank + 1) over them; the count; then pairs f and f * f
for each group of bits of the fingerprint's hash.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .arrays import Array

PROTOCOL = 1  # one higher after any change that another version would not understand
HEADER = 16
FAILED, _FAILED_RANKS, COUNT, FINGERPRINT = 0, 1, 2, 3
_MIN_PAYLOAD = 256


class Moments(NamedTuple):
    """Statistics of `count` values per channel.

    Attributes:
        count: values per channel, a host integer; 0 is allowed.
        mean: (C,) float64.
        m2: (C,) float64, the sum of squared deviations from `mean`.
    """

    count: int  # type: ignore[assignment]  # of tuple, which has a method of that name
    mean: Array
    m2: Array

    def merge(self, other: Moments) -> Moments:
        """The moments of both samples together (Chan's formula)."""
        if other.count == 0:
            return self
        if self.count == 0:
            return other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * other.count / count)
        return Moments(count, mean, m2)

    def pack(self) -> Array:
        """(2C,) float64: ``count * mean`` and ``m2 + count * mean**2``, which add up over ranks."""
        weighted = self.mean * self.count
        return np.concatenate([weighted, self.m2 + weighted * self.mean])

    @staticmethod
    def unpack(count: int, payload: Array) -> Moments:
        """The moments in a sum of packed ones. m2 may be below 0 by a rounding error."""
        weighted, about_zero = np.split(payload, 2)
        if count == 0:
            return Moments(0, weighted, about_zero)
        mean = weighted / count
        return Moments(count, mean, about_zero - weighted * mean)


class BackwardSums(NamedTuple):
    """The sums of a batch that its gradient needs, (C,) float64 each.

    Attributes:
        sum_dy: the sum of dy.
        sum_dy_xmu: the sum of dy * (x - mean).
    """

    sum_dy: Array
    sum_dy_xmu: Array


class Transform(NamedTuple):
    """The numbers that map x to xhat and xhat to y, (C,) each.

    Attributes:
        mean, invstd: float64.
        weight, bias: of the dtype that goes with x, or None.
    """

    mean: Array
    invstd: Array
    weight: Array | None = None
    bias: Array | None = None


def message_length(num_features: int) -> int:
    """Numbers in a forward or backward message of a layer with that many channels."""
    return padded_length(2 * num_features)


@lru_cache(maxsize=4096)
def padded_length(payload: int) -> int:
    """The length of a message that carries `payload` numbers behind its header."""
    return HEADER + max(_MIN_PAYLOAD, 1 << max(payload - 1, 0).bit_length())


@lru_cache(maxsize=4096)
def header_words(dtype: Any, fingerprint: str) -> np.ndarray[Any, Any]:
    """The 16 words before the payload of a rank that has not failed; count 0, read-only."""
    # The pairs (f, f * f) are summed over ranks and must stay exact: 20 bits leave room for 4096
    # ranks in float64, 6 bits in float32.
    words = np.zeros(HEADER, dtype)
    bits = 6 if words.dtype == np.float32 else 20
    number = int.from_bytes(hashlib.blake2b(fingerprint.encode(), digest_size=16).digest(), "big")
    for i in range(FINGERPRINT, HEADER - 1, 2):
        f = number & ((1 << bits) - 1)
        words[i : i + 2] = f, f * f
        number >>= bits
    words.flags.writeable = False
    return words


def failure_header(dtype: Any, rank: int) -> np.ndarray[Any, Any]:
    """The 16 words of a rank that failed, which joins the collective to tell the others."""
    words = np.zeros(HEADER, dtype)
    words[FAILED] = 1
    words[_FAILED_RANKS] = rank + 1
    return words


@lru_cache(maxsize=4096)
def words_of_all(dtype: Any, fingerprint: str, ranks: int) -> tuple[bytes, bytes]:
    """What is before and behind the count in a summed header, if all ranks sent this one.

    No other ranks' fingerprints add up to it. If the sums of f_r and of f_r**2 over n ranks are
    n f and n f**2, the f_r have a variance of 0 (the equality case of the Cauchy-Schwarz
    inequality), so each is f. All numbers are integers that their dtype holds exactly.
    """
    words = header_words(dtype, fingerprint) * ranks
    return words[:COUNT].tobytes(), words[FINGERPRINT:].tobytes()


def failed_ranks(summed: np.ndarray[Any, Any]) -> tuple[int, int]:
    """How many ranks failed, and which one if only one did."""
    return int(summed[FAILED]), int(summed[_FAILED_RANKS]) - 1


def pack_texts(text: str, rank: int, ranks: int, width: int = 256) -> Any:
    """This rank's line of a table of `ranks` short texts; the sum over ranks is the whole table."""
    table = np.zeros((ranks, width))
    data = text.encode()[:width]
    table[rank, : len(data)] = list(data)
    return table.reshape(-1)


def unpack_texts(table: np.ndarray[Any, Any], ranks: int) -> list[str]:
    """The texts of a summed table, one a rank."""
    lines = table.reshape(ranks, -1).astype(np.uint8)
    return [bytes(line[line != 0]).decode(errors="replace") for line in lines]
