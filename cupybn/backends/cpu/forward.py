"""The kernels of the forward. Each call takes work items until none is left.

A kernel runs the stages that the caller names. If a work item has all values of its channels, one
call runs all stages, and the second pass over x reads from the cache.
"""

from __future__ import annotations

from .channels import fill_affine, finalize, pack_moments
from .compiler import inside, kernel, shared
from .intrinsics import (
    added,
    affine,
    buffer,
    byte_buffers,
    double_buffer,
    enter,
    lanes,
    leave,
    line,
    load,
    moved,
    next_place,
    of_channel,
    part,
    pointer,
    positions,
    rectified,
    store_line,
    store_part,
    strided,
    take,
    unaligned,
    where_valid,
)
from .masked import (
    mask_of_run,
    masked_moments,
)
from .moments import column_moments, row_moments
from .plan import WIDE

STREAMED = 1 << 23  # least bytes of an output that is streamed past the caches,
STREAMED_RUN = 1 << 9  # and of each of its runs
MOMENTS, FINALIZE, NORMALIZE = 1, 2, 4  # stages


@inside
def streams(y, run):
    """Whether to write runs of y past the caches."""
    return y.nbytes >= STREAMED and run * y.itemsize >= STREAMED_RUN


@inside
def whole_lines(y, size, streaming):
    """(begin, end) of the whole lines in y[:size]; if `streaming`, they begin a cache line."""
    head = min(size, unaligned(y)) if streaming else 0
    return head, head + (size - head) // lanes(y) * lanes(y)


@inside
def _normalized(y, i, z, r, fused, relu, coefficients, valid, at):
    """The line at y[i], from a line z of x, a line r of the residual, and the mask at `at`."""
    high, scale, shift = coefficients
    z = affine(z, line(y, high, i), line(y, scale, i), line(y, shift, i))
    if fused:
        z = added(z, r)
    return where_valid(valid, at, rectified(z) if relu else z)


@shared
def _normalize_run(y, x, residual, size, streaming, fused, relu, coefficients, found):
    mask, first, period = found
    head, last = whole_lines(y, size, streaming)
    valid, at = positions(mask, first + head)
    before = at - lanes(y)
    for i in range(head, last, lanes(y)):
        z = line(y, x, i)
        r = line(y, residual, i) if fused else z
        z = _normalized(y, i, z, r, fused, relu, coefficients, valid, at)
        store_line(y, i, z, streaming)
        at = next_place(valid, at, lanes(y), period)
    i = head - lanes(y) if head > 0 else last
    at_edge = before if head > 0 else at
    while i < size:  # the ends, which are no whole lines
        z = part(y, x, i, size)
        r = part(y, residual, i, size) if fused else z
        z = _normalized(y, i, z, r, fused, relu, coefficients, valid, at_edge)
        store_part(y, i, z, size)
        i, at_edge = max(last, i + lanes(y)), at


@inside
def _normalize(columns, arrays, item, a, b, relu, coefficients, masked):
    """Writes y of the channels a to b of an item."""
    (y, x, residual), (mask, valid) = arrays, masked
    _, start, channels, length, _, _, n0, n1, l0, l1, _, _ = item
    streaming, fused = streams(y, l1 - l0), residual.size > 0
    first, last = (a, b) if columns is None else (0, 1)
    for n in range(n0, n1):
        for c in range(first, last):
            of = of_channel(columns, coefficients, c - first)
            for i in range(l0, l1, WIDE):
                begin, size = start + (n * channels + c) * length + i, min(WIDE, l1 - i)
                there, v, r = pointer(y, begin), pointer(x, begin), pointer(residual, begin)
                found = mask_of_run(valid, mask, columns, item, x.shape[1], n, i)
                _normalize_run(there, v, r, size, streaming, fused, relu, of, found)


# `columns` is None for items of rows. `form` says which moments `first` and `second` are. Without a
# mask, `mask` and `counts` (valid values per segment, written here) are None; with one, `unmasked`
# is. Numba omits branches that a None decides: each compiled kernel has the code of one case.
@kernel
def forward(
    helper,
    columns,
    items,
    turns,
    y,
    x,
    residual,
    weight,
    bias,
    running_mean,
    running_var,
    mean,
    invstd,
    first,
    second,
    payload,
    stages,
    form,
    relu,
    numbers,
    mask,
    counts,
    unmasked,
    batches,
):
    given = y, x, residual, weight, bias, running_mean, running_var, mean, invstd
    taking, lent = enter(turns, helper, (*given, first, second, payload, mask, counts))
    y, x, residual, weight, bias, running_mean, running_var, mean, invstd = lent[:9]
    first, second, payload, positions, counts = lent[9], lent[10], lent[11], lent[12], lent[13]
    masked = strided(positions, x), byte_buffers(x, mask)
    high, scale, shift, var = buffer(x), buffer(x), buffer(x), double_buffer(x)
    eps, count, factor = numbers
    at = take(turns) if taking else len(items)
    while at < len(items):
        _, start, _, _, c0, c1, _, _, l0, l1, step, group = item = items[at]
        for a in range(c0, c1, group):
            b = min(a + group, c1)
            if stages & MOMENTS:
                if mask is not None:
                    values, more = pointer(x, 0), (x.shape[1], masked[0], counts)
                    masked_moments(columns, values, first, second, item, a, b, *more)
                if unmasked is None:
                    pass
                elif columns is None:
                    row_moments(pointer(x, 0), first, second, item, a, b)
                else:
                    column_moments(pointer(x, start + l0), first, second, item)
                pack_moments(payload, first, second, count, second.size, a, b)
            if stages & FINALIZE:
                states = mean, moved(var, -a), invstd, running_mean, running_var
                finalize(first, second, count, eps, form, *states, factor, a, b)
            if stages & NORMALIZE:
                size = b - a if columns is None else l1 - l0
                fill_affine(high, scale, shift, size, step, mean, invstd, weight, bias, a, b)
                of = high, scale, shift
                _normalize(columns, (y, x, residual), item, a, b, relu, of, masked)
        at = take(turns)
    leave(turns, helper)
    batches[()] += not helper


@kernel
def pack_bits(helper, items, turns, y, relu_bits):
    """Writes the bits of y > 0 into the bytes of each item, as ``np.packbits`` does."""
    taking, (array, relu_bits) = enter(turns, helper, (y, relu_bits))
    size, y = array.size, pointer(array, 0)
    at = take(turns) if taking else len(items)
    while at < len(items):
        for i in range(items[at, 0], items[at, 1]):
            byte = 0
            if 8 * i + 8 <= size:
                for k in range(8):
                    byte |= (load(y, 8 * i + k) > 0) << (7 - k)
            else:
                for k in range(size - 8 * i):
                    byte |= (load(y, 8 * i + k) > 0) << (7 - k)
            relu_bits[i] = byte
        at = take(turns)
    leave(turns, helper)
