"""Weights of DeepAVFusion and of unimodal MAEs: read without trust, mapped to models here, and written back.

DeepAVFusion is the authors' PyTorch release of the method: https://github.com/stoneMo/DeepAVFusion, code and weights
under the Apache License 2.0. Its weights are Git LFS files of that repository,
`checkpoints/deepavfusion_vitb_{vggsound,as2m}_ep200/checkpoints/checkpoint_latest.pth`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av_mae.convert.deepavfusion import load_published

__all__ = ["load_published"]


def __getattr__(name: str):
    if name != "load_published":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from av_mae.convert import deepavfusion  # brings in JAX, which reading a weight file does not need

    return deepavfusion.load_published
