"""Runs → HTML. Pages are built as element trees, so that every text is escaped when they are written out."""

import dataclasses
import json
import os
import pathlib
import stat
import urllib.parse
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence

from av_mae import plots as pictures

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
            folders[:] = (
                [] if deep else sorted(name for name in folders if name not in PASSED_OVER and not name.startswith("."))
            )
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


Element = ElementTree.Element
CONDITIONS = ("right", "swapped", "blank")  # of the other stream, each a column of the results
NOT_FIGURES = ("clips", "skipped", "config", "checkpoint", "skipped_clips")
MOST_PICTURES = 12
MOST_CAUSES = 20
KINDS_OF_SOUND = ("mixture", "estimate", "truth")


def element(tag: str, *children: "Element | str", **attributes: str) -> Element:
    """An HTML element; children are elements and texts, `class_` stands for the attribute class."""
    made = Element(tag, {name.rstrip("_"): value for name, value in attributes.items()})
    last = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif last is None:
            made.text = (made.text or "") + child
        else:
            last.tail = (last.tail or "") + child
    return made


def document(title: str, *body: Element) -> bytes:
    """A whole page as UTF-8 bytes."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("link", rel="stylesheet", href="/view.css"),
    )
    text = ElementTree.tostring(element("html", head, element("body", *body), lang="en"), "unicode", method="html")
    return ("<!DOCTYPE html>\n" + text).encode("utf-8", "replace")


def run_page(run: Run, names: Sequence[str], root: str, whole: bool = False) -> bytes:
    """The page of one run; `names` are those of all runs, `root` that of the work directory. `whole`: all pictures
    and sounds rather than a dozen."""
    title = run.name or root
    sections = [element("p", problem, class_="problem") for problem in run.problems]
    sections += [
        *_state(run),
        *_results(run.results),
        *_curves(run),
        *_pictures(run, whole),
        *_sounds(run, whole),
        *_configuration(run.config),
    ]
    return document(
        f"{title} · av_mae", _navigation(run.name, names, root), element("main", element("h1", title), *sections)
    )


def message_page(title: str, message: str) -> bytes:
    """A page that says one thing, with the way back."""
    return document(
        title,
        element(
            "main",
            element("h1", title),
            element("p", message),
            element("p", element("a", "to the first run", href="/")),
        ),
    )


def address(kind: str, path: str) -> str:
    """The address of a run ('run'), its curves ('curves') or a file ('file')."""
    return f"/{kind}/" + urllib.parse.quote_from_bytes(os.fsencode(path))


def _navigation(shown: str, names: Sequence[str], root: str) -> Element:
    entries = [
        element(
            "li",
            element(
                "a", name or root, href=address("run", name), **({"aria-current": "page"} if name == shown else {})
            ),
        )
        for name in names
    ]
    return element("nav", element("ul", *entries))


def _section(title: str, *children: Element) -> Element:
    return element("section", element("h2", title), *children)


def _table(header: Sequence[str], rows: Iterable[Sequence["Element | str"]]) -> Element:
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    return element(
        "table",
        element("thead", element("tr", *(element("th", name, scope="col") for name in header))),
        element("tbody", *body),
    )


def _state(run: Run) -> list[Element]:
    """How far it is, and what its last line of metrics says."""
    if not run.metrics:
        return []
    last = run.metrics[-1]
    total = run.config.get("steps") or "?"
    rows = [(name.replace("_", " "), f"{last[name]:.5g}") for name in run.curves if name in last]
    return [_section(f"Step {last['step']:g} of {total}", _table(("last", "value"), rows))]


def _curves(run: Run) -> list[Element]:
    if not run.curves:
        return []
    names = ", ".join(name.replace("_", " ") for name in run.curves)
    return [
        _section("Curves", element("img", class_="curves", src=address("curves", run.name), alt=f"curves of {names}"))
    ]


def _pictures(run: Run, whole: bool) -> list[Element]:
    """Reconstructions in the order of their steps, then the pictures of an evaluation."""
    steps = [path for path in run.images if pathlib.PurePosixPath(path).name.startswith("step_")]
    others = [path for path in run.images if path not in steps]
    return [*_gallery("Reconstructions over time", steps, run, whole), *_gallery("Pictures", others, run, whole)]


def _gallery(title: str, paths: list[str], run: Run, whole: bool) -> list[Element]:
    if not paths:
        return []
    shown = paths if whole else spread(paths, MOST_PICTURES)
    figures = [
        element(
            "figure",
            element("img", src=address("file", path), alt=_caption(path), loading="lazy"),
            element("figcaption", _caption(path)),
        )
        for path in shown
    ]
    return [_section(title, *_share(run, len(shown), len(paths)), *figures)]


def _sounds(run: Run, whole: bool) -> list[Element]:
    """A row for each clip: its mixture, estimate and truth to play."""
    clips: dict[str, dict[str, str]] = {}
    for path in run.sounds:
        name, _, kind = pathlib.PurePosixPath(path).stem.rpartition("_")
        known = kind in KINDS_OF_SOUND
        clips.setdefault(name if known else _caption(path), {})[kind if known else "sound"] = path
    if not clips:
        return []
    kinds = [kind for kind in (*KINDS_OF_SOUND, "sound") if any(kind in clip for clip in clips.values())]
    shown = list(clips) if whole else spread(list(clips), MOST_PICTURES)
    rows = [(name, *(_player(clips[name].get(kind), f"{kind} of {name}") for kind in kinds)) for name in shown]
    return [_section("Sounds", *_share(run, len(shown), len(clips)), _table(("clip", *kinds), rows))]


def _player(path: str | None, label: str) -> "Element | str":
    if path is None:
        return ""
    return element("audio", src=address("file", path), controls="", preload="metadata", **{"aria-label": label})


def spread(items: list, most: int) -> list:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def _share(run: Run, shown: int, there: int) -> list[Element]:
    if shown == there:
        return []
    return [
        element(
            "p",
            f"{shown} of {there}, evenly spread; ",
            element("a", "all of them", href=address("run", run.name) + "?all"),
        )
    ]


def _caption(path: str) -> str:
    """step_00001000.png → step 1000; else the file's name in words."""
    stem = pathlib.PurePosixPath(path).stem
    number = stem.removeprefix("step_")
    return f"step {int(number)}" if number != stem and number.isdecimal() else stem.replace("_", " ")


