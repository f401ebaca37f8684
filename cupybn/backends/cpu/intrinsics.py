"""Building blocks of the loops that Numba lacks: pointers, 16-bit numbers, vectors ("lines").

Inside the loops arrays are pointers: with arrays, Numba would count references for every run and
test every index for its sign. The loops see float16 as int16 and bfloat16 as uint16, because Numba
has neither on the CPU; ``load`` and ``line`` convert them to the dtype of the arithmetic. The
functions of arithmetic take numbers or lines; a line has as many values as a cache line. A loop
over lines may overwrite its input, because it needs no proof that arrays do not overlap.
"""

from __future__ import annotations

import inspect
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from .compiler import inside
from .plan import LINE, TURNS, WIDE

BUFFER = WIDE + LINE  # values from one buffer to the next
_ONE_BYTE = ir.IntType(32)(1)  # the alignment of masked accesses


def _arithmetic(dtype):
    return types.float64 if dtype == types.float64 else types.float32


# ---- memory --------------------------------------------------------------------------------------


@intrinsic
def pointer(_, array, i):
    """A pointer to array[i]. The array must be an argument of the kernel, to live long enough."""

    def code(context, builder, signature, arguments):
        data = context.make_array(array)(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.intp), code


@intrinsic
def strided(_, mask, x):
    """(A pointer to a mask's bytes, the number of bytes per sample of x); of None, None.

    The array has one more line before the bytes, and one after them.
    """
    if mask is types.none:
        return types.none(mask, x), lambda context, *_: context.get_dummy_value()
    kinds = types.Tuple((types.CPointer(mask.dtype), types.intp))

    def code(context, builder, signature, arguments):
        given, data = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        samples = builder.extract_value(data.shape, 0)
        one = context.get_constant(types.intp, 1)
        samples = builder.select(builder.icmp_signed("<", samples, one), one, samples)
        line = context.get_constant(types.intp, LINE)
        each = builder.sdiv(builder.sub(given.nitems, builder.add(line, line)), samples)
        return context.make_tuple(builder, kinds, (builder.gep(given.data, [line]), each))

    return kinds(mask, x), code


