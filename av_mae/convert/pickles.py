"""An interpreter of pickles that builds data and nothing else.

The interpreter knows the opcodes with which `torch.save` writes (pickle protocols 2 to 5) and refuses all others by
name. Names, calls and storages go through `tensors`, which imports and runs nothing. Bytes and steps are
limited, so that no file can take much time or memory, and nothing here recurses.
"""

import collections
import pickletools
import struct
from collections.abc import Callable

from av_mae.convert.tensors import Record, Refused, call, shown, symbol

MAX_BYTES = 2**25  # of all pickles of a file; a model of 1,000 tensors with its optimizer needs 2 ** 20
MAX_STEPS = 500_000  # opcodes of all pickles of a file; a tensor takes about 40
MAX_INTEGER = 64  # bytes
MAX_NAME = 1024  # bytes of a line with a name
# Python does not scatter the hashes of numbers: large ones can be chosen such that a dict of them is slow.
SMALL_KEY, MAX_LARGE_KEYS, MAX_KEY = 2**20, 1000, 2**61 - 1

ONE, TWO, FOUR, EIGHT = (struct.Struct(f"<{kind}") for kind in "BHIQ")
SIGNED, DOUBLE = struct.Struct("<i"), struct.Struct(">d")


class PickleReader:
    """Interprets the pickles in `data`, one after another.

    Args:
      data: the bytes, of which the pickles are the beginning.
      name: what messages call them.
      load_persistent: gives what a persistent id stands for, or raises Refused.
    """

    def __init__(self, data: bytes, name: str, load_persistent: Callable[[object], object]):
        self.data, self.name, self.load_persistent = data, name, load_persistent
        self.position = self.steps = self.large_keys = 0
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, object] = {}

    def load(self) -> object:
        """The object of the next pickle. Raises Refused with the position of the opcode and the cause."""
        self.stack, self.marks, self.memo = [], [], {}
        start = self.position
        try:
            while (code := self.take(1)) != b".":
                self.step(code)
                start = self.position
            result = self.pop()
            if self.stack or self.marks:
                raise Refused("ends with more than one object on its stack")
            return result
        except Refused as error:
            code2op = {opcode.code: opcode.name for opcode in pickletools.opcodes}
            opcode = code2op.get(chr(self.data[start])) if start < len(self.data) else None
            near = f", after {shown(self.stack[-1])}" if self.stack and isinstance(self.stack[-1], str) else ""
            raise Refused(f"{self.name}, byte {start} ({opcode or 'no opcode'}{near}): {error}") from None

    def step(self, code: bytes) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Refused(f"takes more than {MAX_STEPS} steps to read")
        if code in VALUES:
            value = VALUES[code](self)  # may replace the stack, so it comes first
            self.stack.append(value)
        elif code in ACTIONS:
            ACTIONS[code](self)
        else:
            raise Refused("is not an opcode that torch.save writes; nothing of it was run")

    def take(self, count: int) -> bytes:
        """The next bytes of the pickle."""
        end = self.position + count
        if end > len(self.data):
            raise Refused(
                f"needs {count} bytes where {len(self.data) - self.position} are left: it is truncated or damaged"
            )
        taken, self.position = self.data[self.position : end], end
        return taken

    def number(self, kind: struct.Struct) -> int:
        return kind.unpack(self.take(kind.size))[0]

    def text(self, kind: struct.Struct) -> str:
        try:
            return self.take(self.number(kind)).decode()
        except UnicodeDecodeError:
            raise Refused("has a string that is not UTF-8") from None

    def old_text(self, kind: struct.Struct) -> str | bytes:
        """A string of Python 2, which may be text or bytes."""
        raw = self.take(self.number(kind))
        return raw.decode() if raw.isascii() else raw

    def integer(self, kind: struct.Struct) -> int:
        length = self.number(kind)
        if length > MAX_INTEGER:
            raise Refused(f"has an integer of {length} bytes, more than {MAX_INTEGER}")
        return int.from_bytes(self.take(length), "little", signed=True)

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + MAX_NAME)
        if end < 0:
            raise Refused(f"has a name that does not end within {MAX_NAME} bytes")
        raw = self.take(end + 1 - self.position)[:-1]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise Refused(f"has a name that is not UTF-8: {shown(raw)}") from None

    def pop(self) -> object:
        if not self.stack:
            raise Refused("takes an object from an empty stack")
        return self.stack.pop()

    def top(self) -> object:
        if not self.stack:
            raise Refused("needs an object on an empty stack")
        return self.stack[-1]

    def pop_tuple(self, count: int) -> tuple:
        if len(self.stack) < count:
            raise Refused(f"takes {count} objects from a stack of {len(self.stack)}")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list:
        if not self.marks:
            raise Refused("goes back to a mark that was never set")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def named(self) -> object:
        module, name = self.pop_tuple(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused(f"takes {shown(module)} and {shown(name)} for the name of something")
        return symbol(module, name)

    def called(self) -> object:
        function, arguments = self.pop_tuple(2)
        return call(function, arguments)

    def recall(self, kind: struct.Struct) -> object:
        index = self.number(kind)
        if index not in self.memo:
            raise Refused(f"recalls object {index}, which was never remembered")
        return self.memo[index]

    def remember(self, index: int) -> None:
        if index > MAX_STEPS:
            raise Refused(f"remembers an object as number {index}, more than {MAX_STEPS}")
        self.memo[index] = self.top()

    def append(self, items: list) -> None:
        target = self.top()
        if type(target) is not list:
            raise Refused(f"appends to {shown(target)}, not to a list")
        target.extend(items)

    def add(self, items: list) -> None:
        target = self.top()
        if type(target) is not set:
            raise Refused(f"adds to {shown(target)}, not to a set")
        target.update(map(self.checked_key, items))

    def set_items(self, items: tuple | list) -> None:
        target = self.top()
        target = target.items if isinstance(target, Record) else target
        if not isinstance(target, dict) or len(items) % 2:
            raise Refused(f"sets {len(items)} keys and values in {shown(target)}, it takes pairs and a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if self.checked_key(key) in target:
                raise Refused(f"has the key {shown(key)} twice in one dict")
            target[key] = value

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Record):
            target.state = state
        elif type(target) is not collections.OrderedDict or type(state) is not dict:
            raise Refused(f"gives {shown(target)} the attributes {shown(state)}")
        # The attributes of a state dict are versions of PyTorch's layers: nothing here needs them.

    def checked_key(self, key: object) -> object:
        """A key whose hash is quick, spread and without recursion. Raises Refused for any other."""
        if not isinstance(key, str | bytes | int | float | None) or type(key) is int and abs(key) >= MAX_KEY:
            raise Refused(f"has {shown(key)} as a key; keys are strings or numbers")
        if isinstance(key, float) or isinstance(key, int) and not -SMALL_KEY < key < SMALL_KEY:
            self.large_keys += 1
            if self.large_keys > MAX_LARGE_KEYS:
                raise Refused(f"has more than {MAX_LARGE_KEYS} keys that are large numbers or fractions")
        return key

    def check_protocol(self) -> None:
        protocol = self.number(ONE)
        if not 2 <= protocol <= 5:
            raise Refused(f"has the pickle protocol {protocol}, torch.save writes 2 to 5")


VALUES: dict[bytes, Callable[[PickleReader], object]] = {
    b"N": lambda reader: None,
    b"\x88": lambda reader: True,
    b"\x89": lambda reader: False,
    b"]": lambda reader: [],
    b"}": lambda reader: {},
    b")": lambda reader: (),
    b"\x8f": lambda reader: set(),
    b"K": lambda reader: reader.number(ONE),
    b"M": lambda reader: reader.number(TWO),
    b"J": lambda reader: reader.number(SIGNED),
    b"G": lambda reader: DOUBLE.unpack(reader.take(DOUBLE.size))[0],
    b"\x8a": lambda reader: reader.integer(ONE),
    b"\x8b": lambda reader: reader.integer(FOUR),
    b"X": lambda reader: reader.text(FOUR),
    b"\x8c": lambda reader: reader.text(ONE),
    b"\x8d": lambda reader: reader.text(EIGHT),
    b"U": lambda reader: reader.old_text(ONE),
    b"T": lambda reader: reader.old_text(FOUR),
    b"C": lambda reader: reader.take(reader.number(ONE)),
    b"B": lambda reader: reader.take(reader.number(FOUR)),
    b"\x8e": lambda reader: reader.take(reader.number(EIGHT)),
    b"t": lambda reader: tuple(reader.pop_mark()),
    b"\x85": lambda reader: reader.pop_tuple(1),
    b"\x86": lambda reader: reader.pop_tuple(2),
    b"\x87": lambda reader: reader.pop_tuple(3),
    b"h": lambda reader: reader.recall(ONE),
    b"j": lambda reader: reader.recall(FOUR),
    b"c": lambda reader: symbol(reader.line(), reader.line()),
    b"\x93": PickleReader.named,
    b"R": PickleReader.called,
    b"\x81": PickleReader.called,
    b"Q": lambda reader: reader.load_persistent(reader.pop()),
}
ACTIONS: dict[bytes, Callable[[PickleReader], object]] = {
    b"\x80": PickleReader.check_protocol,
    b"\x95": lambda reader: reader.number(EIGHT),  # a frame's length
    b"(": PickleReader.mark,
    b"b": PickleReader.build,
    b"q": lambda reader: reader.remember(reader.number(ONE)),
    b"r": lambda reader: reader.remember(reader.number(FOUR)),
    b"\x94": lambda reader: reader.remember(len(reader.memo)),
    b"a": lambda reader: reader.append([reader.pop()]),
    b"e": lambda reader: reader.append(reader.pop_mark()),
    b"\x90": lambda reader: reader.add(reader.pop_mark()),
    b"s": lambda reader: reader.set_items(reader.pop_tuple(2)),
    b"u": lambda reader: reader.set_items(reader.pop_mark()),
}
