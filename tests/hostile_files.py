"""Hostile weight files: `python tests/hostile_files.py FOLDER` writes them all.

Each is one step away from a good file. A payload that ran would make a file named CANARY in the working directory.
The bytes are the same in every run, so that the verdicts of PyTorch on them stay true.
"""

import json
import pathlib
import struct
import sys
import zlib

from weight_file_bytes import (
    EMPTY_DICT,
    FALSE,
    FLOATS,
    NONE,
    ORDERED_DICT,
    call,
    checkpoint,
    entry,
    good_files,
    items,
    items_of_dict,
    legacy,
    member,
    members,
    name,
    number,
    numbers,
    safetensors,
    storage,
    tensor,
    text,
    torch_zip,
    weight,
    zip_bytes,
)

CANARY = "canary_of_an_executed_payload"
TOUCH = f"touch {CANARY}"
WRITE = f"open('{CANARY}', 'w').close()"


def payloads() -> dict[str, bytes]:
    """Pickles that run something when a trusting reader loads them."""
    system, evaluate = name("os", "system"), name("builtins", "eval")
    own = name("my_training", "Model")
    blank = call(name("copyreg", "_reconstructor"), name("argparse", "Namespace"), name("builtins", "object"), NONE)
    values = {
        "os_system": call(system, text(TOUCH)),
        "posix_system": call(name("posix", "system"), text(TOUCH)),
        "nt_system": call(name("nt", "system"), text(TOUCH)),
        "builtins_eval": call(evaluate, text(WRITE)),
        "builtins_exec": call(name("builtins", "exec"), text(WRITE)),
        "python2_eval": call(name("__builtin__", "eval"), text(WRITE)),
        "builtins_getattr": call(name("builtins", "getattr"), name("os", "path"), text("join")),
        "builtins_import": call(name("builtins", "__import__"), text("antigravity")),
        "subprocess_popen": call(name("subprocess", "Popen"), text(TOUCH)),
        "runpy": call(name("runpy", "run_path"), text("/bin/false")),
        "pickle_loads": call(name("pickle", "loads"), b"C\x01."),
        "torch_load": call(name("torch.serialization", "load"), text("other.pt")),
        "torch_hub": call(name("torch.hub", "load"), text("some/repository"), text("model")),
        "numpy_load": call(name("numpy", "load"), text("other.npy")),
        "functools_partial": call(call(name("functools", "partial"), system, text(TOUCH))),
        "operator_attrgetter": call(call(name("operator", "attrgetter"), text("system")), name("os", "path")),
        "reduce_of_own_class": call(own, text("x")),
        "reconstructor": blank + EMPTY_DICT + b"b",
        "call_of_a_call": call(call(name("collections", "OrderedDict")), text(TOUCH)),
        "call_of_text": text("os.system") + b"(" + text(TOUCH) + b"tR",
        "call_with_list": own + b"](" + text(TOUCH) + b"eR",
        "uncalled_os_system": system,
        "uncalled_eval": evaluate,
        "newobj_popen": name("subprocess", "Popen") + text(TOUCH) + b"\x85\x81",
        "newobj_of_instance": ORDERED_DICT + b")\x81",
        "newobj_ex": own + text(TOUCH) + b"\x85" + EMPTY_DICT + b"\x92",
        "stack_global": text("os") + text("system") + b"\x93" + text(TOUCH) + b"\x85R",
        "stack_global_of_numbers": number(1) + number(2) + b"\x93",
        "dotted_name": name("collections", "abc.sys.modules") + b")R",
        "inst": b"(" + text(TOUCH) + b"ios\nsystem\n",
        "obj": b"(" + system + text(TOUCH) + b"o",
        "ext1": b"\x82\x01" + b")R",
        "ext2": b"\x83\x01\x00",
        "ext4": b"\x84\x01\x00\x00\x00",
        "build_on_name": own + items_of_dict(("__call__", text("x"))) + b"b",
        "build_on_list": b"]" + items_of_dict(("__class__", own)) + b"b",
        "build_on_ordered_dict": ORDERED_DICT + text("state") + b"b",
        "build_on_tensor": tensor() + b"(" + storage() + numbers(()) + b"tb",
        "persistent_text": b"P0\n",
        "persistent_number": number(0) + b"Q",
        "persistent_module": storage(word="module"),
        "persistent_list": b"](" + text("storage") + b"eQ",
        "byte_buffer": b"\x96" + struct.pack("<Q", 1) + b"0",
        "outside_buffer": b"\x97",
    }
    return {key: checkpoint(("payload", value)) for key, value in values.items()}


