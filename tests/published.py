"""Test-only reader of the golden `.pth` files (PyTorch zip format): tensors as NumPy arrays, nothing else."""

import collections
import pickle
import zipfile

import numpy as np

STORAGES = {"FloatStorage": np.float32, "LongStorage": np.int64}


class _Reader(pickle.Unpickler):
    """Knows ordered dicts and tensors of the archive; every other global is refused."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.root = next(n for n in archive.namelist() if n.endswith("/data.pkl"))[: -len("data.pkl")]
        super().__init__(archive.open(self.root + "data.pkl"))

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

    def persistent_load(self, pid):
        _, dtype, key, _, _ = pid
        return np.frombuffer(self.archive.read(f"{self.root}data/{key}"), dtype)

    @staticmethod
    def rebuild(storage, offset, size, stride, *_):
        strides = [s * storage.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def read_state_dict(path) -> dict[str, np.ndarray]:
    """The `state_dict` of a golden checkpoint."""
    with zipfile.ZipFile(path) as archive:
        return dict(_Reader(archive).load()["state_dict"])
