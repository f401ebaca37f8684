"""Mean and m2 of the channels of one work item, about a pivot near the mean."""

from __future__ import annotations

from .channels import merge_one
from .compiler import inside, shared, summed
from .intrinsics import buffer, double_buffer, load, moved, plus, zero

RUN = 4096  # most values in one float32 sum
ROWS = 64  # most rows of columns in one float32 sum, added four at a time
SAMPLE = 16  # values that are averaged for a pivot


@summed
def _deviations(x, begin, size, pivot):
    total = zero(x)
    squares = zero(x)
    for i in range(begin, begin + size):
        d = load(x, i) - pivot
        total = plus(total, d)
        squares = plus(squares, d * d)
    return total, squares


@inside
def row_moments(x, mean, m2, item, c0, c1):
    """Writes mean and m2 of the channels c0 to c1 (at most WIDE) of an item to segment + c."""
    segment, _, channels, length, _, _, n0, n1, l0, l1, _, _ = item
    pivot, sums, squares = buffer(x), double_buffer(x), double_buffer(x)
    for c in range(segment + c0, segment + c1):
        mean[c] = 0.0
        m2[c] = 0.0
    count = 0.0
    rows = max(1, RUN // max(1, l1 - l0))
    for n in range(n0, n1, rows):
        last = min(n + rows, n1)
        for j in range(l0, l1, RUN):
            run = min(RUN, l1 - j)
            for c in range(c1 - c0):
                begin = (n * channels + c0 + c) * length + j
                first = load(x, begin)
                total = zero(x)
                taken = zero(x)
                for i in range(begin, begin + min(run, SAMPLE)):
                    total = plus(total, load(x, i) - first)
                    taken += 1
                pivot[c] = first + total / taken
                sums[c] = 0.0
                squares[c] = 0.0
            for k in range(n, last):
                for c in range(c1 - c0):
                    begin = (k * channels + c0 + c) * length + j
                    total, square = _deviations(x, begin, run, pivot[c])
                    sums[c] += total
                    squares[c] += square
            size = float((last - n) * run)
            for c in range(c1 - c0):
                shift = sums[c] / size
                m = squares[c] - sums[c] * shift
                merge_one(mean, m2, segment + c0 + c, count, size, pivot[c] + shift, m)
            count += size


@inside
def column_moments(x, mean, m2, item):
    """As ``row_moments``, for columns: x points to the first of the item's, at most WIDE."""
    segment, _, _, width, c0, c1, m0, m1, j0, j1, step, _ = item
    columns = j1 - j0
    pivot, sums, squares = buffer(x), double_buffer(x), double_buffer(x)
    repeat = (c1 - c0) * step
    _fill_pivot(x, pivot, width, m0, m1, columns, repeat, step)
    partial, partial_squares = buffer(x), buffer(x)
    for j in range(columns):
        sums[j] = 0.0
        squares[j] = 0.0
    for block in range(m0, m1, ROWS):
        last = min(block + ROWS, m1)
        for j in range(columns):
            partial[j] = zero(x)
            partial_squares[j] = zero(x)
        whole = block + (last - block) // 4 * 4
        for m in range(block, whole, 4):
            i = m * width
            for j in range(columns):
                d0 = load(x, i + j) - pivot[j]
                d1 = load(x, i + width + j) - pivot[j]
                d2 = load(x, i + 2 * width + j) - pivot[j]
                d3 = load(x, i + 3 * width + j) - pivot[j]
                partial[j] += (d0 + d1) + (d2 + d3)
                partial_squares[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
        for m in range(whole, last):
            for j in range(columns):
                d0 = load(x, m * width + j) - pivot[j]
                partial[j] += d0
                partial_squares[j] += d0 * d0
        for j in range(columns):
            sums[j] += partial[j]
            squares[j] += partial_squares[j]
    size = float((m1 - m0) * step * (columns // repeat))
    add_columns(sums, squares, columns, repeat, step)
    j = 0
    for c in range(segment + c0, segment + c1):
        shift = sums[j] / size
        mean[c] = pivot[j] + shift
        m2[c] = squares[j] - sums[j] * shift
        j += step


@shared
def _fill_pivot(x, pivot, width, m0, m1, columns, repeat, step):
    """Writes a value near the mean of each channel, from the first row and a few more."""
    first = moved(x, m0 * width)
    rows = min(m1 - m0, max(1, SAMPLE // step))
    for j in range(repeat):
        pivot[j] = zero(x)
    for m in range(1, rows):
        other = moved(x, (m0 + m * ((m1 - m0) // rows)) * width)
        for j in range(repeat):
            pivot[j] += load(other, j) - load(first, j)
    for j in range(0, repeat, step):
        total = zero(x)
        for k in range(j, j + step):
            total += (load(first, k) - load(first, j)) + pivot[k] / rows
        rough = load(first, j) + total / step
        for k in range(j, j + step):
            pivot[k] = rough
    for k in range(repeat, columns):
        pivot[k] = pivot[k - repeat]


@shared
def add_columns(sums, products, columns, repeat, step):
    """Adds the columns of each channel into its first column.

    The channels repeat after every `repeat` columns.
    """
    for begin in range(repeat, columns, repeat):
        for k in range(repeat):
            sums[k] += sums[begin + k]
            products[k] += products[begin + k]
    for j in range(0, repeat, step):
        for k in range(j + 1, j + step):
            sums[j] += sums[k]
            products[j] += products[k]
