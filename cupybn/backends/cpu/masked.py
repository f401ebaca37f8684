"""Moments and sums over the valid positions only, and what all masked loops need.

A mask is a pointer and the number of bytes from one sample to the next; one more line before it and
one after it may be read. Rows use one bit per position, lowest bit first, with the samples one
after the other: at eight positions per byte, the bits of many rows stay in L1. Columns use one byte
per position, nonzero if it is valid, and each line of values is read with as many bytes. All
channels share the bytes of a sample; if a row of columns is one sample, the bytes are passed
repeated (``repeated`` in ``plan.py``). Sums skip rows of columns that are masked entirely.
"""

from __future__ import annotations

from .channels import merge_one
from .compiler import inside, shared, summed
from .intrinsics import (
    BUFFER,
    added,
    buffer,
    byte_buffers,
    double_buffer,
    index_buffer,
    lanes,
    line,
    load,
    minus,
    moved,
    next_place,
    ones,
    part,
    positions,
    store_line,
    times,
    total_of,
    valid_of,
    where_inside,
    where_valid,
    zero,
)
from .moments import ROWS, RUN, add_columns
from .plan import LINE, WIDE

SOME = 4  # values for a pivot: each needs a search for a valid position
NEAR = 4  # positions from one of them to the next in a row, which is read next


@inside
def _below(mask, i, end):
    """Which positions from i to `end`, fewer than LINE, are valid, as bits."""
    return valid_of(mask, i) & ((1 << (end - i)) - 1)


@summed
def valid_in(mask, begin, end):
    """The number of valid positions from `begin` to `end`."""
    first, last = begin & -LINE, end & -LINE
    count = ones(_below(mask, last, end)) - ones(_below(mask, first, begin))
    for i in range(first, last, LINE):
        count += ones(valid_of(mask, i))
    return count


@shared
def _sample(places, taken, mask, begin, end, step):
    """Adds up to SOME valid positions, `step` apart, to `places`; at least one if one exists."""
    for k in range(SOME):
        first = begin + k * step
        last = end if k == SOME - 1 else min(first + step, end)
        for i in range(first & -LINE, last, LINE):
            word = valid_of(mask, i) & (-1 << max(first - i, 0))
            place = i + ones((word & -word) - 1)  # of the lowest bit that is 1
            if place < min(last, i + LINE):
                places[taken] = place
                taken += 1
                break
    return taken


@shared
def _near_mean(x, places, taken):
    """The mean of the values at `taken` places, roughly."""
    first = load(x, places[0])
    total = zero(x)
    for k in range(1, taken):
        total += load(x, places[k]) - first
    return first + total / taken


# ---- rows ----------------------------------------------------------------------------------------


@summed
def _deviations(x, begin, mask, at, size, pivot):
    total, p, whole = line(x, zero(x), 0), line(x, pivot, 0), size // lanes(x) * lanes(x)
    squares, x, (valid, at) = total, moved(x, begin), positions(mask, at)
    for i in range(0, whole, lanes(x)):
        d = where_valid(valid, at + i, minus(line(x, x, i), p))
        total, squares = added(total, d), added(squares, times(d, d))
    if whole < size:
        d = where_valid(valid, at + whole, minus(part(x, x, whole, size), p))
        d = where_inside(whole, size, d)
        total, squares = added(total, d), added(squares, times(d, d))
    return total_of(total), total_of(squares)


