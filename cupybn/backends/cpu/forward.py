"""The kernels of the forward: each call takes work items until none is left.

A kernel does the stages it is asked for. Where a work item has all values of its channels, it does
all of them at once, and the second reading of x finds the values in the cache.
"""

from __future__ import annotations

from .channels import fill_affine, finalize
from .compiler import inside, kernel
from .intrinsics import (
    added,
    affine,
    buffer,
    double_buffer,
    fence,
    lanes,
    line,
    load,
    moved,
    pointer,
    rectified,
    store,
    store_line,
    take,
    unaligned,
)
from .moments import column_moments, row_moments
from .plan import WIDE

STREAMED = 1 << 23  # bytes of an output that goes past the caches, in runs of at least
STREAMED_RUN = 1 << 9  # bytes
FIRST, SECOND = 1, 2  # stages: moments, normalize; sums, gradient of x; both: and what is between


@inside
def streams(y, run):
    """Whether to write runs of y past the caches."""
    return y.nbytes >= STREAMED and run * y.itemsize >= STREAMED_RUN


@inside
def whole_lines(y, size, streaming):
    """Where the cache lines begin and end that y[0] to y[size] fill."""
    head = min(size, unaligned(y)) if streaming else 0
    return head, head + (size - head) // lanes(y) * lanes(y)


@inside
def _normalize_run(y, x, residual, size, streaming, fused, relu, high, scale, shift):
    head, last = whole_lines(y, size, streaming)
    for i in range(head, last, lanes(y)):
        z = affine(line(y, x, i), line(y, high, i), line(y, scale, i), line(y, shift, i))
        if fused:
            z = added(z, line(y, residual, i))
        if relu:
            z = rectified(z)
        store_line(y, i, z, streaming)
    i = 0 if head > 0 else last
    while i < size:  # what is no whole line
        one = affine(load(x, i), load(high, i), load(scale, i), load(shift, i))
        if fused:
            one = added(one, load(residual, i))
        store(y, i, rectified(one) if relu else one)
        i = last if i + 1 == head else i + 1


@kernel
def row_forward(
    y,
    x,
    residual,
    weight,
    bias,
    running_mean,
    running_var,
    mean,
    second,
    items,
    taken,
    stages,
    relu,
    eps,
    factor,
):
    """`second` takes m2, and invstd in its place where both stages are done."""
    high, scale, shift, var = buffer(x), buffer(x), buffer(x), double_buffer(x)
    at = take(taken)
    while at < len(items):
        segment, _, channels, length, c0, c1, n0, n1, l0, l1, group = items[at]
        count = float((n1 - n0) * (l1 - l0))
        streaming, fused = streams(y, l1 - l0), residual.size > 0
        for a in range(c0, c1, group):
            b = min(a + group, c1)
            if stages & FIRST:
                row_moments(
                    pointer(x, 0), mean, second, segment, channels, length, a, b, n0, n1, l0, l1
                )
            if stages & FIRST and stages & SECOND:
                finalize(
                    mean,
                    second,
                    count,
                    eps,
                    0,
                    mean,
                    moved(var, -a),
                    second,
                    running_mean,
                    running_var,
                    factor,
                    a,
                    b,
                )
            if stages & SECOND:
                fill_affine(high, scale, shift, b - a, 1, mean, second, weight, bias, a, b)
                for n in range(n0, n1):
                    for c in range(a, b):
                        for i in range(l0, l1, WIDE):
                            begin = (n * channels + c) * length + i
                            _normalize_run(
                                pointer(y, begin),
                                pointer(x, begin),
                                pointer(residual, begin),
                                min(WIDE, l1 - i),
                                streaming,
                                fused,
                                relu,
                                high[c - a],
                                scale[c - a],
                                shift[c - a],
                            )
        at = take(taken)
    fence()


@kernel
def column_forward(
    y,
    x,
    residual,
    weight,
    bias,
    running_mean,
    running_var,
    mean,
    second,
    items,
    taken,
    stages,
    relu,
    eps,
    factor,
):
    """As :func:`row_forward`."""
    high, scale, shift, var = buffer(x), buffer(x), buffer(x), double_buffer(x)
    at = take(taken)
    while at < len(items):
        segment, start, _, width, c0, c1, m0, m1, j0, j1, step = items[at]
        size = j1 - j0
        count = float((m1 - m0) * size // (c1 - c0))
        streaming, fused = streams(y, size), residual.size > 0
        if stages & FIRST:
            column_moments(
                pointer(x, start + j0), mean, second, segment, c0, c1, width, m0, m1, size, step
            )
        if stages & FIRST and stages & SECOND:
            finalize(
                mean,
                second,
                count,
                eps,
                0,
                mean,
                moved(var, -c0),
                second,
                running_mean,
                running_var,
                factor,
                c0,
                c1,
            )
        if stages & SECOND:
            fill_affine(high, scale, shift, size, step, mean, second, weight, bias, c0, c1)
            for m in range(m0, m1):
                begin = start + m * width + j0
                _normalize_run(
                    pointer(y, begin),
                    pointer(x, begin),
                    pointer(residual, begin),
                    size,
                    streaming,
                    fused,
                    relu,
                    high,
                    scale,
                    shift,
                )
        at = take(taken)
    fence()


@kernel
def pack_mask(y, mask, items, taken):
    """One bit for each y above 0, into the bytes of each item, as ``np.packbits``."""
    size = y.size
    y = pointer(y, 0)
    at = take(taken)
    while at < len(items):
        for i in range(items[at, 0], items[at, 1]):
            byte = 0
            if 8 * i + 8 <= size:
                for k in range(8):
                    byte |= (load(y, 8 * i + k) > 0) << (7 - k)
            else:
                for k in range(size - 8 * i):
                    byte |= (load(y, 8 * i + k) > 0) << (7 - k)
            mask[i] = byte
        at = take(taken)
