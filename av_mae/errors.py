"""The one exception that a user can cause, and how commands show it."""

import difflib
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A rule that the user's input broke. The message states the rule, the value and what to do."""


def check_name(option: str, name: str, known: tuple[str, ...]) -> None:
    """Raises UserError, with the nearest known name, where `name` is not one of `known`."""
    if name in known:
        return
    nearest = difflib.get_close_matches(name, known, 1, 0.4)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"unknown {option} {name!r}, known are {', '.join(known)}{hint}")


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs `main(argv)` of a command; a UserError becomes one line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
