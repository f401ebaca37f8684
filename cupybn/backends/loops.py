"""The loops of ``backends/numba.py``, compiled by Numba when they are first needed.

Data come flat, in the order (N, C, L); float16 is seen as int16 and bfloat16 as uint16, because
Numba has neither on the CPU. Each call of a loop takes pieces of a plan (``pieces.py``) until none
is left: of rows, which are runs of one channel with a number for each coefficient; or of columns,
where runs are short: then there is one coefficient a column.

Only adding up may be reassociated, to make it a vector loop: differences from a pivot or mean are
taken as written, and nothing may assume that there is no NaN or Inf. Inside the loops arrays are
pointers: Numba would count references for every run, and check every index for its sign.

All in one file, because Numba finds out that a loop on disk is out of date by this file alone:
whoever changes KINDS or WIDE touches this file too.
"""

from __future__ import annotations

import operator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from .pieces import KINDS, WIDE

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

LINE = 64  # bytes of a cache line
STREAMED = 1 << 23  # bytes of an output that goes past the caches, in runs of at least
STREAMED_RUN = 1 << 9  # bytes
RUN = 4096  # values in one float32 sum, at most
ROWS = 64  # of columns in one float32 sum, four at a time
SAMPLE = 16  # values that make a pivot, or a row of a channel's columns

_options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


_kernels: list[Any] = []


def _kernel(function):
    try:
        kernel = numba.njit(cache=True, **_options)(function)
    except RuntimeError:  # nowhere to keep it
        kernel = numba.njit(**_options)(function)
    _kernels.append(kernel)
    return kernel


def compiled():
    """How many loops this process has compiled, as opposed to read from disk."""
    return sum(sum(kernel.stats.cache_misses.values()) for kernel in _kernels)


_inside = numba.njit(forceinline=True, **_options)
_piece = numba.njit(**_options)  # kept on disk with the kernels that call it


# ---- values --------------------------------------------------------------------------------------


def _arithmetic(dtype):
    return types.float64 if dtype == types.float64 else types.float32


@intrinsic
def pointer(_, array, offset):
    """To array[offset]. The array must be an argument of the kernel: those live long enough."""

    def code(context, builder, signature, arguments):
        data = context.make_array(array)(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.intp), code


@intrinsic
def buffer(_, x):
    """To WIDE values and a few more in the dtype of the arithmetic on x, on the stack."""
    dtype = _arithmetic(x.dtype)

    def code(context, builder, signature, arguments):
        return cgutils.alloca_once(builder, context.get_data_type(dtype), size=WIDE + 16)

    return types.CPointer(dtype)(x), code


