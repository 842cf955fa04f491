"""Opening a weight file of any format: what it holds for the model, and what else."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import stat
import struct
from collections.abc import Iterator
from typing import BinaryIO

from av_mae.convert.tensors import (
    MAX_DIMENSIONS,
    SAFETENSORS_TYPES,
    OpenedFile,
    Record,
    Refused,
    Storage,
    StoredTensor,
    shown,
    stored_tensor,
)
from av_mae.convert.torch_files import read_at, read_legacy, read_zip
from av_mae.errors import UserError

MAX_HEADER = 2**23  # bytes; a tensor takes about 100
LENGTH = struct.Struct("<Q")


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
    spans, tensors, opened = [], {}, OpenedFile.of(file)
    for name, fields in header.items():
        begin, end, tensors[name] = parse_tensor(opened, name, fields, start)
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


def parse_tensor(file: OpenedFile, name: str, fields: object, start: int) -> tuple[int, int, StoredTensor]:
    """Where a tensor's bytes begin and end behind byte `start`, and the tensor."""
    match fields:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(begin), int(end)], **rest} if not rest:
            pass
        case _:
            raise Refused(f"tensor {shown(name)} must have a dtype, a shape and two data_offsets, and no more")
    if kind not in SAFETENSORS_TYPES:
        raise Refused(f"tensor {shown(name)} has the type {shown(kind)}, which is not supported")
    storage = Storage(file, SAFETENSORS_TYPES[kind], end - begin, start + begin)
    try:
        tensor = stored_tensor(storage, SAFETENSORS_TYPES[kind], 0, tuple(shape), row_major(shape))
    except Refused as error:
        raise Refused(f"tensor {shown(name)}: {error}") from None
    if not 0 <= begin <= end or tensor.nbytes != end - begin:
        raise Refused(
            f"tensor {shown(name)} of {tensor.nbytes} bytes should lie at bytes {shown(begin)} to {shown(end)}"
        )
    return begin, end, tensor


def row_major(shape: list) -> tuple[int, ...]:
    """Strides of a C-contiguous array. What is no shape of a tensor is left to the check of the tensor."""
    if len(shape) > MAX_DIMENSIONS or any(type(length) is not int for length in shape):
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


# Where training programs keep the model's weights: the raw ones first, then their moving average. Also one in another.
STATE_DICTS = ("state_dict", "model", "model_state_dict", "module", "ema", "model_ema", "state_dict_ema", "teacher")
LONGEST_NAME = 1000  # characters
# What wrappers put before all names (PyTorch's distributed training, DeepSpeed, Lightning, moving averages) …
PREFIXES = ("module.", "model.", "ema.", "model_ema.", "ema_model.", "teacher.", "_forward_module.")
# … or into names anywhere: torch.compile, fully sharded training, activation checkpointing.
INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
MAX_SHARDS = 1000
# Tensors that share bytes count once each when they are read: a model may be this much larger than its file.
MAX_EXPANSION, FREE_EXPANSION = 4, 2**24
Metadata = dict[str, int | float | str]


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """What a weight file holds. Nothing but names, shapes and positions has been read of it.

    Attributes:
      path: the file.
      format: 'torch zip', 'torch legacy' or 'safetensors'; with the number of files where these are several.
      tensors: the model's by name, in the file's order, without what wrappers of the model put before or into names.
      ignored: every other entry (optimizer, scaler, …) and the bytes of tensors in it.
      metadata: numbers and strings beside the model (epoch, steps, …).
    """

    path: pathlib.Path
    format: str
    tensors: dict[str, StoredTensor]
    ignored: dict[str, int]
    metadata: Metadata


def open_weights(path: str | os.PathLike) -> WeightFile:
    """Opens a PyTorch or safetensors file, or the index of a sharded one, without trust.

    Nothing that the file names is imported or run. Time and memory are bounded whatever the file holds; tensors are
    read when they are asked for (`StoredTensor.read`).

    Raises:
      UserError: the file cannot be read, is damaged, or holds other than weights; names the file, the position and the
        cause in one line.
    """
    path = pathlib.Path(path)
    try:
        found = read_index(path) if path.name.endswith(".index.json") else read_weights(path)
        return dataclasses.replace(found, tensors=named(found.tensors))
    except (OSError, Refused) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read weights from {path}: {cause}") from error


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[BinaryIO]:
    if not stat.S_ISREG(path.stat().st_mode):
        raise Refused("it is not a file, but a folder or a device")
    with path.open("rb") as file:
        yield file


