"""The kernels of the backward, as in ``forward.py``: the sums of a channel, and the gradient of x.

Where a ReLU let y through is read from the mask, or, where that is empty, found again from x.
"""

from __future__ import annotations

from .channels import add_one, fill_affine, fill_slope
from .compiler import inside, kernel, shared, summed
from .forward import FIRST, SECOND, streams, whole_lines
from .intrinsics import (
    added,
    affine,
    buffer,
    double_buffer,
    either,
    fence,
    is_narrow,
    lanes,
    line,
    load,
    moved,
    plus,
    pointer,
    store,
    store_line,
    take,
    times,
    where_positive,
    zero,
)
from .moments import ROWS, add_columns
from .plan import WIDE


@shared
def _apply_relu_grad(kept, dy, x, mask, begin, size, relu, high, scale, shift, bits):
    """dy where the ReLU let y through, else 0; dy and x begin at value `begin` of their arrays.

    `relu` is 0 for none, 1 where y is found again, 2 where the mask has it.
    """
    if relu == 2:
        before = begin & 7
        for byte in range((before + size + 7) >> 3):
            for k in range(8):
                bits[8 * byte + k] = (mask[(begin >> 3) + byte] >> (7 - k)) & 1
        bits = moved(bits, before)
    last = size // lanes(dy) * lanes(dy)
    for i in range(0, last, lanes(dy)):
        z = line(dy, dy, i)
        if relu == 1:
            y = affine(line(dy, x, i), line(dy, high, i), line(dy, scale, i), line(dy, shift, i))
            z = where_positive(y, z)
        elif relu == 2:
            z = where_positive(line(dy, bits, i), z)
        store_line(kept, i, z, False)
    i = last
    while i < size:
        one = load(dy, i)
        if relu == 1:
            found = affine(load(x, i), load(high, i), load(scale, i), load(shift, i))
            one = where_positive(found, one)
        elif relu == 2:
            one = where_positive(load(bits, i), one)
        store(kept, i, one)
        i += 1


@inside
def _input_run(dx, dresidual, dy, x, size, streaming, fused, constant, high, scale, slope, offset):
    head, last = whole_lines(dx, size, streaming)
    for i in range(head, last, lanes(dx)):
        d = line(dx, dy, i)
        if fused:
            store_line(dresidual, i, d, False)
        if not constant:
            steep = affine(line(dx, x, i), line(dx, high, i), line(dx, slope, i), d)
            d = added(steep, line(dx, offset, i))
        store_line(dx, i, times(d, line(dx, scale, i)), streaming)
    i = 0 if head > 0 else last
    while i < size:
        one = load(dy, i)
        if fused:
            store(dresidual, i, one)
        if not constant:
            one = added(affine(load(x, i), load(high, i), load(slope, i), one), load(offset, i))
        store(dx, i, times(one, load(scale, i)))
        i = last if i + 1 == head else i + 1


@inside
def _relu_kind(relu, mask):
    return (2 if mask.size > 0 else 1) if relu else 0


@summed
def _sums(dy, x, begin, size, high):
    """The sums of dy and of dy * (x - high) of one run."""
    total = zero(x)
    products = zero(x)
    for i in range(begin, begin + size):
        total = plus(total, load(dy, i))
        products = plus(products, load(dy, i) * (load(x, i) - high))
    return total, products


@summed
def _kept_sums(kept, x, begin, size, high):
    """The same of what a ReLU kept, from the buffer."""
    total = zero(x)
    products = zero(x)
    for i in range(size):
        total = plus(total, kept[i])
        products = plus(products, kept[i] * (load(x, begin + i) - high))
    return total, products


@kernel
def row_backward(
    dx,
    dresidual,
    dy,
    x,
    mask,
    mean,
    invstd,
    weight,
    bias,
    dweight,
    dbias,
    sum_dy,
    sum_dy_xmu,
    items,
    taken,
    stages,
    relu,
    count,
):
    """A `count` of 0: the statistics are constants. Gradients are added where both stages are."""
    high, scale, shift, slope, offset = buffer(x), buffer(x), buffer(x), buffer(x), buffer(x)
    kept, bits = buffer(x), buffer(x)
    marks, relu, dys, xs = pointer(mask, 0), _relu_kind(relu, mask), pointer(dy, 0), pointer(x, 0)
    at = take(taken)
    while at < len(items):
        segment, _, channels, length, c0, c1, n0, n1, l0, l1, group = items[at]
        streaming, fused = streams(dx, l1 - l0), dresidual.size > 0
        for a in range(c0, c1, group):
            b = min(a + group, c1)
            fill_affine(high, scale, shift, b - a, 1, mean, invstd, weight, bias, a, b)
            for stage in range(FIRST, SECOND + 1):
                if not stages & stage:
                    continue
                if stage == FIRST:
                    for c in range(segment + a, segment + b):
                        sum_dy[c] = 0.0
                        sum_dy_xmu[c] = 0.0
                else:
                    fill_slope(
                        high, slope, offset, b - a, 1, mean, invstd, sum_dy, sum_dy_xmu, count, a, b
                    )
                staged = relu > 0 or (is_narrow(x) and stage == SECOND)
                for n in range(n0, n1):
                    for c in range(a, b):
                        about = high[c - a]
                        for i in range(l0, l1, WIDE):
                            begin, size = (n * channels + c) * length + i, min(WIDE, l1 - i)
                            g, v = pointer(dy, begin), pointer(x, begin)
                            if staged:
                                _apply_relu_grad(
                                    kept,
                                    g,
                                    v,
                                    marks,
                                    begin,
                                    size,
                                    relu,
                                    about,
                                    scale[c - a],
                                    shift[c - a],
                                    bits,
                                )
                            if stage == FIRST:
                                if relu == 0:
                                    total, products = _sums(dys, xs, begin, size, about)
                                else:
                                    total, products = _kept_sums(kept, xs, begin, size, about)
                                sum_dy[segment + c] += total
                                sum_dy_xmu[segment + c] += products
                            else:
                                _input_run(
                                    pointer(dx, begin),
                                    pointer(dresidual, begin),
                                    either(staged, kept, g),
                                    v,
                                    size,
                                    streaming,
                                    fused,
                                    count == 0,
                                    about,
                                    scale[c - a],
                                    slope[c - a],
                                    offset[c - a],
                                )
                if stage == FIRST and stages & SECOND:
                    for c in range(a, b):
                        sum_dy_xmu[c] -= (mean[c] - high[c - a]) * sum_dy[c]
                        add_one(dweight, dbias, sum_dy, sum_dy_xmu, invstd, c)
        at = take(taken)
    fence()


