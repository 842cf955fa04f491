"""The files of `torch.save`: zip archives, and the format from before PyTorch 1.6 (here 'legacy')."""

import struct
from typing import BinaryIO

from av_mae.weight_files.pickles import MAX_BYTES, PickleReader
from av_mae.weight_files.refusals import Refused, shown
from av_mae.weight_files.tensors import Storage
from av_mae.weight_files.torch_objects import storage_request
from av_mae.weight_files.zip_directory import Entry, read_at, read_directory

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
LEGACY_COUNT = struct.Struct("<q")  # of elements, in front of a storage


def read_zip(file: BinaryIO, size: int) -> object:
    """The object in a PyTorch zip file, its tensors still in the file. Raises Refused."""
    entries = read_directory(file, size)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise Refused(f"a PyTorch zip file has one entry NAME/data.pkl, this one has {len(pickles)}")
    folder = pickles[0].removesuffix("data.pkl")
    for name in entries:
        if not name.startswith(folder):
            raise Refused(f"zip entry {shown(name)} lies outside the archive's folder {shown(folder)}")
    if f"{folder}constants.pkl" in entries:
        raise Refused("it is a TorchScript archive, which holds code: save the model's state_dict instead")
    byteorder = read_byteorder(file, entries, folder)
    storages: dict[str, Storage] = {}

    def load_persistent(request: object) -> Storage:
        key, dtype, nbytes = storage_request(request)
        entry = entries.get(f"{folder}data/{key}")
        if entry is None or entry.size != nbytes:
            has = f"has {entry.size}" if entry else "is not there"
            raise Refused(f"asks for storage {shown(key)} of {nbytes} bytes, but its zip entry {has}")
        storage = storages.setdefault(key, Storage(file.name, dtype, nbytes, entry.offset, byteorder))
        return same_type(storage, key, dtype)

    data = read_small(file, entries[pickles[0]], "data.pkl", MAX_BYTES)
    return PickleReader(data, "data.pkl", load_persistent).load()


def same_type(storage: Storage, key: str, dtype) -> Storage:
    if storage.dtype != dtype:
        raise Refused(f"asks for storage {shown(key)} as {dtype}, but before as {storage.dtype}")
    return storage


def read_small(file: BinaryIO, entry: Entry, name: str, limit: int) -> bytes:
    """The bytes of an entry that is held in memory as a whole."""
    if entry.size > limit:
        raise Refused(f"{name} has {entry.size} bytes, more than {limit}")
    return read_at(file, entry.offset, entry.size, name)


def read_byteorder(file: BinaryIO, entries: dict[str, Entry], folder: str) -> str:
    """'little' or 'big'; files of PyTorch before 2.1 do not say, and are little."""
    name = f"{folder}byteorder"
    if name not in entries:
        return "little"
    order = read_small(file, entries[name], "byteorder", limit=6)
    if order not in (b"little", b"big"):
        raise Refused(f"byteorder is {shown(order)}, it must be 'little' or 'big'")
    return order.decode()


def read_legacy(file: BinaryIO, size: int) -> object:
    """The object in a file from before PyTorch 1.6, its tensors still in the file. Raises Refused.

    The file is a row of pickles (magic number, protocol, the writer's machine, the object, the storages' keys in
    order) and then the storages, each behind the number of its elements.
    """
    storages: dict[str, Storage] = {}

    def load_persistent(request: object) -> Storage:
        key, dtype, nbytes = storage_request(request)
        storage = storages.setdefault(key, Storage(file.name, dtype, nbytes))
        if storage.nbytes != nbytes:
            raise Refused(f"asks for storage {shown(key)} of {nbytes} bytes, but before of {storage.nbytes}")
        return same_type(storage, key, dtype)

    reader = PickleReader(read_at(file, 0, min(size, MAX_BYTES), "the pickles"), "pickle", load_persistent)
    if reader.load() != LEGACY_MAGIC or reader.load() != LEGACY_PROTOCOL:
        raise Refused("it is a pickle, but not a file of torch.save: it lacks its magic number or protocol version")
    machine = reader.load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Refused("it comes from a big-endian machine, or does not say from which: save it again as a zip file")
    result, keys = reader.load(), reader.load()
    place_storages(file, size, reader.position, storages, keys)
    return result


def place_storages(file: BinaryIO, size: int, position: int, storages: dict[str, Storage], keys: object) -> None:
    """Sets where each storage lies, from byte `position` of the file on."""
    if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys) or len(keys) != len(set(keys)):
        raise Refused("the list of storages is not a list of different names")
    if set(keys) != storages.keys():
        raise Refused(f"the list of storages has {len(keys)} names, other than the {len(storages)} that tensors need")
    for key in keys:
        storage = storages[key]
        count, = LEGACY_COUNT.unpack(read_at(file, position, LEGACY_COUNT.size, f"storage {shown(key)}"))
        width = storage.dtype.itemsize if storage.dtype else 1
        storage.offset = position + LEGACY_COUNT.size
        position = storage.offset + storage.nbytes
        if count * width != storage.nbytes or position > size:
            raise Refused(f"storage {shown(key)} should have {storage.nbytes // width} elements; at byte "
                          f"{storage.offset} its header says {count}, and {size - storage.offset} bytes are left")
    if position != size:
        raise Refused(f"{size - position} bytes follow the last storage: the file is damaged, or two in one")