@intrinsic
def take(_, taken):
    """The next number, from 0: taken[0], which is one more for the next thread that asks."""

    def code(context, builder, signature, arguments):
        data = context.make_array(taken)(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(taken), code


@intrinsic
def zero(_, x):
    """0 in the dtype of the arithmetic on x."""
    dtype = _arithmetic(x.dtype)
    return dtype(x), lambda context, builder, *_: context.get_constant(dtype, 0.0)


def _like(kind, element):
    """The LLVM type of as many elements as `kind` has: a vector, or one number."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _constant(kind, value):
    return kind([value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _widened(builder, dtype, values):
    """A number or a vector of `dtype`, as the loops see it, in the dtype of the arithmetic."""
    kind = values.type
    if dtype == types.int16:
        half = builder.bitcast(values, _like(kind, ir.HalfType()))
        return builder.fpext(half, _like(kind, ir.FloatType()))
    if dtype == types.uint16:
        word = _like(kind, ir.IntType(32))
        bits = builder.shl(builder.zext(values, word), _constant(word, 16))
        return builder.bitcast(bits, _like(kind, ir.FloatType()))
    return values


def _narrowed(builder, dtype, values):
    """The way back, rounded to nearest, ties to even."""
    kind = values.type
    if dtype == types.int16:
        half = builder.fptrunc(values, _like(kind, ir.HalfType()))
        return builder.bitcast(half, _like(kind, ir.IntType(16)))
    if dtype == types.uint16:
        word = _like(kind, ir.IntType(32))
        bits = builder.bitcast(values, word)
        odd = builder.and_(builder.lshr(bits, _constant(word, 16)), _constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, _constant(word, 0x7FFF)))
        quiet = builder.or_(bits, _constant(word, 0x400000))  # NaN rounded up could be Inf or 0
        nan = builder.fcmp_unordered("uno", values, values)
        kept = builder.lshr(builder.select(nan, quiet, rounded), _constant(word, 16))
        return builder.trunc(kept, _like(kind, ir.IntType(16)))
    return values


@intrinsic
def load(_, x, i):
    """x[i] in the dtype of the arithmetic."""
    dtype = x.dtype

    def code(context, builder, signature, arguments):
        values, index = arguments
        return _widened(builder, dtype, builder.load(builder.gep(values, [index])))

    return _arithmetic(dtype)(x, types.intp), code


@intrinsic
def store(_, y, i, value):
    """``y[i] = value``, rounded to nearest, ties to even."""
    dtype = y.dtype

    def code(context, builder, signature, arguments):
        target, index, value = arguments
        builder.store(_narrowed(builder, dtype, value), builder.gep(target, [index]))
        return context.get_dummy_value()

    return types.none(y, types.intp, _arithmetic(dtype)), code


@intrinsic
def moved(_, x, i):
    """The pointer to x[i]."""

    def code(context, builder, signature, arguments):
        return builder.gep(*arguments[:1], [arguments[1]])

    return x(x, types.intp), code


@intrinsic
def unaligned(_, y):
    """Values from y to the next cache line."""
    bytes_each = y.dtype.bitwidth // 8

    def code(context, builder, signature, arguments):
        word = context.get_value_type(types.intp)
        address = builder.ptrtoint(arguments[0], word)
        left = builder.and_(builder.neg(address), word(LINE - 1))
        return builder.udiv(left, word(bytes_each))

    return types.intp(y), code


@intrinsic
def lanes(_, y):
    """Values in a cache line."""
    number = LINE * 8 // y.dtype.bitwidth
    return types.intp(y), lambda context, *_: context.get_constant(types.intp, number)


@intrinsic
def fence(_):
    """Has all that was streamed seen by other threads before what comes next."""

    def code(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), code


@_inside
def _streams(y, run):
    return y.nbytes >= STREAMED and run * y.itemsize >= STREAMED_RUN


@intrinsic
def plus(_, total, value):
    """``total + value``, in any order with the other terms of the sum."""

    def code(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=("reassoc", "nsz", "contract"))

    return total(total, value), code


def coefficient(coefficients, k, c, j):
    """Coefficient k: of rows, (k, channels), a number; of columns, (k, 1, columns), a pointer."""


@overload(coefficient)
def _coefficient(coefficients, k, c, j):
    if coefficients.ndim == 2:
        return lambda coefficients, k, c, j: coefficients[k, c]
    return lambda coefficients, k, c, j: pointer(coefficients, k * coefficients.shape[2] + j)


def at(coefficient, i):
    """The coefficient at place i of a run."""


@overload(at)
def _at(coefficient, i):
    if isinstance(coefficient, types.CPointer):
        return lambda coefficient, i: coefficient[i]
    return lambda coefficient, i: coefficient


# ---- a cache line at a time: what goes past the caches -------------------------------------------


class _Line(types.Type):  # type: ignore[misc]
    """As many values as a cache line of `y` has, in the dtype of the arithmetic."""

    def __init__(self, y):
        self.element = _arithmetic(y.dtype)
        self.count = LINE * 8 // y.dtype.bitwidth
        super().__init__(f"{self.count} x {self.element}")


@register_model(_Line)
class _LineModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager, line):
        element = manager.lookup(line.element).get_value_type()
        super().__init__(manager, line, ir.VectorType(element, line.count))


@intrinsic
def line(_, y, values, i):
    """values[i] and what follows; or a number, as often."""
    found = _Line(y)

    def code(context, builder, signature, arguments):
        _, values, index = arguments
        if isinstance(signature.args[1], types.CPointer):
            dtype = signature.args[1].dtype
            vector = ir.VectorType(context.get_value_type(dtype), found.count).as_pointer()
            there = builder.bitcast(builder.gep(values, [index]), vector)
            return _widened(builder, dtype, builder.load(there, align=dtype.bitwidth // 8))
        vector, word = context.get_value_type(found), ir.IntType(32)
        values = context.cast(builder, values, signature.args[1], found.element)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), values, word(0))
        every = _constant(ir.VectorType(word, found.count), 0)
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), every)

    return found(y, values, i), code


def _operation(python, llvm):
    @intrinsic
    def apply(_, a, b):
        def code(context, builder, signature, arguments):
            return getattr(builder, llvm)(*arguments, flags=("contract",))

        return a(a, b), code

    @overload(python)
    def _overloaded(a, b):
        if isinstance(a, _Line) and a == b:
            return lambda a, b: apply(a, b)
        return None


_operation(operator.add, "fadd")
_operation(operator.sub, "fsub")
_operation(operator.mul, "fmul")


@intrinsic
def rectified(_, a):
    """0 where a is below 0."""

    def code(context, builder, signature, arguments):
        zeros = _constant(arguments[0].type, 0.0)
        below = builder.fcmp_ordered("<", arguments[0], zeros)
        return builder.select(below, zeros, arguments[0])

    return a(a), code


@_inside
def _whole_lines(y, size):
    """Where the cache lines begin and end that y[0] to y[size] fill."""
    head = min(size, unaligned(y))
    return head, head + (size - head) // lanes(y) * lanes(y)


@intrinsic
def stream(_, y, i, values):
    """``y[i] = values`` past the caches; y[i] is at the beginning of a cache line."""
    dtype = y.dtype

    def code(context, builder, signature, arguments):
        target, index, values = arguments
        values = _narrowed(builder, dtype, values)
        there = builder.bitcast(builder.gep(target, [index]), values.type.as_pointer())
        stored = builder.store(values, there, align=LINE)
        mark = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        stored.set_metadata("nontemporal", mark)
        return context.get_dummy_value()

    return types.none(y, i, values), code


# ---- per channel ---------------------------------------------------------------------------------


@_inside
def _merge(mean, m2, c, count, other_count, other_mean, other_m2):
    """Chan's formula, into mean[c] and m2[c]."""
    delta = other_mean - mean[c]
    total = count + other_count
    mean[c] += delta * (other_count / total)
    m2[c] += other_m2 + delta * delta * (count * other_count / total)


@_kernel
def merge_moments(means, m2s, counts):
    """All segments into the first, in their order."""
    count = counts[0]
    for s in range(1, counts.size):
        for c in range(means.shape[1]):
            _merge(means[0], m2s[0], c, count, counts[s], means[s, c], m2s[s, c])
        count += counts[s]


@_kernel
def pack_moments(mean, m2, count, payload):
    channels = mean.size
    for c in range(channels):
        payload[c] = mean[c] * count
    if payload.size > channels:
        for c in range(channels):
            payload[channels + c] = m2[c] + payload[c] * mean[c]


@_kernel
def finalize_moments(
    first, second, count, eps, form, mean, var, invstd, running_mean, running_var, factor, c0, c1
):  # fmt: skip
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


@_kernel
def fill_affine(coefficients, length, mean, invstd, weight, bias, c0, c1):
    """0 to 2: high, scale and shift, as ``_Affine`` of ``backends/numpy.py``.

    A channel has `length` columns side by side, and all channels are repeated to the end.
    """
    width = coefficients.size // KINDS
    end = width if c1 - c0 == mean.size else c1 * length
    high, scale = pointer(coefficients, 0), pointer(coefficients, width)
    shift = pointer(coefficients, 2 * width)
    j = c0 * length
    while j < end:
        for c in range(c0, c1):
            high[j] = mean[c]
            scaled = invstd[c] * weight[c] if weight.size else invstd[c]
            scale[j] = scaled
            shift[j] = (bias[c] if bias.size else 0.0) - (mean[c] - high[j]) * scaled
            for k in range(j + 1, j + length):
                high[k] = high[j]
                scale[k] = scale[j]
                shift[k] = shift[j]
            j += length


@_kernel
def fill_slope(coefficients, length, mean, invstd, sum_dy, sum_dy_xmu, count, c0, c1):
    """3 and 4 of ``dx = ((x - high) * slope + dy + offset) * scale``."""
    width = coefficients.size // KINDS
    end = width if c1 - c0 == mean.size else c1 * length
    high, slope = pointer(coefficients, 0), pointer(coefficients, 3 * width)
    offset = pointer(coefficients, 4 * width)
    j = c0 * length
    while j < end:
        for c in range(c0, c1):
            steep = sum_dy_xmu[c] * invstd[c] * invstd[c] / count
            slope[j] = -steep
            offset[j] = (mean[c] - high[j]) * steep - sum_dy[c] / count
            for k in range(j + 1, j + length):
                slope[k] = slope[j]
                offset[k] = offset[j]
            j += length


@_kernel
def add_segments(sums_dy, sums_dy_xmu, mean, coefficients, length, c0, c1):
    """All segments into the first, in their order; then about the mean, not its high part."""
    for s in range(1, sums_dy.shape[0]):
        for c in range(c0, c1):
            sums_dy[0, c] += sums_dy[s, c]
            sums_dy_xmu[0, c] += sums_dy_xmu[s, c]
    high = pointer(coefficients, 0)
    for c in range(c0, c1):
        sums_dy_xmu[0, c] -= (mean[c] - high[c * length]) * sums_dy[0, c]


@_kernel
def add_gradients(dweight, dbias, sum_dy, sum_dy_xmu, invstd, c0, c1):
    for c in range(c0, c1):
        if dweight.size:
            dweight[c] += sum_dy_xmu[c] * invstd[c]
        if dbias.size:
            dbias[c] += sum_dy[c]


# ---- moments -------------------------------------------------------------------------------------


@_inside
def _rough_mean(x, begin, size):
    first = load(x, begin)
    total = zero(x)
    count = zero(x)
    for i in range(begin, begin + min(size, SAMPLE)):
        total = plus(total, load(x, i) - first)
        count += 1
    return first + total / count


@_inside
def _deviations(x, begin, size, pivot):
    total = zero(x)
    squares = zero(x)
    for i in range(begin, begin + size):
        d = load(x, i) - pivot
        total = plus(total, d)
        squares = plus(squares, d * d)
    return total, squares


@_piece
def _row_moments(x, means, m2s, _, piece):
    s, start, channels, length, c0, c1, n0, n1, l0, l1 = piece
    x = pointer(x, start)
    mean, m2 = means[s], m2s[s]
    mean[c0:c1] = 0.0
    m2[c0:c1] = 0.0
    pivot = np.full(c1 - c0, zero(x))
    sums = np.empty(c1 - c0)
    squares = np.empty(c1 - c0)
    count = 0.0
    rows = max(1, RUN // max(1, l1 - l0))
    for n in range(n0, n1, rows):
        last = min(n + rows, n1)
        for j in range(l0, l1, RUN):
            run = min(RUN, l1 - j)
            for c in range(c1 - c0):
                pivot[c] = _rough_mean(x, (n * channels + c0 + c) * length + j, run)
                sums[c] = 0.0
                squares[c] = 0.0
            for i in range(n, last):
                for c in range(c1 - c0):
                    a, b = _deviations(x, (i * channels + c0 + c) * length + j, run, pivot[c])
                    sums[c] += a
                    squares[c] += b
            size = float((last - n) * run)
            for c in range(c1 - c0):
                shift = sums[c] / size
                m = squares[c] - sums[c] * shift
                _merge(mean, m2, c0 + c, count, size, pivot[c] + shift, m)
            count += size


@_piece
def _column_moments(x, means, m2s, length, piece):
    s, start, _, width, _, _, m0, m1, j0, j1 = piece
    x = pointer(x, start + j0)
    columns = j1 - j0
    first = m0 * width
    repeat = min(columns, means.shape[1] * length)
    pivot = np.full(columns, zero(x))
    rows = min(m1 - m0, max(1, SAMPLE // length))
    for m in range(1, rows):
        i = (m0 + m * ((m1 - m0) // rows)) * width
        for j in range(repeat):
            pivot[j] += load(x, i + j) - load(x, first + j)
    for j in range(0, repeat, length):
        total = zero(x)
        for k in range(j, j + length):
            total += (load(x, first + k) - load(x, first + j)) + pivot[k] / rows
        rough = load(x, first + j) + total / length
        for k in range(j, j + length):
            pivot[k] = rough
    for k in range(repeat, columns):
        pivot[k] = pivot[k - repeat]
    partial, partial_squares = buffer(x), buffer(x)
    sums = np.zeros(columns)
    squares = np.zeros(columns)
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
    size = float((m1 - m0) * length * (columns // repeat))
    _add_repeats(sums, repeat)
    _add_repeats(squares, repeat)
    c = j0 // length
    for j in range(0, repeat, length):
        total = _channel_sum(sums, j, length)
        shift = total / size
        means[s, c] = pivot[j] + shift
        m2s[s, c] = _channel_sum(squares, j, length) - total * shift
        c += 1


@_inside
def _add_repeats(sums, repeat):
    """The columns from `repeat` on belong to the same channels once more, and so on."""
    for begin in range(repeat, sums.size, repeat):
        for k in range(repeat):
            sums[k] += sums[begin + k]


@_inside
def _channel_sum(sums, j, length):
    """Of the columns of one channel, `length` from j on."""
    total = sums[j]
    for k in range(j + 1, j + length):
        total += sums[k]
    return total


# ---- normalize -----------------------------------------------------------------------------------


@_inside
def _normalize_run(y, x, residual, begin, i0, i1, staged, fused, relu, high, scale, shift, work):
    # Written straight over the x it was read from, y would not come out of a vector loop.
    if not staged:
        for i in range(i0, i1):
            z = (load(x, begin + i) - at(high, i)) * at(scale, i) + at(shift, i)
            store(y, i, z)
        return
    for i in range(i0, i1):
        work[i] = (load(x, begin + i) - at(high, i)) * at(scale, i) + at(shift, i)
    if fused:
        for i in range(i0, i1):
            work[i] += load(residual, begin + i)
    if relu:
        for i in range(i0, i1):
            work[i] = zero(x) if work[i] < 0 else work[i]
    for i in range(i0, i1):
        store(y, i, work[i])


@_inside
def _stream_normalized(y, x, residual, begin, size, fused, relu, high, scale, shift, work):
    head, last = _whole_lines(y, size)
    for i0, i1 in ((0, head), (last, size)):
        _normalize_run(y, x, residual, begin, i0, i1, True, fused, relu, high, scale, shift, work)
    for i in range(head, last, lanes(y)):
        z = (line(y, x, begin + i) - line(y, high, i)) * line(y, scale, i) + line(y, shift, i)
        if fused:
            z = z + line(y, residual, begin + i)
        stream(y, i, rectified(z) if relu else z)


@_piece
def _normalize(y, x, residual, relu, coefficients, piece):
    _, start, channels, length, c0, c1, n0, n1, l0, l1 = piece
    fused = residual.size > 0
    staged = fused or relu or y.ctypes.data == x.ctypes.data
    streaming = _streams(y, l1 - l0)
    y, x, residual = pointer(y, start), pointer(x, start), pointer(residual, start)
    work = buffer(x)
    for n in range(n0, n1):
        for c in range(c0, c1):
            for i in range(l0, l1, WIDE):
                high, scale, shift = _affine(coefficients, c, i)
                begin, size = (n * channels + c) * length + i, min(WIDE, l1 - i)
                there = moved(y, begin)
                if streaming:
                    _stream_normalized(
                        there, x, residual, begin, size, fused, relu, high, scale, shift, work
                    )
                else:
                    _normalize_run(
                        there, x, residual, begin, 0, size,
                        staged, fused, relu, high, scale, shift, work,
                    )  # fmt: skip
    fence()


@_inside
def _affine(coefficients, c, j):
    return (
        coefficient(coefficients, 0, c, j),
        coefficient(coefficients, 1, c, j),
        coefficient(coefficients, 2, c, j),
    )


@_kernel
def pack_mask(y, mask, pieces, taken):
    """One bit for each y above 0, into the bytes of each piece, as ``np.packbits``."""
    size = y.size
    y = pointer(y, 0)
    p = take(taken)
    while p < len(pieces):
        for i in range(pieces[p, 0], pieces[p, 1]):
            byte = 0
            if 8 * i + 8 <= size:
                for k in range(8):
                    byte |= (load(y, 8 * i + k) > 0) << (7 - k)
            else:
                for k in range(size - 8 * i):
                    byte |= (load(y, 8 * i + k) > 0) << (7 - k)
            mask[i] = byte
        p = take(taken)


# ---- backward ------------------------------------------------------------------------------------


@_inside
def _passing(passed, dy, x, begin, size, activation, mask, high, scale, shift):
    """dy where the activation let y through; 0 none, 1 found again from x, 2 in `mask`."""
    if activation == 1:
        for i in range(size):
            y = (load(x, begin + i) - at(high, i)) * at(scale, i) + at(shift, i)
            passed[i] = load(dy, begin + i) if y > 0 else zero(x)
        return
    if activation == 0:
        for i in range(size):
            passed[i] = load(dy, begin + i)
        return
    bits = buffer(x)
    before = begin & 7
    for byte in range((before + size + 7) >> 3):
        for k in range(8):
            bits[8 * byte + k] = (mask[(begin >> 3) + byte] >> (7 - k)) & 1
    for i in range(size):
        passed[i] = load(dy, begin + i) if bits[before + i] else zero(x)


@_inside
def _gradient_sums(dy, x, begin, size, high):
    total = zero(x)
    products = zero(x)
    for i in range(begin, begin + size):
        total = plus(total, load(dy, i))
        products = plus(products, load(dy, i) * (load(x, i) - high))
    return total, products


@_inside
def _passed_sums(passed, x, begin, size, high):
    total = zero(x)
    products = zero(x)
    for i in range(size):
        total = plus(total, passed[i])
        products = plus(products, passed[i] * (load(x, begin + i) - high))
    return total, products


@_piece
def _row_reduce(sums_dy, sums_dy_xmu, dy, x, activation, mask, coefficients, _, piece):
    s, start, channels, length, c0, c1, n0, n1, l0, l1 = piece
    sum_dy, sum_dy_xmu = sums_dy[s], sums_dy_xmu[s]
    sum_dy[c0:c1] = 0.0
    sum_dy_xmu[c0:c1] = 0.0
    dy, x, mask = pointer(dy, 0), pointer(x, 0), pointer(mask, 0)
    work = buffer(x)
    for n in range(n0, n1):
        for c in range(c0, c1):
            high, scale, shift = _affine(coefficients, c, 0)
            for i in range(l0, l1, WIDE):
                begin, run = start + (n * channels + c) * length + i, min(WIDE, l1 - i)
                if activation == 0:
                    a, b = _gradient_sums(dy, x, begin, run, high)
                else:
                    _passing(work, dy, x, begin, run, activation, mask, high, scale, shift)
                    a, b = _passed_sums(work, x, begin, run, high)
                sum_dy[c] += a
                sum_dy_xmu[c] += b


@_piece
def _column_reduce(sums_dy, sums_dy_xmu, dy, x, activation, mask, coefficients, length, piece):
    s, start, _, width, _, _, m0, m1, j0, j1 = piece
    columns = j1 - j0
    high, scale, shift = _affine(coefficients, 0, j0)
    dy, x, mask = pointer(dy, 0), pointer(x, 0), pointer(mask, 0)
    work, partial, partial_products = buffer(x), buffer(x), buffer(x)
    sums = np.zeros(columns)
    products = np.zeros(columns)
    for block in range(m0, m1, ROWS):
        last = min(block + ROWS, m1)
        for j in range(columns):
            partial[j] = zero(x)
            partial_products[j] = zero(x)
        whole = block + (last - block) // 4 * 4 if activation == 0 else block
        for m in range(block, whole, 4):
            i = start + m * width + j0
            for j in range(columns):
                k = i + j
                g0, g1 = load(dy, k), load(dy, k + width)
                g2, g3 = load(dy, k + 2 * width), load(dy, k + 3 * width)
                a = g0 * (load(x, k) - high[j]) + g1 * (load(x, k + width) - high[j])
                b = g2 * (load(x, k + 2 * width) - high[j])
                b += g3 * (load(x, k + 3 * width) - high[j])
                partial[j] += (g0 + g1) + (g2 + g3)
                partial_products[j] += a + b
        for m in range(whole, last):
            begin = start + m * width + j0
            _passing(work, dy, x, begin, columns, activation, mask, high, scale, shift)
            for j in range(columns):
                partial[j] += work[j]
                partial_products[j] += work[j] * (load(x, begin + j) - high[j])
        for j in range(columns):
            sums[j] += partial[j]
            products[j] += partial_products[j]
    repeat = min(columns, sums_dy.shape[1] * length)
    _add_repeats(sums, repeat)
    _add_repeats(products, repeat)
    c = j0 // length
    for j in range(0, repeat, length):
        sums_dy[s, c] = _channel_sum(sums, j, length)
        sums_dy_xmu[s, c] = _channel_sum(products, j, length)
        c += 1


@_inside
def _input_run(dx, passed, x, begin, i0, i1, constant, high, scale, slope, offset):
    if constant:
        for i in range(i0, i1):
            store(dx, i, load(passed, i) * at(scale, i))
        return
    for i in range(i0, i1):
        d = (load(x, begin + i) - at(high, i)) * at(slope, i) + load(passed, i) + at(offset, i)
        store(dx, i, d * at(scale, i))


@_inside
def _stream_input(dx, passed, x, begin, size, constant, high, scale, slope, offset):
    head, last = _whole_lines(dx, size)
    for i0, i1 in ((0, head), (last, size)):
        _input_run(dx, passed, x, begin, i0, i1, constant, high, scale, slope, offset)
    for i in range(head, last, lanes(dx)):
        d = line(dx, passed, i)
        if not constant:
            steep = (line(dx, x, begin + i) - line(dx, high, i)) * line(dx, slope, i)
            d = steep + d + line(dx, offset, i)
        stream(dx, i, d * line(dx, scale, i))


@_piece
def _backward_input(dx, dresidual, dy, x, activation, mask, constant, coefficients, piece):
    _, start, channels, length, c0, c1, n0, n1, l0, l1 = piece
    fused = dresidual.size > 0
    streaming = _streams(dx, l1 - l0)
    apart = streaming or dx.ctypes.data != dy.ctypes.data
    direct = activation == 0 and apart and not fused
    dx, dresidual, dy = pointer(dx, 0), pointer(dresidual, 0), pointer(dy, 0)
    x, mask = pointer(x, 0), pointer(mask, 0)
    work = buffer(x)
    for n in range(n0, n1):
        for c in range(c0, c1):
            for i in range(l0, l1, WIDE):
                begin, run = start + (n * channels + c) * length + i, min(WIDE, l1 - i)
                high, scale, shift = _affine(coefficients, c, i)
                slope = coefficient(coefficients, 3, c, i)
                offset = coefficient(coefficients, 4, c, i)
                there = moved(dx, begin)
                if not direct:
                    _passing(work, dy, x, begin, run, activation, mask, high, scale, shift)
                if fused:
                    for k in range(run):
                        store(dresidual, begin + k, work[k])
                if direct:
                    _input(
                        there, moved(dy, begin), x, begin, run, streaming, constant,
                        high, scale, slope, offset,
                    )  # fmt: skip
                else:
                    _input(
                        there, work, x, begin, run, streaming, constant, high, scale, slope, offset
                    )
    fence()


@_inside
def _input(dx, passed, x, begin, size, streaming, constant, high, scale, slope, offset):
    if streaming:
        _stream_input(dx, passed, x, begin, size, constant, high, scale, slope, offset)
    else:
        _input_run(dx, passed, x, begin, 0, size, constant, high, scale, slope, offset)


# ---- what threads call: pieces, each taken by whoever comes first --------------------------------
#
# A function each: Numba keeps no loop on disk that is handed the function to call.


@_inside
def _bounds(pieces, i):
    """Piece i as a tuple; see ``Piece`` of ``pieces.py``."""
    p = pieces[i]
    return p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9]


@_inside
def _channels_only(piece, a, b):
    s, start, channels, length, _, _, n0, n1, l0, l1 = piece
    return s, start, channels, length, a, b, n0, n1, l0, l1


@_kernel
def row_moments(x, means, m2s, length, pieces, taken):
    i = take(taken)
    while i < len(pieces):
        _row_moments(x, means, m2s, length, _bounds(pieces, i))
        i = take(taken)


@_kernel
def column_moments(x, means, m2s, length, pieces, taken):
    i = take(taken)
    while i < len(pieces):
        _column_moments(x, means, m2s, length, _bounds(pieces, i))
        i = take(taken)


@_kernel
def normalize(y, x, residual, relu, coefficients, pieces, taken):
    i = take(taken)
    while i < len(pieces):
        _normalize(y, x, residual, relu, coefficients, _bounds(pieces, i))
        i = take(taken)


@_kernel
def row_reduce(
    sums_dy, sums_dy_xmu, dy, x, activation, mask, coefficients, length, pieces, taken
):  # fmt: skip
    i = take(taken)
    while i < len(pieces):
        piece = _bounds(pieces, i)
        _row_reduce(sums_dy, sums_dy_xmu, dy, x, activation, mask, coefficients, length, piece)
        i = take(taken)


@_kernel
def column_reduce(
    sums_dy, sums_dy_xmu, dy, x, activation, mask, coefficients, length, pieces, taken
):  # fmt: skip
    i = take(taken)
    while i < len(pieces):
        piece = _bounds(pieces, i)
        _column_reduce(sums_dy, sums_dy_xmu, dy, x, activation, mask, coefficients, length, piece)
        i = take(taken)


@_kernel
def backward_input(
    dx, dresidual, dy, x, activation, mask, constant, coefficients, pieces, taken
):  # fmt: skip
    i = take(taken)
    while i < len(pieces):
        piece = _bounds(pieces, i)
        _backward_input(dx, dresidual, dy, x, activation, mask, constant, coefficients, piece)
        i = take(taken)


# ---- the same: all of it, where the statistics of a piece's channels are in that piece -----------


@_kernel
def row_forward(
    y, x, residual, relu, weight, bias, eps, mean, invstd, var, running_mean, running_var, factor,
    coefficients, length, group, pieces, taken,
):  # fmt: skip
    i = take(taken)
    while i < len(pieces):
        _, _, _, _, c0, c1, n0, n1, l0, l1 = _bounds(pieces, i)
        count = float((n1 - n0) * (l1 - l0))
        for a in range(c0, c1, group):  # so many that the second pass finds them in the cache
            b = min(a + group, c1)
            piece = _channels_only(_bounds(pieces, i), a, b)
            _row_moments(x, mean, var, length, piece)
            finalize_moments(
                mean[0], var[0], count, eps, 0, mean[0], var[0], invstd, running_mean,
                running_var, factor, a, b,
            )  # fmt: skip
            fill_affine(coefficients, length, mean[0], invstd, weight, bias, a, b)
            _normalize(y, x, residual, relu, coefficients, piece)
        i = take(taken)


@_kernel
def column_forward(
    y, x, residual, relu, weight, bias, eps, mean, invstd, var, running_mean, running_var, factor,
    coefficients, length, group, pieces, taken,
):  # fmt: skip
    i = take(taken)
    while i < len(pieces):
        piece = _bounds(pieces, i)
        _, _, _, _, _, _, m0, m1, j0, j1 = piece
        a, b = j0 // length, min(j1 // length, invstd.size)
        _column_moments(x, mean, var, length, piece)
        count = float((m1 - m0) * (j1 - j0) // (b - a))
        finalize_moments(
            mean[0], var[0], count, eps, 0, mean[0], var[0], invstd, running_mean, running_var,
            factor, a, b,
        )  # fmt: skip
        fill_affine(coefficients, length, mean[0], invstd, weight, bias, a, b)
        _normalize(y, x, residual, relu, coefficients, piece)
        i = take(taken)


@_kernel
def row_backward(
    dx, dresidual, dy, x, activation, mask, constant, mean, invstd, weight, bias, count,
    sums, dweight, dbias, coefficients, length, group, pieces, taken,
):  # fmt: skip
    i = take(taken)
    while i < len(pieces):
        _, _, _, _, c0, c1, _, _, _, _ = _bounds(pieces, i)
        for a in range(c0, c1, group):
            b = min(a + group, c1)
            piece = _channels_only(_bounds(pieces, i), a, b)
            fill_affine(coefficients, length, mean, invstd, weight, bias, a, b)
            _row_reduce(sums[0:1], sums[1:2], dy, x, activation, mask, coefficients, length, piece)
            add_segments(sums[0:1], sums[1:2], mean, coefficients, length, a, b)
            add_gradients(dweight, dbias, sums[0], sums[1], invstd, a, b)
            fill_slope(coefficients, length, mean, invstd, sums[0], sums[1], count, a, b)
            _backward_input(dx, dresidual, dy, x, activation, mask, constant, coefficients, piece)
        i = take(taken)


@_kernel
def column_backward(
    dx, dresidual, dy, x, activation, mask, constant, mean, invstd, weight, bias, count,
    sums, dweight, dbias, coefficients, length, group, pieces, taken,
):  # fmt: skip
    i = take(taken)
    while i < len(pieces):
        piece = _bounds(pieces, i)
        a, b = piece[8] // length, min(piece[9] // length, mean.size)
        fill_affine(coefficients, length, mean, invstd, weight, bias, a, b)
        _column_reduce(sums[0:1], sums[1:2], dy, x, activation, mask, coefficients, length, piece)
        add_segments(sums[0:1], sums[1:2], mean, coefficients, length, a, b)
        add_gradients(dweight, dbias, sums[0], sums[1], invstd, a, b)
        fill_slope(coefficients, length, mean, invstd, sums[0], sums[1], count, a, b)
        _backward_input(dx, dresidual, dy, x, activation, mask, constant, coefficients, piece)
        i = take(taken)