@inside
def _column_sums(
    sum_dy,
    sum_dy_xmu,
    dy,
    x,
    mask,
    relu,
    start,
    segment,
    c0,
    c1,
    width,
    m0,
    m1,
    size,
    step,
    high,
    scale,
    shift,
    kept,
    bits,
):
    """Into sum_dy and sum_dy_xmu, at segment + c, about the high part of the mean."""
    sums, products, partial, partial_products = (
        double_buffer(x),
        double_buffer(x),
        buffer(x),
        buffer(x),
    )
    for j in range(size):
        sums[j] = 0.0
        products[j] = 0.0
    for block in range(m0, m1, ROWS):
        last = min(block + ROWS, m1)
        for j in range(size):
            partial[j] = zero(x)
            partial_products[j] = zero(x)
        whole = block + (last - block) // 4 * 4 if relu == 0 else block
        for m in range(block, whole, 4):
            g, v = moved(dy, start + m * width), moved(x, start + m * width)
            for k in range(size):
                g0, g1 = load(g, k), load(g, k + width)
                g2, g3 = load(g, k + 2 * width), load(g, k + 3 * width)
                a = g0 * (load(v, k) - high[k]) + g1 * (load(v, k + width) - high[k])
                b = g2 * (load(v, k + 2 * width) - high[k])
                b += g3 * (load(v, k + 3 * width) - high[k])
                partial[k] += (g0 + g1) + (g2 + g3)
                partial_products[k] += a + b
        for m in range(whole, last):
            begin = start + m * width
            v = moved(x, begin)
            _apply_relu_grad(
                kept, moved(dy, begin), v, mask, begin, size, relu, high, scale, shift, bits
            )
            for j in range(size):
                partial[j] += kept[j]
                partial_products[j] += kept[j] * (load(v, j) - high[j])
        for j in range(size):
            sums[j] += partial[j]
            products[j] += partial_products[j]
    add_columns(sums, products, size, (c1 - c0) * step, step)
    j = 0
    for c in range(segment + c0, segment + c1):
        sum_dy[c] = sums[j]
        sum_dy_xmu[c] = products[j]
        j += step


@kernel
def column_backward(
    dx,
    dresidual,
    dy,
    x,
    mask,
    mean,
    invstd,
    weight,
    bias,
    dweight,
    dbias,
    sum_dy,
    sum_dy_xmu,
    items,
    taken,
    stages,
    relu,
    count,
):
    """As :func:`row_backward`."""
    high, scale, shift, slope, offset = buffer(x), buffer(x), buffer(x), buffer(x), buffer(x)
    kept, bits = buffer(x), buffer(x)
    marks, relu = pointer(mask, 0), _relu_kind(relu, mask)
    staged = relu > 0 or is_narrow(x)
    at = take(taken)
    while at < len(items):
        segment, start, _, width, c0, c1, m0, m1, j0, j1, step = items[at]
        size = j1 - j0
        streaming, fused = streams(dx, size), dresidual.size > 0
        fill_affine(high, scale, shift, size, step, mean, invstd, weight, bias, c0, c1)
        if stages & FIRST:
            _column_sums(
                sum_dy,
                sum_dy_xmu,
                pointer(dy, 0),
                pointer(x, 0),
                marks,
                relu,
                start + j0,
                segment,
                c0,
                c1,
                width,
                m0,
                m1,
                size,
                step,
                high,
                scale,
                shift,
                kept,
                bits,
            )
        if stages & FIRST and stages & SECOND:
            for c in range(c0, c1):
                sum_dy_xmu[c] -= (mean[c] - high[(c - c0) * step]) * sum_dy[c]
                add_one(dweight, dbias, sum_dy, sum_dy_xmu, invstd, c)
        if stages & SECOND:
            fill_slope(
                high, slope, offset, size, step, mean, invstd, sum_dy, sum_dy_xmu, count, c0, c1
            )
            for m in range(m0, m1):
                begin = start + m * width + j0
                g, v = pointer(dy, begin), pointer(x, begin)
                if staged:
                    _apply_relu_grad(kept, g, v, marks, begin, size, relu, high, scale, shift, bits)
                _input_run(
                    pointer(dx, begin),
                    pointer(dresidual, begin),
                    either(staged, kept, g),
                    v,
                    size,
                    streaming,
                    fused,
                    count == 0,
                    high,
                    scale,
                    slope,
                    offset,
                )
        at = take(taken)
    fence()
