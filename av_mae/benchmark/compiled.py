"""What a compiled program says of itself: its collectives, how long values live, its matrix products.

Programs are read as XLA's text (HLO, scheduled: instructions stand in the order in which they run).
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr

# Bytes of a value, by XLA's name of its type.
BYTES = {
    name: size
    for size, names in {1: "pred s8 u8", 2: "bf16 f16 s16 u16", 4: "f32 s32 u32", 8: "f64 s64 u64"}.items()
    for name in names.split()
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions whose result is their operand, perhaps laid out or rounded otherwise.
SAME_VALUE = frozenset(
    """bitcast reshape transpose copy convert get-tuple-element tuple copy-start copy-done opt-barrier all-gather-done
    async-done""".split()
)

# A name, the type of the result, the operation, and from its operands on what follows.
_LINE = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*?) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Computations that an instruction runs: those of control flow, and all (a fusion's, a reduction's).
FLOW = re.compile(r"\b(?:body|condition|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
CALLS = re.compile(r"\b(?:body|condition|branch_computations|calls|to_apply)=(\{[^}]*\}|%[\w.\-]+)")
# Instructions that move no bytes of their own.
MOVES_NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: `arrays` are the dtypes and shapes of its result, `given` its operands as text, `rest`
    what follows them."""

    name: str
    op: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    given: str
    rest: str

    @property
    def bytes(self) -> int:
        return sum(BYTES.get(dtype, 0) * math.prod(shape) for dtype, shape in self.arrays)


