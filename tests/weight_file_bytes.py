"""Weight files made byte by byte: pieces of pickles, and the three formats around them."""

import json
import struct
import zlib

FLOATS = struct.pack("<4f", 1, 2, 3, 4)
FALSE, NONE, EMPTY_DICT = b"\x89", b"N", b"}"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


ORDERED_DICT = call(name("collections", "OrderedDict"))


def storage(kind=("torch", "FloatStorage"), key="0", count=4, word="storage") -> bytes:
    return b"(" + text(word) + name(*kind) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(stored: bytes = storage(), offset=0, shape=(4,), strides=(1,), rebuild="_rebuild_tensor_v2") -> bytes:
    return call(
        name("torch._utils", rebuild), stored, number(offset), numbers(shape), numbers(strides), FALSE, ORDERED_DICT
    )


def items(*pairs: tuple[str | bytes, bytes]) -> bytes:
    return b"(" + b"".join((text(key) if isinstance(key, str) else key) + value for key, value in pairs) + b"u"


def items_of_dict(*pairs: tuple[str, bytes]) -> bytes:
    return EMPTY_DICT + items(*pairs)


def checkpoint(*pairs: tuple[str | bytes, bytes]) -> bytes:
    """The pickle of {'state_dict': {'weight': tensor}, **pairs}; a pair for 'state_dict' replaces that."""
    state = () if "state_dict" in dict(pairs) else (("state_dict", ORDERED_DICT + items(("weight", tensor()))),)
    return b"\x80\x02" + EMPTY_DICT + items(*state, *pairs) + b"."


def weight(value: bytes) -> bytes:
    """The pickle of a checkpoint whose only tensor is this."""
    return checkpoint(("state_dict", ORDERED_DICT + items(("weight", value))))


def member(path: str, data: bytes, **lies) -> dict:
    """An entry of a zip file. `lies` replace what its headers say."""
    return {
        "name": path,
        "local_name": path,
        "data": data,
        "method": 0,
        "local_method": 0,
        "flags": 0,
        "size": len(data),
        "packed": len(data),
        "local_size": len(data),
        "offset": None,
    } | lies


def zip_bytes(members: list[dict], directory_size=0, directory_offset=0, count=0, comment=b"") -> bytes:
    """A zip file; the three numbers are added to those of its end record."""
    body, central = bytearray(), bytearray()
    for entry in members:
        offset = len(body) if entry["offset"] is None else entry["offset"]
        local, path = entry["local_name"].encode(), entry["name"].encode()
        crc = zlib.crc32(entry["data"])
        body += (
            struct.pack(
                "<4s5H3I2H",
                b"PK\3\4",
                20,
                entry["flags"],
                entry["local_method"],
                0,
                33,
                crc,
                entry["local_size"],
                entry["local_size"],
                len(local),
                0,
            )
            + local
            + entry["data"]
        )
        central += (
            struct.pack(
                "<4s6H3I5H2I",
                b"PK\1\2",
                20,
                20,
                entry["flags"],
                entry["method"],
                0,
                33,
                crc,
                entry["packed"],
                entry["size"],
                len(path),
                0,
                0,
                0,
                0,
                0,
                offset,
            )
            + path
        )
    end = struct.pack(
        "<4s4H2IH",
        b"PK\5\6",
        0,
        0,
        len(members) + count,
        len(members) + count,
        len(central) + directory_size,
        len(body) + directory_offset,
        len(comment),
    )
    return bytes(body + central) + end + comment


def members(pickle: bytes, stored: bytes = FLOATS, key="0", byteorder=b"little") -> list[dict]:
    return [
        member("archive/data.pkl", pickle),
        member("archive/byteorder", byteorder),
        member(f"archive/data/{key}", stored),
        member("archive/version", b"3\n"),
    ]


def torch_zip(pickle: bytes, **options) -> bytes:
    return zip_bytes(members(pickle, **options))


def legacy(pickle: bytes, keys=("0",), count=4, data=FLOATS, magic=0x1950A86A20F9469CFC6C, little=b"\x88") -> bytes:
    """A persistent id has one more item here than in zip files."""
    root = pickle.removeprefix(b"\x80\x02").removesuffix(b".").replace(b"tQ", NONE + b"tQ")
    head = [
        number(magic),
        number(1001),
        items_of_dict(("little_endian", little)),
        root,
        b"](" + b"".join(map(text, keys)) + b"e",
    ]
    return b"".join(b"\x80\x02" + part + b"." for part in head) + struct.pack("<q", count) + data


def safetensors(header: object, data: bytes = FLOATS, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape=(4,), dtype="F32", offsets=(0, 16), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def good_files() -> dict[str, bytes]:
    """What the hostile ones are made from."""
    return {
        "good.pt": torch_zip(checkpoint(("epoch", number(3)))),
        "good_legacy.pt": legacy(checkpoint()),
        "good.safetensors": safetensors({"weight": entry()}),
    }
