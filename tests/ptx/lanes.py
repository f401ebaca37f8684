"""What instructions compute: one function for each kind, of one lane's values.

A register holds 64 bits, of a narrower type the lowest, the others 0. A function gets up to three
of them, a, b, c, and two constants of the instruction: `k`, mostly the bits that its type has, and
`j`. Floats are flushed where the instruction says `.ftz`, and a float32 NaN is 0x7fffffff, as on
the device.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compiled import inside

ZERO, ONE, ALL = np.uint64(0), np.uint64(1), np.uint64(2**64 - 1)
LOW32 = np.uint64(2**32 - 1)
_TOP = np.uint64(63)
_EXPONENT, _SIGN, _NAN = np.uint64(0x7F800000), np.uint64(0x80000000), np.uint64(0x7FFFFFFF)
LOW16 = np.uint64(0xFFFF)


# ---- memory and bits -----------------------------------------------------------------------------


def _load(bits):
    def typer(context, address):
        def code(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            value = builder.load(pointer)
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        return types.uint64(types.uint64), code

    return intrinsic(typer)


def _store(bits):
    def typer(context, address, value):
        def code(context, builder, signature, arguments):
            address, value = arguments
            pointer = builder.inttoptr(address, ir.IntType(bits).as_pointer())
            builder.store(value if bits == 64 else builder.trunc(value, ir.IntType(bits)), pointer)
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64), code

    return intrinsic(typer)


load8, load16, load32, load64 = map(_load, (8, 16, 32, 64))
store8, store16, store32, store64 = map(_store, (8, 16, 32, 64))


@inside
def load(address, size):
    if size == 4:
        return load32(address)
    if size == 8:
        return load64(address)
    return load16(address) if size == 2 else load8(address)


@inside
def store(address, size, value):
    if size == 4:
        store32(address, value)
    elif size == 8:
        store64(address, value)
    elif size == 2:
        store16(address, value)
    else:
        store8(address, value)


def _cast(to, bits):
    """Between 64 bits and the number that the lowest of them are."""

    def of_bits(context, x):
        def code(context, builder, signature, arguments):
            value = arguments[0]
            if bits < 64:
                value = builder.trunc(value, ir.IntType(bits))
            return builder.bitcast(value, context.get_value_type(to))

        return to(types.uint64), code

    def to_bits(context, x):
        def code(context, builder, signature, arguments):
            value = builder.bitcast(arguments[0], ir.IntType(bits))
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        return types.uint64(to), code

    return intrinsic(of_bits), intrinsic(to_bits)


f32, bits32 = _cast(types.float32, 32)
f64, bits64 = _cast(types.float64, 64)


@intrinsic
def fused(context, a, b, c):
    """a * b + c, rounded once."""

    def code(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return a(a, a, a), code


@intrinsic
def root(context, a):
    def code(context, builder, signature, arguments):
        function = builder.module.declare_intrinsic("llvm.sqrt", [arguments[0].type])
        return builder.call(function, arguments)

    return a(a), code


# ---- integers ------------------------------------------------------------------------------------


@inside
def signed(a, k):
    """The number that the bits `k` of a are."""
    top = k ^ (k >> ONE)
    return np.int64((a ^ top) - top)


@inside
def move(a, b, c, k, j):
    return a & k


@inside
def add(a, b, c, k, j):
    return (a + b) & k


@inside
def sub(a, b, c, k, j):
    return (a - b) & k


@inside
def mul_lo(a, b, c, k, j):
    return (a * b) & k


@inside
def mad_lo(a, b, c, k, j):
    return (a * b + c) & k


@inside
def _twice(k):
    if k == LOW16:
        return LOW32
    return ALL


@inside
def mul_wide(a, b, c, k, j):
    """`j`: signed; of twice the bits, so that nothing is lost in 64."""
    wide = _twice(k)
    if j:
        return (np.uint64(signed(a, k)) * np.uint64(signed(b, k))) & wide
    return (a * b) & wide


@inside
def mad_wide(a, b, c, k, j):
    wide = _twice(k)
    if j:
        return (np.uint64(signed(a, k)) * np.uint64(signed(b, k)) + c) & wide
    return (a * b + c) & wide


@inside
def mul_hi(a, b, c, k, j):
    """Of 32 bits, `j`: signed."""
    if j:
        return (np.uint64(signed(a, k)) * np.uint64(signed(b, k)) >> np.uint64(32)) & k
    return (a * b) >> np.uint64(32)


@inside
def div_u(a, b, c, k, j):
    return a // b if b else k


@inside
def rem_u(a, b, c, k, j):
    return a % b if b else a


@inside
def _size(a, k):
    return (ZERO - a) & k if signed(a, k) < 0 else a


@inside
def div_s(a, b, c, k, j):
    """Towards zero."""
    x, y = signed(a, k), signed(b, k)
    if y == 0:
        return k
    size = _size(a, k) // _size(b, k)
    return (ZERO - size if (x < 0) != (y < 0) else size) & k


@inside
def rem_s(a, b, c, k, j):
    """With the sign of a."""
    x, y = signed(a, k), signed(b, k)
    if y == 0:
        return a
    size = _size(a, k) % _size(b, k)
    return (ZERO - size if x < 0 else size) & k


@inside
def min_of(a, b, c, k, j):
    """`j`: signed."""
    if j:
        return a if signed(a, k) < signed(b, k) else b
    return a if a < b else b


@inside
def max_of(a, b, c, k, j):
    if j:
        return a if signed(a, k) > signed(b, k) else b
    return a if a > b else b


@inside
def bit_and(a, b, c, k, j):
    return a & b & k


@inside
def bit_or(a, b, c, k, j):
    return (a | b) & k


@inside
def bit_xor(a, b, c, k, j):
    return (a ^ b) & k


@inside
def bit_not(a, b, c, k, j):
    return ~a & k


@inside
def negate(a, b, c, k, j):
    return (ZERO - a) & k


@inside
def absolute(a, b, c, k, j):
    return (ZERO - a) & k if signed(a, k) < 0 else a


@inside
def shift_left(a, b, c, k, j):
    """`j`: bits of the type; a shift by as many or more leaves nothing."""
    return (a << b) & k if b < j else ZERO


@inside
def shift_right(a, b, c, k, j):
    return (a & k) >> b if b < j else ZERO


@inside
def shift_right_s(a, b, c, k, j):
    count = b if b < j else j - ONE
    return np.uint64(signed(a, k) >> np.int64(count)) & k


@inside
def funnel_left(a, b, c, k, j):
    """The upper half of b:a shifted left by c modulo 32."""
    both = (b << np.uint64(32)) | a
    return (both << (c & np.uint64(31))) >> np.uint64(32)


@inside
def funnel_right(a, b, c, k, j):
    return (((b << np.uint64(32)) | a) >> (c & np.uint64(31))) & LOW32


@inside
def extract(a, b, c, k, j):
    """Bits of a from b on, c of them; `j`: signed, with 64 bits in a register that is filled up."""
    position, length = b & np.uint64(255), c & np.uint64(255)
    value = (a & k) >> position if position < np.uint64(64) else ZERO
    if length == ZERO:
        return ZERO
    kept = (ONE << length) - ONE if length < np.uint64(64) else ALL
    value &= kept
    if j:
        return np.uint64(signed(value, kept)) & k
    return value & k


@inside
def permute(a, b, c, k, j):
    """Four bytes, each one of the eight of b:a, or that one's sign."""
    both, found = (b << np.uint64(32)) | a, ZERO
    for i in range(4):
        place = np.uint64(8 * i)
        choice = (c >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (choice & np.uint64(7)))) & np.uint64(255)
        if choice & np.uint64(8):
            byte = np.uint64(255) if byte & np.uint64(128) else ZERO
        found |= byte << place
    return found


