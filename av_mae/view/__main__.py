"""`python -m av_mae.view`: writes one page of a run's curves, images, sounds and results into its work directory.

Pages are built as element trees, which escape every text when written out.
"""

import argparse
import collections
import importlib.resources
import json
import os
import pathlib
import tempfile
import urllib.parse
import webbrowser
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from av_mae import plots
from av_mae.errors import CHECKPOINT_STORES, UserError, run_command
from av_mae.storage import as_path, is_url
from av_mae.view import RUN_FILES, SHOWN_FILES, Run, Workdir, is_number
from av_mae.workdir import Mirror, is_shown, last_metrics, original

URLS = {"--workdir": CHECKPOINT_STORES}  # options that take those of stores

PAGE_FILE = "view.html"
MOST_CURVES, SHOWN_CURVES, MOST_POINTS = 1000, 12, 300  # of the page; of a run, the others folded; of a curve
MOST_IMAGES, SHOWN_IMAGES, MOST_CAUSES = 1000, 12, 20
MOST_LETTERS = 300  # of a text that a file gives
CONDITIONS = ("right", "swapped", "blank")  # of the other stream, each a column of the results
DETAILS = ("clips", "skipped", "config", "checkpoint", "skipped_clips")  # keys of results.json that are no metrics
KINDS_OF_AUDIO = ("mixture", "estimate", "source")
OLDER_KINDS = {"truth": "source"}  # ends of files' names that older runs have
UNITS = {"clips_per_second": "clips/s", "input_wait": "share of the time"}
# Nothing is loaded from elsewhere and no script runs, whatever a file of the run holds.
POLICY = "default-src 'none'; img-src 'self' file: data:; media-src 'self' file:; style-src 'unsafe-inline'"


Element = ElementTree.Element