def read_weights(path: pathlib.Path) -> WeightFile:
    """The content of one file, whose format its first bytes tell; names are as they stand there."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(512)
        if head[257:262] == b"ustar":
            raise Refused("it is in the tar format of PyTorch before 0.2: load it there and save it again")
        if head[:4] in (b"PK\3\4", b"PK\5\6"):
            found = WeightFile(path, "torch zip", *split(read_zip(file, size)))
        elif head[8:9] == b"{":  # first, since a header's length may begin like a pickle
            tensors, metadata = read_safetensors(file, size)
            found = WeightFile(path, "safetensors", tensors, {}, dict(metadata))
        elif head[:1] == b"\x80":
            found = WeightFile(path, "torch legacy", *split(read_legacy(file, size)))
        else:
            raise Refused(f"it is neither a file of torch.save nor safetensors; it begins with {shown(head[:8])}")
    total = sum(tensor.nbytes for tensor in found.tensors.values())
    if total > MAX_EXPANSION * size + FREE_EXPANSION:
        raise Refused(f"its tensors take {total} bytes in memory, though the file has {size}: they repeat themselves")
    return found


def read_index(path: pathlib.Path) -> WeightFile:
    """The tensors of all files that an index names; the files lie beside the index."""
    with opened(path) as file:
        index = parse_header(read_at(file, 0, min(os.fstat(file.fileno()).st_size, MAX_HEADER), "the index"))
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise Refused("an index needs a weight_map of tensors' names to files' names")
    names = sorted(set(files.values()))
    if not 0 < len(names) <= MAX_SHARDS:
        raise Refused(f"the index names {len(names)} files, it may be 1 to {MAX_SHARDS}")
    parts = {}
    for name in names:
        if not plain_name(name) or os.path.basename(name) != name or name.endswith(".json"):
            raise Refused(f"the index names the file {shown(name)}: it must be the name of a weight file beside it")
        try:
            parts[name] = read_weights(path.with_name(name))
        except (OSError, Refused) as error:
            cause = error.strerror if isinstance(error, OSError) else error
            raise Refused(f"its file {name}: {cause}") from None
    for name, part in parts.items():
        other = next((tensor for tensor in part.tensors if files.get(tensor) != name), None)
        if other is not None:
            raise Refused(f"its file {name} has a tensor {shown(other)} that the index does not place there")
    lacking = next((tensor for tensor, name in files.items() if tensor not in parts[name].tensors), None)
    if lacking is not None:
        raise Refused(f"its file {files[lacking]} lacks the tensor {shown(lacking)}")
    tensors = {tensor: parts[name].tensors[tensor] for tensor, name in files.items()}
    ignored = {text: size for part in parts.values() for text, size in part.ignored.items()}
    return WeightFile(path, f"{parts[names[0]].format} in {len(parts)} files", tensors, ignored, {})


def split(root: object) -> tuple[dict[str, StoredTensor], dict[str, int], Metadata]:
    """A checkpoint → (tensors, ignored, metadata) of a WeightFile."""
    if not isinstance(root, dict):
        raise Refused(f"it holds {shown(root)}, not a dict of tensors")
    others: dict[str, object] = {}
    state: dict = root
    prefix = ""
    for part in where_weights_lie(root):
        others |= {f"{prefix}{text(name)}": number(value) for name, value in state.items() if name != part}
        state, prefix = state[part], f"{prefix}{part}."
    tensors = tensors_in(state)
    if not tensors:
        raise Refused("it has no tensors at its root or under any of " + ", ".join(map(repr, STATE_DICTS)))
    others = {f"{prefix}{text(name)}": value for name, value in state.items() if name not in tensors} | others
    metadata = {name: value for name, value in others.items() if isinstance(value, int | float | str)}
    ignored = {name: tensor_bytes(value) for name, value in others.items() if name not in metadata}
    return tensors, ignored, metadata


def where_weights_lie(root: dict) -> tuple[str, ...]:
    """The keys that lead to the model's tensors: none (the root itself), one, or two in each other."""
    inner = {part: root[part] for part in STATE_DICTS if isinstance(root.get(part), dict)}
    ways = [(part,) for part in inner] + [(part, other) for part in inner for other in STATE_DICTS]
    for way in ways:
        if tensors_in(inner[way[0]] if len(way) == 1 else inner[way[0]].get(way[1])):
            return way
    return ()


def tensors_in(value: object) -> dict:
    """The tensors of a dict by name; none of anything else."""
    if not isinstance(value, dict):
        return {}
    return {name: tensor for name, tensor in value.items() if isinstance(tensor, StoredTensor)}


def plain_name(name: object) -> bool:
    return isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable()


def text(name: object) -> str:
    return str(name) if plain_name(name) else shown(name)


def number(value: object) -> object:
    """A tensor of one number beside the model (a count of steps) as that number; other values as they are."""
    return value.read().item() if isinstance(value, StoredTensor) and value.shape == () else value


def named(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors with their names, without what wrappers of the model put there. Raises Refused for odd names."""
    result = {}
    for name, tensor in tensors.items():
        if not plain_name(name):
            raise Refused(
                f"a tensor has the name {shown(name)}: names must be of at most {LONGEST_NAME} printable characters"
            )
        for infix in INFIXES:
            name = name.removeprefix(infix).replace(f".{infix}", ".")
        result[name] = tensor
    while result:
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in result)), None)
        if prefix is None:
            break
        result = {name.removeprefix(prefix): tensor for name, tensor in result.items()}
    if len(result) < len(tensors):
        raise Refused("two tensors have the same name, apart from what wrappers of the model put into names")
    return {name: dataclasses.replace(tensor, name=name) for name, tensor in result.items()}


def tensor_bytes(value: object) -> int:
    """Bytes of all tensors in an object, each once, however it is nested."""
    seen: set[int] = set()
    total, pending = 0, [value]
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
