"""Arithmetic per channel: merging, finalizing, and the coefficients of the long loops."""

from __future__ import annotations

import numpy as np

from .compiler import inside, kernel, shared
from .intrinsics import buffer


@inside
def merge_one(mean, m2, c, count, other_count, other_mean, other_m2):
    """Merges other moments into mean[c] and m2[c], by Chan's formula."""
    delta = other_mean - mean[c]
    total = count + other_count
    mean[c] += delta * (other_count / total)
    m2[c] += other_m2 + delta * delta * (count * other_count / total)


@inside
def pack_moments(payload, mean, m2, count, channels, c0, c1):
    """Writes ``count * mean`` and, if it has room, ``m2 + count * mean**2`` to `payload`."""
    for c in range(c0, c1 if payload.size else c0):
        payload[c] = mean[c] * count
    for c in range(c0, c1 if payload.size > channels else c0):
        payload[channels + c] = m2[c] + payload[c] * mean[c]


@kernel
def merge_moments(mean, m2, channels, counts, payload):
    """Merges all segments into the first, in their order, then packs the message."""
    count = 0.0
    for s in range(len(counts)):
        for c in range(channels if s > 0 and counts[s] > 0 else 0):
            other = s * channels + c
            merge_one(mean, m2, c, count, counts[s], mean[other], m2[other])
        count += counts[s]
    pack_moments(payload, mean, m2, count, channels, 0, channels)


@shared
def finalize(
    first, second, count, eps, form, mean, var, invstd, running_mean, running_var, factor, c0, c1
):
    """`form`: 0 local, 1 pooled, 2 recentred; see ``backends/numpy.py``."""
    n = max(count, 1.0)
    for c in range(c0, c1):
        m2 = second[c]
        mean[c] = first[c] if form == 0 else first[c] / n
        if form == 1:
            m2 -= first[c] * mean[c]
        var[c] = (0.0 if m2 < 0.0 else m2) / n
        invstd[c] = 1.0 / np.sqrt(var[c] + eps)
    if count > 0 and running_mean.size:
        unbiased = count / max(count - 1.0, 1.0)
        for c in range(c0, c1):
            running_mean[c] = (1.0 - factor) * running_mean[c] + factor * mean[c]
            running_var[c] = (1.0 - factor) * running_var[c] + factor * (var[c] * unbiased)


@kernel
def finalize_moments(
    first, second, count, eps, form, mean, var, invstd, running_mean, running_var, factor
):
    finalize(
        first,
        second,
        count,
        eps,
        form,
        mean,
        var,
        invstd,
        running_mean,
        running_var,
        factor,
        0,
        mean.size,
    )


@inside
def fill_affine(high, scale, shift, size, step, mean, invstd, weight, bias, c0, c1):
    """Writes high, scale and shift (see ``backends/numpy.py``) of `size` columns.

    A channel has `step` adjacent columns; the channels repeat until the end.
    """
    j = 0
    while j < size:
        for c in range(c0, c1):
            scaled = invstd[c] * weight[c] if weight.size else invstd[c]
            for k in range(j, j + step):
                high[k] = mean[c]
                scale[k] = scaled
                shift[k] = (bias[c] if bias.size else 0.0) - (mean[c] - high[k]) * scaled
            j += step


@inside
def fill_slope(high, slope, offset, size, step, mean, invstd, sums, count, c0, c1):
    """Likewise slope and offset of ``dx = ((x - high) * slope + dy + offset) * scale``."""
    sum_dy, sum_dy_xmu = sums
    j = 0
    while j < size:
        for c in range(c0, c1):
            steep = sum_dy_xmu[c] * invstd[c] * invstd[c] / count
            for k in range(j, j + step):
                slope[k] = -steep
                offset[k] = (mean[c] - high[k]) * steep - sum_dy[c] / count
            j += step


@inside
def merge_segments(sum_dy, sum_dy_xmu, mean, parameter, c0, c1):
    """Adds all segments into the first, in their order, then recentres from high to the mean.

    `parameter` is any array of the dtype of the arithmetic.
    """
    high = buffer(parameter)
    for c in range(c0, c1):
        for other in range(mean.size + c, sum_dy.size, mean.size):
            sum_dy[c] += sum_dy[other]
            sum_dy_xmu[c] += sum_dy_xmu[other]
        high[0] = mean[c]
        sum_dy_xmu[c] -= (mean[c] - high[0]) * sum_dy[c]


@kernel
def merge_sums(sum_dy, sum_dy_xmu, mean, parameter):
    merge_segments(sum_dy, sum_dy_xmu, mean, parameter, 0, mean.size)


@inside
def add_some(dweight, dbias, sum_dy, sum_dy_xmu, invstd, c0, c1):
    """Adds to the gradients of the channels c0 to c1."""
    for c in range(c0, c1):
        if dweight.size:
            dweight[c] += sum_dy_xmu[c] * invstd[c]
        if dbias.size:
            dbias[c] += sum_dy[c]


@kernel
def add_gradients(dweight, dbias, sum_dy, sum_dy_xmu, invstd):
    add_some(dweight, dbias, sum_dy, sum_dy_xmu, invstd, 0, invstd.size)
