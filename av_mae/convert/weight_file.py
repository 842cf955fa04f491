"""Opening a weight file of any format: what it holds for the model, and what else."""

import dataclasses
import json
import math
import os
import pathlib
import stat
import struct
from typing import BinaryIO

import numpy as np

from av_mae.convert.pickles import Record
from av_mae.convert.tensors import BFLOAT16, Refused, Storage, StoredTensor, shown, stored_tensor
from av_mae.convert.torch_files import read_at, read_legacy, read_zip
from av_mae.errors import UserError

MAX_HEADER = 2**23  # bytes; a tensor takes about 100
LENGTH = struct.Struct("<Q")
TYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": BFLOAT16,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


def read_safetensors(file: BinaryIO, size: int) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors by name and metadata of a safetensors file of `size` bytes. Raises Refused."""
    (length,) = LENGTH.unpack(read_at(file, 0, LENGTH.size, "the header's length"))
    if length > min(MAX_HEADER, size - LENGTH.size):
        raise Refused(f"the header should have {length} bytes: the file has {size}, and headers {MAX_HEADER} at most")
    header = parse_header(read_at(file, LENGTH.size, length, "the header"))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise Refused("__metadata__ must be a dict of strings")
    start = LENGTH.size + length
    spans, tensors = [], {}
    for name, fields in header.items():
        begin, end, tensors[name] = parse_tensor(file.name, name, fields, start)
        spans.append((begin, end, name))
    check_gapless(spans, size - start)
    return tensors, metadata


def parse_header(text: bytes) -> dict:
    """The JSON object in the header."""
    try:
        header = json.loads(text.decode(), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the header is not JSON: {shown(str(error))}") from None
    if not isinstance(header, dict):
        raise Refused(f"the header must be a JSON object, it is {shown(header)}")
    return header


def unique_names(pairs: list[tuple[str, object]]) -> dict:
    result = {}
    for name, value in pairs:
        if name in result:
            raise Refused(f"the header has the name {shown(name)} twice in one object")
        result[name] = value
    return result


def parse_tensor(path: str, name: str, fields: object, start: int) -> tuple[int, int, StoredTensor]:
    """Where a tensor's bytes begin and end behind byte `start`, and the tensor."""
    match fields:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if len(fields) == 3:
            pass
        case _:
            raise Refused(f"tensor {shown(name)} must have a dtype, a shape and two data_offsets, and no more")
    if kind not in TYPES:
        raise Refused(f"tensor {shown(name)} has the type {shown(kind)}, which is not supported")
    storage = Storage(path, TYPES[kind], end - begin, start + begin)
    try:
        tensor = stored_tensor(storage, TYPES[kind], 0, tuple(shape), row_major(shape))
    except Refused as error:
        raise Refused(f"tensor {shown(name)}: {error}") from None
    if not 0 <= begin <= end or tensor.nbytes != end - begin:
        raise Refused(
            f"tensor {shown(name)} of {tensor.nbytes} bytes should lie at bytes {shown(begin)} to {shown(end)}"
        )
    return begin, end, tensor


