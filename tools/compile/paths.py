"""Longest path of a warp through a kernel's machine code: its instructions, and the least cycles that they take.

The path has the most instructions of all from the first block to an end, so it bounds what a warp executes from above.
A caller rules out source lines that are for other cases. Blocks with a call are out of every path: they are the slow
cases of division and square root, for numbers that hardly occur. The body of a loop counts as often as the caller says.

The cycles are those of a warp that has a scheduler for itself: an instruction issues after the stall of the one before,
and waits for the results that its control word names, which arrive after `LATENCIES`. Other warps, bank conflicts and
misses of the instruction cache are left out, so this bounds the time of a warp from below.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil
from typing import NamedTuple

from bnkernels.runtime import source
from tools.compile import nvrtc, sass

# Cycles from issue to result on Hopper: global memory with a hit in the L2 cache, shared memory (arXiv:2402.13499), the
# units of special functions, shuffles and atomics; of the others what the compiler plans with.
LATENCIES = {"LDG": 270, "LDGSTS": 290, "LDS": 30, "MUFU": 22, "SHFL": 24, "LDC": 30, "S2R": 25, "ATOMG": 300}
OTHERS = 22
OPERANDS_READ = 12  # until a register that a store reads may be written again
BARRIER = 30  # that all other threads have reached

_PLACE = re.compile(r'//## File "[^"]*?cuda/([^"]+)", line (\d+)')
_LABEL = re.compile(r"^(\.L_x_\w+|\$\S+):")
_CODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
_CONTROL = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"`\(([^)]+)\)")


class Instruction(NamedTuple):
    """One instruction.

    Attributes
    ----------
    predicated : bool
        Whether it may be skipped.
    name, operands : str
        Operation with its modifiers, and what follows.
    places : tuple of (str, int)
        File and line in the source, from the innermost function out.
    control : int
        Control bits: the stall, the barriers that it sets, and those that it waits for.
    """

    predicated: bool
    name: str
    operands: str
    places: tuple[tuple[str, int], ...]
    control: int

    @property
    def kind(self) -> str:
        """The operation without modifiers."""
        return self.name.partition(".")[0]

    @property
    def bytes_loaded(self) -> int:
        """Bytes that a thread loads from global memory."""
        if self.kind == "LDGSTS":
            return 16 if ".128" in self.name else 4
        if self.kind != "LDG":
            return 0
        return next((size for mark, size in ((".128", 16), (".64", 8), (".U16", 2)) if mark in self.name), 4)


class Step(NamedTuple):
    """A block of a path, or the steps of a loop's body, so many times.

    An unrolled loop has other code for the turns left over. Of a path through both, the loop may take a part of a turn.
    """

    times: int | Fraction
    block: int = -1
    body: tuple[Step, ...] = ()


class Loop(NamedTuple):
    """A loop: the block where it is entered, all its blocks, and the source line that closes it."""

    header: int
    blocks: frozenset[int]
    line: str


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions in nvdisasm's text of one kernel, and the places of its labels among them."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    places: list[tuple[str, int]] = []
    begun, new_places = None, True
    for line in text.splitlines():
        if found := _PLACE.search(line):
            if new_places:
                places, new_places = [], False
            places.append((found[1], int(found[2])))
        elif found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _CODE.match(line):
            begun, new_places = found, True
        elif begun and (found := _CONTROL.match(line)):
            code.append(Instruction(bool(begun[1]), begun[2], begun[3], tuple(places), int(found[1], 16) >> 41))
            begun = None
    return code, labels


@dataclass(frozen=True)
class Machine:
    """The machine code of one kernel, and the text of its source files by line."""

    code: list[Instruction]
    labels: Mapping[str, int]
    sources: Mapping[str, Sequence[str]]

    @cached_property
    def blocks(self) -> list[range]:
        """Instructions that are executed one after the other; the last of a block may branch."""
        starts = {0, *self.labels.values(), *(i + 1 for i, one in enumerate(self.code) if one.kind in _ENDS)}
        ordered = sorted(start for start in starts if start < len(self.code))
        return [range(*pair) for pair in zip(ordered, [*ordered[1:], len(self.code)], strict=True)]

    @cached_property
    def successors(self) -> list[list[int]]:
        """Blocks that may follow each block. Warps do not diverge: BRA.DIV is not taken."""
        at, found = {block.start: number for number, block in enumerate(self.blocks)}, []
        for number, block in enumerate(self.blocks):
            last, after = self.code[block[-1]], []
            target = _TARGET.search(last.operands)
            if last.kind == "BRA" and last.name != "BRA.DIV" and target:
                after.append(at[self.labels[target[1]]])
            always = last.kind in ("EXIT", "RET") or (last.kind == "BRA" and last.operands.startswith("`"))
            if (last.predicated or not always) and number + 1 < len(self.blocks):
                after.append(number + 1)
            found.append(after)
        return found

    def lines(self, instruction: Instruction) -> list[str]:
        """Return the source lines of an instruction, from the innermost function out; empty for a line that is none.

        Some lines of a file after an included one come with the name of that.
        """
        found = (self.sources[file][line - 1 : line] for file, line in instruction.places)
        return [line[0].strip() if line else "" for line in found]

    def reachable(self, avoid: Sequence[str] = ()) -> frozenset[int]:
        """Return the blocks on paths without calls and without source lines that hold a text of `avoid`."""
        found, waiting = set(), [0]
        while waiting:
            block = waiting.pop()
            instructions = [self.code[i] for i in self.blocks[block]]
            called = any(one.kind == "CALL" for one in instructions)
            avoided = any(text in line for one in instructions for line in self.lines(one) for text in avoid)
            if block not in found and not called and not avoided:
                found.add(block)
                waiting += self.successors[block]
        return frozenset(found)

    def loops(self, within: frozenset[int], entry: int) -> list[Loop]:
        """Return the outermost loops of some blocks, in the order of the code."""
        found = []
        for blocks in _components(within, self.successors):
            headers = {after for block in within - blocks for after in self.successors[block] if after in blocks}
            header = entry if entry in blocks else min(headers, default=min(blocks))
            closing = [block for block in blocks if header in self.successors[block]]
            if closing:
                found.append(Loop(header, blocks, self.lines(self.code[self.blocks[max(closing)][-1]])[0]))
        return sorted(found)

    def path(self, trips: Mapping[str, Sequence[int | Fraction]], avoid: Sequence[str] = ()) -> tuple[Step, ...]:
        """Return the longest path.

        Parameters
        ----------
        trips : mapping of str to sequence of int or Fraction
            Numbers of turns of loops, in the order of the code, by a text in the source line that closes them: the
            compiler may make several of one loop. All other loops run once.
        avoid : sequence of str
            Texts in source lines that are not executed.

        Raises
        ------
        ValueError
            If the loops are not as many as `trips` says.
        """
        found: list[str] = []
        steps = self._longest(self.reachable(avoid), 0, False, trips, found)
        for text, times in trips.items():
            if (number := sum(text in line for line in found)) != len(times):
                raise ValueError(f"{len(times)} loops expected at {text!r}, found {number} among {found}")
        return steps

    def _longest(
        self,
        within: frozenset[int],
        entry: int,
        is_body: bool,
        trips: Mapping[str, Sequence[int | Fraction]],
        found: list[str],
    ) -> tuple[Step, ...]:
        """Return the longest way through some blocks, which are a loop's body or all; notes the loops that it meets."""
        steps, members = {}, {}
        for loop in self.loops(within - {entry} if is_body else within, entry):
            times = next((times for text, times in trips.items() if text in loop.line), (1,))
            number = sum(line == loop.line for line in found)
            found.append(loop.line)
            body = self._longest(loop.blocks, loop.header, True, trips, found)
            steps[loop.header] = Step(times[min(number, len(times) - 1)], body=body)
            members |= dict.fromkeys(loop.blocks, loop)
        known: dict[int, tuple[int, tuple[Step, ...]]] = {}

        def ways(block: int) -> tuple[int, tuple[Step, ...]]:
            loop = members.get(block)
            node = loop.header if loop else block
            if node not in known:
                own = loop.blocks if loop else frozenset({block})
                step = steps[node] if loop else Step(1, block)
                after = {n for one in own for n in self.successors[one] if n in within and n not in own}
                rest = [ways(n) for n in after if not (is_body and n == entry)]
                length, others = max(rest, key=lambda way: way[0], default=(0, ()))
                known[node] = length + self.instructions((step,)), (step, *others)
            return known[node]

        return ways(entry)[1]

    def instructions(
        self, steps: Iterable[Step], weight: Callable[[Instruction], int] = lambda one: 1
    ) -> int | Fraction:
        """Return the number of instructions of a path, or the sum of what each of them has of something."""
        found = 0
        for step in steps:
            own = () if step.body else self.blocks[step.block]
            found += step.times * (self.instructions(step.body, weight) + sum(weight(self.code[i]) for i in own))
        return found

    def executed(self, steps: Iterable[Step]) -> Iterator[Instruction]:
        """Give the instructions of a path, in order, and the whole of the last turn of a loop."""
        for step in steps:
            for _ in range(ceil(step.times)):
                if step.body:
                    yield from self.executed(step.body)
                else:
                    yield from (self.code[i] for i in self.blocks[step.block])

    def cycles(self, steps: Iterable[Step], global_latency: int = LATENCIES["LDG"]) -> int:
        """Return the cycles of one warp on a path, where a load from global memory takes `global_latency`."""
        latencies = LATENCIES | {
            "LDG": global_latency,
            "LDGSTS": global_latency + LATENCIES["LDGSTS"] - LATENCIES["LDG"],
        }
        now, copied, ready, groups = 0, 0, [0] * 6, []
        for one in self.executed(steps):
            stall, write, read, wait = (one.control >> shift & mask for shift, mask in _FIELDS)
            now = max([now, *(time for i, time in enumerate(ready) if wait >> i & 1)])
            done = now + latencies.get(one.kind, OTHERS)
            if one.kind == "LDGSTS":
                copied = done
            elif one.kind == "LDGDEPBAR":
                groups.append(copied)
            elif one.kind == "DEPBAR":
                pending = int(re.search(r"0x(\w+)", one.operands)[1], 16)
                now = max([now, *groups[: len(groups) - pending]])
            elif one.kind == "BAR":
                now += BARRIER
            if write != NO_BARRIER:
                ready[write] = max(ready[write], done)
            if read != NO_BARRIER:
                ready[read] = max(ready[read], now + OPERANDS_READ)
            now += max(stall, 1)
        return now


