"""The page of a run: what it shows, that it escapes what it must, and that nothing from elsewhere gets onto it."""

import html.parser
import json
import os
import time
import urllib.parse
import webbrowser

import pytest
from made_run import HOSTILE, write_run

from av_mae.errors import UserError
from av_mae.view import Workdir
from av_mae.view import __main__ as view


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def sources(self, tag):
        return [attributes["src"] for name, attributes in self.tags if name == tag]


def shown_page(folder) -> Elements:
    """The page that the command writes into a folder, within a minute of one processor whatever is in the folder."""
    started = time.process_time()
    view.main([f"--workdir={folder}"])
    assert time.process_time() - started < 60
    return Elements((folder / "view.html").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("view") / "run")
    write_run(folder / "tasks" / "second run")
    (folder.parent / "secret.png").write_bytes(b"secret")
    (folder / "images" / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "images" / "in.png").symlink_to(folder / "images" / "localization.png")
    (folder / "images" / "folder").symlink_to(folder.parent)
    os.mkfifo(folder / "images" / "pipe.png")
    return folder


def test_page_shows_curves_images_sounds_and_metrics(run):
    shown = shown_page(run)
    images = [path for path in shown.sources("img") if path.startswith("images/")]
    assert [urllib.parse.unquote(path).removeprefix("images/") for path in images] == [
        *(f"step_{10 * n:08d}.png" for n in (1, 2, 3)),
        "in.png",
        "localization.png",
    ]
    assert [text for text in shown.texts if text.startswith("step ")][:3] == ["step 10", "step 20", "step 30"]
    sounds = [path for path in shown.sources("audio") if path.startswith("images/")]
    assert sounds == [f"images/separation/clip%201%23_{kind}.wav" for kind in ("mixture", "estimate", "source")]
    assert all((run / urllib.parse.unquote(path)).is_file() for path in shown.sources("img") + shown.sources("audio"))
    texts = " ".join(shown.texts)
    assert "Step 30 of 30" in texts and "20 clips measured, 1 skipped" in texts
    assert "7.166 [6.304, 8.031] (without 2 silent)" in texts and "– (9 nothing left)" in texts
    assert "metrics.jsonl: 2 lines are no metrics of a step" in texts
    assert f"tensorboard --logdir={run}" in texts


def test_sounds_of_older_runs_are_shown_with_the_others(tmp_path):
    """Once, the files of target sources ended in `_truth`."""
    folder = write_run(tmp_path / "run") / "images" / "separation"
    (folder / "clip 1#_source.wav").rename(folder / "clip 1#_truth.wav")
    shown = shown_page(tmp_path / "run")
    assert shown.sources("audio")[-1].endswith("clip%201%23_truth.wav") and "source" in shown.texts


def test_skipped_clips_are_shown_by_their_causes(run):
    texts = shown_page(run).texts
    first = texts.index("frame")
    assert texts[first : first + 4] == ["frame", "broken", "3", HOSTILE + "0"]
    assert "4 clips" in texts


def test_runs_of_a_folder_are_on_one_page(run):
    shown = shown_page(run)
    assert [attributes["href"] for tag, attributes in shown.tags if tag == "a"] == ["#run0", "#run1"]
    assert [attributes["id"] for tag, attributes in shown.tags if tag == "h1"] == ["run0", "run1"]
    second = [path for path in shown.sources("img") + shown.sources("audio") if path.startswith("tasks/second%20run/")]
    assert len(second) == 4 + 3


def test_curves_have_labelled_axes_and_their_values(run):
    metrics = [{"step": float(step), "input_wait": 0.4 * step} for step in range(0, 101)]
    svg = view.curve(metrics, "input_wait")
    texts = [element.text for element in svg.iter("text")]
    assert texts[:2] == ["input wait [share of the time]", "step"] and {"0", "50", "100"} <= set(texts[2:])
    points = [tuple(map(float, pair.split(","))) for pair in svg.find("polyline").get("points").split()]
    lines = {text.text: float(text.get("y")) - 4 for text in svg.iter("text") if text.get("text-anchor") == "end"}
    assert points[0][1] == pytest.approx(lines["0"], abs=0.2) and points[-1][1] == pytest.approx(lines["40"], abs=0.2)
    slopes = {round((b[1] - a[1]) / (b[0] - a[0]), 1) for a, b in zip(points, points[20:])}
    assert len(points) == 101 and len(slopes) == 1  # a straight line


