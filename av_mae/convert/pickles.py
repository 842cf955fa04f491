"""An interpreter of pickles that builds data and nothing else.

It knows the opcodes with which `torch.save` writes (pickle protocols 2 to 5) and refuses all others by name. It makes
numbers, strings, bytes, lists, tuples, dicts and sets by itself; names, calls and storages go through
`torch_objects`, which imports and runs nothing. Bytes and steps are limited, so that no file can take much time or
memory, and nothing here recurses.
"""

import collections
import dataclasses
import pickletools
import struct
import sys
from collections.abc import Callable

import numpy as np

from av_mae.convert.tensors import BFLOAT16, Refused, Storage, StoredTensor, shown, stored_tensor

STORAGE_TYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": BFLOAT16,
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.UntypedStorage": None,
    "torch.storage.UntypedStorage": None,
}
# Types without a storage class of their own: their storages are untyped and the tensor names the type.
TENSOR_TYPES = {f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")}
# Calls of these make a Record: what was called and with what, nothing is run.
RECORDS = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "collections.Counter",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.Metadata",
    "omegaconf.base.ContainerMetadata",
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    ),
    "easydict.EasyDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    *(f"pathlib.{kind}Path" for kind in ("Posix", "PurePosix", "Windows", "PureWindows")),
    "builtins.bytearray",
    "builtins.complex",
    "builtins.frozenset",
    "builtins.set",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "torch.Size",
    "torch.device",
}
# Names of Python's own library that occur without being called.
TYPES = {
    "typing.Any",
    *(
        f"builtins.{kind}"
        for kind in (
            "bool",
            "bytes",
            "dict",
            "float",
            "int",
            "list",
            "long",
            "object",
            "str",
            "tuple",
            "type",
            "unicode",
        )
    ),
}
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # since Python 2


@dataclasses.dataclass(frozen=True, slots=True)
class Symbol:
    """A dotted name in a pickle; it stands for nothing."""

    name: str


@dataclasses.dataclass(eq=False, slots=True)
class Record:
    """An object of a known harmless class, as data."""

    name: str
    arguments: tuple
    items: dict = dataclasses.field(default_factory=dict)
    state: object = None


def symbol(module: str, name: str) -> Symbol:
    """A name as data. Raises Refused for names of Python's own library that no weight file needs."""
    full = f"{RENAMED.get(module, module)}.{name}"
    known = full in TYPES or full in RECORDS or full in BUILDERS
    if not known and full.partition(".")[0] in sys.stdlib_module_names:
        raise Refused(f"names {shown(full)}, which no weight file needs; nothing of it was run")
    return Symbol(full)


def call(function: object, arguments: object) -> object:
    """What a call in a pickle makes here: a tensor, plain data or a Record. Raises Refused for all other calls."""
    if not isinstance(function, Symbol) or type(arguments) is not tuple:
        raise Refused(f"calls {shown(function)} with {shown(arguments)}: only names can be called, with a tuple")
    if function.name in BUILDERS:
        return BUILDERS[function.name](arguments)
    if function.name in RECORDS:
        return Record(function.name, arguments)
    raise Refused(
        f"calls {shown(function.name)}, which is not among the few names that weight files need; nothing of "
        "it was run. Save a plain state_dict of dense tensors instead"
    )


def rebuild_tensor(arguments: tuple) -> StoredTensor:
    """(storage, offset, shape, strides, …) → tensor of the storage's type."""
    match arguments:
        case (Storage(dtype=np.dtype() as dtype) as storage, offset, tuple(shape), tuple(strides), *_):
            return stored_tensor(storage, dtype, offset, shape, strides)
    raise Refused("a tensor is made from other than a typed storage, offset, shape and strides")


def rebuild_typed_tensor(arguments: tuple) -> StoredTensor:
    """(storage, offset, shape, strides, requires_grad, hooks, type, …) → tensor of that type."""
    match arguments:
        case (Storage() as storage, offset, tuple(shape), tuple(strides), _, _, Symbol(name=name), *_):
            if name not in TENSOR_TYPES:
                raise Refused(f"a tensor has the type {shown(name)}, which is not supported")
            return stored_tensor(storage, TENSOR_TYPES[name], offset, shape, strides)
    raise Refused("a tensor is made from other than storage, offset, shape, strides, two flags and a type")


def rebuild_parameter(arguments: tuple) -> StoredTensor:
    """(tensor, requires_grad, …) → the tensor."""
    match arguments:
        case (StoredTensor() as tensor, *_):
            return tensor
    raise Refused("a parameter is made from other than a tensor")