def row_major(shape: list) -> tuple[int, ...]:
    """Strides of a C-contiguous array. A shape that is none is left to the check of the tensor."""
    if any(type(length) is not int for length in shape):
        return tuple(shape)
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def check_gapless(spans: list[tuple[int, int, str]], size: int) -> None:
    """Raises Refused unless the tensors fill the `size` bytes behind the header one after another."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise Refused(
                f"tensor {shown(name)} starts at byte {begin} of the data, where {position} was due: "
                "tensors overlap or leave gaps"
            )
        position = end
    if position != size:
        raise Refused(f"the tensors take {position} bytes, the file has {size} for them: it is truncated or damaged")


STATE_DICTS = ("state_dict", "model", "model_state_dict")  # where training programs keep the model's
LONGEST_NAME = 1000  # characters
DISTRIBUTED = "module."  # the prefix that PyTorch's distributed training puts before all names
# Tensors that share bytes count once each when they are read: a model may be this much larger than its file.
MAX_EXPANSION, FREE_EXPANSION = 4, 2**24


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """What a weight file holds. Nothing but names, shapes and places has been read of it.

    Attributes:
      path: the file.
      format: 'torch zip', 'torch legacy' or 'safetensors'.
      tensors: the model's by name, in the file's order, without a 'module.' that all names begin with.
      ignored: every other entry (optimizer, scaler, …) and the bytes of tensors in it.
      metadata: numbers and strings beside the model (epoch, steps, …).
    """

    path: pathlib.Path
    format: str
    tensors: dict[str, StoredTensor]
    ignored: dict[str, int]
    metadata: dict[str, int | float | str]


def open_weights(path: str | os.PathLike) -> WeightFile:
    """Opens a PyTorch or safetensors file without trust: nothing that it names is imported or run.

    Time and memory are bounded whatever the file holds; tensors are read when asked for (`StoredTensor.read`).

    Raises:
      UserError: the file cannot be read, is damaged, or holds other than weights; names the file, the place and the
        cause in one line.
    """
    path = pathlib.Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Refused("it is not a file, but a folder or a device")
        with path.open("rb") as file:
            return read_weights(file, path)
    except (OSError, Refused) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read weights from {path}: {cause}") from error


def read_weights(file: BinaryIO, path: pathlib.Path) -> WeightFile:
    """The content of an open file, whose format its first bytes tell."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(512)
    if head[257:262] == b"ustar":
        raise Refused("it is in the tar format of PyTorch before 0.2: load it there and save it again")
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        found = WeightFile(path, "torch zip", *split(read_zip(file, size)))
    elif head[8:9] == b"{":  # first, since a header's length may begin like a pickle
        tensors, metadata = read_safetensors(file, size)
        found = WeightFile(path, "safetensors", named(tensors), {}, metadata)
    elif head[:1] == b"\x80":
        found = WeightFile(path, "torch legacy", *split(read_legacy(file, size)))
    else:
        raise Refused(f"it is neither a file of torch.save nor safetensors; it begins with {shown(head[:8])}")
    total = sum(tensor.nbytes for tensor in found.tensors.values())
    if total > MAX_EXPANSION * size + FREE_EXPANSION:
        raise Refused(f"its tensors take {total} bytes in memory, though the file has {size}: they repeat themselves")
    return found


def split(root: object) -> tuple[dict[str, StoredTensor], dict[str, int], dict[str, int | float | str]]:
    """A checkpoint → (tensors, ignored, metadata) of a WeightFile."""
    if not isinstance(root, dict):
        raise Refused(f"it holds {shown(root)}, not a dict of tensors")
    part = next((name for name in STATE_DICTS if tensors_in(root.get(name))), None)
    state = root if part is None else root[part]
    tensors = tensors_in(state)
    if not tensors:
        raise Refused("it has no tensors at its root or under any of " + ", ".join(map(repr, STATE_DICTS)))
    others = {
        f"{part}.{text(name)}" if part else text(name): value for name, value in state.items() if name not in tensors
    }
    if part is not None:
        others |= {text(name): number(value) for name, value in root.items() if name != part}
    metadata = {name: value for name, value in others.items() if isinstance(value, int | float | str)}
    ignored = {name: tensor_bytes(value) for name, value in others.items() if name not in metadata}
    return named(tensors), ignored, metadata


def tensors_in(value: object) -> dict[object, StoredTensor]:
    """The tensors of a dict by name; none of anything else."""
    if not isinstance(value, dict):
        return {}
    return {name: tensor for name, tensor in value.items() if isinstance(tensor, StoredTensor)}


def plain_name(name: object) -> bool:
    return isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable()


def text(name: object) -> str:
    return name if plain_name(name) else shown(name)


def number(value: object) -> object:
    """A tensor of one number beside the model (a count of steps) as that number; other values as they are."""
    return value.read().item() if isinstance(value, StoredTensor) and value.shape == () else value


def named(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors with their names, without a common prefix of distributed training. Raises Refused for odd names."""
    for name in tensors:
        if not plain_name(name):
            raise Refused(
                f"a tensor has the name {shown(name)}: names must be of at most {LONGEST_NAME} printable characters"
            )
    prefix = DISTRIBUTED if tensors and all(name.startswith(DISTRIBUTED) for name in tensors) else ""
    return {
        short: dataclasses.replace(tensor, name=short)
        for short, tensor in ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items())
    }


def tensor_bytes(value: object) -> int:
    """Bytes of all tensors in an object, each once, however it is nested."""
    total, seen, pending = 0, set(), [value]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, StoredTensor):
            total += value.nbytes
        elif isinstance(value, Record):
            pending += [value.arguments, value.items, value.state]
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
    return total
