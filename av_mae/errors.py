"""Why a clip failed; how many did, which and why, and the share of them at which a run stops."""

import collections
import contextlib
import difflib
import sys
from collections.abc import Callable, Iterator


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


class ClipFailure(Exception):
    """Why a clip cannot be used: 'stage: cause'."""


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ClipFailure that names the stage."""
    try:
        yield
    except ClipFailure:
        raise
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ClipFailure(f"{name}: {cause}") from error


class FailureCount:
    """Counts the failed clips of the batches it is shown; padding does not count."""

    def __init__(self, max_failure_share: float, minimum: int = 100, remembered: int = 5):
        """`minimum`: clips to see before the share is judged. `remembered`: how many failures stay in `last`."""
        self.max_failure_share = max_failure_share
        self.clips = 0
        self.failures = 0
        self.causes: collections.Counter[str] = collections.Counter()
        self.last: collections.deque[str] = collections.deque(maxlen=remembered)
        self._minimum = minimum

    def add(self, batch: dict) -> list[str]:
        """Counts a host batch (`id`, `error`: str [b]; '' in both is padding) and returns its errors.

        Raises UserError, with the counts, when too large a share of the clips seen so far failed.
        """
        errors = [str(error) for error in batch["error"] if error]
        self.clips += sum(1 for identifier, error in zip(batch["id"], batch["error"]) if identifier or error)
        self.failures += len(errors)
        self.last.extend(errors)
        for error in errors:  # 'clip ID: stage: cause': all clips that fail alike count as one cause
            self.causes[error.split(": ", 1)[-1]] += 1
        if self.clips >= self._minimum and self.failures > self.max_failure_share * self.clips:
            raise UserError(
                f"{self.summary()}. This is more than data.max_failure_share={self.max_failure_share}: "
                "repair or prepare the data again, or raise the share"
            )
        return errors

    def summary(self) -> str:
        """'3 of 200 clips failed (2 × frame: …; 1 × sound: …); last: clip a: frame: …'"""
        if not self.failures:
            return f"0 of {self.clips} clips failed"
        causes = "; ".join(f"{count} × {cause}" for cause, count in self.causes.most_common(5))
        return f"{self.failures} of {self.clips} clips failed ({causes}); last: {', '.join(self.last)}"
