"""The kernel of the backward, built as ``forward.py``: the sums of a channel, the gradient of x.

What passes a ReLU is read from `relu_bits`, or, if that is empty, recomputed from x.
"""

from __future__ import annotations

from .channels import add_some, fill_affine, fill_slope, merge_segments
from .compiler import inside, kernel, shared, summed
from .forward import streams, whole_lines
from .intrinsics import (
    BUFFER,
    added,
    affine,
    buffer,
    buffers,
    byte_buffers,
    double_buffer,
    enter,
    index_buffer,
    lanes,
    leave,
    line,
    load,
    moved,
    next_place,
    of_channel,
    part,
    plus,
    pointer,
    positions,
    store_line,
    store_part,
    strided,
    take,
    times,
    where_positive,
    where_valid,
    zero,
)
from .masked import (
    add_products,
    bytes_of_four,
    mask_of_run,
    masked_sums,
    valid_rows,
)
from .moments import ROWS, add_columns
from .plan import WIDE

SUMS, MERGE, GRADIENTS, INPUT = 1, 2, 4, 8  # stages


@shared
def _apply_relu_grad(kept, dy, x, relu_bits, begin, size, relu, coefficients):
    """Writes dy, with 0 where the ReLU stops it, to `kept`; dy and x are at offset `begin`.

    `relu` is 0 without a ReLU, 1 to recompute y from x, 2 to read `relu_bits`.
    """
    high, scale, shift, _, _ = coefficients
    bits = buffer(dy)
    if relu == 2:
        before = begin & 7
        for byte in range((before + size + 7) >> 3):
            for k in range(8):
                bits[8 * byte + k] = (relu_bits[(begin >> 3) + byte] >> (7 - k)) & 1
        bits = moved(bits, before)
    for i in range(0, size, lanes(dy)):
        z = part(dy, dy, i, size)
        if relu == 1:
            y = part(dy, x, i, size)
            y = affine(y, line(dy, high, i), line(dy, scale, i), line(dy, shift, i))
            z = where_positive(y, z)
        elif relu == 2:
            z = where_positive(line(dy, bits, i), z)
        store_line(kept, i, z, False)


@summed
def _sums(dy, x, size, high):
    """The sums of dy and of dy * (x - high) over one run."""
    total = zero(x)
    products = zero(x)
    for i in range(size):
        total = plus(total, load(dy, i))
        products = plus(products, load(dy, i) * (load(x, i) - high))
    return total, products


@inside
def _row_sums(sums, dy, x, relu_bits, item, a, b, relu, coefficients, kept):
    """Writes the sums of dy and dy * (x - high) to segment + c; high is the rounded mean."""
    sum_dy, sum_dy_xmu = sums
    segment, _, channels, length, _, _, n0, n1, l0, l1, _, _ = item
    for c in range(segment + a, segment + b):
        sum_dy[c] = 0.0
        sum_dy_xmu[c] = 0.0
    for n in range(n0, n1):
        for c in range(a, b):
            of = of_channel(None, coefficients, c - a)
            for i in range(l0, l1, WIDE):
                begin, size = (n * channels + c) * length + i, min(WIDE, l1 - i)
                g, v = moved(dy, begin), moved(x, begin)
                if relu == 0:
                    total, products = _sums(g, v, size, of[0])
                else:
                    _apply_relu_grad(kept, g, v, relu_bits, begin, size, relu, of)
                    total, products = _sums(kept, v, size, of[0])
                sum_dy[segment + c] += total
                sum_dy_xmu[segment + c] += products


@inside
def _column_sums(sums, dy, x, relu_bits, item, relu, coefficients, kept):
    """As ``_row_sums``, for columns."""
    (sum_dy, sum_dy_xmu), high = sums, coefficients[0]
    segment, start, _, width, c0, c1, m0, m1, j0, j1, step, _ = item
    size = j1 - j0
    totals, products = double_buffer(x), double_buffer(x)
    partial, partial_products = buffer(x), buffer(x)
    for j in range(size):
        totals[j] = 0.0
        products[j] = 0.0
    for block in range(m0, m1, ROWS):
        last = min(block + ROWS, m1)
        for j in range(size):
            partial[j] = zero(x)
            partial_products[j] = zero(x)
        whole = block + (last - block) // 4 * 4 if relu == 0 else block
        for m in range(block, whole, 4):
            g, v = moved(dy, start + m * width + j0), moved(x, start + m * width + j0)
            for k in range(size):
                g0, g1 = load(g, k), load(g, k + width)
                g2, g3 = load(g, k + 2 * width), load(g, k + 3 * width)
                a = g0 * (load(v, k) - high[k]) + g1 * (load(v, k + width) - high[k])
                b = g2 * (load(v, k + 2 * width) - high[k])
                b += g3 * (load(v, k + 3 * width) - high[k])
                partial[k] += (g0 + g1) + (g2 + g3)
                partial_products[k] += a + b
        for m in range(whole, last):
            begin = start + m * width + j0
            g, v = moved(dy, begin), moved(x, begin)
            _apply_relu_grad(kept, g, v, relu_bits, begin, size, relu, coefficients)
            for j in range(size):
                partial[j] += kept[j]
                partial_products[j] += kept[j] * (load(v, j) - high[j])
        for j in range(size):
            totals[j] += partial[j]
            products[j] += partial_products[j]
    add_columns(totals, products, size, (c1 - c0) * step, step)
    for c in range(c1 - c0):
        sum_dy[segment + c0 + c] = totals[c * step]
        sum_dy_xmu[segment + c0 + c] = products[c * step]