def ordered_dict(arguments: tuple) -> dict:
    """An empty one: its items follow as opcodes."""
    if arguments:
        raise Refused("an OrderedDict is made from items at once, as Python 2 did: save the file with Python 3")
    return collections.OrderedDict()


def default_dict(arguments: tuple) -> dict:
    """A plain dict; what it was to be filled with by default is dropped."""
    if len(arguments) > 1:
        raise Refused("a defaultdict is made from more than its default")
    return {}


BUILDERS: dict[str, Callable[[tuple], object]] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_typed_tensor,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "collections.OrderedDict": ordered_dict,
    "collections.defaultdict": default_dict,
}


def storage_request(request: object) -> tuple[str, np.dtype | None, int]:
    """Key, type and bytes of the storage that a persistent id asks for."""
    match request:
        case ("storage", Symbol(name=name), str(key), _, int(count)) | (
            "storage",
            Symbol(name=name),
            str(key),
            _,
            int(count),
            None,
        ):
            if name not in STORAGE_TYPES:
                raise Refused(f"asks for a storage of the type {shown(name)}, which is not supported")
            if not 0 <= count < 2**56:
                raise Refused(f"asks for storage {shown(key)} of {shown(count)} elements")
            dtype = STORAGE_TYPES[name]
            return key, dtype, count * (dtype.itemsize if dtype else 1)
    raise Refused("has a persistent id that is not ('storage', type, key, device, elements)")


MAX_BYTES = 2**25  # of all pickles of a file; a model of 1,000 tensors with its optimizer needs 2 ** 20
MAX_STEPS = 500_000  # opcodes of all pickles of a file; a tensor takes about 40
MAX_INTEGER = 64  # bytes
MAX_NAME = 1024  # bytes of a line with a name
MAX_KEY = 2**61 - 1  # larger whole numbers share hashes, which makes dicts slow

ONE, TWO, FOUR, EIGHT = (struct.Struct(f"<{kind}") for kind in "BHIQ")
SIGNED, DOUBLE = struct.Struct("<i"), struct.Struct(">d")


class PickleReader:
    """Interprets the pickles in `data`, one after another.

    Args:
      data: the bytes, of which the pickles are the beginning.
      place: what messages call them.
      load_persistent: gives what a persistent id stands for, or raises Refused.
    """

    def __init__(self, data: bytes, place: str, load_persistent: Callable[[object], object]):
        self.data, self.place, self.load_persistent = data, place, load_persistent
        self.position = self.steps = 0
        self.stack, self.marks, self.memo = [], [], {}

    def load(self) -> object:
        """The object of the next pickle. Raises Refused with the place of the opcode and the cause."""
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
            opcode = pickletools.code2op.get(chr(self.data[start])) if start < len(self.data) else None
            near = f", after {shown(self.stack[-1])}" if self.stack and isinstance(self.stack[-1], str) else ""
            raise Refused(
                f"{self.place}, byte {start} ({opcode.name if opcode else 'no opcode'}{near}): {error}"
            ) from None

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

    def number(self, kind: struct.Struct) -> int | float:
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
        target.update(map(checked_key, items))

    def set_items(self, items: tuple | list) -> None:
        target = self.top()
        target = target.items if isinstance(target, Record) else target
        if not isinstance(target, dict) or len(items) % 2:
            raise Refused(f"sets {len(items)} keys and values in {shown(target)}, it takes pairs and a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if checked_key(key) in target:
                raise Refused(f"has the key {shown(key)} twice in one dict")
            target[key] = value

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Record):
            target.state = state
        elif type(target) is not collections.OrderedDict or type(state) is not dict:
            raise Refused(f"gives {shown(target)} the attributes {shown(state)}")
        # The attributes of a state dict are versions of PyTorch's layers: nothing here needs them.

    def check_protocol(self) -> None:
        protocol = self.number(ONE)
        if not 2 <= protocol <= 5:
            raise Refused(f"has the pickle protocol {protocol}, torch.save writes 2 to 5")


def checked_key(key: object) -> object:
    """A key whose hash is quick, spread and without recursion. Raises Refused for any other."""
    if type(key) is int and abs(key) >= MAX_KEY or not isinstance(key, str | bytes | int | float | None):
        raise Refused(f"has {shown(key)} as a key; keys are strings or numbers")
    return key


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
    b"G": lambda reader: reader.number(DOUBLE),
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
ACTIONS: dict[bytes, Callable[[PickleReader], None]] = {
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
