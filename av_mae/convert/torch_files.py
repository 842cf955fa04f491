"""The files of `torch.save`: zip archives, and the format from before PyTorch 1.6 (here 'legacy')."""

import struct
from typing import BinaryIO, NamedTuple

from av_mae.convert.pickles import MAX_BYTES, PickleReader
from av_mae.convert.tensors import OpenedFile, Refused, Storage, shown, storage_request

MAX_DIRECTORY = 2**23  # bytes; PyTorch writes about 70 for each storage
LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END_64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR_64 = struct.Struct("<4sIQI")
ENCRYPTED, SIZES_FOLLOW = 1, 8  # bits of an entry's flags
IN_EXTRA = 0xFFFFFFFF  # stands for a number that does not fit into 32 bits


class Entry(NamedTuple):
    """Where an entry lies in the file: its local header, its bytes and their number."""

    header: int
    offset: int
    size: int


def read_directory(file: BinaryIO, size: int) -> dict[str, Entry]:
    """Entries of a zip file of `size` bytes by name. Raises Refused for whatever PyTorch would not have written."""
    position, length, count, end = find_directory(file, size)
    if length > MAX_DIRECTORY:
        raise Refused(f"the zip directory has {length} bytes, more than {MAX_DIRECTORY}")
    if position + length != end:
        raise Refused(
            f"the zip directory should end where its end record starts, at byte {end}, "
            f"but lies at bytes {position} to {position + length}"
        )
    data = read_at(file, position, length, "the zip directory")
    entries: dict[str, Entry] = {}
    offset = 0
    while offset < length:
        name, header, sizes, offset = central_header(data, offset)
        if name in entries:
            raise Refused(f"the zip directory has the entry {shown(name)} twice")
        entries[name] = local_entry(file, name, header, *sizes)
    if len(entries) != count:
        raise Refused(f"the zip directory has {len(entries)} entries, its end record says {count}")
    check_apart(entries, position)
    return entries


def read_at(file: BinaryIO, offset: int, length: int, what: str) -> bytes:
    """`length` bytes at `offset`. Raises Refused when the file ends before."""
    file.seek(offset)
    data = file.read(length)
    if len(data) < length:
        raise Refused(f"the file ends within {what} ({length} bytes at byte {offset}): it is truncated or damaged")
    return data


def find_directory(file: BinaryIO, size: int) -> tuple[int, int, int, int]:
    """Start, length and entries of the directory, and where its end record starts."""
    start = size - END.size
    data = read_at(file, max(start, 0), END.size, "the zip end record")
    signature, disk, first_disk, here, count, length, position, comment = END.unpack(data)
    if signature != b"PK\5\6" or comment:
        raise Refused("the zip end record is not at the end of the file: it is truncated or something was appended")
    if start >= LOCATOR_64.size:
        locator = LOCATOR_64.unpack(read_at(file, start - LOCATOR_64.size, LOCATOR_64.size, "the zip64 locator"))
        if locator[0] == b"PK\6\7":
            start = locator[2]
            record = END_64.unpack(read_at(file, min(start, size), END_64.size, "the zip64 end record"))
            signature, _, _, _, disk, first_disk, here, count, length, position = record
            if signature != b"PK\6\6" or start + END_64.size + LOCATOR_64.size + END.size != size:
                raise Refused(f"the zip64 end record is not at byte {start}, where its locator says")
    if (disk, first_disk) != (0, 0) or here != count:
        raise Refused("the zip file is split over several disks")
    return position, length, count, start


def central_header(data: bytes, offset: int) -> tuple[str, tuple, tuple[int, int], int]:
    """Name, (flags, method), (where the local header lies, size of the entry) and the next header's offset."""
    if offset + CENTRAL.size > len(data):
        raise Refused(f"the zip directory ends within a header, at its byte {offset}")
    fields = CENTRAL.unpack_from(data, offset)
    (signature, *_), (flags, method), (packed, size), lengths = fields[:1], fields[3:5], fields[8:10], fields[10:13]
    disk, local = fields[13], fields[16]
    if signature != b"PK\1\2":
        raise Refused(f"the zip directory has no header at its byte {offset}")
    start = offset + CENTRAL.size
    middle, end = start + lengths[0], start + sum(lengths)
    name, extra = data[start:middle], data[middle : middle + lengths[1]]
    if end > len(data):
        raise Refused(f"the zip directory ends within a header, at its byte {offset}")
    size, packed, local = wide_numbers(extra, (size, packed, local))
    checked = check_name(name)
    if flags & ENCRYPTED or method != 0 or packed != size or disk != 0:
        raise Refused(
            f"zip entry {shown(checked)} is compressed, encrypted or on another disk; PyTorch stores entries "
            f"as they are (method {method}, {packed} bytes for {size})"
        )
    return checked, (flags, method), (local, size), end


