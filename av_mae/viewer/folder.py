"""What a work directory holds for the viewer: its runs, their curves, pictures, sounds and figures. Only reads."""

import dataclasses
import json
import os
import pathlib
import stat
from collections.abc import Iterator

from av_mae import pictures

MARKS = ("metrics.jsonl", "results.json")  # either of them makes a folder a run
PASSED_OVER = ("checkpoints", "data", "images")  # folders in which no run is looked for
MOST_RUNS = 200
DEPTH = 3
LARGEST = 1e30  # beyond it a curve's axis overflows
SHOWN_FILES = {".png": "image/png", ".wav": "audio/wav"}  # what may be fetched, by the end of its name


class Refused(Exception):
    """A request for what is not there or may not be seen."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder as read now.

    name: its path from the work directory, with slashes, '' for the work directory itself. metrics: the lines of
    metrics.jsonl. images and sounds: paths from the work directory. problems: what could not be read, in words.
    """

    name: str
    config: dict
    metrics: list[dict]
    results: dict
    images: list[str]
    sounds: list[str]
    problems: list[str]

    @property
    def curves(self) -> list[str]:
        """The names of all numbers that some line of the metrics has, those that every run has first."""
        found = {name for line in self.metrics for name, value in line.items() if _is_number(value)} - {"step"}
        known = [name for name in pictures.CURVES if name in found]
        return known + sorted(found - set(known))


class Workdir:
    """The only folder that the viewer sees: paths that lead out of it, also through links, are refused."""

    def __init__(self, path: str | os.PathLike):
        self.root = pathlib.Path(path).resolve()

    def runs(self) -> list[str]:
        """The names of all runs in the folder, itself ('') first, at most 200 and three folders deep."""
        names = []
        for folder, folders, files in os.walk(self.root):
            place = pathlib.Path(folder).relative_to(self.root)
            deep = len(place.parts) >= DEPTH
            folders[:] = [] if deep else sorted(name for name in folders
                                                if name not in PASSED_OVER and not name.startswith("."))
            if set(MARKS) & set(files):
                names.append("" if place == pathlib.Path() else place.as_posix())
            if len(names) == MOST_RUNS:
                break
        return names

    def read(self, name: str) -> Run:
        """The run of that name. Raises Refused where there is none."""
        if name not in self.runs():
            raise Refused(f"there is no run {name!r} in {self.root}")
        folder, problems = self.root / name, []
        config, results = (self._object(folder / file, problems) for file in ("config.json", "results.json"))
        found = sorted(self._shown(folder / "images"))
        images, sounds = ([path for path in found if path.endswith(end)] for end in (".png", ".wav"))
        return Run(name, config, self._metrics(folder / "metrics.jsonl", problems), results, images, sounds, problems)

    def file(self, relative: str) -> pathlib.Path:
        """A picture or sound inside the folder.

        Raises:
          Refused: the path leads out of the folder, is no plain file, or is of a kind that is not shown.
        """
        place = pathlib.PurePosixPath(relative)
        if place.is_absolute() or {"..", ""} & set(place.parts) or "\0" in relative or "\\" in relative:
            raise Refused("the path leads out of the work directory")
        if place.suffix not in SHOWN_FILES or any(part.startswith(".") for part in place.parts):
            raise Refused("only pictures (png) and sounds (wav) are shown")
        return self._inside(self.root / place)

    def _inside(self, path: pathlib.Path) -> pathlib.Path:
        """The path without links, a plain file in this folder. Raises Refused otherwise."""
        try:
            real = path.resolve(strict=True)
            plain = stat.S_ISREG(real.stat().st_mode)
        except (OSError, RuntimeError) as error:
            raise Refused("there is no such file") from error
        if not real.is_relative_to(self.root):
            raise Refused("the path leads out of the work directory")
        if not plain:
            raise Refused("this is no plain file")
        return real

    def _shown(self, folder: pathlib.Path) -> Iterator[str]:
        """Pictures and sounds below a folder that may be fetched."""
        for parent, folders, files in os.walk(folder):
            folders.sort()
            for name in files:
                relative = (pathlib.Path(parent) / name).relative_to(self.root).as_posix()
                try:
                    self.file(relative)
                except Refused:
                    continue
                yield relative

    def _text(self, path: pathlib.Path, problems: list[str]) -> str:
        """A file's text; empty where there is none, and where it cannot be read, which is noted."""
        if not os.path.lexists(path):
            return ""
        try:
            return self._inside(path).read_text()
        except (Refused, OSError, UnicodeDecodeError) as error:
            problems.append(f"{path.name} cannot be read: {error}")
            return ""

    def _object(self, path: pathlib.Path, problems: list[str]) -> dict:
        text = self._text(path, problems)
        try:
            found = json.loads(text or "{}")
        except (ValueError, RecursionError) as error:
            problems.append(f"{path.name} is no JSON: {error}")
            return {}
        if not isinstance(found, dict):
            problems.append(f"{path.name} must hold an object, it holds {type(found).__name__}")
            return {}
        return found

    def _metrics(self, path: pathlib.Path, problems: list[str]) -> list[dict]:
        """Lines with a step, their numbers alone; any other line is counted as a problem."""
        text = self._text(path, problems)
        lines = pictures.parse_metrics(text)
        right = [line for line in lines if isinstance(line, dict) and _is_number(line.get("step"))]
        broken = len(text.splitlines()) - len(right)
        if broken:
            problems.append(f"metrics.jsonl: {broken} lines are no metrics of a step and are left out")
        return [{name: value for name, value in line.items() if _is_number(value)} for line in right]


def _is_number(value) -> bool:
    """Whether a value can be drawn: a finite number of a sane size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
