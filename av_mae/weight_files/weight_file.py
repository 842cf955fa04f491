"""Opening a weight file of any format: what it holds for the model, and what else."""

import dataclasses
import os
import pathlib
import stat
from typing import BinaryIO

from av_mae.errors import UserError
from av_mae.weight_files.refusals import Refused, shown
from av_mae.weight_files.safetensors_files import read_safetensors
from av_mae.weight_files.tensors import StoredTensor
from av_mae.weight_files.torch_files import read_legacy, read_zip
from av_mae.weight_files.torch_objects import Record

STATE_DICTS = ("state_dict", "model", "model_state_dict")  # where training programs keep the model's
LONGEST_NAME = 1000  # characters
DISTRIBUTED = "module."  # the prefix that PyTorch's distributed training puts before all names
# Tensors that share bytes count once each when they are read: a model may be this much larger than its file.
MAX_EXPANSION, FREE_EXPANSION = 4, 2 ** 24


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
    others = {f"{part}.{text(name)}" if part else text(name): value
              for name, value in state.items() if name not in tensors}
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
            raise Refused(f"a tensor has the name {shown(name)}: names must be of at most {LONGEST_NAME} printable "
                          "characters")
    prefix = DISTRIBUTED if tensors and all(name.startswith(DISTRIBUTED) for name in tensors) else ""
    return {short: dataclasses.replace(tensor, name=short)
            for short, tensor in ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items())}


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
