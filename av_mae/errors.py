"""What can be wrong: the user's input (`UserError`), or one clip (`ClipFailure`).

A failed clip is data until it is printed: clip, stage and cause travel as fields, through batches too (`id`, `stage`,
`cause`), and are written to `skipped.jsonl`.
"""

import collections
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

MOST = 10**9  # of any number of an option
STORES = ("gs", "gcs", "s3", "hdfs", "az", "abfs", "memory")  # of those that fsspec knows; servers of files are none
LASTING_STORES = tuple(name for name in STORES if name != "memory")  # what a command writes must outlive it
CHECKPOINT_STORES = ("gs",)  # those that Orbax writes to; of others it says that a path "should be absolute"
RESTART = 75  # exit status: try again later (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """A rule that the user's input broke. The message states the rule, the value and what to do."""


class StoreError(OSError):
    """A store that does not answer, or refuses. The message says which, why, and what to do."""


class WorkerKilled(Exception):
    """A process that reads clips was ended from outside. The message says how, and what it was most likely."""


def check_name(option: str, name: str, known: tuple[str, ...]) -> None:
    """Raises UserError, with the nearest known name, where `name` is not one of `known`."""
    if name in known:
        return
    nearest = difflib.get_close_matches(name, known, 1, 0.4)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"unknown {option} {name!r}, known are {', '.join(known)}{hint}")


def check_numbers(options: Any, least: Mapping[str, float], most: Mapping[str, float] = {}) -> None:
    """Compares a command's numbers with bounds, before anything is made that they could be too large for.

    Args:
      options: has the options as attributes; those that are None pass.
      least: the smallest value of each option that is looked at.
      most: the largest values where they are not MOST.

    Raises:
      UserError: a number is not finite, too small or too large.
    """
    for name, smallest in least.items():
        value, largest = getattr(options, name), most.get(name, MOST)
        if value is not None and not smallest <= value <= largest:  # nan is neither
            bound = f"at most {largest:_}" if value > largest else f"at least {smallest:_}"
            raise UserError(f"--{name}={value} must be {bound}")


def check_local(name: str, text: str, stores: Container[str] = ()) -> None:
    """Raises UserError where `text`, the value of `name`, has the URL of another store than `stores` for a path."""
    for scheme in re.findall(r"(?:^|[,=])([A-Za-z][A-Za-z0-9+.-]*)://", text):
        if scheme not in stores:
            known = "".join(f"{store}://, " for store in STORES if store in stores)
            raise UserError(
                f"{name}={text}: {scheme}:// is not read or written here, only {known}paths of this machine; give the "
                "folder where the store is mounted (gcsfuse, mount-s3), or a copy"
            )


def one_line(text: str) -> str:
    """Text that stays in its line and moves no cursor: control characters and line ends are written as escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: repr(found[0])[1:-1], text)


def run_command(main: Callable[[list[str]], None], stores: Mapping[str, Container[str]] | None = {}) -> None:
    """Runs `main(argv)` of a command; what a user can mend becomes one line on stderr, with status 2 or RESTART.

    In a locale such as C the command starts anew in Python's UTF-8 mode: libraries take no other names of files.

    Args:
      main: the command.
      stores: the options that take URLs, each with the stores it takes; `None`: the command looks at all of them
        itself. All else is refused before anything is made: `gs://bucket` is the name of a local folder, too.
    """
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # for the processes that the command starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    try:
        if stores is not None:
            _check_words(sys.argv[1:], stores)
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (WorkerKilled, StoreError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(RESTART)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def _check_words(words: Sequence[str], stores: Mapping[str, Container[str]]) -> None:
    """`check_local` of what a user typed: `--option=value`, or the value after its option, or alone."""
    for before, word in zip(("argument", *words), words):
        option, _, value = word.partition("=")
        if not word.startswith("-"):
            takes = before.startswith("-") and "=" not in before  # the option before it, which has no value yet
            option, value = before if takes else "argument", word
        check_local(option, value, stores.get(option, ()))


class ClipFailure(Exception):
    """A clip that cannot be used.

    Args:
      clip: the clip's id, '' where it is not known yet (see `named`).
      stage: what was done with the clip, e.g. 'read', 'sound' or 'frame'.
      cause: what went wrong, in one line.
    """

    def __init__(self, clip: str, stage: str, cause: str):
        super().__init__(clip, stage, cause)  # pickled, and compared below, by these
        self.clip, self.stage, self.cause = clip, stage, cause

    def named(self, clip: str) -> "ClipFailure":
        """The same failure, without a traceback, as that of this clip."""
        return ClipFailure(clip, self.stage, self.cause)

    def to_json(self) -> dict[str, str]:
        """The three fields by name."""
        return {"clip": self.clip, "stage": self.stage, "cause": self.cause}

    def __str__(self) -> str:
        return f"clip {self.clip}: {self.stage}: {self.cause}" if self.clip else f"{self.stage}: {self.cause}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClipFailure) and self.args == other.args

    def __hash__(self) -> int:
        return hash(self.args)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ClipFailure of this stage, the clip not named yet."""
    try:
        yield
    except ClipFailure:
        raise
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ClipFailure("", name, cause) from error


def batch_failures(batch: Mapping[str, Any]) -> list[ClipFailure]:
    """The failed clips of a host batch: `id`, `stage` and `cause` are str [b], `stage` is '' where nothing failed."""
    rows = zip(batch["id"], batch["stage"], batch["cause"], strict=True)
    return [ClipFailure(str(clip), str(where), str(cause)) for clip, where, cause in rows if where]


class FailureCount:
    """Counts the failed clips of the batches it is shown; padding does not count."""

    def __init__(self, max_failure_share: float, minimum: int = 100, remembered: int = 5):
        """`minimum`: clips to see before the share is judged. `remembered`: how many failures stay in `last`."""
        self.max_failure_share = max_failure_share
        self.clips = 0
        self.failures = 0
        self.causes: collections.Counter[tuple[str, str]] = collections.Counter()
        self.last: collections.deque[ClipFailure] = collections.deque(maxlen=remembered)
        self._minimum = minimum

    def add(self, batch: Mapping[str, Any]) -> Sequence[ClipFailure]:
        """Counts a host batch (`id`, `stage`, `cause`: str [b]; '' in all is padding) and returns its failures.

        Raises:
          UserError: too large a share of the clips seen so far failed.
        """
        failures = batch_failures(batch)
        self.clips += sum(1 for clip, where in zip(batch["id"], batch["stage"]) if clip or where)
        self.failures += len(failures)
        self.last.extend(failures)
        self.causes.update((failure.stage, failure.cause) for failure in failures)
        if self.clips >= self._minimum and self.failures > self.max_failure_share * self.clips:
            raise UserError(
                f"{self.summary()}. This is more than data.max_failure_share={self.max_failure_share}: "
                "repair or prepare the data again, or raise the share"
            )
        return failures

    def summary(self) -> str:
        """'3 of 200 clips failed (2 × frame: …; 1 × sound: …); last: clip a: frame: …'"""
        if not self.failures:
            return f"0 of {self.clips} clips failed"
        causes = "; ".join(f"{count} × {where}: {cause}" for (where, cause), count in self.causes.most_common(5))
        return f"{self.failures} of {self.clips} clips failed ({causes}); last: {', '.join(map(str, self.last))}"
