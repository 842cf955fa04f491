"""Preparing a folder of media files: what a record holds, labels, splits, tables, findings, refusals."""

import csv
import io
import json
import os
import subprocess
import sys

import clip_trees
import made_media
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import simplejpeg
import soundfile
import tensorflow_datasets as tfds
from real_media import BLACK, ROBUST, probed

from av_mae import preprocess
from av_mae.config import DataConfig
from av_mae.data import pipeline, records
from av_mae.errors import ClipFailure, UserError, batch_failures
from av_mae.media import decode as media
from av_mae.prepare import __main__ as prepare
from av_mae.prepare.clips import Limits


@pytest.fixture(scope="module")
def robust(shared, tmp_path_factory):
    output = tmp_path_factory.mktemp("robust") / "set"
    return output, clip_trees.prepare("folder", shared / "media" / "robust", output, workers=2)


def _id(name: str) -> str:
    """Files that share all but their ending keep it."""
    return name if name in ("sample.flv", "sample.mkv", "sample.mp4") else name.rpartition(".")[0]


def test_every_robust_clip_comes_through(robust, shared):
    output, _ = robust
    clips = clip_trees.stored(output)
    assert set(clips) == {_id(name) for name in ROBUST}
    for name in ROBUST:
        row, record = probed(shared, name), clips[_id(name)]
        seconds = float(row["duration"] or int(row["vframes"]) / float(row["fps"]))
        assert record["duration"] == pytest.approx(seconds, abs=0.1 if not row["duration"] else 0.006)
        assert len(record["frames"]) == max(1, round(float(record["duration"])))
        width, height = map(int, row["res"].split("x"))
        width, height = (height, width) if row["rot"] else (width, height)
        scale = min(1.0, 256 / min(width, height))
        for frame in record["frames"]:
            assert simplejpeg.decode_jpeg(frame).shape == (round(height * scale), round(width * scale), 3)
        if row["n_a"] == "0":
            assert record["sound"] == b""
        else:
            sound = soundfile.info(io.BytesIO(record["sound"]))
            assert (sound.samplerate, sound.channels, sound.format) == (16000, 1, "FLAC")
            _, _, begin = media.Media(shared / "media" / "robust" / name).waveform(0.0, 0.1)
            late = max(0.0, begin)  # silence before it begins
            assert sound.duration == pytest.approx(min(late + float(row["asec"]), seconds), abs=0.02)


def test_what_is_odd_about_robust_clips_is_reported(robust, shared):
    _, report = robust
    found = clip_trees.causes(report)
    assert found["no_sound"] == {_id(name) for name in ROBUST if probed(shared, name)["n_a"] == "0"}
    assert {_id(name) for name in BLACK} <= found["black"] and "silent-black-10s" in found["silence"]
    assert found["too_short"] == {"sample_android_slow_motion", "sample_h262_mpeg_audio", "video_90"}
    assert found["ends_early"] == {"sample_shorter_audio"}
    assert set(found) == {"no_sound", "black", "silence", "too_short", "ends_early"}
    for name in found["silence"]:
        path = next(path for path in ROBUST if _id(path) == name)
        assert probed(shared, path)["asec"]


def test_broken_clips_are_reported_under_their_cause(shared, tmp_path):
    report = clip_trees.prepare("folder", shared / "media" / "broken", tmp_path / "set", workers=2)
    found = clip_trees.causes(report)
    assert found["undecodable"] == {
        "corrupted",
        "sample_malformed_free_box",
        "sample_with_invalid_nalu",
        "sample_with_sdt",
        "zero_length",
    }
    assert found["no_sound"] == {"sample_video_only"} and found["no_picture"] == {"sample_ac3_aac", "sample_audio_only"}
    stages = {finding["clip"]: finding["stage"] for finding in report["findings"] if finding["cause"] == "undecodable"}
    assert stages == {
        "corrupted": "frame",
        "sample_malformed_free_box": "open",
        "sample_with_invalid_nalu": "frame",
        "sample_with_sdt": "frame",
        "zero_length": "open",
    }
    # The ninth, video_with_failing_audio.mp4, fails in other readers only.
    assert set(clip_trees.stored(tmp_path / "set")) == {
        "sample_video_only",
        "sample_ac3_aac",
        "sample_audio_only",
        "video_with_failing_audio",
    }
    page = (tmp_path / "set" / "report.html").read_text()
    assert all(finding["message"] in page for finding in report["findings"])