def parse_instruction(line: str) -> Instruction | None:
    """One line of a computation; `None` for other lines."""
    match = _LINE.match(line)
    if not match:
        return None
    name, result, op, text = match.groups()
    depths = itertools.accumulate({"(": 1, ")": -1}.get(letter, 0) for letter in text)
    end = next((index for index, depth in enumerate(depths) if depth < 0), len(text))  # of the operands
    arrays = tuple((dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(result))
    return Instruction(name, op, arrays, tuple(_NAME.findall(text[:end])), text[:end], text[end + 1 :])


class Computation(NamedTuple):
    """A computation of a program; `entry`: it is the one that runs first."""

    name: str
    entry: bool
    body: list[Instruction]


@functools.lru_cache(maxsize=1)
def computations(program: str) -> list[Computation]:
    """All computations of a program: what is called stands before what calls it."""
    found: list[Computation] = []
    for line in program.splitlines():
        head = re.match(r"(ENTRY )?%(\S+) .*\{$", line)
        instruction = parse_instruction(line)
        if head:
            found.append(Computation(head.group(2), bool(head.group(1)), []))
        elif instruction and found:
            found[-1].body.append(instruction)
    return found


def called(instruction: Instruction, by: re.Pattern[str]) -> list[str]:
    """Names of the computations that an instruction runs (FLOW or CALLS)."""
    return [name for some in by.findall(instruction.rest) for name in _NAME.findall(some)]


def trips(loop: Instruction, known: dict[str, list[Instruction]]) -> int:
    """How often a loop turns, 1 where the program does not tell.

    It says so, or the loop's condition (of the computations that are `known`) compares the turn, which counts from 0,
    with a constant.
    """
    said = _TRIPS.search(loop.rest)
    if said:
        return int(said.group(1))
    tested = [one for name in re.findall(r"condition=%([\w.\-]+)", loop.rest) for one in known[name]]
    constants = {one.name: one.given for one in tested if one.op == "constant"}
    compared = [one for one in tested if one.op == "compare" and "direction=LT" in one.rest]
    limits = [constants[operand] for one in compared for operand in one.operands[1:] if operand in constants]
    return int(limits[0]) if len(limits) == 1 else 1


def turns(program: str) -> dict[str, int]:
    """How often each loop's body and condition run when the loop is entered once."""
    known = {name: body for name, _, body in computations(program)}
    return {
        name: trips(one, known)
        for body in known.values()
        for one in body
        if one.op == "while"
        for name in called(one, FLOW)
    }


def repeats(program: str, by: re.Pattern[str] = CALLS) -> dict[str, int]:
    """How many times each computation that is reached runs when the program runs once; every branch is taken."""
    turn = turns(program)
    times = collections.Counter({one.name: int(one.entry) for one in computations(program)})
    for name, _, body in reversed(computations(program)):
        for other in (other for instruction in body for other in called(instruction, by)):
            times[other] += times[name] * turn.get(other, 1)
    return {one.name: times[one.name] for one in computations(program) if times[one.name]}


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


def group_size(rest: str) -> int:
    """Devices of a group, from what follows a collective's operands (1 where nothing is said)."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed.group(1).split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(counted.group(1))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    return 2 if "source_target_pairs=" in rest else 1


def collectives(program: str) -> list[Collective]:
    """Every collective that a program runs, one of a loop's body as often as that turns.

    An all-reduce whose result is scattered at once is a reduce-scatter. TPUs' programs name one that runs beside matrix
    products where it starts, in each of these and where it is done: it counts where it starts.
    """
    times, found = repeats(program), []
    for name, _, body in computations(program):
        targets = "".join(one.rest for one in body if one.op == "custom-call")
        if name.startswith("async_collective_fusion") or "AsyncCollectiveDone" in targets:
            continue
        found += [
            _collective(one, name, "AsyncCollectiveStart" in targets)
            for one in body
            if one.op.removesuffix("-start") in COLLECTIVES
            for _ in range(times.get(name, 0))
        ]
    return found


def _collective(instruction: Instruction, computation: str, hidden: bool) -> Collective:
    """What an instruction exchanges; `hidden` where its computation says so."""
    kind, started = instruction.op.removesuffix("-start"), instruction.op.endswith("-start")
    dtype, shape = instruction.arrays[-1 if started and kind == "all-gather" else 0]
    group = group_size(instruction.rest)
    size = BYTES.get(dtype, 0) * math.prod(shape) if started else instruction.bytes
    size *= group if kind == "reduce-scatter" else 1
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return Collective(kind, size, group, started or hidden, shape)


def gathers(instruction: Instruction) -> bool:
    """Whether the result is a whole array gathered from its parts on other devices, or (in TPUs' programs, which do not
    tell them apart) another collective that ends after running beside matrix products."""
    return instruction.op in ("all-gather", "all-gather-done") or instruction.name.startswith("async-collective-done")


def most_gathered(program: str) -> int:
    """The most bytes held at once by results of instructions that gather (see `gathers`), in the program's own order.

    A result lives until the last instruction that reads it or what only lays it out anew; beside what is alive while
    a loop runs, its body holds its own, and what it hands to its next turn all the time.
    """
    held: dict[str, int] = {}  # by computation
    for name, entry, body in computations(program):
        held[name] = _most_gathered(body, held)
        if entry:
            return held[name]
    return 0


def _most_gathered(body: list[Instruction], inside: dict[str, int]) -> int:
    """`most_gathered` of one computation; `inside` knows those that it runs."""
    origin: dict[str, set[str]] = {}
    sizes, first, last = dict[str, int](), dict[str, int](), dict[str, int]()
    for index, instruction in enumerate(body):
        read = set().union(*(origin.get(name, ()) for name in instruction.operands))
        last |= dict.fromkeys(read, index)
        if gathers(instruction):
            name = instruction.name
            origin[name], sizes[name], first[name], last[name] = {name}, instruction.bytes, index, index
        elif instruction.op in SAME_VALUE:
            origin[instruction.name] = read
    first |= dict.fromkeys(origin.get(body[-1].name, ()), 0)
    changes = [0] * (len(body) + 1)
    for name, size in sizes.items():
        changes[first[name]] += size
        changes[last[name] + 1] -= size
    below = [max((inside[name] for name in called(instruction, FLOW)), default=0) for instruction in body]
    return max(map(sum, zip(itertools.accumulate(changes), below)), default=0)


def cycles(program: str) -> int:
    """Clock ticks that the TPU compiler's own model expects of the instructions that run one after the other; 0 where
    it says nothing."""
    times = repeats(program, FLOW)
    return sum(
        times.get(name, 0) * int(ticks)
        for name, _, body in computations(program)
        for instruction in body
        for ticks in re.findall(r'"estimated_cycles":"(\d+)"', instruction.rest)
    )


def product_flops(instruction: Instruction, known: dict[str, Instruction]) -> int:
    """FLOPs of a matrix product, 0 of other instructions; `known` are those of its computation by name.

    Of [b, m, k] by [b, k, n] the sizes of operands and result multiply to b³ m² k² n². TPUs' programs write products
    as convolutions, their batch dimensions as a dilated window.
    """
    if instruction.op not in ("dot", "convolution"):
        return 0
    arrays = [known[name].arrays[0][1] for name in instruction.operands[:2]]
    sizes = math.prod(map(math.prod, (*arrays, instruction.arrays[0][1])))
    batch = re.search(r"lhs_batch_dims=\{([\d,]+)\}", instruction.rest)
    window = re.search(r"window=\{size=([\dx]+).*lhs_dilate", instruction.rest)
    dims = [arrays[0][int(i)] for i in batch.group(1).split(",")] if batch else []
    dims = [int(size) for size in window.group(1).split("x")] if window else dims
    return 2 * math.isqrt(sizes // math.prod(dims))


def moved_bytes(body: list[Instruction], turns: int) -> int:
    """Bytes of operands and results of a computation's instructions.

    In a loop's body, arrays that hold something for each of its turns are read and written a turn's part at a time.
    """
    known = {instruction.name: instruction for instruction in body}
    handed = {name for name, one in known.items() if one.op == "parameter"}
    stacked = {
        array
        for one in body
        if one.op == "get-tuple-element" and handed & {*one.operands}
        for array in one.arrays
        if turns > 1 and array[1][:1] == (turns,)
    }
    size = lambda array: BYTES.get(array[0], 0) * math.prod(array[1]) // (turns if array in stacked else 1)
    return sum(
        size(array)
        for one in body
        if one.op not in MOVES_NOTHING
        for part in (one, *(known[name] for name in one.operands if name in known))
        for array in part.arrays
    )


def further_turns(program: str) -> tuple[int, int]:
    """FLOPs of matrix products, and bytes of operands and results, of all turns of loops but the first.

    XLA's own counts take the body of a loop once; these are what is missing there, but for operations that are not
    matrix products.
    """
    times, flow, turn = repeats(program), repeats(program, FLOW), turns(program)
    flops = moved = 0
    for name, _, body in computations(program):
        known = {instruction.name: instruction for instruction in body}
        flops += max(times.get(name, 0) - 1, 0) * sum(product_flops(instruction, known) for instruction in body)
        if flow.get(name, 0) > 1:
            moved += (flow[name] - 1) * moved_bytes(body, turn.get(name, 1))
    return flops, moved


def products(jaxpr: Jaxpr) -> Iterator[tuple[int, int, int, int]]:
    """(batch, rows, contracted, columns) of each matrix product in a jaxpr, those of inner ones included.

    The second operand's free dimensions are the columns: a kernel's outputs, or keys.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, other), (batch, other_batch) = equation.params["dimension_numbers"]
            left, right = (operand.aval.shape for operand in equation.invars)  # type: ignore[attr-defined]
            size = lambda shape, skip: math.prod(n for i, n in enumerate(shape) if i not in skip)
            yield (
                math.prod(left[i] for i in batch),
                size(left, (*contract, *batch)),
                math.prod(left[i] for i in contract),
                size(right, (*other, *other_batch)),
            )
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            body: Any = getattr(inner, "jaxpr", inner)
            repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            for _ in range(repeats if hasattr(body, "eqns") else 0):
                yield from products(body)


def matmul_flops(sizes: Iterable[tuple[int, int, int, int]], tile: int = 1) -> int:
    """FLOPs of products, contracted and columns rounded up to whole tiles and rows to eight (`tile` 1: not rounded)."""
    up = lambda n, unit: -(-n // unit) * unit
    rows_unit = 8 if tile > 1 else 1
    return sum(
        2 * batch * up(rows, rows_unit) * up(contracted, tile) * up(columns, tile)
        for batch, rows, contracted, columns in sizes
    )
