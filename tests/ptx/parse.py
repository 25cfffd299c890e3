"""The text of PTX taken apart: kernels with their parameters, shared memory, registers, labels and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LINE_DIRECTIVE = re.compile(r"^[ \t]*\.(?:loc|file)\b[^\n]*", re.MULTILINE)  # the ones that end with their line
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?[^{;]*")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([a-z]\d+)\s+(?:\.ptr[^,]*?)?([\w$]+)(?:\[(\d+)\])?")
_SHARED = re.compile(
    r"(?P<extern>\.extern\s+)?\.shared\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>[a-z]\d+)\s+(?P<name>[\w$]+)"
    r"(?:\[(?P<count>\d*)\])?"
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_INSTRUCTION = re.compile(r"(?:@(?P<not>!?)(?P<guard>%[\w$]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<rest>.*)", re.DOTALL)
_OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*)")
_NAME = re.compile(r"%[\w$]+")


class PtxError(Exception):
    """The text cannot be read, or running it did what a GPU would not forgive."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes
    ----------
    opcode : str
        With its modifiers, such as ``add.rn.ftz.f32``.
    operands : tuple of str
        As they are written; vectors are one operand.
    guard : str or None
        The predicate register in front.
    negated : bool
        Whether it runs where the guard does not hold.
    """

    opcode: str
    operands: tuple[str, ...] = ()
    guard: str | None = None
    negated: bool = False

    def __str__(self) -> str:
        """Return the text."""
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip() + ";"


@dataclass
class Kernel:
    """A kernel: everything that it takes to run it.

    Attributes
    ----------
    name : str
        Of the entry.
    parameters : dict of str to int
        Where each parameter begins in the bytes of the arguments.
    parameter_bytes : int
        Of all parameters together.
    shared : dict of str to int
        Where each variable in shared memory begins; that of dynamic size begins behind all the others.
    shared_bytes : int
        Of those whose size is known.
    registers : dict of str to str
        The declared type of every register.
    instructions : list of Instruction
        In their order.
    labels : dict of str to int
        Number of the instruction behind each label.
    """

    name: str
    parameters: dict[str, int] = field(default_factory=dict)
    parameter_bytes: int = 0
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> dict[str, Kernel]:
    """Return the kernels of a module by name.

    Raises
    ------
    PtxError
        If something cannot be read, with its text.
    """
    text = _LINE_DIRECTIVE.sub("", _COMMENT.sub("", text))
    bodies = []
    outside, end = "", 0
    for entry in _ENTRY.finditer(text):
        if entry.start() < end:
            raise PtxError(f"an entry within another: {entry[0]!r}")
        outside += text[end : entry.start()]
        end = _closing(text, entry.end())
        bodies.append((entry[1], entry[2] or "", text[entry.end() + 1 : end - 1]))
    common = list(_SHARED.finditer(outside + text[end:]))
    return {name: _kernel(name, parameters, body, common) for name, parameters, body in bodies}


def _closing(text: str, at: int) -> int:
    """Return where the text continues behind the block that begins at `at`."""
    depth = 0
    for brace in re.finditer(r"[{}]", text[at:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return at + brace.end()
    raise PtxError(f"a block is not closed: {text[at : at + 40]!r}")


def _kernel(name: str, parameters: str, body: str, common: list[re.Match[str]]) -> Kernel:
    kernel = Kernel(name)
    for align, kind, parameter, count in _PARAMETER.findall(parameters):
        size = int(kind[1:]) // 8
        kernel.parameters[parameter] = _rounded_up(kernel.parameter_bytes, int(align or size))
        kernel.parameter_bytes = kernel.parameters[parameter] + size * int(count or 1)
    for statement in _Statements(kernel).of(body):
        if not _SHARED.match(statement):
            raise PtxError(f"{name}: cannot read {statement!r}")
    _place_shared(kernel, [*common, *_SHARED.finditer(body)])
    for instruction in kernel.instructions:
        if instruction.opcode.split(".")[0] == "bra" and instruction.operands[0] not in kernel.labels:
            raise PtxError(f"{name}: there is no label for {instruction}")
    return kernel


def _place_shared(kernel: Kernel, declarations: list[re.Match[str]]) -> None:
    """Give every variable in shared memory its place, those of dynamic size behind the others."""
    for one in sorted(declarations, key=lambda one: one["count"] == ""):
        size = int(one["type"][1:]) // 8
        kernel.shared[one["name"]] = _rounded_up(kernel.shared_bytes, int(one["align"] or size))
        if one["count"] != "":
            kernel.shared_bytes = kernel.shared[one["name"]] + size * int(one["count"] or 1)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


class _Statements:
    """Reads the body of a kernel into it; registers declared in an inner block get names of their own."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._scopes: list[dict[str, str]] = [{}]
        self._scope_count = 0

    def of(self, body: str) -> list[str]:
        """Read `body`; return the directives that are left."""
        left, at, end = [], 0, len(body)
        while True:
            while at < end and body[at].isspace():
                at += 1
            if at == end:
                return left
            if body[at] in "{}":
                self._scope(body[at])
                at += 1
            elif label := _LABEL.match(body, at):
                self._kernel.labels[label[1]] = len(self._kernel.instructions)
                at = label.end()
            else:
                stop = body.find(";", at)
                if stop < 0:
                    raise PtxError(f"{self._kernel.name}: no semicolon behind {body[at : at + 40]!r}")
                self._statement(body[at:stop], left)
                at = stop + 1

    def _scope(self, brace: str) -> None:
        if brace == "{":
            self._scope_count += 1
            self._scopes.append({})
        else:
            self._scopes.pop()

    def _statement(self, text: str, left: list[str]) -> None:
        if registers := _REGISTERS.match(text):
            for name in registers[2].split(","):
                self._declare(name.strip(), registers[1])
        elif text.startswith((".pragma", ".maxntid", ".minnctapersm")):
            return  # for the compiler behind
        elif text.startswith("."):
            left.append(text)
        else:
            self._kernel.instructions.append(self._instruction(text))

    def _declare(self, name: str, kind: str) -> None:
        base, _, count = name.partition("<")
        for one in [f"{base}{i}" for i in range(int(count.rstrip(">")))] if count else [base]:
            own = one
            if len(self._scopes) > 1:
                own = self._scopes[-1][one] = f"{one}${self._scope_count}"
            self._kernel.registers[own] = kind

    def _instruction(self, text: str) -> Instruction:
        renamed = {name: own for scope in self._scopes for name, own in scope.items()}
        if renamed:
            text = _NAME.sub(lambda name: renamed.get(name[0], name[0]), text)
        found = _INSTRUCTION.fullmatch(text)
        if not found:
            raise PtxError(f"{self._kernel.name}: cannot read {text!r}")
        operands = tuple(operand.strip() for operand in _OPERAND.findall(found["rest"]))
        return Instruction(found["opcode"], operands, found["guard"], bool(found["not"]))