@inside
def select(a, b, c, k, j):
    return (a if c & ONE else b) & k


@inside
def logic3(a, b, c, k, j):
    """Any function of three bits, by its table `j`."""
    found = ZERO
    for i in range(8):
        if (j >> np.uint64(i)) & ONE:
            x = a if i & 4 else ~a
            y = b if i & 2 else ~b
            z = c if i & 1 else ~c
            found |= x & y & z
    return found & k


@inside
def count_ones(a, b, c, k, j):
    found = ZERO
    while a:
        a &= a - ONE
        found += ONE
    return found


@inside
def widen_s(a, b, c, k, j):
    """A signed number of bits `j` in a type of bits `k`."""
    return np.uint64(signed(a & j, j)) & k


# What compares two numbers is a table of four bits: less, equal, greater, unordered.


@inside
def compare_s(a, b, c, k, j):
    x, y = signed(a, k), signed(b, k)
    return (j >> (ZERO if x < y else ONE if x == y else np.uint64(2))) & ONE


@inside
def compare_u(a, b, c, k, j):
    return (j >> (ZERO if a < b else ONE if a == b else np.uint64(2))) & ONE


@inside
def _compared(x, y, j):
    if x < y:
        return j & ONE
    if x == y:
        return (j >> ONE) & ONE
    return (j >> np.uint64(2 if x > y else 3)) & ONE


