"""Weight files of PyTorch and safetensors, read without PyTorch and without trust."""

from av_mae.weight_files.tensors import StoredTensor
from av_mae.weight_files.weight_file import WeightFile, open_weights

__all__ = ["StoredTensor", "WeightFile", "open_weights"]
