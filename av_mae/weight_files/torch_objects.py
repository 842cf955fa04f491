"""What the names in a PyTorch pickle stand for here: tensors, plain data, inert records, or a refusal.

No name is ever looked up in Python: a name is a string, and the tables below say what may be done with it.
"""

import collections
import dataclasses
import sys
from collections.abc import Callable

import numpy as np

from av_mae.weight_files.refusals import Refused, shown
from av_mae.weight_files.tensors import BFLOAT16, Storage, StoredTensor, stored_tensor

STORAGE_TYPES = {
    "torch.FloatStorage": np.dtype(np.float32), "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16), "torch.BFloat16Storage": BFLOAT16,
    "torch.LongStorage": np.dtype(np.int64), "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16), "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8), "torch.BoolStorage": np.dtype(np.bool_),
    "torch.UntypedStorage": None, "torch.storage.UntypedStorage": None,
}
# Types without a storage class of their own: their storages are untyped and the tensor names the type.
TENSOR_TYPES = {f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")}
# Calls of these make a Record: what was called and with what, nothing is run.
RECORDS = {
    "argparse.Namespace", "types.SimpleNamespace", "collections.Counter",
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.Metadata",
    "omegaconf.base.ContainerMetadata", *(f"omegaconf.nodes.{kind}Node" for kind in (
        "Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")),
    "easydict.EasyDict", "ml_collections.config_dict.config_dict.ConfigDict", "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    *(f"pathlib.{kind}Path" for kind in ("Posix", "PurePosix", "Windows", "PureWindows")),
    "builtins.bytearray", "builtins.complex", "builtins.frozenset", "builtins.set", "_codecs.encode",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct",
    "torch.Size", "torch.device",
}
# Names of Python's own library that occur without being called.
TYPES = {"typing.Any", *(f"builtins.{kind}" for kind in (
    "bool", "bytes", "dict", "float", "int", "list", "long", "object", "str", "tuple", "type", "unicode"))}
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
    raise Refused(f"calls {shown(function.name)}, which is not among the few names that weight files need; nothing of "
                  "it was run. Save a plain state_dict of dense tensors instead")


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
                "storage", Symbol(name=name), str(key), _, int(count), None):
            if name not in STORAGE_TYPES:
                raise Refused(f"asks for a storage of the type {shown(name)}, which is not supported")
            if not 0 <= count < 2 ** 56:
                raise Refused(f"asks for storage {shown(key)} of {shown(count)} elements")
            dtype = STORAGE_TYPES[name]
            return key, dtype, count * (dtype.itemsize if dtype else 1)
    raise Refused("has a persistent id that is not ('storage', type, key, device, elements)")
