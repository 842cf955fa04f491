"""What stops the reading of a weight file, before the file's name is put in front of it."""

LONGEST = 80  # characters of a name in a message


class Refused(Exception):
    """A rule that the file breaks: place and cause, in one line."""


def shown(value: object) -> str:
    """A value out of a file for a message: on one line, and of a length that the file does not decide."""
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= LONGEST else f"{value[:LONGEST]!r}…"
    if isinstance(value, int) and abs(value) >= 2 ** 64 or not isinstance(value, int | float | None):
        return f"an object of type {type(value).__name__}"
    return repr(value)