@inside
def masked_row_moments(x, mean, m2, item, c0, c1, mask, counts):
    """As ``row_moments``; also writes the number of valid values per channel to `counts`."""
    segment, _, channels, length, _, _, n0, n1, l0, l1, _, _ = item
    pivot, sums, squares = buffer(x), double_buffer(x), double_buffer(x)
    places, values = index_buffer(x), mask[0]
    for c in range(segment + c0, segment + c1):
        mean[c] = 0.0
        m2[c] = 0.0
    count = 0.0
    rows = max(1, RUN // max(1, l1 - l0))
    for n in range(n0, n1, rows):
        last = min(n + rows, n1)
        for j in range(l0, l1, RUN):
            run = min(RUN, l1 - j)
            taken = 0
            valid = 0
            for k in range(n, last):
                at, before = k * length + j, taken
                valid += valid_in(values, at, at + run)
                if taken < SOME:
                    taken = _sample(places, taken, values, at, at + run, NEAR)
                for p in range(before, taken):
                    places[p] += k * (channels - 1) * length
            if valid > 0:
                size = float(valid)
                for c in range(c1 - c0):
                    pivot[c] = _near_mean(moved(x, (c0 + c) * length), places, taken)
                    sums[c] = 0.0
                    squares[c] = 0.0
                for k in range(n, last):
                    for c in range(c1 - c0):
                        begin, at = (k * channels + c0 + c) * length + j, k * length + j
                        total, square = _deviations(x, begin, values, at, run, pivot[c])
                        sums[c] += total
                        squares[c] += square
                for c in range(c1 - c0):
                    shift = sums[c] / size
                    m = squares[c] - sums[c] * shift
                    merge_one(mean, m2, segment + c0 + c, count, size, pivot[c] + shift, m)
                count += size
    counts[segment // channels] = count


@summed
def masked_sums(dy, x, mask, at, size, high):
    """The sums of dy and of dy * (x - high) over the valid positions of one run."""
    total, high, whole = line(x, zero(x), 0), line(x, high, 0), size // lanes(x) * lanes(x)
    products, (valid, at) = total, positions(mask, at)
    for i in range(0, whole, lanes(x)):
        g = where_valid(valid, at + i, line(x, dy, i))
        d = where_valid(valid, at + i, minus(line(x, x, i), high))
        total, products = added(total, g), added(products, times(g, d))
    if whole < size:
        g = where_valid(valid, at + whole, part(x, dy, whole, size))
        d = where_valid(valid, at + whole, minus(part(x, x, whole, size), high))
        g = where_inside(whole, size, g)
        total, products = added(total, g), added(products, times(g, d))
    return total_of(total), total_of(products)


# ---- columns -------------------------------------------------------------------------------------


@shared
def bytes_of_row(valid, mask, sample, length, channels, samples):
    """(the mask bytes of a row of columns that begins with `sample`, the period of the bytes).

    The bytes of several samples are assembled in `valid`.
    """
    values, stride = mask
    if stride > length:
        return moved(values, sample * stride), stride // 2
    k = 0
    for n in range(sample * length, (sample + samples) * length, length):
        for _ in range(channels):
            for i in range(n, n + length):
                valid[k] = values[i]
                k += 1
    return moved(valid, 0), 2 * WIDE


@inside
def samples_in(item, channels):
    """(samples in a row of columns, the first sample of the first row)."""
    _, start, _, width, _, _, _, _, _, _, length, _ = item
    return width // (channels * length), start // (channels * length)


@summed
def mask_of_run(valid, mask, columns, item, channels, n, i):
    """(the mask of a run from column i on, its first position in the mask, the period of bytes).

    `valid` is memory for the bytes of several samples, None without a mask. A run of columns begins
    with a channel, and so with the first byte of its sample.
    """
    if mask is None:
        return valid, 0, 2 * WIDE
    _, _, _, width, _, _, _, _, _, _, length, _ = item
    if columns is None:
        return mask[0], n * width + i, 2 * WIDE
    samples, first = samples_in(item, channels)
    found, period = bytes_of_row(valid, mask, first + n * samples, length, channels, samples)
    return found, 0, period


@shared
def valid_rows(rows, mask, item, channels, begin, end):
    """Writes the rows from `begin` to `end` with valid positions; (their number, valid positions).

    Three copies of the first row follow, so that rows can be read four at a time.
    """
    _, _, _, _, _, _, _, _, _, _, length, _ = item
    samples, first = samples_in(item, channels)
    values, stride = mask
    taken = 0
    count = 0
    for m in range(begin, end):
        at = (first + m * samples) * stride
        found = valid_in(values, at, at + samples * length)
        rows[taken] = m
        count += found
        taken += found > 0
    for k in range(taken, taken + 3):
        rows[k] = rows[0]
    return taken, count


@shared
def bytes_of_four(valid, mask, rows, k, taken, item, channels):
    """(the mask bytes of rows[k] to rows[k + 3], their period); 0 for rows from `taken` on."""
    _, _, _, _, _, _, _, _, _, _, length, _ = item
    samples, first = samples_in(item, channels)
    for i in range(BUFFER if k + 4 > taken else 0):
        valid[3 * BUFFER + i] = 0
    none, s = moved(valid, 3 * BUFFER), first + rows[k] * samples
    a, period = bytes_of_row(valid, mask, s, length, channels, samples)
    s, own = first + rows[k + 1] * samples, moved(valid, BUFFER)
    b = bytes_of_row(own, mask, s, length, channels, samples)[0] if k + 1 < taken else none
    s, own = first + rows[k + 2] * samples, moved(valid, 2 * BUFFER)
    c = bytes_of_row(own, mask, s, length, channels, samples)[0] if k + 2 < taken else none
    s = first + rows[k + 3] * samples
    d = bytes_of_row(none, mask, s, length, channels, samples)[0] if k + 3 < taken else none
    return (a, b, c, d), period


@shared
def _fill_pivot(x, pivot, width, item, channels, mask):
    """Writes a value near the mean of each channel, from a few of the valid positions."""
    _, _, _, _, c0, c1, m0, m1, j0, j1, step, _ = item
    samples, first = samples_in(item, channels)
    values, stride = mask
    begin, end = first + m0 * samples, first + m1 * samples
    places = index_buffer(x)
    apart = max(1, (end - begin) * stride // SOME)
    taken = _sample(places, 0, values, begin * stride, end * stride, apart)
    for k in range(taken):
        sample, position = places[k] // stride - first, places[k] % stride % step
        row, rest = sample // samples, sample % samples
        places[k] = row * width + rest * channels * step + position
    repeat = (c1 - c0) * step
    for j in range(0, repeat, step):
        near = _near_mean(moved(x, j), places, taken) if taken > 0 else zero(x)
        for k in range(j, j1 - j0, repeat):
            for i in range(k, k + step):
                pivot[i] = near


@inside
def _four(y, values, begins, i, size):
    """The lines at column i of four rows; columns from `size` on are not read."""
    if i + lanes(y) <= size:
        a, b = line(y, values, begins[0] + i), line(y, values, begins[1] + i)
        c, d = line(y, values, begins[2] + i), line(y, values, begins[3] + i)
    else:
        a = part(y, moved(values, begins[0]), i, size)
        b = part(y, moved(values, begins[1]), i, size)
        c = part(y, moved(values, begins[2]), i, size)
        d = part(y, moved(values, begins[3]), i, size)
    return a, b, c, d


@inside
def _add_deviations(x, j, at, lines, pivot, valid, partial, squares):
    x0, x1, x2, x3 = lines
    p = line(x, pivot, j)
    d0, d1 = where_valid(valid[0], at, minus(x0, p)), where_valid(valid[1], at, minus(x1, p))
    d2, d3 = where_valid(valid[2], at, minus(x2, p)), where_valid(valid[3], at, minus(x3, p))
    total = added(line(x, partial, j), added(added(d0, d1), added(d2, d3)))
    store_line(partial, j, total, False)
    square = added(added(times(d0, d0), times(d1, d1)), added(times(d2, d2), times(d3, d3)))
    store_line(squares, j, added(line(x, squares, j), square), False)


@inside
def masked_column_moments(x, mean, m2, item, channels, mask, counts):
    """As ``column_moments``; also writes the number of valid values per channel to `counts`."""
    segment, _, _, width, c0, c1, m0, m1, j0, j1, step, _ = item
    columns, repeat = j1 - j0, (c1 - c0) * step
    pivot, sums, squares = buffer(x), double_buffer(x), double_buffer(x)
    partial, partial_squares = buffer(x), buffer(x)
    rows, memory = index_buffer(x), byte_buffers(x, mask[0])
    _fill_pivot(x, pivot, width, item, channels, mask)
    for j in range(columns):
        sums[j] = 0.0
        squares[j] = 0.0
    count = 0
    for block in range(m0, m1, ROWS):
        last = min(block + ROWS, m1)
        taken, found = valid_rows(rows, mask, item, channels, block, last)
        count += found
        for j in range(columns):
            partial[j] = zero(x)
            partial_squares[j] = zero(x)
        for k in range(0, taken, 4):
            valid, period = bytes_of_four(memory, mask, rows, k, taken, item, channels)
            begins = (
                rows[k] * width,
                rows[k + 1] * width,
                rows[k + 2] * width,
                rows[k + 3] * width,
            )
            at = 0
            for j in range(0, columns, lanes(x)):
                lines = _four(x, x, begins, j, columns)
                _add_deviations(x, j, at, lines, pivot, valid, partial, partial_squares)
                at = next_place(valid[0], at, lanes(x), period)
        for j in range(columns):
            sums[j] += partial[j]
            squares[j] += partial_squares[j]
    add_columns(sums, squares, columns, repeat, step)
    size = max(float(count), 1.0)
    j = 0
    for c in range(segment + c0, segment + c1):
        shift = sums[j] / size
        mean[c] = pivot[j] + shift
        m2[c] = squares[j] - sums[j] * shift
        j += step
    counts[segment // channels] = float(count)


@shared
def masked_moments(columns, x, mean, m2, item, a, b, channels, mask, counts):
    """Writes the moments of the channels a to b of an item."""
    if columns is None:
        masked_row_moments(x, mean, m2, item, a, b, mask, counts)
    else:
        begin = moved(x, item[1] + item[8])
        masked_column_moments(begin, mean, m2, item, channels, mask, counts)


@shared
def add_products(arrays, begins, size, relu, high, found, partial, products):
    """Adds dy (after a ReLU's backward) and dy * (x - high), of `size` columns of four rows."""
    (dy, x, kept), ((a, b, c, d), period) = arrays, found
    at = 0
    for j in range(0, size, lanes(x)):
        x0, x1, x2, x3 = _four(x, x, begins, j, size)
        if relu > 0:
            g0, g1 = line(x, kept, j), line(x, kept, j + BUFFER)
            g2, g3 = line(x, kept, j + 2 * BUFFER), line(x, kept, j + 3 * BUFFER)
        else:
            g0, g1, g2, g3 = _four(x, dy, begins, j, size)
        h = line(x, high, j)
        g0, d0 = where_valid(a, at, g0), where_valid(a, at, minus(x0, h))
        g1, d1 = where_valid(b, at, g1), where_valid(b, at, minus(x1, h))
        g2, d2 = where_valid(c, at, g2), where_valid(c, at, minus(x2, h))
        g3, d3 = where_valid(d, at, g3), where_valid(d, at, minus(x3, h))
        total = added(line(x, partial, j), added(added(g0, g1), added(g2, g3)))
        store_line(partial, j, total, False)
        product = added(added(times(g0, d0), times(g1, d1)), added(times(g2, d2), times(g3, d3)))
        store_line(products, j, added(line(x, products, j), product), False)
        at = next_place(a, at, lanes(x), period)
