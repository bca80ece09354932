"""Tests in bytecode that fx proxies cannot record: for identity, for a type, for an exception.

`h is None` is False for a proxy, whatever `h` would be: the trace silently follows one branch. The operands tell
whether the outcome is fixed. An attribute of a module is fixed; a value computed from an input is not.
"""

import dis
import functools
import linecache
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

ASKS_TYPE = {"type", "callable", "id"}
"""Builtins that answer for the proxy instead of the value, and that no method of a proxy notices."""
MATCHES = ("MATCH_", "CHECK_EXC_MATCH", "CHECK_EG_MATCH", "JUMP_IF_NOT_EXC_MATCH")
WITHOUT_EFFECT = {"CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN", "PRECALL", "RESUME", "PUSH_NULL"}
READS_LOCAL = ("LOAD_FAST", "LOAD_DEREF")
CONSTANTS = ("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL", "LOAD_NAME")
LONGEST_CHAIN = 8


@dataclass(frozen=True)
class Operand:
    """A value that bytecode reads: a chain of attributes of a local variable, or (without one) a constant or a global.

    `is_known=False` represents any other expression.
    """

    local: str = ""
    attributes: tuple[str, ...] = ()
    is_none: bool = False
    is_known: bool = True

    def attribute(self, names: tuple[str, ...]) -> "Operand":
        """Return the attribute at the end of `names`."""
        chain = (*self.attributes, *names)
        return replace(self, attributes=chain) if self.is_known and len(chain) <= LONGEST_CHAIN else COMPUTED


COMPUTED = Operand(is_known=False)


@dataclass(frozen=True)
class Test:
    """A test whose outcome a trace fixes, and all values that its operands may have.

    `is_for_none`: it is a test for None, which is probed for named arguments.
    """

    line: int
    operands: frozenset[Operand]
    is_for_none: bool = False
    question: str = "tests the identity or type of a value that a trace does not know"


@dataclass(frozen=True)
class _Step:
    """One instruction; an instruction that Python fuses becomes two steps."""

    name: str
    value: object
    line: int
    is_target: bool


def unseen_tests(frame: types.FrameType, probed: set[str]) -> Iterator[str]:
    """Yield the tests in the code of a frame, which just started, whose outcome may depend on the model's inputs.

    Args:
        frame: a frame of the model's own code.
        probed: receives the named arguments of the model that are tested for None.
    """
    for test in _tests_in(frame.f_code):
        unknown = [operand for operand in test.operands if not _is_fixed(operand, frame.f_locals)]
        names = {_argument_name(operand, frame.f_locals) for operand in unknown}
        if test.is_for_none and "" not in names:
            probed |= names
        elif unknown:
            file = frame.f_code.co_filename
            source = linecache.getline(file, test.line).strip() or frame.f_code.co_name
            yield f"its code {test.question} ({os.path.basename(file)}, line {test.line}: {source})"


def _is_fixed(operand: Operand, entry: Mapping[str, object]) -> bool:
    if not operand.is_known or operand.local not in entry:
        return operand.is_known
    value = entry[operand.local]
    for name in operand.attributes:
        if isinstance(value, fx.Proxy):
            return False
        if isinstance(value, nn.Module | types.ModuleType | type):
            return True
        value = getattr(value, "__dict__", {}).get(name)
    return not isinstance(value, fx.Proxy) or value.node.op == "get_attr"


def _argument_name(operand: Operand, entry: Mapping[str, object]) -> str:
    """Return the model's argument that an operand is, or ""."""
    value = entry.get(operand.local) if operand.is_known and not operand.attributes else None
    if not isinstance(value, fx.Proxy) or value.node.op != "placeholder":
        return ""
    return "" if str(value.node.target).startswith("*") else str(value.node.target)


@functools.lru_cache(maxsize=4096)
def _tests_in(code: types.CodeType) -> tuple[Test, ...]:
    return tuple(_Code(code).tests())


