"""Tensors that still lie in their file, and what a pickle of PyTorch may name besides.

Tensors are checked when their file is opened, and read when they are asked for.
"""

import collections
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import BinaryIO

import ml_dtypes
import numpy as np

from av_mae.errors import UserError

LONGEST = 80  # characters of a name in a message


class Refused(Exception):
    """A rule that the file breaks: where in the file, and the cause, in one line."""


def shown(value: object) -> str:
    """A value out of a file for a message: on one line, and of a length that the file does not decide."""
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= LONGEST else f"{value[:LONGEST]!r}…"
    if isinstance(value, int) and abs(value) >= 2**64 or not isinstance(value, int | float | None):
        return f"an object of type {type(value).__name__}"
    return repr(value)


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Names of dtypes in safetensors.
SAFETENSORS_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_DIMENSIONS = 8  # weights have 5 at most
LIMIT = 2**63  # sizes and offsets are signed 64-bit numbers in every format here


@dataclasses.dataclass(frozen=True, slots=True)
class OpenedFile:
    """A file as it was when it was opened: `identity` differs once another file, or another content, is there."""

    path: pathlib.Path
    identity: tuple[int, int, int]

    @classmethod
    def of(cls, file: BinaryIO) -> "OpenedFile":
        about = os.fstat(file.fileno())
        return cls(pathlib.Path(file.name), (about.st_dev, about.st_ino, about.st_mtime_ns))

    def open(self) -> BinaryIO:
        """The same file, opened again. Raises OSError where it is not there or not the same."""
        file = open(self.path, "rb")
        if OpenedFile.of(file) != self:
            file.close()
            raise OSError("another file, or another content, has taken its place")
        return file


@dataclasses.dataclass(slots=True)
class Storage:
    """A run of bytes in a file. `dtype` is `None` where the bytes have no type of their own.

    `offset` is where they start; the legacy format tells it only after the tensors.
    """

    file: OpenedFile
    dtype: np.dtype | None
    nbytes: int
    offset: int = 0
    byteorder: str = "little"


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: `offset` and `strides` count elements of `dtype` (native byte order) in its storage."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    storage: Storage
    offset: int
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory once it is read."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Its values: C-contiguous, in memory of their own, native byte order. Reads no other bytes of the file.

        Raises:
          UserError: the file cannot be read any more, or has been replaced or shortened since it was opened.
        """
        if self.size == 0:
            return np.empty(self.shape, self.dtype)
        try:
            with self.storage.file.open() as file:
                values = self._read_run(file) if self._is_run() else self._read_strided(file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.storage.file.path}: tensor {shown(self.name)} cannot be read, though it was there when "
                f"the file was opened: {error}"
            ) from error
        if self.storage.byteorder != sys.byteorder and self.dtype.itemsize > 1:
            values.view(f"u{self.dtype.itemsize}").byteswap(inplace=True)
        if self.dtype == np.bool_:
            return values.view(np.uint8) != 0  # any byte but 0 and 1 would be neither true nor false to NumPy
        return values

    def _start(self) -> int:
        return self.storage.offset + self.offset * self.dtype.itemsize

    def _is_run(self) -> bool:
        """Whether the elements lie in the file one after another in the order of the shape."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length > 1 and stride != expected:
                return False
            expected *= length
        return True

    def _read_run(self, file: BinaryIO) -> np.ndarray:
        values = np.fromfile(file, np.uint8, self.nbytes, offset=self._start())
        if len(values) < self.nbytes:
            raise OSError(f"{len(values)} bytes are left of its {self.nbytes}")
        return values.view(self.dtype).reshape(self.shape)

    def _read_strided(self, file: BinaryIO) -> np.ndarray:
        """Through a memory map: the elements in between are never in memory of this process."""
        strides = tuple(stride if length > 1 else 0 for length, stride in zip(self.shape, self.strides, strict=True))
        span = 1 + sum((length - 1) * stride for length, stride in zip(self.shape, strides, strict=True))
        width = self.dtype.itemsize
        mapped = np.memmap(file, np.uint8, "r", self._start(), (span * width,))
        view = np.ndarray(self.shape, self.dtype, mapped, strides=tuple(stride * width for stride in strides))
        return view.copy(order="C")


def stored_tensor(
    storage: Storage, dtype: np.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> StoredTensor:
    """A tensor without a name. Raises Refused unless its shape is sound and every element lies in its storage."""
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise Refused(
            f"a tensor needs as many strides as dimensions, at most {MAX_DIMENSIONS}; it has {len(shape)} "
            f"dimensions and {len(strides)} strides"
        )
    for number in (offset, *shape, *strides):
        if type(number) is not int or not 0 <= number < LIMIT:
            raise Refused(
                "offset, shape and strides of a tensor must be whole numbers from 0 to 2^63 - 1, "
                f"one is {shown(number)}"
            )
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= LIMIT:
        raise Refused(f"the shape {shape} of a tensor overflows 2^63 bytes")
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.nbytes // dtype.itemsize:
        raise Refused(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} reaches element {last} of a "
            f"storage that has {storage.nbytes // dtype.itemsize}"
        )
    return StoredTensor("", shape, dtype, storage, offset, strides)


Tensors = Mapping[str, StoredTensor]

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