_ENDS = ("BRA", "EXIT", "RET", "CALL")
_FIELDS = (0, 15), (5, 7), (8, 7), (11, 63)  # shifts and masks of stall, barriers written and read, barriers awaited
NO_BARRIER = 7


def _components(within: frozenset[int], successors: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    """Return the strongly connected components: sets of blocks that reach one another (Kosaraju's algorithm)."""
    order: list[int] = []
    seen: set[int] = set()
    for root in within:
        work = [(root, False)]
        while work:
            node, done = work.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                work += [(node, True), *((n, False) for n in successors[node] if n in within)]
    before: dict[int, list[int]] = {}
    for node in within:
        for after in successors[node]:
            before.setdefault(after, []).append(node)
    left, found = set(within), []
    for root in reversed(order):
        if root in left:
            component, work = set(), [root]
            while work:
                node = work.pop()
                if node in left:
                    left.remove(node)
                    component.add(node)
                    work += before.get(node, [])
            found.append(frozenset(component))
    return found


def machine(stem: str, kernel: str, constants: Iterable[tuple[str, int]] = (), architecture: int = 90) -> Machine:
    """Return the machine code that the newest compiler makes of one kernel."""
    cubin = nvrtc.cubin(source.read(stem, kernel, constants), architecture)
    code, labels = parse(sass.text_of(cubin, "-c", "-hex", "-gi"))
    files = {file for one in code for file, _ in one.places}
    return Machine(code, labels, {f: (source.folder() / f).read_text(encoding="utf-8").splitlines() for f in files})