# ---- float32; k: flushed -------------------------------------------------------------------------


@inside
def flush(a, k):
    return a & _SIGN if k and not a & _EXPONENT else a


@inside
def number(a, k):
    return f32(flush(a, k))


@inside
def result(x, k):
    return flush(bits32(x), k) if x == x else _NAN


@inside
def add_f32(a, b, c, k, j):
    return result(number(a, k) + number(b, k), k)


@inside
def sub_f32(a, b, c, k, j):
    return result(number(a, k) - number(b, k), k)


@inside
def mul_f32(a, b, c, k, j):
    return result(number(a, k) * number(b, k), k)


@inside
def fma_f32(a, b, c, k, j):
    return result(fused(number(a, k), number(b, k), number(c, k)), k)


@inside
def div_f32(a, b, c, k, j):
    return result(number(a, k) / number(b, k), k)


@inside
def rcp_f32(a, b, c, k, j):
    return result(np.float32(1) / number(a, k), k)


@inside
def sqrt_f32(a, b, c, k, j):
    return result(root(number(a, k)), k)


@inside
def neg_f32(a, b, c, k, j):
    return flush(a ^ _SIGN, k)


@inside
def abs_f32(a, b, c, k, j):
    return flush(a & ~_SIGN & LOW32, k)


@inside
def min_f32(a, b, c, k, j):
    """The other one, if one is NaN; -0 is less than 0."""
    x, y = number(a, k), number(b, k)
    if x != x and y != y:
        return _NAN
    if x == y:
        return flush(a, k) | flush(b, k)
    return flush(a if x < y or y != y else b, k)


@inside
def max_f32(a, b, c, k, j):
    x, y = number(a, k), number(b, k)
    if x != x and y != y:
        return _NAN
    if x == y:
        return flush(a, k) & flush(b, k)
    return flush(a if x > y or y != y else b, k)


@inside
def compare_f32(a, b, c, k, j):
    return _compared(number(a, k), number(b, k), j)


# ---- float64 -------------------------------------------------------------------------------------


@inside
def add_f64(a, b, c, k, j):
    return bits64(f64(a) + f64(b))


@inside
def sub_f64(a, b, c, k, j):
    return bits64(f64(a) - f64(b))


@inside
def mul_f64(a, b, c, k, j):
    return bits64(f64(a) * f64(b))


@inside
def fma_f64(a, b, c, k, j):
    return bits64(fused(f64(a), f64(b), f64(c)))


@inside
def div_f64(a, b, c, k, j):
    return bits64(f64(a) / f64(b))


