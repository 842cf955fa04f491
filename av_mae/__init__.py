"""av_mae: audio-visual early-fusion encoders, pretrained by masked reconstruction, in JAX.

`av_mae.load(path)` and `av_mae.encode(model, batch)` are in av_mae.loading, which is imported when they are used.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in ("load", "encode"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from av_mae import loading

    return getattr(loading, name)