def test_frames_and_sound_are_those_of_their_time(tmp_path):
    source = clip_trees.put(tmp_path / "in", {"a.mp4": clip_trees.clip(100, 4.0)})
    clip_trees.prepare("folder", source, tmp_path / "set", frame_rate=2.0, quality=95)
    record = clip_trees.stored(tmp_path / "set")["a"]
    times = 0.25 + 0.5 * np.arange(8)
    assert np.abs(record["frame_times"] - times).max() <= 0.1 + 1e-6  # frames are 0.2 s apart
    for time, frame in zip(record["frame_times"], record["frames"]):
        assert made_media.number_of(simplejpeg.decode_jpeg(frame)) == 100 + round(time * clip_trees.FPS)
    sound, _ = soundfile.read(io.BytesIO(record["sound"]))
    expected = made_media.hum(100 + np.arange(len(sound)) / 16000)
    assert len(sound) == 64000 and np.abs(sound - expected).mean() < 2e-3  # its own mean is 0.055
    assert record["source"] == "a" and record["source_start"] == 0 and record["label"] == -1


def test_parts_of_a_file_by_a_table(tmp_path):
    source = clip_trees.put(tmp_path / "in", {"long.mkv": clip_trees.clip(0, 20.0, format="matroska")})
    table = "path,id,label,split,start,end\nlong.mp4,x,dog;cat,test,12.5,15\nlong.mkv,,cat,,3,\n./long.mkv,y,,val,,\n"
    clip_trees.put(tmp_path, {"list.csv": table})
    report = clip_trees.prepare("folder", source, tmp_path / "set", table=str(tmp_path / "list.csv"), frames=4)
    test, train = clip_trees.stored(tmp_path / "set", "test")["x"], clip_trees.stored(tmp_path / "set")["long_3"]
    assert records.class_names(tmp_path / "set") == ["cat", "dog"]
    np.testing.assert_array_equal(test["labels"], [1, 0])
    assert (test["duration"], test["source"], test["source_start"]) == (2.5, "long.mp4", 12.5)
    assert train["duration"] == pytest.approx(17, abs=0.08) and train["source_start"] == 3
    assert clip_trees.stored(tmp_path / "set", "validation")["y"]["label"] == -1
    assert clip_trees.causes(report) == {"no_label": {"y"}}
    for start, record in ((12.5, test), (3, train)):
        for time, frame in zip(record["frame_times"], record["frames"], strict=True):
            assert made_media.number_of(simplejpeg.decode_jpeg(frame)) == round((start + time) * clip_trees.FPS)
        sound, _ = soundfile.read(io.BytesIO(record["sound"]))
        expected = made_media.hum(start + np.arange(len(sound)) / 16000)
        assert np.abs(sound - expected).mean() < 2e-3


