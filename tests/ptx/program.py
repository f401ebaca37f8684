"""PTX text to programs: tables of integers that the machine steps through.

An operand becomes the number of a row of 32 values, one a lane: a register's, or one that holds a
constant, a parameter or a special register. What an instruction does becomes a code (`CODES`) and
two constants. An instruction that is in no table here is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np

from . import lanes

WINDOW = 1 << 62  # where shared memory lies among generic addresses
GAP = 128  # bytes between the variables in shared memory, which nobody may touch

# Fields of an instruction
FIELDS = (
    "OP", "D0", "D1", "D2", "D3", "A", "B", "C", "E", "PRED", "NEG", "K", "J", "SIZE", "VEC",
    "SPACE",
)  # fmt: skip
OP, D0, D1, D2, D3, A, B, C, E, PRED, NEG, K, J, SIZE, VEC, SPACE = range(len(FIELDS))
GENERIC, GLOBAL, SHARED = range(3)  # low bits of SPACE; above them the order:
WEAK, RELAXED, ACQUIRE, RELEASE = 0, 4, 8, 16

# Of one lane's values: in the order of machine.py's branches, by names of lanes.py's functions.
ARITHMETIC = (
    "move", "add", "sub", "mul_lo", "mad_lo", "mul_wide", "mad_wide", "mul_hi", "div_u",
    "rem_u", "div_s", "rem_s", "min_of", "max_of", "bit_and", "bit_or", "bit_xor", "bit_not",
    "negate", "absolute", "shift_left", "shift_right", "shift_right_s", "funnel_left",
    "funnel_right", "extract", "permute", "select", "logic3", "count_ones", "widen_s",
    "compare_s", "compare_u", "add_f32", "sub_f32", "mul_f32", "fma_f32", "div_f32", "rcp_f32",
    "sqrt_f32", "neg_f32", "abs_f32", "min_f32", "max_f32", "compare_f32", "add_f64", "sub_f64",
    "mul_f64", "fma_f64", "div_f64", "rcp_f64", "sqrt_f64", "neg_f64", "abs_f64", "compare_f64",
    "f32_of_f16", "f16_of_f32", "bf16_of_f32", "two_f16_of_f32", "two_bf16_of_f32",
    "f32_of_bf16", "f64_of_f32", "f32_of_f64", "f32_of_u", "f32_of_s", "f64_of_u", "f64_of_s",
    "insert",
)  # fmt: skip
OTHERS = (
    "pack", "unpack", "load", "store", "atomic", "copy", "commit", "wait", "fence", "branch",
    "exit", "barrier", "sync_warp", "shuffle", "vote", "nothing",
)  # fmt: skip
CODES = {name: code for code, name in enumerate([*ARITHMETIC, *OTHERS])}
SHUFFLES = ("up", "down", "bfly", "idx")
VOTES = ("any", "all", "ballot")
ATOMICS = ("add", "inc", "dec", "exch", "cas", "min", "max", "and", "or", "xor")
_ORDERED = {"eq": 2, "ne": 5, "lt": 1, "le": 3, "gt": 4, "ge": 6}
_UNSIGNED = _ORDERED | {"lo": 1, "ls": 3, "hi": 4, "hs": 6}
_UNORDERED = {"equ": 10, "neu": 13, "ltu": 9, "leu": 11, "gtu": 12, "geu": 14, "num": 7, "nan": 8}
_SPECIAL = re.compile(r"%(n?tid|n?ctaid)\.([xyz])$|%(laneid|warpid|nwarpid)$")
_NAME = r"[%$\w]+"
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*?);")
_PLACE = re.compile(r"\.loc\s+(\d+) (\d+)")
_OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+")


class UnknownInstruction(NotImplementedError):
    """The machine has no meaning for it."""


def _bits(kind: str) -> int:
    return int(kind.lstrip("busf"))


def _mask(kind: str) -> int:
    return 1 if kind == "pred" else (1 << _bits(kind)) - 1


def _table() -> dict[str, tuple[str, int, int, str]]:
    """(function, k, j, type of immediate operands) of every instruction that has no rule below."""
    table: dict[str, tuple[str, int, int, str]] = {}

    def put(instruction: str, function: str, k: int = 0, j: int = 0, of: str = "") -> None:
        table[instruction] = function, k, j, of or instruction.rpartition(".")[2]

    integers = [f"{kind}{bits}" for bits in (16, 32, 64) for kind in "sub"]
    for kind in integers:
        sign, k, bits = kind[0] == "s", _mask(kind), _bits(kind)
        for name in ("add", "sub"):
            put(f"{name}.{kind}", name, k)
        for name in ("mul", "mad"):
            put(f"{name}.lo.{kind}", f"{name}_lo", k)
            if bits < 64:
                put(f"{name}.wide.{kind}", f"{name}_wide", k, sign)
        if bits == 32:
            put(f"mul.hi.{kind}", "mul_hi", k, sign)
        for name in ("div", "rem"):
            put(f"{name}.{kind}", f"{name}_{'s' if sign else 'u'}", k)
        for name in ("min", "max"):
            put(f"{name}.{kind}", f"{name}_of", k, sign)
        put(f"neg.{kind}", "negate", k)
        put(f"abs.{kind}", "absolute", k)
        put(f"shr.{kind}", "shift_right_s" if sign else "shift_right", k, bits)
        put(f"bfe.{kind}", "extract", k, sign)
        compare = "compare_s" if sign else "compare_u"
        for name, j in (_ORDERED if sign else _UNSIGNED).items():
            put(f"setp.{name}.{kind}", compare, k, j)
        for to in [*integers, "u8", "s8"]:
            if sign:
                put(f"cvt.{to}.{kind}", "widen_s", _mask(to), k)
            else:
                put(f"cvt.{to}.{kind}", "move", _mask(to) & k)
        for to in ("f32", "f64"):
            put(f"cvt.rn.{to}.{kind}", f"{to}_of_{'s' if sign else 'u'}", k)
    for kind in ("b16", "b32", "b64", "pred"):
        for name in ("and", "or", "xor", "not"):
            put(f"{name}.{kind}", f"bit_{name}", _mask(kind))
    for kind in ("b16", "b32", "b64"):
        put(f"shl.{kind}", "shift_left", _mask(kind), _bits(kind))
        put(f"bfi.{kind}", "insert", _mask(kind))
    for kind in [*integers, "f32", "f64", "pred"]:
        put(f"mov.{kind}", "move", _mask(kind))
        put(f"selp.{kind}", "select", _mask(kind))
    put("shf.l.wrap.b32", "funnel_left")
    put("shf.r.wrap.b32", "funnel_right")
    put("prmt.b32", "permute")
    put("popc.b32", "count_ones")
    put("popc.b64", "count_ones")
    put("cvta.to.global.u64", "move", _mask("u64"))
    put("cvta.global.u64", "move", _mask("u64"))
    put("cvta.to.shared.u64", "move", WINDOW - 1)
    for ftz in ("", ".ftz"):
        k = int(bool(ftz))
        for name in ("add", "sub", "mul", "neg", "abs", "min", "max"):
            put(f"{name}{ftz}.f32", f"{name}_f32", k)
        for name in ("add", "sub", "mul", "fma", "div", "rcp", "sqrt"):
            put(f"{name}.rn{ftz}.f32", f"{name}_f32", k)
        for name, j in (_ORDERED | _UNORDERED).items():
            put(f"setp.{name}{ftz}.f32", "compare_f32", k, j)
            put(f"setp.{name}.f64", "compare_f64", k, j)
        put(f"cvt{ftz}.f64.f32", "f64_of_f32", k)
        put(f"cvt.rn{ftz}.f32.f64", "f32_of_f64", k)
        put(f"cvt{ftz}.f32.f16", "f32_of_f16", k)
        put(f"cvt.rn{ftz}.f16.f32", "f16_of_f32", k)
    for name in ("add", "sub", "mul", "neg", "abs"):
        put(f"{name}.f64", f"{name}_f64")
    for name in ("add", "sub", "mul", "fma", "div", "rcp", "sqrt"):
        put(f"{name}.rn.f64", f"{name}_f64")
    put("cvt.rn.bf16.f32", "bf16_of_f32")
    put("cvt.rn.f16x2.f32", "two_f16_of_f32")
    put("cvt.rn.bf16x2.f32", "two_bf16_of_f32")
    put("cvt.f32.bf16", "f32_of_bf16")
    return table


_TABLE = _table()
_NARROW_OPERANDS = {"shift_left", "shift_right", "shift_right_s", "extract", "insert"}  # counts


def _immediate(text: str, kind: str) -> int:
    if text[:2] in ("0f", "0F"):
        return int(text[2:], 16)
    if text[:2] in ("0d", "0D"):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0) & _mask(kind)


def _operands(text: str) -> list[str]:
    """Apart at the commas outside of brackets."""
    return [part.strip() for part in _OPERAND.findall(text)]


def _in_braces(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",")]


@dataclass
class Program:
    """One kernel.

    Attributes:
        code: (instructions, fields).
        rows: of registers, without those of `constants`, which follow.
        constants: a number, ("parameter", i), ("special", name) or ("dynamic", offset).
        parameters: their types.
        shared: begin and end of the variables in static shared memory.
        limit: threads of a block at most, by the launch bounds.
        texts, places: of each instruction, its PTX and "file:line" of its source.
    """

    name: str
    code: np.ndarray[Any, Any]
    rows: int
    constants: list[Any]
    parameters: list[str]
    shared: list[tuple[int, int]]
    limit: int
    texts: list[str]
    places: list[str]

    @cached_property
    def tells(self) -> bool:
        """Whether its blocks tell each other anything."""
        telling = np.isin(self.code[:, OP], [CODES["fence"], CODES["atomic"]])
        return bool(telling.any() or (self.code[:, SPACE] >> 2).any())

    @cached_property
    def numbers(self) -> np.ndarray[Any, Any]:
        """Of the constants, a column; 0 where the launch says what it is."""
        values = [0 if isinstance(value, tuple) else value for value in self.constants]
        return np.array(values, np.uint64)[:, None]

    @cached_property
    def of_launch(self) -> list[tuple[int, tuple[str, Any]]]:
        """The rows of the other constants, and what they are."""
        rows = enumerate(self.constants, start=self.rows)
        return [(row, value) for row, value in rows if isinstance(value, tuple)]

    @cached_property
    def copies(self) -> bool:
        return bool((self.code[:, OP] == CODES["copy"]).any())


@dataclass
class _Reader:
    parameters: list[str]
    files: dict[str, str]
    shared: dict[str, int] = field(default_factory=dict)  # offsets; of dynamic ones -1
    size: int = 0
    variables: list[tuple[int, int]] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    constants: dict[Any, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[dict[int, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    place: str = ""

    def register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def constant(self, value: Any) -> tuple[str, int]:
        return "constant", self.constants.setdefault(value, len(self.constants))

    def operand(self, text: str, kind: str) -> Any:
        if _SPECIAL.match(text):
            return self.constant(("special", text[1:]))
        if text.startswith("%") or text in self.named:
            return self.register(text)
        if text in self.shared:
            offset = self.shared[text]
            return self.constant(("dynamic", 0) if offset < 0 else offset)
        return self.constant(_immediate(text, kind))

    def address(self, text: str) -> tuple[Any, int]:
        """Row and offset."""
        found = re.fullmatch(rf"\[\s*({_NAME})(?:\+(-?\d+))?\s*\]", text)
        if not found:
            raise UnknownInstruction(f"the address {text}")
        return self.operand(found[1], "u64"), int(found[2] or 0)

    def statement(self, line: str) -> None:
        if found := _INSTRUCTION.fullmatch(line):
            negated, predicate, instruction, rest = found.groups()
            fields = self.decode(instruction, _operands(rest))
            fields[PRED] = self.register(predicate) if predicate else -1
            fields[NEG] = int(negated == "!")
            self.instructions.append(fields)
            self.texts.append(line)
            self.places.append(self.place)
        elif found := _PLACE.match(line):
            self.place = f"{self.files.get(found[1], '?')}:{found[2]}"
        elif found := re.fullmatch(r"(\$?[\w$]+):", line):
            self.labels[found[1]] = len(self.instructions)
        elif found := re.fullmatch(r"\.reg \.\w+\s+([^<;]*)(<\d+>)?;", line):
            # of inline assembly, in a scope of its own: no two of a name live at once
            self.named |= set() if found[2] else set(re.split(r"[\s,]+", found[1].strip()))
        elif line.startswith(".pragma"):
            return
        elif line.startswith("."):
            self.declare(line)
        else:
            raise UnknownInstruction(line)

    def declare(self, line: str) -> None:
        found = re.fullmatch(
            r"(?:\.extern )?\.shared \.align (\d+) \.(\w+) ([\w$]+)(\[(\d*)\])?;", line
        )
        if not found:
            raise UnknownInstruction(line)
        alignment, kind, name, array, count = found.groups()
        if array and not count:
            self.shared[name] = -1
            return
        begin = -(-self.size // max(GAP, int(alignment))) * max(GAP, int(alignment))
        self.shared[name] = begin
        self.variables.append((begin, begin + _bits(kind) // 8 * int(count or 1)))
        self.size = self.variables[-1][1] + 1  # at least one byte of a gap

    def decode(self, instruction: str, given: list[str]) -> dict[int, Any]:
        if instruction in _TABLE and not given[-1].startswith("{") and given[0][0] != "{":
            return self.arithmetic(instruction, given)
        base = instruction.partition(".")[0]
        rule = getattr(self, f"decode_{base}", None)
        fields = rule(instruction.split("."), given) if rule else None
        if fields is None:
            raise UnknownInstruction(f"{instruction} {', '.join(given)}")
        return fields

    def arithmetic(self, instruction: str, given: list[str]) -> dict[int, Any]:
        name, k, j, kind = _TABLE[instruction]
        fields = {OP: name, K: k, J: j, D0: self.register(given[0])}
        for place, text in zip((A, B, C, E), given[1:], strict=False):
            narrow = (
                name in _NARROW_OPERANDS and place != A and not (name == "insert" and place == B)
            )
            wide = name == "mad_wide" and place == C
            fields[place] = self.operand(text, "u32" if narrow else "u64" if wide else kind)
        return fields

    def decode_lop3(self, parts: list[str], given: list[str]) -> Any:
        if parts != ["lop3", "b32"]:
            return None
        a, b, c = (self.operand(text, "b32") for text in given[1:4])
        d = self.register(given[0])
        return {OP: "logic3", D0: d, A: a, B: b, C: c, K: _mask("b32"), J: int(given[4], 0)}

    def decode_mov(self, parts: list[str], given: list[str]) -> Any:
        kind = parts[1]
        if given[0].startswith("{"):
            names = _in_braces(given[0])
            rows = [-1 if name == "_" else self.register(name) for name in names]
            fields = dict(zip((D0, D1, D2, D3), rows, strict=False))
            fields |= {OP: "unpack", A: self.operand(given[1], kind)}
        elif given[1].startswith("{"):
            names = _in_braces(given[1])
            part = f"b{_bits(kind) // len(names)}"
            rows = [self.operand(name, part) for name in names]
            fields = dict(zip((A, B, C, E), rows, strict=False))
            fields |= {OP: "pack", D0: self.register(given[0])}
        else:
            return None
        return fields | {VEC: len(names), SIZE: _bits(kind) // len(names)}

    def decode_cvta(self, parts: list[str], given: list[str]) -> Any:
        if parts != ["cvta", "shared", "u64"]:
            return None
        window = self.constant(WINDOW)
        a = self.operand(given[1], "u64")
        return {OP: "add", D0: self.register(given[0]), A: a, B: window, K: _mask("u64")}

    def _access(self, parts: list[str], known: set[str]) -> dict[int, Any] | None:
        """Size, vector, space and order, if all the words are `known` or of an access."""
        kind = parts[-1]
        words = set(parts[1:-1])
        orders = {"weak": WEAK, "volatile": RELAXED, "relaxed": RELAXED, "acquire": ACQUIRE}
        orders |= {"release": RELEASE, "acq_rel": ACQUIRE | RELEASE}
        if "shared::cta" in words:
            words = words - {"shared::cta"} | {"shared"}
        given = {word for word in words if word in orders}
        space = SHARED if "shared" in words else GLOBAL if "global" in words else GENERIC
        if words - known - orders.keys() - {"shared", "global", "gpu", "cta", "sys", "v2", "v4"}:
            return None
        if not re.fullmatch(r"[busf](8|16|32|64)", kind):
            return None
        order = 0
        for word in given:
            order |= orders[word]
        return {
            SIZE: _bits(kind) // 8,
            VEC: 4 if "v4" in words else 2 if "v2" in words else 1,
            SPACE: space | order,
        }

    def decode_ld(self, parts: list[str], given: list[str]) -> Any:
        if parts[1] == "param":
            name = given[1].strip("[]")
            if len(parts) != 3 or name not in self.parameters:
                return None
            row = self.constant(("parameter", self.parameters.index(name)))
            return {OP: "move", D0: self.register(given[0]), A: row, K: _mask(parts[2])}
        caches = {"ca", "cg", "cs", "lu", "nc", "L1::no_allocate", "L1::evict_last"}
        fields = self._access(parts, caches)
        if fields is None:
            return None
        rows = [self.register(name) for name in _in_braces(given[0])]
        row, offset = self.address(given[1])
        fields |= dict(zip((D0, D1, D2, D3), rows, strict=False))
        return fields | {OP: "load", A: row, J: offset}

    def decode_st(self, parts: list[str], given: list[str]) -> Any:
        fields = self._access(parts, {"wb", "cg", "cs", "wt", "L1::no_allocate"})
        if fields is None:
            return None
        rows = [self.operand(text, parts[-1]) for text in _in_braces(given[1])]
        row, offset = self.address(given[0])
        fields |= dict(zip((D0, D1, D2, D3), rows, strict=False))
        return fields | {OP: "store", A: row, J: offset}

    def decode_atom(self, parts: list[str], given: list[str]) -> Any:
        names = [part for part in parts if part in ATOMICS]
        fields = self._access(parts, set(ATOMICS))
        kind = parts[-1]
        if fields is None or len(names) != 1 or kind[0] == "f" or _bits(kind) < 32:
            return None
        signed = names[0] in ("min", "max") and kind[0] == "s"
        if parts[0] == "red":
            given = ["", *given]
        row, offset = self.address(given[1])
        values = [self.operand(text, kind) for text in given[2:]]
        fields |= dict(zip((B, C), values, strict=False))
        fields |= {OP: "atomic", A: row, J: offset, K: ATOMICS.index(names[0]), E: int(signed)}
        return fields | {D0: self.register(given[0]) if given[0] else -1}

    decode_red = decode_atom

    def decode_cp(self, parts: list[str], given: list[str]) -> Any:
        text = ".".join(parts)
        if text == "cp.async.commit_group":
            return {OP: "commit"}
        if text == "cp.async.wait_all":
            return {OP: "wait", J: 0, K: 1}
        if text == "cp.async.wait_group":
            return {OP: "wait", J: int(given[0]), K: 0}
        if not re.fullmatch(r"cp\.async\.c[ag]\.shared(::cta)?\.global(\.L2::\d+B)?", text):
            return None
        to, to_offset = self.address(given[0])
        source, offset = self.address(given[1])
        size = given[3] if len(given) > 3 else given[2]
        fields = {OP: "copy", A: to, J: to_offset, B: source, K: offset, SIZE: int(given[2])}
        return fields | {C: self.operand(size, "u32")}

    def decode_fence(self, parts: list[str], given: list[str]) -> Any:
        if set(parts[1:]) - {"gl", "cta", "gpu", "sys", "sc", "acq_rel", "cluster"}:
            return None
        return {OP: "fence", J: int("cta" not in parts)}

    decode_membar = decode_fence

    def decode_bra(self, parts: list[str], given: list[str]) -> Any:
        return {OP: "branch", J: given[0]} if set(parts) <= {"bra", "uni"} else None

    def decode_ret(self, parts: list[str], given: list[str]) -> Any:
        return {OP: "exit"} if set(parts) <= {"ret", "exit", "uni"} else None

    decode_exit = decode_ret

    def decode_bar(self, parts: list[str], given: list[str]) -> Any:
        text = ".".join(parts)
        if text == "bar.warp.sync":
            return {OP: "sync_warp", E: self.operand(given[0], "b32")}
        if text in ("bar.sync", "barrier.sync", "barrier.sync.aligned") and given == ["0"]:
            return {OP: "barrier"}
        return None

    decode_barrier = decode_bar

    def decode_shfl(self, parts: list[str], given: list[str]) -> Any:
        if len(parts) != 4 or parts[1] != "sync" or parts[2] not in SHUFFLES or parts[3] != "b32":
            return None
        names = given[0].split("|")
        a, b, c, mask = (self.operand(text, "b32") for text in given[1:])
        rows = [self.register(name) for name in names]
        fields = {OP: "shuffle", J: SHUFFLES.index(parts[2]), A: a, B: b, C: c, E: mask}
        return fields | dict(zip((D0, D1), rows, strict=False))

    def decode_vote(self, parts: list[str], given: list[str]) -> Any:
        if parts[1] != "sync" or parts[2] not in VOTES or parts[3] not in ("pred", "b32"):
            return None
        negated = given[1].startswith("!")
        a, mask = self.operand(given[1].lstrip("!"), "pred"), self.operand(given[2], "b32")
        fields = {OP: "vote", J: VOTES.index(parts[2]), K: int(negated), A: a, E: mask}
        return fields | {D0: self.register(given[0])}


_DEFAULTS = {D0: -1, D1: -1, D2: -1, D3: -1, A: 0, B: 0, C: 0, E: 0, K: 0, J: 0} | {
    SIZE: 0, VEC: 1, SPACE: 0,
}  # fmt: skip


def _program(name: str, reader: _Reader, kinds: list[str], limit: int) -> Program:
    first, code = len(reader.registers), []
    for given in reader.instructions:
        fields = _DEFAULTS | given
        fields[OP] = CODES[fields[OP]]
        if fields[OP] == CODES["branch"]:
            fields[J] = reader.labels[fields[J]]
        values = [fields[i] for i in range(len(FIELDS))]
        values = [first + value[1] if isinstance(value, tuple) else value for value in values]
        code.append([value - (1 << 64) if value >= 1 << 63 else value for value in values])
    constants = list(reader.constants)
    return Program(
        *(name, np.array(code, np.int64), first, constants, kinds, reader.variables, limit),
        *(reader.texts, reader.places),
    )


_ENTRY = re.compile(r"^\.visible \.entry (\w+)\((.*?)\)([^{]*)^\{", re.S | re.M)
_PARAMETER = re.compile(r"\.param \.(\w+) (?:\.ptr .*?)?(\w+)\s*$", re.M)
_FILE = re.compile(r'^\s*\.file\s+(\d+) "(.*?)"', re.M)
_MODULE_SHARED = re.compile(r"^\s*(?:\.extern )?\.shared [^;]*;", re.M)


def _kernels(ptx: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, parameters, bounds and body of each; a last one without a name is what lies outside."""
    outside, done = [], 0
    for entry in _ENTRY.finditer(ptx):
        outside.append(ptx[done : entry.start()])
        depth = 1
        for brace in re.finditer("[{}]", ptx[entry.end() :]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                done = entry.end() + brace.start()
                break
        yield entry[1], entry[2], entry[3], ptx[entry.end() : done]
    yield "", "", "", "".join([*outside, ptx[done:]])


def _statements(body: str) -> Iterator[str]:
    """Without comments and braces that only make scopes."""
    for line in body.splitlines():
        line = line.partition("//")[0].strip()
        if line.startswith(".loc") or (line.find(";") == len(line) - 1 > 0 and line[0] not in "{}"):
            yield line
            continue
        for part in re.findall(r"[^;]*;|[^;]+$", line):
            statement = part.strip().lstrip("{} \t")
            if statement:
                yield statement


@cache
def _kernel(
    name: str, parameters: str, bounds: str, body: str, shared: tuple[str, ...],
    files: tuple[tuple[str, str], ...],
) -> Program:  # fmt: skip
    named = _PARAMETER.findall(parameters.replace(",", "\n"))
    reader = _Reader([parameter for _, parameter in named], dict(files))
    for declaration in shared:
        reader.declare(declaration.strip())
    for statement in _statements(body):
        reader.statement(statement)
    threads = re.search(r"\.(?:max|req)ntid (\d+)", bounds)
    kinds = [kind for kind, _ in named]
    return _program(name, reader, kinds, int(threads[1]) if threads else 1024)


def read(ptx: str) -> dict[str, Program]:
    """The kernels of a module. Each text is read once: other architectures may have the same.

    Raises:
        UnknownInstruction: something in it is not known here.
    """
    *kernels, (*_, outside) = _kernels(ptx)
    shared, files = tuple(_MODULE_SHARED.findall(outside)), tuple(_FILE.findall(ptx))
    return {name: _kernel(name, *parts, shared, files) for name, *parts in kernels}


assert all(hasattr(lanes, name) for name in ARITHMETIC if name != "insert")
