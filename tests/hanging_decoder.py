"""A decoder that damage has sent round in circles."""

import itertools


def read_excerpt(*_) -> int:
    """Never returns. The loop is in C and keeps the interpreter's lock, as FFmpeg's may."""
    return sum(itertools.repeat(0))
