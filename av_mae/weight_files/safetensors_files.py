"""The safetensors format, read with its rules enforced and errors that name the tensor.

The package of this name is not used for reading: 0.8 takes duplicate names, needs bfloat16 to be known to NumPy, and
names no tensor in its errors. The header is small; the tensors are read like those of any other file.
Source: the format's description in the safetensors repository.
"""

import json
import math
import struct
from typing import BinaryIO

import numpy as np

from av_mae.weight_files.refusals import Refused, shown
from av_mae.weight_files.tensors import BFLOAT16, Storage, StoredTensor, stored_tensor
from av_mae.weight_files.zip_directory import read_at

MAX_HEADER = 2 ** 23  # bytes; a tensor takes about 100
LENGTH = struct.Struct("<Q")
TYPES = {name: np.dtype(dtype) for name, dtype in {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": BFLOAT16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.bool_}.items()}


def read_safetensors(file: BinaryIO, size: int) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors by name and metadata of a safetensors file of `size` bytes. Raises Refused."""
    length, = LENGTH.unpack(read_at(file, 0, LENGTH.size, "the header's length"))
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
        raise Refused(f"tensor {shown(name)} of {tensor.nbytes} bytes should lie at bytes {shown(begin)} "
                      f"to {shown(end)}")
    return begin, end, tensor


def row_major(shape: list) -> tuple[int, ...]:
    """Strides of a C-contiguous array. A shape that is none is left to the check of the tensor."""
    if any(type(length) is not int for length in shape):
        return tuple(shape)
    return tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))


def check_gapless(spans: list[tuple[int, int, str]], size: int) -> None:
    """Raises Refused unless the tensors fill the `size` bytes behind the header one after another."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise Refused(f"tensor {shown(name)} starts at byte {begin} of the data, where {position} was due: "
                          "tensors overlap or leave gaps")
        position = end
    if position != size:
        raise Refused(f"the tensors take {position} bytes, the file has {size} for them: it is truncated or damaged")