def test_a_parquet_table_says_the_same_as_a_csv(tmp_path):
    source = clip_trees.put(tmp_path / "in", {f"{name}.mp4": clip_trees.clip(ord(name)) for name in "ab"})
    rows = [{"file": "a.mp4", "labels": ["dog", "cat"], "start": 0.5}, {"file": "b.mp4", "labels": [], "start": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "list.parquet")
    clip_trees.put(tmp_path, {"list.csv": '\ufefffile,labels,start\na.mp4,"dog|cat",0.5\nb.mp4,,\n'})
    for ending in ("csv", "parquet"):
        clip_trees.prepare("folder", source, tmp_path / ending, table=str(tmp_path / f"list.{ending}"))
    clip_trees.assert_same_files(tmp_path / "csv", tmp_path / "parquet")
    assert set(clip_trees.stored(tmp_path / "csv")) == {"a_0.5", "b"}


def test_bad_rows_are_named_and_the_rest_is_kept(tmp_path):
    source = clip_trees.put(tmp_path / "in", {"a.mp4": clip_trees.clip(1)})
    rows = [
        b"path,id,split,start,end",
        b"a.mp4,good,,,",
        b"a.mp4,wide,,,,7",
        b"a.mp4,../up,,,",
        b"a.mp4,b,,x,",
        b"a.mp4,c,,2,1",
        b"../a.mp4,d,,,",
        b"a.mp4,caf\xe9,,,",
        b"a.mp4,e,later,,",
        b"absent.mp4,f,,,",
        b"a.mp4,good,,,",
        b'a.mp4,"g,,,',
    ]
    clip_trees.put(tmp_path, {"list.csv": b"\r\n".join(rows)})
    report = clip_trees.prepare("folder", source, tmp_path / "set", table=str(tmp_path / "list.csv"))
    messages = {finding["message"].split("list.csv, ")[-1] for finding in report["findings"]}
    expected = {
        "row 3: 6 fields, the header has 5",
        "row 4: id '../up' holds a path separator or a control character",
        "row 5: start 'x' is no number",
        "row 6: end 1 must be after start 2",
        "row 7: path '../a.mp4' must be a file below the source folder",
        "row 8: byte 0xe9 at column 10 is not UTF-8",
        "row 10: no file absent.mp4",
        "a.mp4 (train); a.mp4 (train) is kept",
        "row 12: cannot be split at commas: unexpected end of data",
    }
    assert expected <= messages and any(message.startswith("row 9: split 'later' must be") for message in messages)
    assert len(messages) == 10 and set(clip_trees.stored(tmp_path / "set")) == {"good"}
    assert report["causes"]["bad_row"] == 8 and report["causes"]["missing"] == report["causes"]["duplicate_id"] == 1


def test_folders_are_labels_and_splits(tmp_path):
    names = ["train/dog/a.mp4", "train/cat/a.mp4", "test/dog/loud/a.mp4", "val/cat/b.mp4", "val/.hidden/c.mp4"]
    source = clip_trees.put(tmp_path / "in", {name: clip_trees.clip(position) for position, name in enumerate(names)})
    clip_trees.put(source, {"train/dog/notes.txt": "x"})
    report = clip_trees.prepare("folder", source, tmp_path / "set")
    assert records.class_names(tmp_path / "set") == ["cat", "dog", "dog/loud"]
    labels = {
        name: int(record["label"])
        for split in ("train", "test", "validation")
        for name, record in clip_trees.stored(tmp_path / "set", split).items()
    }
    assert labels == {"train-dog-a": 1, "train-cat-a": 0, "test-dog-loud-a": 2, "val-cat-b": 0}
    assert report["classes"] == {"cat": 2, "dog": 1, "dog/loud": 1} and not report["findings"]


def test_names_that_are_not_utf8_and_links_in_circles(tmp_path):
    source = clip_trees.put(tmp_path / "in", {"a/good.mp4": clip_trees.clip(1)})
    (source / "a" / os.fsdecode(b"caf\xe9.mp4")).write_bytes(clip_trees.clip(2))
    (source / "a" / "round").symlink_to(source)
    for name in ("proc", "sys", "dev"):
        (source / "a" / name).symlink_to(f"/{name}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.mp4").write_bytes(clip_trees.clip(3))
    (source / "b").symlink_to(tmp_path / "elsewhere")
    report = clip_trees.prepare("folder", source, tmp_path / "set")
    assert set(clip_trees.stored(tmp_path / "set")) == {"a-good", "b-linked"}
    assert clip_trees.causes(report) == {"bad_id": {"a-caf\\udce9"}}
    assert "caf\\udce9" in (tmp_path / "set" / "report.html").read_text()


def test_copies_are_found_by_content(tmp_path):
    same, other = clip_trees.clip(1), clip_trees.clip(2)
    source = clip_trees.put(tmp_path / "in", {"train/a.mp4": same, "train/b.mp4": other, "test/c.mp4": same})
    report = clip_trees.prepare("folder", source, tmp_path / "set")
    (finding,) = report["findings"]
    assert finding["cause"] == "duplicate_content" and {finding["clip"], finding["message"].split()[-2]} == {
        "train-a",
        "test-c",
    }


def test_what_is_odd_can_be_left_out(tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(10)]
    tone, quiet = made_media.hum(np.arange(32000) / 16000), np.zeros(32000)
    clips = {
        "good": (noise, tone),
        "quiet": (noise, quiet),
        "still": ([noise[0]] * 10, tone),
        "mute": (noise, None),
        "dark": ([frame // 32 for frame in noise], tone),
        "blind": (None, tone),
        "short": (noise[:2], tone[:6400]),
    }
    source = clip_trees.put(
        tmp_path / "in",
        {
            f"{name}.mkv": made_media.encoded(frames, sound, format="matroska")
            for name, (frames, sound) in clips.items()
        },
    )
    report = clip_trees.prepare("folder", source, tmp_path / "set", skip=("no_sound", "silence", "too_short"))
    assert clip_trees.causes(report) == {
        "silence": {"quiet"},
        "still": {"still"},
        "no_sound": {"mute"},
        "black": {"dark"},
        "no_picture": {"blind"},
        "too_short": {"short"},
    }
    assert set(clip_trees.stored(tmp_path / "set")) == {"good", "still", "dark", "blind"}


def test_a_clip_that_takes_too_long_fails_alone(tmp_path):
    source = clip_trees.put(tmp_path / "in", {"a.mp4": clip_trees.clip(1, 40.0), "b.mp4": clip_trees.clip(2)})
    report = clip_trees.prepare("folder", source, tmp_path / "set", limits=Limits(seconds=1e-4))
    messages = {finding["clip"]: (finding["stage"], finding["message"]) for finding in report["findings"]}
    assert messages == dict.fromkeys("ab", ("decode", "stopped after time_limit=0.0001 s"))
    assert report["splits"]["train"] == {"clips": 2, "stored": 0, "bytes": 0, "seconds": 0.0}
    with pytest.raises(UserError, match="split 'train' of .* holds no clips"):
        records.open_source(tmp_path / "set", "train")


def test_tfds_reads_the_set_without_tensorflow(tmp_path, root):
    source = clip_trees.put(tmp_path / "in", {f"{name}.mp4": clip_trees.clip(ord(name)) for name in "abcde"})
    clip_trees.put(source, {"bad.mp4": b"x"})
    clip_trees.prepare("folder", source, tmp_path / "set", shard_clips=1)
    builder = tfds.builder_from_directory(str(tmp_path / "set"))
    theirs = {clip["id"].decode(): clip for clip in builder.as_data_source(split="train")}
    ours = clip_trees.stored(tmp_path / "set")
    assert set(ours) == set(theirs) == set("abcde") and builder.info.splits["train"].num_shards == 6  # one is empty
    for name, record in ours.items():
        for field in record.keys() - {"id", "source"}:
            np.testing.assert_array_equal(record[field], theirs[name][field])
    assert "tensorflow" not in sys.modules


def test_a_prepared_set_is_read_as_the_file_is(tmp_path):
    """The batch of evaluation has what is in the middle of the clip; a clip without sound fails alone."""
    frames = [made_media.numbered_frame(number) for number in range(50)]
    clips = {"a.mp4": clip_trees.clip(7, 6.0), "mute.mp4": made_media.encoded(frames)}
    clip_trees.prepare("folder", clip_trees.put(tmp_path / "in", clips), tmp_path / "set")
    data = DataConfig(path=str(tmp_path / "set"), split="train", workers=0)
    with pipeline.open_evaluation_data(data, made_media.SIZE, (128, 192), 2, np.arange(2)) as evaluation:
        (batch,) = evaluation
    position = list(batch["id"]).index("a")
    assert list(batch["valid"]) == [name == "a" for name in batch["id"]]
    assert batch_failures(batch) == [ClipFailure("mute", "sound", "the clip has no sound")]
    assert batch["start"][position] == pytest.approx(1.5) and batch["label"][position] == -1
    shown = made_media.number_of(batch["image"][position])
    assert abs((shown - 7) / clip_trees.FPS - 3.0) <= 0.6  # frames are stored once a second
    expected = preprocess.load(tmp_path / "in" / "a.mp4")["audio"][0]
    heard = expected > -4  # below it there is the noise of 16-bit samples
    assert heard.mean() > 0.3 and np.abs(batch["audio"][position] - expected)[heard].max() < 0.02


def test_the_command_tells_what_it_made(tmp_path, root):
    mute = made_media.encoded([made_media.numbered_frame(number) for number in range(9)])
    source = clip_trees.put(tmp_path / "in", {"a/a.mp4": clip_trees.clip(1), "b/b.mp4": b"x", "b/c.mp4": mute})
    command = [
        sys.executable,
        "-m",
        "av_mae.prepare",
        "--dataset=folder",
        f"--source={source}",
        f"--output={tmp_path / 'set'}",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 clips in train" in done.stdout and "1 × undecodable" in done.stdout
    assert "--skip=no_sound,no_picture leaves out" in done.stdout and "3/3 clips" in done.stderr
    names = clip_trees.files_below(tmp_path / "set")
    assert names == [
        "README.md",
        "dataset_info.json",
        "features.json",
        "folder-train.array_record-00000-of-00001",
        "label.labels.txt",
        "labels-train.npz",
        "prepare.json",
        "report.html",
        "report.json",
        "skipped.jsonl",
    ]
    card = (tmp_path / "set" / "README.md").read_text()
    assert "| train | 3 | 2 | 0.00 |" in card and "## Licence" in card and "1 × undecodable" in card
    assert json.loads((tmp_path / "set" / "prepare.json").read_text())["frame_rate"] == 1.0
    before = {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in names}
    again = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert again.returncode == 0 and "2 of 3 clips in train" in again.stdout
    assert before == {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in names}


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "--dataset=folder needs --source=DIR"),
        ({"source": "nowhere"}, "--source=nowhere is no folder"),
        ({"source": ".", "clips": 3}, "--clips is not an option of --dataset=folder"),
        ({"source": ".", "size": 0}, "--size=0 must be at least 1"),
        ({"source": ".", "frames": -1}, "--frames=-1 must be at least 0"),
        ({"source": ".", "quality": 101}, "--quality=101 must be at most 100"),
        ({"source": ".", "skip": "silense"}, "unknown cause in --skip 'silense', known are .*did you mean silence"),
        ({"source": ".", "on_error": "stop"}, "unknown value of --on_error 'stop', known are skip, fail"),
        ({"source": "empty"}, "empty holds no media file"),
        ({"source": "in", "splits": "test"}, "--splits=test: the data set has no 'test'; it has train"),
        ({"source": "in", "table": "absent.csv"}, r"there is no \./absent\.csv"),
        ({"source": "in", "table": "wide.csv"}, "wide.csv is encoded as UTF-16; save it as UTF-8"),
        ({"source": "in", "table": "other.csv"}, "other.csv has the columns a, b; it needs `path`"),
        ({"source": "in", "table": "fake.parquet"}, "fake.parquet is no Parquet file"),
        ({"source": "in", "on_error": "fail"}, "--on_error=fail: clip [bc]: open: Invalid data found"),
        ({"source": "in", "max_failures": 1}, r"--max_failures=1: clip [bc]: open: .*\(2 failed\)"),
    ],
)
def test_bad_input_is_named(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip_trees.put(
        tmp_path,
        {
            "in/b.mp4": b"x",
            "in/c.mp4": b"y",
            "empty/a.txt": b"",
            "wide.csv": "path\n".encode("utf-16"),
            "other.csv": "a,b\n1,2\n",
            "fake.parquet": "PAR",
        },
    )
    with pytest.raises(UserError, match=message):
        prepare.main(
            [
                "--dataset=folder",
                "--output=set",
                "--workers=1",
                *(f"--{name}={value}" for name, value in options.items()),
            ]
        )


def test_clips_with_separators_in_their_ids_are_refused(tmp_path):
    source = clip_trees.put(tmp_path / "in", {"a.mp4": clip_trees.clip(1)})
    file = io.StringIO()
    csv.writer(file).writerows([["path", "id"], ["a.mp4", "a/b"], ["a.mp4", ".."], ["a.mp4", "x" * 201]])
    clip_trees.put(tmp_path, {"list.csv": file.getvalue()})
    with pytest.raises(UserError, match="no clip was found in --source.*row 2: id 'a/b' holds a path separator"):
        clip_trees.prepare("folder", source, tmp_path / "set", table=str(tmp_path / "list.csv"))