def wide_numbers(extra: bytes, numbers: tuple[int, int, int]) -> list[int]:
    """Replaces those numbers of a header that do not fit into 32 bits by those of its zip64 field."""
    wide = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = [number for (number,) in struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8])]
            break
        extra = extra[4 + length :]
    if len(wide) < numbers.count(IN_EXTRA):
        raise Refused("a header of the zip directory lacks its 64-bit sizes")
    return [wide.pop(0) if number == IN_EXTRA else number for number in numbers]


def check_name(raw: bytes) -> str:
    """The name of an entry. Raises Refused when it could mean a file outside the archive."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise Refused(f"the name of zip entry {shown(raw)} is not UTF-8") from None
    parts = name.split("/")
    if ".." in parts or "" in parts or "\\" in name or ":" in parts[0] or "\0" in name:
        raise Refused(f"zip entry {shown(name)} must be a plain relative name, without '..'")
    return name


def local_entry(file: BinaryIO, name: str, header: tuple, local: int, size: int) -> Entry:
    """The entry behind its local header, which must agree with the directory."""
    what = f"the header of zip entry {shown(name)}"
    signature, _, flags, method, _, _, _, packed, unpacked, name_length, extra_length = LOCAL.unpack(
        read_at(file, local, LOCAL.size, what)
    )
    raw = file.read(name_length)
    unknown = (IN_EXTRA, 0) if flags & SIZES_FOLLOW else (IN_EXTRA,)
    if (
        signature != b"PK\3\4"
        or (flags, method) != header
        or raw != name.encode()
        or packed not in (size, *unknown)
        or unpacked not in (size, *unknown)
    ):
        raise Refused(f"{what} at byte {local} disagrees with the zip directory: one of them is damaged or lies")
    return Entry(local, local + LOCAL.size + name_length + extra_length, size)


def check_apart(entries: dict[str, Entry], end: int) -> None:
    """Raises Refused unless the entries lie one behind another before the directory at byte `end`."""
    previous, free = "", 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].header):
        if entry.header < free:
            raise Refused(f"zip entries {shown(previous)} and {shown(name)} overlap")
        if entry.offset + entry.size > end:
            raise Refused(
                f"zip entry {shown(name)} of {entry.size} bytes at byte {entry.offset} reaches beyond "
                f"the zip directory at byte {end}"
            )
        previous, free = name, entry.offset + entry.size


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
    opened = OpenedFile.of(file)

    def load_persistent(request: object) -> Storage:
        key, dtype, nbytes = storage_request(request)
        entry = entries.get(f"{folder}data/{key}")
        if entry is None or entry.size != nbytes:
            has = f"has {entry.size}" if entry else "is not there"
            raise Refused(f"asks for storage {shown(key)} of {nbytes} bytes, but its zip entry {has}")
        storage = storages.setdefault(key, Storage(opened, dtype, nbytes, entry.offset, byteorder))
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
    opened = OpenedFile.of(file)

    def load_persistent(request: object) -> Storage:
        key, dtype, nbytes = storage_request(request)
        storage = storages.setdefault(key, Storage(opened, dtype, nbytes))
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
    locate_storages(file, size, reader.position, storages, keys)
    return result


def locate_storages(file: BinaryIO, size: int, position: int, storages: dict[str, Storage], keys: object) -> None:
    """Sets where each storage lies, from byte `position` of the file on."""
    if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys) or len(keys) != len(set(keys)):
        raise Refused("the list of storages is not a list of different names")
    if set(keys) != storages.keys():
        raise Refused(f"the list of storages has {len(keys)} names, other than the {len(storages)} that tensors need")
    for key in keys:
        storage = storages[key]
        (count,) = LEGACY_COUNT.unpack(read_at(file, position, LEGACY_COUNT.size, f"storage {shown(key)}"))
        width = storage.dtype.itemsize if storage.dtype else 1
        storage.offset = position + LEGACY_COUNT.size
        position = storage.offset + storage.nbytes
        if count * width != storage.nbytes or position > size:
            raise Refused(
                f"storage {shown(key)} should have {storage.nbytes // width} elements; at byte "
                f"{storage.offset} its header says {count}, and {size - storage.offset} bytes are left"
            )
    if position != size:
        raise Refused(f"{size - position} bytes follow the last storage: the file is damaged, or two in one")
