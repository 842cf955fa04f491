"""av_mae: audio-visual early-fusion encoders, pretrained by masked reconstruction, in JAX.

`av_mae.load(path)` gives the model of a checkpoint and `av_mae.encode(model, batch)` its embeddings. Both, and the
modules named in `__all__`, are imported when they are first used: `import av_mae` itself is free.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av_mae import convert, models, preprocess
    from av_mae.loading import Encoding, encode, load

__version__ = "0.1.0"
__all__ = ["Encoding", "convert", "encode", "load", "models", "preprocess"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("Encoding", "encode", "load"):
        return getattr(importlib.import_module("av_mae.loading"), name)
    return importlib.import_module(f"av_mae.{name}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
