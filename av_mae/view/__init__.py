"""The page of a work directory. Here the runs in it are read; __main__.py makes one HTML file of them.

Nothing in a work directory is trusted: files may be damaged, huge, or links to elsewhere.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

RUN_FILES = ("metrics.jsonl", "results.json", "skipped.jsonl")  # any of them makes a folder a run
PASSED_OVER = ("checkpoints", "data", "images")  # folders in which no run is looked for
MOST_RUNS, DEPTH = 200, 3
MOST_BYTES = 64 * 2**20  # of a file that is read
LARGEST = 1e30  # beyond it a curve's axis overflows
SHOWN_FILES = (".png", ".wav")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder as read now.

    name: its path from the work directory, with slashes; '' for the work directory itself. metrics: the lines of
    metrics.jsonl. skipped: the lines of skipped.jsonl. images and sounds: paths from the work directory. problems:
    what could not be read, in words.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, float]]
    results: dict[str, Any]
    skipped: list[dict[str, Any]]
    images: list[str]
    sounds: list[str]
    problems: list[str]


class Refused(Exception):
    """A file that may not be shown, with the reason."""


class Workdir:
    """The only folder that the page shows: paths that lead out of it, also through links, are refused."""

    def __init__(self, path: str | os.PathLike[str]):
        self.root = pathlib.Path(path).resolve()

    def runs(self) -> list[str]:
        """The names of all runs in the folder, itself ('') first, at most 200 and three folders deep."""
        names = []
        for folder, folders, files in os.walk(self.root):
            inside = pathlib.Path(folder).relative_to(self.root)
            left = [name for name in sorted(folders) if name not in PASSED_OVER and not name.startswith(".")]
            folders[:] = left if len(inside.parts) < DEPTH else []
            if set(RUN_FILES) & set(files):
                names.append("" if inside == pathlib.Path() else inside.as_posix())
            if len(names) == MOST_RUNS:
                break
        return names

    def read(self, name: str) -> Run:
        """The run of that name, which `runs` gave."""
        folder = self.root / name
        problems: list[str] = []
        config, results = (self._object(folder / file, problems) for file in ("config.json", "results.json"))
        found = sorted(self._shown(folder / "images", problems))
        images, sounds = ([path for path in found if path.endswith(end)] for end in SHOWN_FILES)
        lines = self._lines(
            folder / "metrics.jsonl", problems, lambda line: is_number(line.get("step")), "metrics of a step"
        )
        metrics = [{key: value for key, value in line.items() if is_number(value)} for line in lines]
        skipped = self._lines(folder / "skipped.jsonl", problems, lambda line: "clip" in line, "clips with their cause")
        return Run(name, config, metrics, results, skipped, images, sounds, problems)

    def _inside(self, path: pathlib.Path) -> pathlib.Path:
        """The path without links. Raises Refused unless it is a plain file in this folder."""
        try:
            real = path.resolve(strict=True)
            status = real.stat()
        except (OSError, RuntimeError) as error:
            raise Refused("there is no such file") from error
        if not real.is_relative_to(self.root):
            raise Refused("the path leads out of the work directory")
        if not stat.S_ISREG(status.st_mode):
            raise Refused("this is no plain file")
        return real

    def _shown(self, folder: pathlib.Path, problems: list[str]) -> Iterator[str]:
        """Images and sounds below a folder, as paths from the work directory."""
        if folder.is_symlink():
            problems.append(f"{folder.name} is a link, which is not followed")
            return
        for parent, folders, files in os.walk(folder):
            folders.sort()
            for path in (pathlib.Path(parent, name) for name in files if name.endswith(SHOWN_FILES)):
                with contextlib.suppress(Refused):
                    self._inside(path)
                    yield path.relative_to(self.root).as_posix()

    def _text(self, path: pathlib.Path, problems: list[str]) -> str:
        """A file's text; empty if the file is missing or cannot be read, which `problems` then tell."""
        if not os.path.lexists(path):
            return ""
        try:
            real = self._inside(path)
            if real.stat().st_size > MOST_BYTES:
                raise Refused(f"it is larger than {MOST_BYTES // 2**20} MB")
            return real.read_text("utf-8", "replace" if path.suffix == ".jsonl" else "strict")
        except (Refused, OSError, UnicodeDecodeError) as error:
            problems.append(f"{path.name} cannot be read: {error}")
            return ""

    def _object(self, path: pathlib.Path, problems: list[str]) -> dict[str, Any]:
        """The object that a JSON file holds; empty if the file holds none."""
        text = self._text(path, problems)
        try:
            found = _parse(text or "{}")
        except (ValueError, RecursionError) as error:
            problems.append(f"{path.name} is no JSON: {error}")
            return {}
        if not isinstance(found, dict):
            problems.append(f"{path.name} must hold an object, it holds {type(found).__name__}")
            return {}
        return found

    def _lines(
        self, path: pathlib.Path, problems: list[str], is_right: Callable[[dict[str, Any]], bool], what: str
    ) -> list[dict[str, Any]]:
        """The objects in the lines of a file that are right; any other line is counted as a problem."""
        right, texts = [], self._text(path, problems).splitlines()
        for text in texts:
            with contextlib.suppress(ValueError, RecursionError):
                line = _parse(text)
                right += [line] if isinstance(line, dict) and is_right(line) else []
        if len(right) < len(texts):
            problems.append(f"{path.name}: {len(texts) - len(right)} lines are no {what} and are left out")
        return right


def _parse(text: str) -> Any:
    """JSON; whole numbers too long for a float become infinite (Python refuses those of more than 4,300 digits)."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 300 else float(digits))


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value can be drawn: a finite number of a sane size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