@inside
def _masked_row_sums(sums, arrays, item, a, b, relu, coefficients, mask):
    """As ``_row_sums``, over the valid positions."""
    (sum_dy, sum_dy_xmu), (dy, x, relu_bits, kept) = sums, arrays
    segment, _, channels, length, _, _, n0, n1, l0, l1, _, _ = item
    for c in range(segment + a, segment + b):
        sum_dy[c] = 0.0
        sum_dy_xmu[c] = 0.0
    for n in range(n0, n1):
        for c in range(a, b):
            of = of_channel(None, coefficients, c - a)
            for i in range(l0, l1, WIDE):
                begin, size = (n * channels + c) * length + i, min(WIDE, l1 - i)
                g, v, at = moved(dy, begin), moved(x, begin), n * length + i
                if relu == 0:
                    total, products = masked_sums(g, v, mask[0], at, size, of[0])
                else:
                    _apply_relu_grad(kept, g, v, relu_bits, begin, size, relu, of)
                    total, products = masked_sums(kept, v, mask[0], at, size, of[0])
                sum_dy[segment + c] += total
                sum_dy_xmu[segment + c] += products


@inside
def _masked_column_sums(sums, arrays, item, relu, coefficients, channels, masked):
    """As ``_column_sums``, over the valid positions. `kept` and `memory` hold four rows."""
    (sum_dy, sum_dy_xmu), high = sums, coefficients[0]
    (dy, x, relu_bits, kept), (mask, memory) = arrays, masked
    segment, start, _, width, c0, c1, m0, m1, j0, j1, step, _ = item
    size = j1 - j0
    totals, products, rows = double_buffer(x), double_buffer(x), index_buffer(x)
    partial, partial_products = buffer(x), buffer(x)
    for j in range(size):
        totals[j] = 0.0
        products[j] = 0.0
    for block in range(m0, m1, ROWS):
        last = min(block + ROWS, m1)
        taken, _ = valid_rows(rows, mask, item, channels, block, last)
        for j in range(size):
            partial[j] = zero(x)
            partial_products[j] = zero(x)
        for k in range(0, taken, 4):
            found = bytes_of_four(memory, mask, rows, k, taken, item, channels)
            if relu > 0:
                for r in range(4):
                    begin, own = start + rows[k + r] * width + j0, moved(kept, r * BUFFER)
                    g, v = moved(dy, begin), moved(x, begin)
                    _apply_relu_grad(own, g, v, relu_bits, begin, size, relu, coefficients)
            begins = (
                start + rows[k] * width + j0,
                start + rows[k + 1] * width + j0,
                start + rows[k + 2] * width + j0,
                start + rows[k + 3] * width + j0,
            )
            add_products((dy, x, kept), begins, size, relu, high, found, partial, partial_products)
        for j in range(size):
            totals[j] += partial[j]
            products[j] += partial_products[j]
    add_columns(totals, products, size, (c1 - c0) * step, step)
    for c in range(c1 - c0):
        sum_dy[segment + c0 + c] = totals[c * step]
        sum_dy_xmu[segment + c0 + c] = products[c * step]


@shared
def _masked(columns, sums, arrays, item, a, b, relu, coefficients, channels, masked):
    if columns is None:
        _masked_row_sums(sums, arrays, item, a, b, relu, coefficients, masked[0])
    else:
        _masked_column_sums(sums, arrays, item, relu, coefficients, channels, masked)


@inside
def _input_line(dx, i, d, v, constant, coefficients):
    """The line at dx[i], from a line d of dy and a line v of x."""
    high, scale, _, slope, offset = coefficients
    if not constant:
        d = added(affine(v, line(dx, high, i), line(dx, slope, i), d), line(dx, offset, i))
    return times(d, line(dx, scale, i))