@intrinsic
def moved(_, x, i):
    """A pointer to x[i]; x is a pointer."""

    def code(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return x(x, types.intp), code


@intrinsic
def of_channel(_, columns, coefficients, c):
    """For rows (`columns` is None) the coefficients of channel c; for columns the pointers."""
    result = coefficients
    if columns is types.none:
        result = types.UniTuple(coefficients.dtype.dtype, coefficients.count)

    def code(context, builder, signature, arguments):
        if signature.return_type == signature.args[1]:
            return arguments[1]
        pointers = cgutils.unpack_tuple(builder, arguments[1])
        numbers = [builder.load(builder.gep(p, [arguments[2]])) for p in pointers]
        return context.make_tuple(builder, result, numbers)

    return result(columns, coefficients, types.intp), code


def _on_the_stack(dtype, x, size=WIDE + LINE):
    def code(context, builder, signature, arguments):
        made = cgutils.alloca_once(builder, context.get_data_type(dtype), size=size)
        made.align = LINE
        return builder.gep(made, [context.get_constant(types.intp, LINE // 2)])

    return types.CPointer(dtype)(x), code


@intrinsic
def buffer(_, x):
    """A pointer to WIDE values of x's arithmetic, on the stack; lines may overhang both ends."""
    return _on_the_stack(_arithmetic(x.dtype), x)


@intrinsic
def double_buffer(_, x):
    """As :func:`buffer`, in float64."""
    return _on_the_stack(types.float64, x)


@intrinsic
def buffers(_, x, mask):
    """As :func:`buffer`; with a mask four of them, BUFFER values apart."""
    number = 1 if mask is types.none else 4
    result, code = _on_the_stack(_arithmetic(x.dtype), x, number * BUFFER)
    return result.return_type(x, mask), code


@intrinsic
def byte_buffers(_, x, mask):
    """Four buffers of the dtype of a mask, BUFFER values apart; None without a mask."""
    if mask is types.none:
        return types.none(x, mask), lambda context, *_: context.get_dummy_value()
    result, code = _on_the_stack(mask.dtype, x, 4 * BUFFER)
    return result.return_type(x, mask), code


@intrinsic
def index_buffer(_, x):
    """As :func:`buffer`, of integers."""
    return _on_the_stack(types.intp, x)


def _add(order):
    @intrinsic
    def add(_, turns, i, number):
        def code(context, builder, signature, arguments):
            data = context.make_array(turns)(context, builder, arguments[0]).data
            return builder.atomic_rmw("add", builder.gep(data, [arguments[1]]), arguments[2], order)

        return types.int64(turns, types.intp, types.int64), code

    return add


_add_in_order, _add_in_any = _add("seq_cst"), _add("monotonic")
_let_others_run = types.ExternalFunction(
    "SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32()
)
_CALLER, _HELPER = 1, 2  # what each thread inside a kernel adds to turns[1]
_NUMBERS = 2  # of turns: counters, before the lent arrays


@intrinsic
def fence(_):
    """Makes streaming stores visible to other threads before what follows."""

    def code(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), code


@inside
def take(turns):
    """Returns turns[0], the index of the next work item, and increments it."""
    return _add_in_any(turns, 0, 1)


@intrinsic
def _lend(_, turns, arrays):
    """Writes the arrays, as Numba represents them, after the counters of `turns`."""

    def code(context, builder, signature, arguments):
        there = _behind_numbers(context, builder, turns, *arguments)
        builder.store(_unowned(context, builder, arrays, arguments[1]), there)
        return context.get_dummy_value()

    return types.none(turns, arrays), code


@intrinsic
def _borrow(_, turns, arrays):
    """The lent arrays, of the types of `arrays`."""

    def code(context, builder, signature, arguments):
        return builder.load(_behind_numbers(context, builder, turns, *arguments))

    return arrays(turns, arrays), code


def _behind_numbers(context, builder, turns, given, arrays):
    assert context.get_abi_sizeof(arrays.type) <= 8 * (TURNS - _NUMBERS)
    data = context.make_array(turns)(context, builder, given).data
    there = builder.gep(data, [context.get_constant(types.intp, _NUMBERS)])
    return builder.bitcast(there, arrays.type.as_pointer())


def _unowned(context, builder, kinds, arrays):
    """The tuple of arrays and None, without what Numba needs to count references."""
    made = []
    for kind, value in zip(kinds, cgutils.unpack_tuple(builder, arrays), strict=True):
        if kind is types.none:
            made.append(value)
            continue
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.parent = cgutils.get_null_value(array.parent.type)
        made.append(array._getvalue())
    return context.make_tuple(builder, kinds, made)


@inside
def enter(turns, helper, arrays):
    """(whether to take work items, the arrays): a helper may take items while its caller is inside.

    Helpers pass empty arrays of the same types and get those that the caller lends.
    """
    if not helper and turns.size > _NUMBERS:
        _lend(turns, arrays)
    before = _add_in_order(turns, 1, _HELPER if helper else _CALLER)
    taking = not helper or before & _CALLER != 0
    return taking, _borrow(turns, arrays) if helper and taking else arrays


@inside
def leave(turns, helper):
    """The caller waits here until every helper has left. Streaming stores are visible then."""
    fence()
    _add_in_order(turns, 1, -_HELPER if helper else -_CALLER)
    while not helper and _add_in_order(turns, 1, 0) != 0:
        _let_others_run()


# ---- numbers -------------------------------------------------------------------------------------


@intrinsic
def zero(_, x):
    """0 in the dtype of the arithmetic on x."""
    dtype = _arithmetic(x.dtype)
    return dtype(x), lambda context, builder, *_: context.get_constant(dtype, 0.0)


def _like(kind, element):
    """The LLVM type with as many elements as `kind`: a vector, or one number."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _constant(kind, value):
    return kind([value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _widened(builder, dtype, values):
    """Converts a number or a vector of `dtype` to the dtype of the arithmetic."""
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
    """Converts back, rounded to nearest, ties to even."""
    kind = values.type
    if dtype == types.int16:
        half = builder.fptrunc(values, _like(kind, ir.HalfType()))
        return builder.bitcast(half, _like(kind, ir.IntType(16)))
    if dtype == types.uint16:
        word = _like(kind, ir.IntType(32))
        bits = builder.bitcast(values, word)
        odd = builder.and_(builder.lshr(bits, _constant(word, 16)), _constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, _constant(word, 0x7FFF)))
        quiet = builder.or_(bits, _constant(word, 0x400000))  # a NaN rounded up could be Inf or 0
        nan = builder.fcmp_unordered("uno", values, values)
        kept = builder.lshr(builder.select(nan, quiet, rounded), _constant(word, 16))
        return builder.trunc(kept, _like(kind, ir.IntType(16)))
    return values


@intrinsic
def load(_, x, i):
    """x[i] in the dtype of the arithmetic; x itself if it is a number."""
    if not isinstance(x, types.CPointer):
        return x(x, types.intp), lambda context, builder, signature, arguments: arguments[0]
    dtype = x.dtype

    def code(context, builder, signature, arguments):
        values, index = arguments
        return _widened(builder, dtype, builder.load(builder.gep(values, [index])))

    return _arithmetic(dtype)(x, types.intp), code


# ---- cache lines ---------------------------------------------------------------------------------


class _Line(types.Type):  # type: ignore[misc]
    """A vector of as many values as a cache line of `y` has, in the dtype of the arithmetic."""

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
    """The number of values of y in a cache line."""
    number = LINE * 8 // y.dtype.bitwidth
    return types.intp(y), lambda context, *_: context.get_constant(types.intp, number)


@intrinsic
def unaligned(_, y):
    """The number of values from y to the next cache line."""
    bytes_each = y.dtype.bitwidth // 8

    def code(context, builder, signature, arguments):
        word = context.get_value_type(types.intp)
        address = builder.ptrtoint(arguments[0], word)
        left = builder.and_(builder.neg(address), word(LINE - 1))
        return builder.udiv(left, word(bytes_each))

    return types.intp(y), code


@intrinsic
def line(_, y, values, i):
    """As many values from values[i] on as a line of y has; a number fills the line."""
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
    """Stores a line at y[i]; if `streaming`, past the caches: y[i] must begin a cache line."""
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


def _inside(builder, i, size, count):
    """Which of `count` places from i on are at least 0 and below `size`: a vector of booleans."""
    kind, word = ir.VectorType(i.type, count), ir.IntType(32)

    def every(number):
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, word(0))
        return builder.shuffle_vector(one, one, _constant(ir.VectorType(word, count), 0))

    places = builder.add(every(i), kind(list(range(count))))
    return builder.icmp_unsigned("<", places, every(size))


def _masked(builder, what, dtype, vector, arguments):
    """LLVM's masked load or store of a vector of `dtype`: masked bytes are not accessed."""
    kind = f"{'f' if isinstance(dtype, types.Float) else 'i'}{dtype.bitwidth}"
    result = vector if what == "load" else ir.VoidType()
    called = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(
        builder.module, called, f"llvm.masked.{what}.v{vector.count}{kind}.p0"
    )
    return builder.call(function, arguments)


@intrinsic
def part(_, y, values, i, size):
    """``line(y, values, i)``, which reads only values[:size]; other elements are 0."""
    found = _Line(y)
    dtype = values.dtype

    def code(context, builder, signature, arguments):
        _, values, index, size = arguments
        vector = ir.VectorType(context.get_value_type(dtype), found.count)
        there = builder.bitcast(builder.gep(values, [index]), vector.as_pointer())
        mask = _inside(builder, index, size, found.count)
        given = there, _ONE_BYTE, mask, vector(None)
        return _widened(builder, dtype, _masked(builder, "load", dtype, vector, given))

    return found(y, values, types.intp, types.intp), code


@intrinsic
def store_part(_, y, i, values, size):
    """Stores a line at y[i], but only what lies in y[:size]."""
    dtype = y.dtype

    def code(context, builder, signature, arguments):
        target, index, values, size = arguments
        values = _narrowed(builder, dtype, values)
        there = builder.bitcast(builder.gep(target, [index]), values.type.as_pointer())
        mask = _inside(builder, index, size, values.type.count)
        _masked(builder, "store", dtype, values.type, (values, there, _ONE_BYTE, mask))
        return context.get_dummy_value()

    return types.none(y, types.intp, values, types.intp), code


# ---- arithmetic on numbers and lines -------------------------------------------------------------

_CONTRACT = ("contract",)  # a product and a sum may be fused, as in all the loops


def _operation(emit):
    """An intrinsic that takes numbers or lines, all of one type, and returns one of that type."""

    def operation(_, *values):
        def code(context, builder, signature, arguments):
            return emit(builder, *arguments)

        return values[0](*values[:1] * len(values)), code

    vars(operation)["__signature__"] = inspect.signature(emit)  # Numba counts the parameters
    return intrinsic(operation)


def _plus(builder, total, value):
    return builder.fadd(total, value, flags=("reassoc", "nsz", "contract"))


def _affine(builder, x, high, scale, shift):
    scaled = builder.fmul(builder.fsub(x, high, flags=_CONTRACT), scale, flags=_CONTRACT)
    return builder.fadd(scaled, shift, flags=_CONTRACT)


def _rectified(builder, a):
    zeros = _constant(a.type, 0.0)
    return builder.select(builder.fcmp_ordered("<", a, zeros), zeros, a)


def _where_positive(builder, a, b):
    zeros = _constant(a.type, 0.0)
    return builder.select(builder.fcmp_ordered(">", a, zeros), b, zeros)


_BITS, _BYTES = types.CPointer(types.int8), types.CPointer(types.uint8)  # masks


@intrinsic
def positions(_, valid, i):
    """(the mask that ``where_valid`` takes, the place of position i in it).

    A mask of bits becomes (pointer to i's byte, bit of i in it); places are multiples of 8.
    """
    if valid != _BITS:
        kinds = types.Tuple((valid, types.intp))
        return kinds(valid, types.intp), lambda context, builder, _, given: context.make_tuple(
            builder, kinds, given
        )
    pair = types.Tuple((valid, types.intp))
    kinds = types.Tuple((pair, types.intp))

    def code(context, builder, signature, arguments):
        bits, index = arguments
        there = builder.gep(bits, [builder.ashr(index, index.type(3))])
        made = context.make_tuple(builder, pair, (there, builder.and_(index, index.type(7))))
        return context.make_tuple(builder, kinds, (made, index.type(0)))

    return kinds(valid, types.intp), code


@intrinsic
def next_place(_, valid, at, step, period):
    """The place in a mask `step` columns further. Bytes repeat after `period`, bits do not."""

    def code(context, builder, signature, arguments):
        place = builder.add(arguments[1], arguments[2])
        if signature.args[0] != _BYTES:
            return place
        again = builder.sub(place, arguments[3])  # if negative, the larger as an unsigned number
        return builder.select(builder.icmp_unsigned("<", place, again), place, again)

    return types.intp(valid, types.intp, types.intp, types.intp), code


def _bytes_of(builder, mask, i, count):
    """Whether each of `count` bytes from mask[i] on is not 0."""
    kind = ir.VectorType(ir.IntType(8), count)
    there = builder.bitcast(builder.gep(mask, [i]), kind.as_pointer())
    return builder.icmp_unsigned("!=", builder.load(there, align=1), _constant(kind, 0))


def _bits_of(builder, mask, i, count):
    """Whether each of `count` bits from place i on, a multiple of 8, is 1: see ``positions``."""
    (bits, shift), word = cgutils.unpack_tuple(builder, mask), ir.IntType(2 * count)
    there = builder.gep(bits, [builder.ashr(i, i.type(3))])
    found = builder.load(builder.bitcast(there, word.as_pointer()), align=1)
    shift = shift if word == i.type else builder.trunc(shift, word)
    found = builder.trunc(builder.lshr(found, shift), ir.IntType(count))
    return builder.bitcast(found, ir.VectorType(ir.IntType(1), count))


@intrinsic
def where_valid(_, valid, i, z):
    """The line z, with 0 where positions from place i on are masked; z if `valid` is None.

    See ``positions``.
    """

    def code(context, builder, signature, arguments):
        mask, index, values = arguments
        if signature.args[0] is types.none:
            return values
        of = _bytes_of if signature.args[0] == _BYTES else _bits_of
        found = of(builder, mask, index, values.type.count)
        return builder.select(found, values, _constant(values.type, 0.0))

    return z(valid, types.intp, z), code


@intrinsic
def where_inside(_, i, size, z):
    """The line z, which begins at place i, with 0 for places below 0 or from `size` on."""

    def code(context, builder, signature, arguments):
        index, size, values = arguments
        inside = _inside(builder, index, size, values.type.count)
        return builder.select(inside, values, _constant(values.type, 0.0))

    return z(types.intp, types.intp, z), code


@intrinsic
def valid_of(_, mask, i):
    """Which of the LINE positions from i on are valid, as bits; i is a multiple of LINE."""

    def code(context, builder, signature, arguments):
        (given, index), word = arguments, ir.IntType(LINE)
        if signature.args[0] == _BYTES:
            return builder.bitcast(_bytes_of(builder, given, index, LINE), word)
        there = builder.gep(given, [builder.ashr(index, index.type(3))])
        return builder.load(builder.bitcast(there, word.as_pointer()), align=1)

    return types.int64(mask, types.intp), code


@intrinsic
def ones(_, word):
    """The number of bits of an integer that are 1."""
    return types.int64(word), lambda context, builder, _, given: builder.ctpop(given[0])


@intrinsic
def total_of(_, z):
    """The sum of the values of a line."""

    def code(context, builder, signature, arguments):
        kind = arguments[0].type
        element = "f64" if kind.element == ir.DoubleType() else "f32"
        called = ir.FunctionType(kind.element, [kind.element, kind])
        name = f"llvm.vector.reduce.fadd.v{kind.count}{element}"
        function = cgutils.get_or_insert_function(builder.module, called, name)
        return builder.call(function, (kind.element(-0.0), arguments[0]), fastmath=("reassoc",))

    return z.element(z), code


plus = _operation(_plus)
"""``total + value``; the terms of a sum may be added in any order."""
minus = _operation(lambda builder, a, b: builder.fsub(a, b, flags=_CONTRACT))
added = _operation(lambda builder, a, b: builder.fadd(a, b, flags=_CONTRACT))
times = _operation(lambda builder, a, b: builder.fmul(a, b, flags=_CONTRACT))
affine = _operation(_affine)
"""``(x - high) * scale + shift``."""
rectified = _operation(_rectified)
"""a, or 0 where a is below 0."""
where_positive = _operation(_where_positive)
"""b where a is above 0, else 0."""
