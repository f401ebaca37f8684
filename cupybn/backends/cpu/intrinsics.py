"""What the loops are made of that Numba does not offer: pointers, 16-bit numbers, cache lines.

Inside the loops arrays are pointers: Numba would count references for every run, and check every
index for its sign. float16 is seen as int16 and bfloat16 as uint16, because Numba has neither on
the CPU; ``load`` and ``line`` read them in the dtype of the arithmetic. The functions of values
take one number or a cache line of them; a loop over lines needs no proof that its arrays lie apart,
so it may write over what it reads.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from .plan import WIDE

LINE = 64  # bytes of a cache line


def _arithmetic(dtype):
    return types.float64 if dtype == types.float64 else types.float32


# ---- memory --------------------------------------------------------------------------------------


@intrinsic
def pointer(_, array, offset):
    """To value `offset`. The array must be an argument of the kernel: those live long enough."""

    def code(context, builder, signature, arguments):
        data = context.make_array(array)(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.intp), code


@intrinsic
def moved(_, x, i):
    """The pointer to x[i]."""

    def code(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return x(x, types.intp), code


def _on_the_stack(dtype, x):
    def code(context, builder, signature, arguments):
        return cgutils.alloca_once(builder, context.get_data_type(dtype), size=WIDE + 16)

    return types.CPointer(dtype)(x), code


@intrinsic
def buffer(_, x):
    """To WIDE values and a few more in the dtype of the arithmetic on x, on the stack."""
    return _on_the_stack(_arithmetic(x.dtype), x)


@intrinsic
def double_buffer(_, x):
    """The same in float64."""
    return _on_the_stack(types.float64, x)


@intrinsic
def either(_, converted, buffer, x):
    """`buffer` if it has to be `converted` to, else x: a pointer in the dtype of the arithmetic.

    A 16-bit x always has to be; see ``is_narrow``.
    """

    def code(context, builder, signature, arguments):
        if signature.args[1] == signature.args[2]:
            return builder.select(*arguments)
        return arguments[1]

    return buffer(types.boolean, buffer, x), code


@intrinsic
def is_narrow(_, x):
    """Whether x has to be converted to the dtype of the arithmetic."""
    narrow = x.dtype != _arithmetic(x.dtype)
    return types.boolean(x), lambda context, *_: context.get_constant(types.boolean, narrow)


@intrinsic
def take(_, taken):
    """The next number, from 0: taken[0], which is one more for the next thread that asks."""

    def code(context, builder, signature, arguments):
        data = context.make_array(taken)(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(taken), code


@intrinsic
def fence(_):
    """Has all that was streamed seen by other threads before what comes next."""

    def code(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), code


# ---- numbers -------------------------------------------------------------------------------------


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
    """x[i] in the dtype of the arithmetic; of a number, itself."""
    if not isinstance(x, types.CPointer):
        return x(x, types.intp), lambda context, builder, signature, arguments: arguments[0]
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


# ---- cache lines ---------------------------------------------------------------------------------


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
def lanes(_, y):
    """Values in a cache line."""
    number = LINE * 8 // y.dtype.bitwidth
    return types.intp(y), lambda context, *_: context.get_constant(types.intp, number)


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
def line(_, y, values, i):
    """values[i] and what follows, as many as a line of y has; of a number, itself as often."""
    found = _Line(y)

    def code(context, builder, signature, arguments):
        _, values, index = arguments
        if isinstance(signature.args[1], types.CPointer):
            dtype = signature.args[1].dtype
            vector = ir.VectorType(context.get_value_type(dtype), found.count).as_pointer()
            there = builder.bitcast(builder.gep(values, [index]), vector)
            return _widened(builder, dtype, builder.load(there, align=dtype.bitwidth // 8))
        vector, word = context.get_value_type(found), ir.IntType(32)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), values, word(0))
        every = _constant(ir.VectorType(word, found.count), 0)
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), every)

    return found(y, values, types.intp), code


@intrinsic
def store_line(_, y, i, values, streaming):
    """The line at y[i]; past the caches if `streaming`, where y[i] begins a cache line."""
    dtype = y.dtype

    def code(context, builder, signature, arguments):
        target, index, values, streaming = arguments
        values = _narrowed(builder, dtype, values)
        there = builder.bitcast(builder.gep(target, [index]), values.type.as_pointer())
        with builder.if_else(streaming) as (past, through):
            with past:
                stored = builder.store(values, there, align=LINE)
                mark = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
                stored.set_metadata("nontemporal", mark)
            with through:
                builder.store(values, there, align=dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(y, types.intp, values, types.boolean), code


# ---- arithmetic on numbers and lines -------------------------------------------------------------

_CONTRACT = ("contract",)  # a product and a sum may become one instruction, as in all the loops


@intrinsic
def plus(_, total, value):
    """``total + value``, in any order with the other terms of the sum."""

    def code(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=("reassoc", "nsz", "contract"))

    return total(total, total), code


@intrinsic
def added(_, a, b):
    def code(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=_CONTRACT)

    return a(a, a), code


@intrinsic
def times(_, a, b):
    def code(context, builder, signature, arguments):
        return builder.fmul(*arguments, flags=_CONTRACT)

    return a(a, a), code


@intrinsic
def affine(_, x, high, scale, shift):
    """``(x - high) * scale + shift``."""

    def code(context, builder, signature, arguments):
        x, high, scale, shift = arguments
        centred = builder.fsub(x, high, flags=_CONTRACT)
        return builder.fadd(builder.fmul(centred, scale, flags=_CONTRACT), shift, flags=_CONTRACT)

    return x(x, x, x, x), code


@intrinsic
def rectified(_, a):
    """0 where a is below 0."""

    def code(context, builder, signature, arguments):
        zeros = _constant(arguments[0].type, 0.0)
        below = builder.fcmp_ordered("<", arguments[0], zeros)
        return builder.select(below, zeros, arguments[0])

    return a(a), code


@intrinsic
def where_positive(_, a, b):
    """b where a is above 0, else 0."""

    def code(context, builder, signature, arguments):
        zeros = _constant(arguments[0].type, 0.0)
        above = builder.fcmp_ordered(">", arguments[0], zeros)
        return builder.select(above, arguments[1], zeros)

    return a(a, a), code