class _Code:
    """The steps of a code object, and the values stored in its local variables."""

    def __init__(self, code: types.CodeType) -> None:
        self.steps: list[_Step] = []
        self.loops = False
        line, is_target = code.co_firstlineno, False
        for one in dis.get_instructions(code):
            line, is_target = _line_of(one) or line, is_target or one.is_jump_target
            if one.opname in WITHOUT_EFFECT:
                continue
            for name, value in _taken_apart(one):
                self.steps.append(_Step(name, value, line, is_target))
                is_target = False
            self.loops |= one.opcode in (*dis.hasjrel, *dis.hasjabs) and one.argval < one.offset
        self.stores = [
            (index, str(step.value), self.operand(index)[0])
            for index, step in enumerate(self.steps)
            if step.name in ("STORE_FAST", "STORE_DEREF")
        ]

    def tests(self) -> Iterator[Test]:
        for index, step in enumerate(self.steps):
            if step.name.startswith(MATCHES):
                question = "catches exceptions or matches patterns, which a trace does not see"
                yield Test(step.line, frozenset({COMPUTED}), question=question)
            elif step.name.endswith(("IF_NONE", "IF_NOT_NONE")):
                yield self.test(index, [self.operand(index)[0]], is_for_none=True)
            elif step.name == "IS_OP":
                right, start = self.operand(index)
                operands = [self.operand(start)[0], right] if right.is_known else [COMPUTED]
                yield self.test(index, operands, is_for_none=any(operand.is_none for operand in operands))
            elif self.asks_type(index):
                yield self.test(index, [self.argument_after(index)])

    def test(self, index: int, operands: list[Operand], is_for_none: bool = False) -> Test:
        return Test(self.steps[index].line, self.origins(index, operands), is_for_none)

    def operand(self, end: int) -> tuple[Operand, int]:
        """Return the operand of the expression before `end`, and the index where the expression starts."""
        step = self.steps[end - 1]
        if self.steps[end].is_target or end == 0:
            return COMPUTED, end - 1
        if step.name.startswith(CONSTANTS):
            return Operand(is_none=step.value is None), end - 1
        if step.name.startswith(READS_LOCAL):
            return Operand(str(step.value)), end - 1
        if step.name == "LOAD_ATTR":
            base, start = self.operand(end - 1)
            return base.attribute((str(step.value),)), start
        if step.name.startswith("CALL") and step.value == 1:
            argument, start = self.operand(end - 1)
            if start > 0 and self.asks_type(start - 1):
                return argument, start - 1
        return COMPUTED, end - 1

    def asks_type(self, index: int) -> bool:
        return self.steps[index].name == "LOAD_GLOBAL" and self.steps[index].value in ASKS_TYPE

    def argument_after(self, index: int) -> Operand:
        """Return the argument of `type(...)` if it is one variable, attribute or global."""
        call = next((i for i in range(index, len(self.steps)) if self.steps[i].name.startswith("CALL")), None)
        if call is None or self.steps[call].value != 1:
            return COMPUTED
        operand, start = self.operand(call)
        return operand if start == index + 1 else COMPUTED

    def origins(self, index: int, operands: list[Operand]) -> frozenset[Operand]:
        """Return all values that operands may have at `index`, whichever branches were taken before."""
        found, waiting = set[Operand](), list(operands)
        while waiting:
            one = waiting.pop()
            if one not in found:
                found.add(one)
                sources = (s for at, name, s in self.stores if name == one.local and (at < index or self.loops))
                waiting.extend(source.attribute(one.attributes) for source in sources)
        return frozenset(found)


def _taken_apart(one: dis.Instruction) -> list[tuple[str, object]]:
    """Split a fused instruction such as `LOAD_FAST_LOAD_FAST (x, y)` into two steps."""
    if not isinstance(one.argval, tuple) or "_FAST" not in one.opname:
        return [(one.opname, one.argval)]
    first = one.opname[: one.opname.index("_FAST")] + "_FAST"
    second = "STORE_FAST" if one.opname.endswith("STORE_FAST") else "LOAD_FAST"
    return [(first, one.argval[0]), (second, one.argval[1])]


def _line_of(one: dis.Instruction) -> int | None:
    return getattr(one, "line_number", None) or one.starts_line
