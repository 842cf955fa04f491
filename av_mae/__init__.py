"""av_mae: audio-visual early-fusion encoders, pretrained by masked reconstruction, in JAX."""

__version__ = "0.1.0"
