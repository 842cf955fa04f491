"""Weights of DeepAVFusion and of unimodal MAEs: read without trust, mapped to models here, and written back.

DeepAVFusion is the authors' PyTorch release of the method: https://github.com/stoneMo/DeepAVFusion, code and weights
under the Apache License 2.0. Its weights are Git LFS files of that repository,
`checkpoints/deepavfusion_vitb_{vggsound,as2m}_ep200/checkpoints/checkpoint_latest.pth`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av_mae.convert.deepavfusion import load_published
    from av_mae.convert.store import convert, export

__all__ = ["convert", "export", "load_published"]
HOMES = {"load_published": "deepavfusion", "convert": "store", "export": "store", "main": "__main__"}


def __getattr__(name: str):
    """Brings in JAX with the first function that is asked for: reading a weight file does without."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