def bombs() -> dict[str, bytes]:
    """Pickles that are to cost memory, time, or the stack of the process."""
    many = 1_200_000
    shape = call(
        name("torch._utils", "_rebuild_tensor_v2"),
        storage(),
        number(0),
        numbers((1,) * 8),
        numbers((1,) * 8),
        FALSE,
        ORDERED_DICT,
    )
    rebuild, arguments = shape[:-1].split(b"(", 1)
    again = b"h\x01h\x02R" * (many // 3)
    values = {
        "nested_lists": b"]" * (many // 2) + b"a" * (many // 2 - 1),
        "nested_tuples_as_key": EMPTY_DICT + b")" + b"\x85" * (many // 4) + NONE + b"s",
        "tuple_as_key": EMPTY_DICT + numbers((1, 2)) + NONE + b"s",
        "nested_tuples_in_set": b"\x8f()" + b"\x85" * (many // 4) + b"\x90",
        "many_sets": b"\x8f" * many,
        "many_marks": b"(" * many,
        "many_remembered_lists": b"]\x94" * many,
        "many_tensors": rebuild + b"q\x01(" + arguments + b"q\x02R" + again,
        "many_names": b"capackage\nname\n" * many,
        "equal_hashes": EMPTY_DICT + b"(" + b"".join(number(i * (2**61 - 1)) + NONE for i in range(30000)) + b"u",
        "doubling_memo": b"](" + text("lol") * 10 + b"eq\x00" + b"](h\x00h\x00eq\x00" * 400_000,
        "list_within_itself_as_key": EMPTY_DICT + b"]q\x00h\x00a" + NONE + b"s",
        "long4": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"0",
        "long4_negative": b"\x8b" + struct.pack("<i", -1),
        "long_integer": b"\x8a\xff" + b"\x7f" * 255,
        "long_decimal": b"L" + b"9" * 100_000 + b"L\n",
        "binunicode": b"X" + struct.pack("<I", 2**32 - 1) + b"0",
        "binunicode8": b"\x8d" + struct.pack("<Q", 2**62) + b"0",
        "binbytes8": b"\x8e" + struct.pack("<Q", 2**63 + 5) + b"0",
        "binput_far": b"r\xff\xff\xff\xff",
        "binget_unknown": b"j\xff\xff\xff\xff",
        "endless_name": b"c" + b"a" * 100_000,
        "unmatched_mark": b"tt",
        "empty_stack": b"\x87" * 5,
        "odd_items": EMPTY_DICT + b"(" + text("a") + b"u",
        "not_utf8": b"X\x02\x00\x00\x00\xff\xfe",
        "duplicate_key": EMPTY_DICT + items(("a", NONE), ("a", NONE)),
        "append_to_dict": EMPTY_DICT + NONE + b"a",
        "items_of_list": b"]" + items(("a", NONE)),
        "dup": text("a") + b"2",
    }
    return {key: checkpoint(("payload", value)) for key, value in values.items()}


def tensors() -> dict[str, bytes]:
    """Pickles whose tensors lie about themselves."""
    half = ("torch", "HalfStorage")
    values = {
        "storage_too_long": tensor(storage(count=1000), shape=(1000,)),
        "storage_missing": tensor(storage(key="7")),
        "storage_outside": tensor(storage(key="../0")),
        "storage_count_negative": tensor(storage(count=-4)),
        "storage_count_huge": tensor(storage(count=2**62)),
        "storage_two_types": ORDERED_DICT + items(("x", tensor()), ("y", tensor(storage(kind=half, count=8)))),
        "storage_quantized": tensor(storage(kind=("torch", "QInt8Storage"), count=16)),
        "storage_complex": tensor(storage(kind=("torch", "ComplexFloatStorage"), count=2)),
        "storage_of_os": tensor(storage(kind=("os", "system"))),
        "storage_of_text": tensor(text("storage")),
        "shape_negative": tensor(shape=(-4,)),
        "shape_overflow": tensor(shape=(2**32, 2**32), strides=(0, 0)),
        "shape_zero_overflow": tensor(shape=(0, 2**40, 2**40), strides=(1, 1, 1)),
        "shape_above_64_bits": tensor(shape=(2**70,)),
        "shape_of_text": call(
            name("torch._utils", "_rebuild_tensor_v2"), storage(), number(0), text("4"), text("1"), FALSE, ORDERED_DICT
        ),
        "shape_of_floats": tensor().replace(numbers((4,)), b"(G" + struct.pack(">d", 4.0) + b"t", 1),
        "shape_too_long": tensor(shape=(5,)),
        "dimensions_many": tensor(shape=(1,) * 1000, strides=(1,) * 1000),
        "strides_negative": tensor(strides=(-1,), offset=3),
        "strides_too_long": tensor(strides=(2,)),
        "strides_overflow": tensor(strides=(2**62,)),
        "strides_missing": tensor(strides=()),
        "offset_negative": tensor(offset=-1),
        "offset_too_far": tensor(offset=1),
        "offset_overflow": tensor(offset=2**63 - 1),
        "expanded": tensor(shape=(2**40,), strides=(0,)),
        "arguments_missing": call(name("torch._utils", "_rebuild_tensor_v2"), storage()),
        "rebuild_qtensor": tensor(rebuild="_rebuild_qtensor"),
        "rebuild_sparse": tensor(rebuild="_rebuild_sparse_tensor"),
        "rebuild_from_type": call(
            name("torch._tensor", "_rebuild_from_type_v2"),
            name("os", "system"),
            name("torch", "Tensor"),
            text(TOUCH) + b"\x85",
            NONE,
        ),
        "rebuild_type_unknown": call(
            name("torch._utils", "_rebuild_tensor_v3"),
            storage(kind=("torch.storage", "UntypedStorage"), count=16),
            number(0),
            numbers((4,)),
            numbers((1,)),
            FALSE,
            ORDERED_DICT,
            name("os", "system"),
            NONE,
        ),
        "parameter_of_text": call(name("torch._utils", "_rebuild_parameter"), text("x"), FALSE, ORDERED_DICT),
        "module_pickled_whole": name("torch.nn.modules.linear", "Linear") + b")\x81" + EMPTY_DICT + b"b",
    }
    whole = {
        "root_is_list": b"\x80\x02](" + tensor() + b"e.",
        "root_is_text": b"\x80\x02" + text("x") + b".",
        "no_tensors": checkpoint(("state_dict", EMPTY_DICT)),
        "names_are_numbers": weight(NONE).replace(text("weight") + NONE, number(1) + tensor()),
        "name_of_two_lines": checkpoint(("model", items_of_dict(("a\nb", tensor()))), ("state_dict", NONE)),
        "no_stop": checkpoint()[:-1],
        "stop_alone": b".",
        "two_objects": checkpoint()[:-1] + NONE + b".",
        "protocol_0": b"\x80\x00" + checkpoint()[2:],
        "protocol_99": b"\x80\x63" + checkpoint()[2:],
        "no_pickle": b"\x00" * 64,
    }
    return {key: weight(value) for key, value in values.items()} | whole


def zips() -> dict[str, bytes]:
    """Zip files whose directory lies."""
    good = checkpoint()
    first, order, data, version = members(good)
    rest = [first, order, version]
    packed = zlib.compress(bytes(2**24))[2:-4]
    bomb = {"size": 2**24, "method": 8, "local_method": 8}
    return {
        "name_dots": zip_bytes([*rest, data, member("archive/../../x", b"x")]),
        "name_absolute": zip_bytes([*rest, data, member("/etc/x", b"x")]),
        "name_drive": zip_bytes([*rest, data, member("C:/x", b"x")]),
        "name_backslash": zip_bytes([*rest, data, member("archive\\..\\x", b"x")]),
        "name_nul": zip_bytes([*rest, data, member("archive/x\0y", b"x")]),
        "name_outside": zip_bytes([*rest, data, member("other/x", b"x")]),
        "name_twice": zip_bytes([*rest, data, data]),
        "pickle_twice": zip_bytes([first, *rest, data]),
        "pickle_in_two_folders": zip_bytes([*rest, data, member("b/data.pkl", good)]),
        "pickle_missing": zip_bytes([order, data, version]),
        "compressed_bomb": zip_bytes([member("archive/data.pkl", packed, **bomb), order, data, version]),
        "compressed_storage": zip_bytes([*rest, member("archive/data/0", packed, **bomb)]),
        "method_only_local": zip_bytes([*rest, data | {"local_method": 8}]),
        "encrypted": zip_bytes([*rest, data | {"flags": 1}]),
        "size_huge": zip_bytes([*rest, data | {"size": 2**31, "packed": 2**31}]),
        "size_64_missing": zip_bytes([*rest, data | {"size": 2**32 - 1, "packed": 2**32 - 1}]),
        "size_local_differs": zip_bytes([*rest, data | {"local_size": 4}]),
        "size_packed_differs": zip_bytes([*rest, data | {"packed": 4}]),
        "name_local_differs": zip_bytes([*rest, data | {"local_name": "archive/data/1"}]),
        "offset_beyond": zip_bytes([*rest, data | {"offset": 10**6}]),
        "entries_overlap": zip_bytes(
            [
                *rest,
                member("archive/data/0", FLOATS, size=76, packed=76, local_size=76),
                member("archive/data/1", FLOATS),
            ]
        ),
        "count_differs": zip_bytes([*rest, data], count=1),
        "directory_size_differs": zip_bytes([*rest, data], directory_size=-1),
        "directory_size_huge": zip_bytes([*rest, data], directory_size=2**31),
        "directory_elsewhere": zip_bytes([*rest, data], directory_offset=2**31),
        "comment": zip_bytes([*rest, data], comment=b"PK\5\6"),
        "appended": zip_bytes([*rest, data]) + b"#!/bin/sh\n",
        "no_directory": zip_bytes([*rest, data])[:-22],
        "end_record_alone": zip_bytes([]),
        "many_entries": zip_bytes([member(f"archive/data/{i}", b"") for i in range(65_000)]),
        "byteorder_unknown": torch_zip(good, byteorder=b"middle"),
        "byteorder_long": torch_zip(good, byteorder=b"l" * 10**6),
        "torchscript": zip_bytes([*rest, data, member("archive/constants.pkl", good)]),
        "pickle_too_large": torch_zip(checkpoint(("x", b"X" + struct.pack("<I", 2**25) + bytes(2**25)))),
    }


def legacies() -> dict[str, bytes]:
    """Files in the format from before PyTorch 1.6 whose parts disagree, and other formats of that time."""
    good = checkpoint()
    bare = b"\x80\x02" + call(name("os", "system"), text(TOUCH)) + b"."
    return {
        "magic_differs": legacy(good, magic=5),
        "payload_before_magic": bare + legacy(good),
        "plain_pickle": bare,
        "plain_pickle_of_weights": good,
        "big_endian": legacy(good, little=FALSE),
        "keys_missing": legacy(good, keys=()),
        "keys_twice": legacy(good, keys=("0", "0")),
        "keys_other": legacy(good, keys=("1",)),
        "keys_more": legacy(good, keys=("0", "1")),
        "count_differs": legacy(good, count=5),
        "count_negative": legacy(good, count=-1),
        "count_huge": legacy(good, count=2**62),
        "data_short": legacy(good, data=FLOATS[:10]),
        "data_long": legacy(good, data=FLOATS * 2),
        "sizes_differ": legacy(checkpoint(("b", tensor(storage(count=5))))),
        "storage_view": legacy(good).replace(NONE + b"tQ", b"(" + text("0") + number(1) + number(2) + b"ttQ"),
        "tar": b"storages".ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0") + bytes(1024),
    }


def safetensors_files() -> dict[str, bytes]:
    """Safetensors files with lying headers."""
    good, two = {"a": entry()}, {"a": entry((2,), offsets=(0, 8)), "b": entry((2,), offsets=(8, 16))}
    same = b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)
    return {
        "length_huge": safetensors(good, length=2**63),
        "length_beyond": safetensors(good, length=1000),
        "length_short": safetensors(good, length=10),
        "not_json": safetensors(b"{" + b"x" * 50),
        "not_utf8": safetensors(b'{"\xff": 1}'),
        "nested": safetensors(b'{"a":' + b"[" * 10**6),
        "nested_objects": safetensors(b'{"a":' * 10**5),
        "names_twice": safetensors(same),
        "long_number": safetensors(b'{"a":' + b"9" * 10**5 + b"}"),
        "many_objects": safetensors(b'{"a":[' + b"{}," * 2_700_000 + b"{}]}"),
        "many_names": safetensors(b"{" + b",".join(b'"%d":{}' % i for i in range(600_000)) + b"}"),
        "header_too_large": safetensors(b'{"__metadata__":{"a":"' + b"x" * 2**23 + b'"}}'),
        "root_is_list": struct.pack("<Q", 12) + b"[1,2,3,4,5] " + FLOATS,
        "metadata_numbers": safetensors(good | {"__metadata__": {"a": 1}}),
        "name_of_escapes": safetensors({"\x1b[2J": entry()}),
        "tensor_is_list": safetensors({"a": [1]}),
        "field_missing": safetensors({"a": {"dtype": "F32", "shape": [4]}}),
        "field_unknown": safetensors({"a": entry(code="os.system")}),
        "dtype_unknown": safetensors({"a": entry((16,), "F8_E4M3")}),
        "dtype_complex": safetensors({"a": entry((2,), "C64")}),
        "shape_negative": safetensors({"a": entry((-2, -2))}),
        "shape_float": safetensors({"a": entry((4.0,))}),
        "shape_bool": safetensors({"a": entry((True, 4))}),
        "shape_differs": safetensors({"a": entry((5,))}),
        "shape_overflow": safetensors({"a": entry((2**40, 2**40))}),
        "shape_zero_overflow": safetensors({"a": entry((0, 2**40, 2**40), offsets=(0, 0))}),
        "dimensions_many": safetensors({"a": entry((1,) * 1000 + (4,))}),
        "offsets_reversed": safetensors({"a": entry(offsets=(16, 0))}),
        "offsets_negative": safetensors({"a": entry(offsets=(-16, 0))}),
        "offsets_beyond": safetensors({"a": entry(offsets=(10**9, 10**9 + 16))}),
        "offsets_overlap": safetensors(two | {"b": entry((2,), offsets=(4, 12))}),
        "offsets_gap": safetensors({"b": entry((2,), offsets=(8, 16))}),
        "data_long": safetensors(good, FLOATS * 2),
        "data_short": safetensors(good, FLOATS[:9]),
    }


def truncations() -> dict[str, bytes]:
    """Good files cut at a few places; the fuzz test cuts them at many more."""
    return {
        f"cut_{part}_{path}": whole[: len(whole) * part // 8]
        for path, whole in good_files().items()
        for part in (0, 1, 4, 7)
    }


def hostile_files() -> dict[str, bytes]:
    """All hostile files by name."""
    files = {}
    for title, make in (("payload", payloads), ("bomb", bombs), ("tensor", tensors)):
        for key, pickle in make().items():
            files[f"{title}_{key}.pt"] = torch_zip(pickle)
            if title == "payload":
                files[f"{title}_{key}_legacy.pt"] = legacy(pickle)
    files |= {f"zip_{key}.pt": data for key, data in zips().items()}
    files |= {f"legacy_{key}.pt": data for key, data in legacies().items()}
    files |= {f"{key}.safetensors": data for key, data in safetensors_files().items()}
    return files | truncations()


def write_files(files: dict[str, bytes], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes files by name into a folder, in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        (folder / path).write_bytes(data)
    return [folder / path for path in sorted(files)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/hostile_files.py FOLDER")
    print(f"{len(write_files(hostile_files(), pathlib.Path(sys.argv[1])))} hostile files in {sys.argv[1]}")