@shared
def _input_run(arrays, size, streaming, staged, fused, constant, coefficients, found):
    mask, first, period = found
    dx, dresidual, dy, x, kept = arrays
    head, last = whole_lines(dx, size, streaming)
    valid, at = positions(mask, first + head)
    before = at - lanes(dx)
    for i in range(head, last, lanes(dx)):
        d = line(dx, kept, i) if staged else line(dx, dy, i)
        v = line(dx, x, i)
        if fused:
            store_line(dresidual, i, where_valid(valid, at, d), False)
        d = where_valid(valid, at, _input_line(dx, i, d, v, constant, coefficients))
        store_line(dx, i, d, streaming)
        at = next_place(valid, at, lanes(dx), period)
    i = head - lanes(dx) if head > 0 else last
    at_edge = before if head > 0 else at
    while i < size:
        d = line(dx, kept, i) if staged else part(dx, dy, i, size)
        v = part(dx, x, i, size)
        if fused:
            store_part(dresidual, i, where_valid(valid, at_edge, d), size)
        d = where_valid(valid, at_edge, _input_line(dx, i, d, v, constant, coefficients))
        store_part(dx, i, d, size)
        i, at_edge = max(last, i + lanes(dx)), at


@inside
def _input(columns, arrays, item, a, b, relu, coefficients, more):
    """Writes the gradient of x, of the channels a to b of an item."""
    (dx, dresidual, dy, x), (constant, relu_bits, kept, (mask, valid)) = arrays, more
    _, start, channels, length, _, _, n0, n1, l0, l1, _, _ = item
    streaming, fused = streams(dx, l1 - l0), dresidual.size > 0
    staged = relu > 0
    first, last = (a, b) if columns is None else (0, 1)
    for n in range(n0, n1):
        for c in range(first, last):
            of = of_channel(columns, coefficients, c - first)
            for i in range(l0, l1, WIDE):
                begin, size = start + (n * channels + c) * length + i, min(WIDE, l1 - i)
                g, v = pointer(dy, begin), pointer(x, begin)
                if staged:
                    _apply_relu_grad(kept, g, v, relu_bits, begin, size, relu, of)
                run = pointer(dx, begin), pointer(dresidual, begin), g, v, kept
                found = mask_of_run(valid, mask, columns, item, x.shape[1], n, i)
                _input_run(run, size, streaming, staged, fused, constant, of, found)


@inside
def _use_sums(stages, sum_dy, sum_dy_xmu, mean, invstd, weight, dweight, dbias, a, b):
    if stages & MERGE:
        merge_segments(sum_dy, sum_dy_xmu, mean, weight, a, b)
    if stages & GRADIENTS:
        add_some(dweight, dbias, sum_dy, sum_dy_xmu, invstd, a, b)


# dweight and dbias come from this rank's sums, dx from the totals. `count` 0: constant statistics.
@kernel
def backward(
    helper,
    columns,
    items,
    turns,
    dx,
    dresidual,
    dy,
    x,
    relu_bits,
    mean,
    invstd,
    weight,
    bias,
    dweight,
    dbias,
    sum_dy,
    sum_dy_xmu,
    total_dy,
    total_dy_xmu,
    stages,
    relu,
    count,
    mask,
    unmasked,
):
    given = dx, dresidual, dy, x, relu_bits, mean, invstd, weight, bias, dweight, dbias
    own = sum_dy, sum_dy_xmu, total_dy, total_dy_xmu
    taking, lent = enter(turns, helper, (*given, *own, mask))
    dx, dresidual, dy, x, relu_bits, mean, invstd, weight, bias, dweight, dbias = lent[:11]
    (sum_dy, sum_dy_xmu), totals = lent[11:13], lent[13:15]
    masked = strided(lent[15], x), byte_buffers(x, mask)
    high, scale, shift, slope, offset = buffer(x), buffer(x), buffer(x), buffer(x), buffer(x)
    coefficients, kept, sums = (high, scale, shift, slope, offset), buffers(x, mask), lent[11:13]
    dys, xs, bits = pointer(dy, 0), pointer(x, 0), pointer(relu_bits, 0)
    kind = 0 if not relu else 2 if relu_bits.size > 0 else 1
    at = take(turns) if taking else len(items)
    while at < len(items):
        _, _, _, _, c0, c1, _, _, l0, l1, step, group = item = items[at]
        for a in range(c0, c1, group):
            b = min(a + group, c1)
            size = b - a if columns is None else l1 - l0
            fill_affine(high, scale, shift, size, step, mean, invstd, weight, bias, a, b)
            if stages & SUMS:
                if mask is not None:
                    sources, numbers = (dys, xs, bits, kept), (x.shape[1], masked)
                    _masked(columns, sums, sources, item, a, b, kind, coefficients, *numbers)
                if unmasked is None:
                    pass
                elif columns is None:
                    _row_sums(sums, dys, xs, bits, item, a, b, kind, coefficients, kept)
                else:
                    _column_sums(sums, dys, xs, bits, item, kind, coefficients, kept)
            _use_sums(stages, sum_dy, sum_dy_xmu, mean, invstd, weight, dweight, dbias, a, b)
            if stages & INPUT:
                fill_slope(high, slope, offset, size, step, mean, invstd, totals, count, a, b)
                arrays, more = (dx, dresidual, dy, x), (count == 0, bits, kept, masked)
                _input(columns, arrays, item, a, b, kind, coefficients, more)
        at = take(turns)
    leave(turns, helper)