def element(tag: str, *children: Element | str, **attributes: str) -> Element:
    """An HTML element; children are elements and texts, `class_` stands for the attribute class."""
    made = Element(tag, {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def page(workdir: Workdir, names: Sequence[str]) -> bytes:
    """The whole page as UTF-8 bytes.

    Args:
      workdir: the work directory.
      names: the runs to show, as `Workdir.runs` names them.
    """
    title = workdir.root.name or str(workdir.root)
    links = [element("a", _short(name or title), href=f"#run{number}") for number, name in enumerate(names)]
    styles = importlib.resources.files("av_mae").joinpath("assets", "view.css").read_text()
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", f"{title} · av_mae"),
        element("link", rel="icon", href="data:,"),
        element("style", styles),
    )
    moving = element("p", "Curves that move: ", element("code", f"tensorboard --logdir={workdir.root}"))
    sections, curves = [], MOST_CURVES
    for number, name in enumerate(names):
        run = workdir.read(name)
        sections += [element("h1", _short(name or title), id=f"run{number}"), *_run(run, curves)]
        curves = max(0, curves - len(curve_names(run)))
    navigation = element("nav", element("ul", *(element("li", link) for link in links)))
    body = element("body", navigation, element("main", moving, *sections))
    text = ElementTree.tostring(element("html", head, body, lang="en"), "unicode", method="html")
    return ("<!DOCTYPE html>\n" + text).encode("utf-8", "replace")


def curve_names(run: Run) -> list[str]:
    """The names of all numbers that some line of the metrics has, those that every run has first."""
    found = {name for line in run.metrics for name in line} - {"step"}
    known = [name for name in plots.CURVES if name in found]
    return known + sorted(found - set(known))


def _run(run: Run, curves: int) -> list[Element]:
    """What the page shows of one run; `curves` at most are drawn."""
    # Reconstructions in the order of their steps, then the images of an evaluation.
    steps = [path for path in run.images if pathlib.PurePosixPath(path).name.startswith("step_")]
    others = [path for path in run.images if not pathlib.PurePosixPath(path).name.startswith("step_")]
    return [
        *(element("p", _short(problem), class_="problem") for problem in run.problems),
        *_state(run),
        *_results(run.results),
        *_curves(run, curves),
        *_gallery("Reconstructions over time", steps),
        *_gallery("Images", others),
        *_sounds(run),
        *_skipped(run),
        *_configuration(run.config),
    ]


def _section(title: str, *children: Element) -> list[Element]:
    """A section of the page; none where there is nothing in it."""
    return [element("section", element("h2", title), *children)] if children else []


def _table(header: Sequence[str], rows: Iterable[Sequence[Element | str]]) -> Element:
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    heads = [element("th", name, scope="col") for name in header]
    return element("table", element("thead", element("tr", *heads)), element("tbody", *body))


def _short(value: object) -> str:
    """A value as text of at most 300 letters."""
    text = str(value)
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"


def _state(run: Run) -> list[Element]:
    """The last step, and what its line of the metrics says."""
    if not run.metrics:
        return []
    last = last_metrics(run.metrics)
    rows = [(_short(name.replace("_", " ")), f"{last[name]:.5g}") for name in curve_names(run) if name in last]
    total = _short(run.config.get("steps") or "?")
    return _section(f"Step {last['step']:g} of {total}", _table(("last", "value"), rows[:MOST_CURVES]))


def _curves(run: Run, most: int) -> list[Element]:
    """A curve for each number of the metrics: the first ones at once, the others when they are unfolded."""
    names = curve_names(run)
    drawn = [curve(run.metrics, name) for name in names[:most]]
    parts = [element("div", *drawn[:SHOWN_CURVES], class_="curves")] if names else []
    if len(drawn) > SHOWN_CURVES:
        folded = element("div", *drawn[SHOWN_CURVES:], class_="curves")
        parts.append(element("details", element("summary", f"{len(drawn) - SHOWN_CURVES} more curves"), folded))
    if len(drawn) < len(names):
        parts.append(element("p", f"{len(names) - len(drawn)} further curves are left to TensorBoard"))
    return _section("Curves", *parts)


WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 340, 200, 58, 24, 34  # pixels of a curve and of its margins


def curve(metrics: Sequence[dict[str, float]], name: str) -> Element:
    """One metric over steps as SVG, at most 300 points of it."""
    points = spread([(line["step"], line[name]) for line in metrics if name in line], MOST_POINTS)
    ticks_x, ticks_y = (_ticks([point[axis] for point in points]) for axis in (0, 1))
    scale = lambda value, ticks: (value - ticks[0]) / (ticks[-1] - ticks[0])
    x = lambda value: LEFT + scale(value, ticks_x) * (WIDTH - LEFT - RIGHT)
    y = lambda value: HEIGHT - BOTTOM - scale(value, ticks_y) * (HEIGHT - BOTTOM - 24)
    text = lambda words, x, y, anchor: element("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
    line = lambda *ends: element("line", **dict(zip(("x1", "y1", "x2", "y2"), (f"{end:.1f}" for end in ends))))
    unit = UNITS.get(name)
    title = _short(name.replace("_", " ") + (f" [{unit}]" if unit else ""))[:50]
    marks = [text(title, LEFT, 14, "start"), text("step", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "middle")]
    for tick in ticks_y:
        marks += [line(LEFT, y(tick), WIDTH - RIGHT, y(tick)), text(f"{tick:.4g}", LEFT - 6, y(tick) + 4, "end")]
    for tick in ticks_x:
        bottom = y(ticks_y[0])
        marks += [line(x(tick), bottom, x(tick), bottom + 4), text(f"{tick:g}", x(tick), bottom + 16, "middle")]
    path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    # A dot at the last point: a line of one point is not seen.
    last = element("circle", cx=f"{x(points[-1][0]):.1f}", cy=f"{y(points[-1][1]):.1f}", r="2.5")
    label = f"{title} over steps, last {points[-1][1]:.4g}"
    shape = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "width": str(WIDTH), "height": str(HEIGHT), "role": "img"}
    return element("svg", *marks, element("polyline", points=path), last, aria_label=label, **shape)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers on an axis, the values between the first and the last of them."""
    low, high = float(min(values)), float(max(values))
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    return [float(tick) for tick in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def _folded(items: list[Any], show: Callable[[list[Any]], list[Element]]) -> list[Element]:
    """What `show` makes of a dozen items, evenly spread, and of the others, which are folded away."""
    shown = spread(items, SHOWN_IMAGES)
    first = set(shown)
    rest = [item for item in items if item not in first]
    others = spread(rest, MOST_IMAGES)
    which = f"{len(others)} of the others" if len(others) < len(rest) else "the others"
    summary = f"{len(shown)} of {len(items)}, evenly spread; {which}"
    return [*show(shown), *([element("details", element("summary", summary), *show(others))] if others else [])]


def _gallery(title: str, paths: list[str]) -> list[Element]:
    figure = lambda path: element(
        "figure",
        element("img", src=_address(path), alt=_caption(path), loading="lazy"),
        element("figcaption", _caption(path)),
    )
    return _section(title, *_folded(paths, lambda some: list(map(figure, some))))


def _sounds(run: Run) -> list[Element]:
    """A row for each clip: its mixture, estimate and target source to play."""
    clips: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for path in run.sounds:
        name, _, end = pathlib.PurePosixPath(path).stem.rpartition("_")
        kind = OLDER_KINDS.get(end, end)
        clips[name if kind in KINDS_OF_AUDIO else _caption(path)][kind if kind in KINDS_OF_AUDIO else "sound"] = path
    kinds = [kind for kind in (*KINDS_OF_AUDIO, "sound") if any(kind in clip for clip in clips.values())]

    def player(name: str, kind: str) -> Element | str:
        label, path = _short(f"{kind} of {name}"), clips[name].get(kind)
        return element("audio", src=_address(path), controls="", preload="metadata", aria_label=label) if path else ""

    rows = lambda names: [(_short(name), *(player(name, kind) for kind in kinds)) for name in names]
    parts = _folded(list(clips), lambda names: [_table(("clip", *kinds), rows(names))]) if clips else []
    return _section("Sounds", *parts)


def _address(path: str) -> str:
    """A file's address, relative to the page."""
    return urllib.parse.quote_from_bytes(os.fsencode(path))


def _caption(path: str) -> str:
    """step_00001000.png → step 1000; else the file's name in words."""
    stem = pathlib.PurePosixPath(path).stem
    number = stem.removeprefix("step_")
    return f"step {int(number)}" if number != stem and number.isdecimal() else stem.replace("_", " ")


def _results(results: dict[str, Any]) -> list[Element]:
    """The metrics of an evaluation, one row for each, with a column for every condition of the other stream."""
    if not results:
        return []
    rows: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name in [name for name in results if name not in DETAILS][:MOST_CURVES]:
        parts = name.split("/")
        condition = next((part for part in parts if part in CONDITIONS), "value")
        quantity = "/".join(part for part in parts if part not in CONDITIONS)
        rows[quantity][condition] = _short(metric_text(results[name]))
    columns = [name for name in ("value", *CONDITIONS) if any(name in row for row in rows.values())]
    cells = [(_short(name), *(row.get(column, "") for column in columns)) for name, row in rows.items()]
    counts = (
        f"{_short(results.get('clips', '?'))} clips measured, {_short(results.get('skipped', '?'))} skipped; values "
        "with their 95 % intervals over clips"
    )
    return _section("Results", element("p", counts), _table(("metric", *columns), cells))


def metric_text(metric: object) -> str:
    """A metric of results.json as `.721 [.701, .740]` with what it leaves out; any other value as it stands."""
    if not isinstance(metric, dict):
        return f"{metric:.4g}" if isinstance(metric, float) else str(metric)
    numbers = [metric.get(name) for name in ("value", "low", "high")]
    left_out = metric.get("left_out")
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) if isinstance(left_out, dict) else ""
    known = [number for number in numbers if is_number(number)]
    if len(known) < 3:
        return f"– ({reasons})" if reasons else "–"
    return "{:.3f} [{:.3f}, {:.3f}]".format(*known) + (f" (without {reasons})" if reasons else "")


