"""Published weights for tests: a second reader of `.pth` files, what golden files do not tell, small files."""

import collections
import functools
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from av_mae import convert, models
from av_mae.convert.infer import Options
from av_mae.convert.names import Names, names_of
from av_mae.errors import UserError

STORAGES = {"FloatStorage": np.float32, "LongStorage": np.int64}
GOLDEN = (
    "factorized_mmi.pth",
    "dense_mmi.pth",
    "token.pth",
    "factorized_mmi_swin.pth",
    "factorized_mmi.safetensors",
    "classifier_plain.safetensors",
    "classifier_norm.safetensors",
    "separation.safetensors",
    "segmentation5.safetensors",
)
# What the golden files do not tell of their small models.
GOLDEN_OPTIONS = Options(heads=4, decoder_heads=4, tokens=(6, 4, 2))
ARGUMENTS = ["--heads=4", "--decoder_heads=4", "--tokens=6,4,2"]


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


def written(tmp_path, tensors):
    """A safetensors file of these tensors."""
    path = tmp_path / "changed.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


def refused(tmp_path, tensors, options=GOLDEN_OPTIONS):
    """The message with which a file is refused; nothing is left of it."""
    with pytest.raises(UserError) as error:
        convert.convert(written(tmp_path, tensors), tmp_path / "out", options)
    assert os.listdir(tmp_path) == ["changed.safetensors"]
    assert "\n" not in str(error.value) and str(tmp_path / "changed.safetensors") in str(error.value)
    return str(error.value)


def read_state_dict(path) -> dict[str, np.ndarray]:
    """The tensors of a golden file: the `state_dict` of a checkpoint, or safetensors read by their own package."""
    if str(path).endswith(".safetensors"):
        return safetensors.numpy.load_file(path)
    with zipfile.ZipFile(path) as archive:
        return dict(_Reader(archive).load()["state_dict"])


@functools.cache
def pretraining_names(config: models.AVMAEConfig) -> Names:
    return names_of(nnx.eval_shape(lambda: models.AVMAE(config, rngs=nnx.Rngs(0))))


def as_here(tensors: dict[str, np.ndarray], config: models.AVMAEConfig) -> dict[str, np.ndarray]:
    """Some published tensors (or gradients) of a pretraining model → arrays by path here; buffers are left out."""
    names, arrays = pretraining_names(config), {}
    for name in tensors.keys() - names.buffers.keys():
        arrays |= names.rules[name].split(tensors[name])
    return arrays


def assert_same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


def unimodal_tensors(
    channels: int, patches: int, width: int = 32, depth: int = 2, patch: int = 16, decoder: bool = True
) -> dict[str, np.ndarray]:
    """A MAE (3 channels) or AudioMAE (1 channel) with the official names, random throughout."""
    random = np.random.default_rng(channels)
    draw = lambda *shape: random.normal(0, 0.2, shape).astype(np.float32)
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (2 * width, width),
        "mlp.fc1.bias": (2 * width,),
        "mlp.fc2.weight": (width, 2 * width),
        "mlp.fc2.bias": (width,),
    }
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, patches + 1, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    shapes |= {f"blocks.{n}.{name}": shape for n in range(depth) for name, shape in block.items()}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    if decoder:
        shapes |= {
            "mask_token": (1, 1, 16),
            "decoder_pos_embed": (1, patches + 1, 16),
            "decoder_embed.weight": (16, width),
            "decoder_blocks.0.norm1.weight": (16,),
            "decoder_norm.bias": (16,),
            "decoder_pred.weight": (patch * patch * channels, 16),
        }
    return {name: draw(*shape) for name, shape in shapes.items()}