def test_every_text_is_escaped_and_no_script_is_there(run):
    shown = shown_page(run)
    assert {tag for tag, _ in shown.tags} == set(
        "html head meta title link style body nav ul li a main h1 h2 p section table thead tbody tr th td img figure "
        "figcaption audio details summary pre div svg text line polyline circle code".split()
    )
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on")]
    assert shown.texts.count(HOSTILE) == 2 * 4  # of both runs: last value, title of a curve, metric, cause
    assert len([attributes for tag, attributes in shown.tags if tag == "script"]) == 0
    (policy,) = (a["content"] for tag, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "script" not in policy and "http" not in policy
    asked = [value for _, a in shown.tags for name, value in a.items() if name in ("src", "href", "xlink:href", "data")]
    assert all(urllib.parse.urlsplit(value).scheme in ("", "data") and value[0] != "/" for value in asked)


def test_many_images_are_spread_and_all_can_be_had(tmp_path):
    write_run(tmp_path, steps=40)
    shown = shown_page(tmp_path)
    steps = [path for path in shown.sources("img") if "step_" in path]
    first = steps[:12]
    assert first[0].endswith("00000010.png") and first[-1].endswith("00000400.png") and first == sorted(first)
    assert len(set(steps)) == len(steps) == 40
    assert "12 of 40, evenly spread; the others" in shown.texts


def test_spread_keeps_the_ends_and_the_order():
    for count in (13, 50, 997):
        chosen = view.spread(list(range(count)), 12)
        assert len(set(chosen)) == 12 and chosen == sorted(chosen) and (chosen[0], chosen[-1]) == (0, count - 1)
    assert view.spread([1, 2], 12) == [1, 2]


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("results.json", "{", "results.json is no JSON"),
        ("results.json", "[" * 100_000, "results.json is no JSON"),
        ("config.json", "[]", "config.json must hold an object, it holds list"),
        ("config.json", b"\x80", "config.json cannot be read"),
        ("metrics.jsonl", b'{"step": 1, "loss": 2}\n\x80\x00\n{"step": 2, "loss": 1', "2 lines are no metrics"),
        (
            "metrics.jsonl",
            '{"step": NaN}\n{"step": 1e999, "loss": 1}\n{"step": 1, "loss": 1' + "0" * 400 + "}",
            "2 lines are no metrics",
        ),
        ("metrics.jsonl", "null\n" * 100_000 + "[" * 100_000, "100001 lines are no metrics"),
        ("skipped.jsonl", "{}\n\x00\n3", "skipped.jsonl: 3 lines are no clips"),
    ],
)
def test_broken_files_are_named_and_the_rest_is_shown(tmp_path, name, text, problem):
    write_run(tmp_path)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    shown = shown_page(tmp_path)
    assert any(problem in line for line in shown.texts) and len(shown.sources("audio")) == 3


@pytest.mark.parametrize("digits", [19, 400, 5000])
def test_numbers_of_any_length(tmp_path, digits):
    write_run(tmp_path)
    number = "9" * digits
    (tmp_path / "results.json").write_text(
        f'{{"sdr": {{"value": {number}, "low": 0.1, "high": {number}}}, "sir": {number}, "sar": -{number}, '
        f'"clips": {number}, "iou": {{"value": 0.5, "low": 0.25, "high": 0.75, "left_out": {{"silent": {number}}}}}}}'
    )
    (tmp_path / "config.json").write_text(f'{{"steps": {number}, "seed": {number}}}')
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 2, "b": {number}}}\n{{"step": {number}, "loss": 1}}')
    texts = " ".join(shown_page(tmp_path).texts)
    assert "0.500 [0.250, 0.750] (without" in texts


def test_four_hundred_metrics(tmp_path):
    write_run(tmp_path)
    lines = [{"step": step} | {f"metric_{n}": step * n for n in range(400)} for step in range(200)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shown = shown_page(tmp_path)
    assert len([tag for tag, _ in shown.tags if tag == "svg"]) == 400 and "388 more curves" in shown.texts
    assert (tmp_path / "view.html").stat().st_size < 5e6


def test_twenty_thousand_images(tmp_path):
    write_run(tmp_path)
    for step in range(20_000):
        (tmp_path / "images" / f"step_{step:08d}.png").touch()
    shown = shown_page(tmp_path)
    assert sum("step_000" in path for path in shown.sources("img")) == 12 + 1000
    assert any(text.startswith("12 of 20000, evenly spread; 1000 of the others") for text in shown.texts)


def test_images_linked_to_the_root_of_the_disk(tmp_path):
    write_run(tmp_path / "other")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2}')
    (run / "images").symlink_to("/")
    shown = shown_page(run)
    assert shown.sources("img") == [] and any("images is a link" in text for text in shown.texts)


def test_files_of_a_run_that_are_links_out_of_the_folder_are_not_read(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (run / "config.json").unlink()
    (run / "config.json").symlink_to(tmp_path / "secret.json")
    read = Workdir(run).read("")
    assert read.config == {} and read.problems[0].startswith("config.json cannot be read: the path leads out")


def test_page_is_not_written_through_a_link(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "elsewhere").write_text("kept")
    (run / "view.html").symlink_to(tmp_path / "elsewhere")
    shown_page(run)
    assert (tmp_path / "elsewhere").read_text() == "kept" and not (run / "view.html").is_symlink()
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_runs_are_found_but_not_in_checkpoints_or_data(tmp_path):
    for folder in ("b", "a/c", "checkpoints/1", "data/d", ".hidden", "a/c/e/too_deep"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "metrics.jsonl").touch()
    assert Workdir(tmp_path).runs() == ["a/c", "b"]


def test_bad_options_are_refused(tmp_path):
    for folder, message in ((tmp_path / "none", "must be a folder"), (tmp_path, "holds no run: neither it nor")):
        with pytest.raises(UserError, match=message):
            view.main([f"--workdir={folder}"])


def test_open_shows_the_page_in_the_browser(tmp_path, monkeypatch, capsys):
    run, opened = write_run(tmp_path / "a run"), []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    view.main([f"--workdir={run}", "--open"])
    assert opened == [(run / "view.html").as_uri()] and capsys.readouterr().out == f"{run / 'view.html'}\n"