def _skipped(run: Run) -> list[Element]:
    """Why clips were skipped, most frequent causes first, with a clip of each."""
    if not run.skipped:  # runs of earlier versions: each clip with its cause in one text
        listed = run.results.get("skipped_clips")
        texts = listed[:MOST_CAUSES] if isinstance(listed, list) else []
        return _section(
            "Skipped", *([element("ul", *(element("li", _short(text)) for text in texts))] if texts else [])
        )
    clips: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for line in run.skipped:
        clips[_short(line.get("stage", "")), _short(line.get("cause", ""))].append(_short(line["clip"]))
    ordered = sorted(clips.items(), key=lambda item: -len(item[1]))
    rows = [(stage, cause, str(len(some)), some[0]) for (stage, cause), some in ordered[:MOST_CAUSES]]
    parts = [element("p", f"{len(run.skipped)} clips"), _table(("stage", "cause", "clips", "for example"), rows)]
    return _section("Skipped", *parts)


def _configuration(config: dict[str, Any]) -> list[Element]:
    if not config:
        return []
    text = json.dumps(config, indent=2)[: 100 * MOST_LETTERS]
    return [element("details", element("summary", "Configuration"), element("pre", text))]


def write_page(folder: str) -> pathlib.Path:
    """Writes `view.html` into a work directory over an older one, and returns its path.

    Raises:
      UserError: the folder is missing, holds no run, or cannot be written to.
    """
    workdir = Workdir(folder)
    if not workdir.root.is_dir():
        raise UserError(f"--workdir={original(workdir.root)} must be a folder; there is none of that name")
    names = workdir.runs()
    if not names:
        raise UserError(
            f"--workdir={original(workdir.root)} holds no run: neither it nor a folder in it has "
            f"{' or '.join(RUN_FILES)}; name the --workdir of av_mae.train or av_mae.evaluate, or a folder of several"
        )
    path = workdir.root / PAGE_FILE
    try:
        # A new file takes the page's name: what a link of that name leads to is not written to.
        with tempfile.NamedTemporaryFile(dir=workdir.root, prefix=".view_", delete=False) as file:
            file.write(page(workdir, names))
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def main(argv: list[str]) -> None:
    """Writes the page of a work directory."""
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.view",
        description=f"Writes {PAGE_FILE} into a work directory: curves, reconstructions, heat maps, separated sounds, "
        "results and skipped clips of a run, or of all runs in a folder. The page shows the run as it is now.",
        epilog="example: python -m av_mae.view --workdir=runs/demo --open    curves that move: tensorboard "
        "--logdir=runs/demo",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="a run's work directory, or a folder of several"
    )
    parser.add_argument("--open", action="store_true", help="also open the page in the browser")
    arguments = parser.parse_args(argv)
    if is_url(arguments.workdir):
        if arguments.open:
            raise UserError("--open shows pages of this machine only, not those on stores")
        shown = as_path(arguments.workdir)
        with Mirror(str(shown), is_shown, empty=lambda name: name.endswith(SHOWN_FILES)) as local:
            print(original(write_page(str(local))))
        return
    path = write_page(arguments.workdir)
    print(path)
    if arguments.open and not webbrowser.open(path.as_uri()):
        print("there is no browser here: open the page yourself")


if __name__ == "__main__":
    run_command(main, URLS)