@inside
def rcp_f64(a, b, c, k, j):
    return bits64(np.float64(1) / f64(a))


@inside
def sqrt_f64(a, b, c, k, j):
    return bits64(root(f64(a)))


@inside
def neg_f64(a, b, c, k, j):
    return a ^ (ONE << _TOP)


@inside
def abs_f64(a, b, c, k, j):
    return a & ~(ONE << _TOP)


@inside
def compare_f64(a, b, c, k, j):
    return _compared(f64(a), f64(b), j)


# ---- conversions ---------------------------------------------------------------------------------


@inside
def f32_of_f16(a, b, c, k, j):
    sign, rest = (a & np.uint64(0x8000)) << np.uint64(16), a & np.uint64(0x7FFF)
    if rest > np.uint64(0x7C00):
        return _NAN
    if rest == np.uint64(0x7C00):
        return sign | _EXPONENT
    if rest < np.uint64(0x400):  # a denormal: so many units of 2**-24
        return sign | bits32(np.float32(rest) * np.float32(2.0**-24))
    return sign | ((rest << np.uint64(13)) + np.uint64(112 << 23))


@inside
def _rounded(a, drop):
    """Without its last bits, to the nearest, halves to even."""
    half = (ONE << (drop - ONE)) - ONE
    return (a + half + ((a >> drop) & ONE)) >> drop


@inside
def f16_of_f32(a, b, c, k, j):
    a = flush(a, k)
    sign, rest = (a >> np.uint64(16)) & np.uint64(0x8000), a & np.uint64(0x7FFFFFFF)
    if rest > _EXPONENT:
        return np.uint64(0x7FFF)
    if rest >= np.uint64(0x47800000):  # 2**16: not even a rounded one
        return sign | np.uint64(0x7C00)
    if rest >= np.uint64(113 << 23):
        return sign | _rounded(rest - np.uint64(112 << 23), np.uint64(13))
    exponent = rest >> np.uint64(23)
    if exponent < np.uint64(102):  # less than half of the smallest
        return sign
    significand = (rest & np.uint64(0x7FFFFF)) | np.uint64(0x800000)
    return sign | _rounded(significand, np.uint64(126) - exponent)


@inside
def bf16_of_f32(a, b, c, k, j):
    a = flush(a, k)
    if a & np.uint64(0x7FFFFFFF) > _EXPONENT:
        return np.uint64(0x7FFF)
    return _rounded(a, np.uint64(16))


@inside
def two_f16_of_f32(a, b, c, k, j):
    """a above, b below."""
    return (f16_of_f32(a, b, c, k, j) << np.uint64(16)) | f16_of_f32(b, b, c, k, j)


@inside
def two_bf16_of_f32(a, b, c, k, j):
    return (bf16_of_f32(a, b, c, k, j) << np.uint64(16)) | bf16_of_f32(b, b, c, k, j)


@inside
def f32_of_bf16(a, b, c, k, j):
    return a << np.uint64(16)


@inside
def f64_of_f32(a, b, c, k, j):
    return bits64(np.float64(number(a, k)))


@inside
def f32_of_f64(a, b, c, k, j):
    return result(np.float32(f64(a)), k)


@inside
def f32_of_u(a, b, c, k, j):
    return bits32(np.float32(a))


@inside
def f32_of_s(a, b, c, k, j):
    return bits32(np.float32(signed(a, k)))


@inside
def f64_of_u(a, b, c, k, j):
    return bits64(np.float64(a))


@inside
def f64_of_s(a, b, c, k, j):
    return bits64(np.float64(signed(a, k)))


@inside
def insert(a, b, c, e, k):
    """The lowest e bits of a in b, from c on."""
    position, length = c & np.uint64(255), e & np.uint64(255)
    if length == ZERO or position >= np.uint64(64):
        return b & k
    kept = ((ONE << length) - ONE if length < np.uint64(64) else ALL) << position
    return ((b & ~kept) | ((a << position) & kept)) & k
