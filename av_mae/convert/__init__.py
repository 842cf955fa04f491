"""Weights of DeepAVFusion and of unimodal MAEs: read without trust, mapped to models here, and written back.

DeepAVFusion is the authors' PyTorch release of the method: https://github.com/stoneMo/DeepAVFusion, code and weights
under the Apache License 2.0. Its weights are Git LFS files of that repository,
`checkpoints/deepavfusion_vitb_{vggsound,as2m}_ep200/checkpoints/checkpoint_latest.pth`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av_mae.convert.__main__ import convert, export, main
    from av_mae.convert.deepavfusion import load_published

__all__ = ["convert", "export", "load_published", "main"]


def __getattr__(name: str):
    """Brings in JAX with the first function that is asked for: reading a weight file does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "deepavfusion" if name == "load_published" else "__main__"
    return getattr(importlib.import_module(f"av_mae.convert.{module}"), name)
