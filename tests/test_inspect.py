"""`python -m av_mae.inspect`: what it tells is what the set holds, and what cannot be read is told too."""

import json

import clip_trees
import fake_clips
import numpy as np
import pytest
from PIL import Image

from av_mae import errors, inspect, workdir
from av_mae.data import records
from av_mae.data.records import Labels
from av_mae.errors import UserError
from av_mae.prepare.shards import write_set


def clip(index: int, labels: list[int], **options) -> dict:
    known = fake_clips.record("c", index, **({"size": (100, 300)} | options))
    return {name: value for name, value in known.items() if name != "label"} | {"labels": labels}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven training clips of three classes, one of which never occurs, and an empty split."""
    path = tmp_path_factory.mktemp("sets") / "set"
    path.mkdir()
    clips = [
        clip(0, [0]),
        clip(1, [0, 2], seconds=2.5),
        clip(2, [0]),
        clip(3, [2]),
        clip(4, []),
        clip(5, [0], size=(300, 100), frames=1),
        clip(6, [0]),
    ]
    clips[3]["frames"] = [frame[:20] for frame in clips[3]["frames"]]
    clips[4]["sound"] = b""
    clips[5] |= {"frames": [], "frame_times": []}
    write_set(
        path,
        "made_up",
        "Clips made\nup.",
        ["drum", "flute", "bell"],
        {"train": lambda: iter(clips), "test": lambda: iter(clips[:1])},
        7,
    )
    return path


def test_it_tells_what_the_set_holds(folder, tmp_path, capsys):
    inspect.main([str(folder), f"--sheet={tmp_path / 'sheet.png'}"])
    lines = [line.rstrip("█ ").strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"{folder}: made_up, records of version {records.VERSION}" and lines[1] == "Clips made up."
    train = lines[next(i for i, line in enumerate(lines) if line.startswith("train: 7 clips in 1 shard, 0.0")) :]
    assert "classes: 3, of which 1 have no clip; 1 clips have no class" in train
    for expected in (
        "drum         5",
        "bell         2",
        "flute         0",
        "0.5 … 1         5",
        "2 … 3         1",
        "0 … 1         1",
        "3 … 5         5",
        "64 … 128         5",
    ):
        assert expected in train, expected
    assert "1 of 7 clips cannot be read:" in train
    assert any(line.startswith("clip c-3: frame: ") for line in train)
    assert any(line.startswith("test: 1 clips in 1 shard") for line in lines)
    assert not any("preparation" in line for line in lines)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.ndim == 3 and sheet.shape[0] > 5 * 150 and sheet.std() > 20


def test_the_sheet_shows_the_clips(tmp_path):
    """One clip, red above blue, silent but for one second of noise."""
    path = tmp_path / "set"
    path.mkdir()
    frame = np.zeros((120, 160, 3), np.uint8)
    frame[:60, :, 0], frame[60:, :, 2] = 255, 255
    waveform = np.zeros(32000)
    waveform[8000:24000] = 0.3 * np.random.default_rng(0).standard_normal(16000)
    made = clip(0, [1]) | {
        "frames": [fake_clips.jpeg(frame)] * 3,
        "sound": fake_clips.flac(waveform, 16000),
        "duration": np.float32(2),
    }
    write_set(path, "made_up", "made up", ["drum", "flute"], {"train": lambda: iter([made])}, 1)
    shown, middle, last, sound = inspect._panels(records.open_source(path, "train")[0])
    assert shown.shape == (144, 192, 3)
    for picture in (shown, middle, last):
        assert np.abs(picture[5:66].mean((0, 1)) - [255, 0, 0]).max() < 8
        assert np.abs(picture[78:139].mean((0, 1)) - [0, 0, 255]).max() < 8
    columns = sound.shape[1]
    quiet, loud = np.r_[: columns // 4 - 2, 3 * columns // 4 + 3 : columns], slice(columns // 3, 2 * columns // 3)
    assert sound[:, loud].min() > sound[:, quiet].max() + 2
    sheet = inspect.contact_sheet(str(path), "train", 4, 0)
    red = (sheet.astype(int) - [255, 0, 0]).__abs__().max(2) < 12
    blue = (sheet.astype(int) - [0, 0, 255]).__abs__().max(2) < 12
    assert red.sum() > 10_000 and blue.sum() > 10_000 and np.argwhere(red)[:, 0].mean() < np.argwhere(blue)[:, 0].mean()


def test_what_preparation_found_is_told(folder, tmp_path):
    (folder / "report.json").write_text(json.dumps({"causes": {"silence": 3, "undecodable": 12, "too_short": 0}}))
    lines = inspect.report_lines(folder)
    assert [line.split()[:2] for line in lines[2:]] == [["silence", "3"], ["undecodable", "12"]]
    (folder / "report.json").write_text(json.dumps({"causes": {"silence": 0}}))
    assert inspect.report_lines(folder) == ["", "preparation: nothing was wrong"]
    (folder / "report.json").write_text("{")
    assert inspect.report_lines(folder) == []
    (folder / "report.json").unlink()


def test_many_classes_are_shortened():
    labels = Labels.of([[c] for c in range(50) for _ in range(50 - c)])
    lines = inspect.class_lines([f"c{i}" for i in range(50)], labels)
    assert [line.split()[0] for line in lines[1:7]] == [f"c{i}" for i in range(6)]
    assert "38 more classes" in lines[7] and [line.split()[0] for line in lines[8:]] == [f"c{i}" for i in range(44, 50)]


def test_histogram_against_numpy():
    values = np.random.default_rng(0).uniform(0, 40, 500)
    edges = (0, 5, 7, 20, 30)
    counts = [int(line.split("█")[0].split()[-1]) for line in inspect.histogram(values, edges)]
    assert counts == np.histogram(values, [*edges, np.inf])[0].tolist() and inspect.histogram([], edges) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no/such"], "no/such does not exist"),
        (["{set}", "--splits=train,valid"], "no split 'valid'; it has test, train"),
        (["{set}", "--clips=0"], "--clips=0 must be at least 1"),
        (["{set}", "--seed=-1"], "--seed=-1"),
        (["{set}", "--sheet=/proc/no/sheet.png", "--clips=2"], "cannot write /proc/no/sheet.png: .*--sheet"),
    ],
)
def test_bad_options_are_named(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        inspect.main([word.format(set=folder) for word in arguments])


SKIPPED = [
    ("a", "sound", "the file is cut off: 3.20 of 4.00 s are there"),
    ("b", "sound", "the file is cut off: 1.00 of 9.50 s are there"),
    ("c", "frame", "no frame can be decoded"),
    ("a", "files", "no file a.mp4"),
    ("d\x1b[2J", "files", "no file d\x1b[2J.mp4"),
]


@pytest.mark.parametrize("kind", ["set", "config.json", "results.json", "part-00000.parquet"])
def test_what_was_skipped_is_shown_of_every_output(kind, folder, tmp_path, capsys):
    """Of a prepared set, the work directories of training and evaluation, and an export."""
    output = folder if kind == "set" else tmp_path
    if kind != "set":
        (output / kind).write_text("{}")
    workdir.write_skipped(output, [errors.ClipFailure(*fields) for fields in SKIPPED])
    inspect.main([str(output), f"--sheet={tmp_path / 'sheet.png'}"])
    (output / "skipped.jsonl").unlink()
    text = capsys.readouterr().out
    table = text[text.index("skipped clips") :].split("\n\n")[0].splitlines()
    assert table[0].endswith("skipped.jsonl has them all): 5") and "\x1b" not in text
    rows = [line.split() for line in table[2:] if line[4:11].strip()]
    assert [(row[0], row[1], " ".join(row[2:])) for row in rows] == [
        ("2", "files", "no file ….mp4"),
        ("2", "sound", "the file is cut off: … of … s are there"),
        ("1", "frame", "no frame can be decoded"),
    ]
    assert any("b: the file is cut off: 1.00 of 9.50 s are there" in line for line in table)
    assert any(r"d\x1b[2J: no file" in line for line in table)


def test_an_output_without_skipped_clips_says_so(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    inspect.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1].endswith(": 0")


@pytest.mark.parametrize("file", ["shard", "labels"])
def test_files_of_another_set_are_named(file, tmp_path, capsys):
    """As many records, of the same fields: only ids and labels tell."""
    folders = [f"{label}/{number}.mp4" for label in ("cat", "dog", "owl") for number in range(2)]
    clip_trees.put(tmp_path / "in", {name: clip_trees.clip(number, 1.0) for number, name in enumerate(folders)})
    clip_trees.prepare("folder", tmp_path / "in", tmp_path / "set", shard_clips=3)
    inspect.main([str(tmp_path / "set")])
    assert "shards of other sets" not in capsys.readouterr().out
    if file == "shard":
        first, second = sorted((tmp_path / "set").glob("folder-train.array_record*"))
        second.write_bytes(first.read_bytes())
    else:
        clip_trees.prepare("folder", tmp_path / "in", tmp_path / "other", shard_clips=3, seed=1)
        (tmp_path / "set" / "labels-train.npz").write_bytes((tmp_path / "other" / "labels-train.npz").read_bytes())
    inspect.main([str(tmp_path / "set")])
    assert "shards of other sets are among those of this one" in capsys.readouterr().out
