"""What a compiled program says of itself: its collectives, how long values live, its matrix products.

Programs are read as XLA's text (HLO, scheduled: instructions stand in the order in which they run).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator

import jax
from jax.extend.core import Jaxpr

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions whose result is their operand, perhaps laid out or rounded otherwise.
SAME_VALUE = ("bitcast", "reshape", "transpose", "copy", "convert", "get-tuple-element", "tuple", "copy-start",
              "copy-done", "opt-barrier", "all-gather-done", "async-done")

_LINE = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: `arrays` are the dtypes and shapes of its result, `rest` what follows its operands."""

    name: str
    op: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    rest: str

    @property
    def bytes(self) -> int:
        return sum(BYTES.get(dtype, 0) * math.prod(shape) for dtype, shape in self.arrays)


def _closing(text: str) -> int:
    """Place of the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and letter == ")":
            return place
    return len(text)


def parse_instruction(line: str) -> Instruction | None:
    """One line of a computation; None for other lines."""
    match = _LINE.match(line)
    if not match:
        return None
    name, text = match.groups()
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].strip()
    op, _, text = text.partition("(")
    end = _closing("(" + text) - 1
    arrays = tuple((dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(kind))
    return Instruction(name, op.strip(), arrays, tuple(_NAME.findall(text[:end])), text[end + 1:])


def computations(program: str) -> Iterator[tuple[str, bool, list[Instruction]]]:
    """(name, whether it is the one that runs first, instructions) of each computation of a program."""
    name, entry, body = None, False, []
    for line in program.splitlines():
        head = re.match(r"(ENTRY )?%(\S+) .*\{$", line)
        if head:
            name, entry, body = head.group(2), bool(head.group(1)), []
        elif line.startswith("}") and name is not None:
            yield name, entry, body
            name = None
        elif name is not None:
            instruction = parse_instruction(line)
            body += [instruction] if instruction else []


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between the `group` devices of each group, of an array of `bytes` as a whole (gathered or summed).

    `hidden`: it runs beside other instructions. `shape` is that of the result.
    """

    kind: str
    bytes: int
    group: int
    hidden: bool
    shape: tuple[int, ...]
    name: str


def group_size(rest: str) -> int:
    """Devices of a group, from what follows a collective's operands (1 where nothing is said)."""
    match = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if match:
        return len(match.group(1).split(","))
    match = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    if match:
        return int(match.group(1))
    match = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", rest)
    if match:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    match = re.search(r"source_target_pairs=", rest)
    return 2 if match else 1


def collectives(program: str) -> list[Collective]:
    """Every collective of a program. An all-reduce whose result is cut at once is a reduce-scatter."""
    found = []
    for computation, _, body in computations(program):
        for instruction in body:
            kind = instruction.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            hidden = instruction.op.endswith("-start")
            dtype, shape = instruction.arrays[-1 if hidden and kind == "all-gather" else 0]
            group = group_size(instruction.rest)
            size = instruction.bytes if not hidden else BYTES.get(dtype, 0) * math.prod(shape)
            size *= group if kind == "reduce-scatter" else 1
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            found.append(Collective(kind, size, group, hidden, shape, instruction.name))
    return found


def gathers(instruction: Instruction) -> bool:
    """Whether the result is a whole array gathered from its parts on other devices."""
    return instruction.op in ("all-gather", "all-gather-done")


def most_alive(program: str, begins: Callable[[Instruction], bool]) -> int:
    """The most bytes held at once by results of the instructions that `begins` chooses, in the program's own order.

    A result lives until the last instruction that reads it or what only lays it out anew.
    """
    body = next(body for _, entry, body in computations(program) if entry)
    origin: dict[str, set[str]] = {}
    sizes, first, last = {}, {}, {}
    for place, instruction in enumerate(body):
        read = set().union(*(origin.get(name, ()) for name in instruction.operands))
        for name in read:
            last[name] = place
        if begins(instruction):
            sizes[instruction.name], first[instruction.name] = instruction.bytes, place
            last[instruction.name], origin[instruction.name] = place, {instruction.name}
        elif instruction.op in SAME_VALUE:
            origin[instruction.name] = read
    return max((sum(sizes[name] for name in sizes if first[name] <= place <= last[name]) for place in first.values()),
               default=0)


def cycles(program: str) -> int:
    """Clock ticks that the TPU compiler's own model expects of the instructions that run one after the other; 0 where
    it says nothing."""
    entry = program[program.find("\nENTRY"):]
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry)))


def products(jaxpr: Jaxpr) -> Iterator[tuple[int, int, int, int]]:
    """(batch, rows, contracted, columns) of each matrix product in a jaxpr, those of inner ones included.

    The second operand's free dimensions are the columns: a kernel's outputs, or keys.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, other), (batch, other_batch) = equation.params["dimension_numbers"]
            left, right = (operand.aval.shape for operand in equation.invars)
            size = lambda shape, skip: math.prod(n for i, n in enumerate(shape) if i not in skip)
            yield (math.prod(left[i] for i in batch), size(left, (*contract, *batch)),
                   math.prod(left[i] for i in contract), size(right, (*other, *other_batch)))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            for _ in range(repeats if hasattr(inner, "eqns") else 0):
                yield from products(inner)


def matmul_flops(sizes: Iterable[tuple[int, int, int, int]], tile: int = 1) -> int:
    """FLOPs of products, contracted and columns rounded up to whole tiles and rows to eight (`tile` 1: not rounded)."""
    up = lambda n, unit: -(-n // unit) * unit
    rows_unit = 8 if tile > 1 else 1
    return sum(2 * batch * up(rows, rows_unit) * up(contracted, tile) * up(columns, tile)
               for batch, rows, contracted, columns in sizes)
