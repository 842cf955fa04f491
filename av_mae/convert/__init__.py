"""Weights of the published system and of others: read, mapped to models here, and written back."""

from av_mae.convert.source import load_published

__all__ = ["load_published"]
