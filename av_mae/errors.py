"""The one exception that a user can cause, and how commands show it."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A rule that the user's input broke. The message states the rule, the value and what to do."""


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