def _results(results: dict) -> list[Element]:
    """Figures, one row for each, with a column for every condition of the other stream."""
    rows: dict[str, dict[str, str]] = {}
    for name, figure in results.items():
        if name in NOT_FIGURES:
            continue
        parts = name.split("/")
        condition = next((part for part in parts if part in CONDITIONS), "figure")
        quantity = "/".join(part for part in parts if part not in CONDITIONS)
        rows.setdefault(quantity, {})[condition] = figure_text(figure)
    if not results:
        return []
    columns = [name for name in ("figure", *CONDITIONS) if any(name in row for row in rows.values())]
    table = _table(("", *columns), [(name, *(row.get(column, "") for column in columns)) for name, row in rows.items()])
    counts = (
        f"{results.get('clips', '?')} clips measured, {results.get('skipped', '?')} skipped; values with their "
        "95 % intervals over clips"
    )
    skipped = results.get("skipped_clips")
    causes = [element("li", str(cause)) for cause in (skipped if isinstance(skipped, list) else [])[:MOST_CAUSES]]
    return [_section("Results", element("p", counts), table, *([element("ul", *causes)] if causes else []))]


def figure_text(figure: object) -> str:
    """A figure of results.json as `.721 [.701, .740]` with what it leaves out; any other value as it stands."""
    if not isinstance(figure, dict):
        return f"{figure:.4g}" if isinstance(figure, float) else str(figure)
    value, low, high = (figure.get(name) for name in ("value", "low", "high"))
    left_out = figure.get("left_out")
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) if isinstance(left_out, dict) else ""
    if not all(isinstance(number, int | float) for number in (value, low, high)):
        return f"– ({reasons})" if reasons else "–"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" + (f" (without {reasons})" if reasons else "")


def _configuration(config: dict) -> list[Element]:
    if not config:
        return []
    return [element("details", element("summary", "Configuration"), element("pre", json.dumps(config, indent=2)))]
