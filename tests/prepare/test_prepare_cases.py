"""Inputs after public bug reports (tests/data/cases, a README each) and their like: each gives the right value or is
named; nothing is stored of another file, split or place."""

import io
import json
import pathlib
import subprocess
import sys

import clip_trees
import made_media
import numpy as np
import pytest
import simplejpeg
import soundfile
from PIL import Image

from av_mae import workdir
from av_mae.data import records
from av_mae.errors import UserError
from av_mae.prepare import __main__ as prepare
from av_mae.prepare import clips as clip_records
from av_mae.prepare import run
from av_mae.prepare.clips import Job
from av_mae.prepare.readers import READERS
from av_mae.prepare.readers.catalogue import check_id, checked
from av_mae.storage import Folder

CASES = pathlib.Path(__file__).resolve().parent.parent / "data" / "cases"


def catalogue(source: pathlib.Path, dataset: str = "folder", **options):
    return READERS[dataset].read(Folder(source), **options)


def found(report) -> dict[str, list[str]]:
    causes: dict[str, list[str]] = {}
    for finding in report.findings:
        causes.setdefault(finding.cause, []).append(finding.clip)
    return causes


def test_a_row_whose_file_is_missing_takes_no_other_file():
    case = CASES / "01_table_takes_another_file"
    read = catalogue(case / "src", table=str(case / "table.csv"))
    assert not read.clips and found(read) == {"missing": ["dog-1", "bird-clip_0007"]}
    assert read.findings[0].message.endswith("no file dog/1.mp4")


@pytest.mark.parametrize(
    "named, there, taken",
    [
        ("a/long.mp4", ["a/long.mkv"], "a/long.mkv"),  # as it was converted
        ("a/long.mp4", ["a/long.mkv", "a/long.wav"], None),
        ("a/long.mp4", ["a/long.MP4"], "a/long.MP4"),
        ("a/long.mp4", ["a/long.mp4", "a/long.mkv"], "a/long.mp4"),
        ("a/clip_07.mp4", ["a/clip_7.mp4"], None),
        ("long.mp4", ["b/long.mp4"], None),
        ("a/x.1.mp4", ["a/x.mp4", "a/x.2.mp4"], None),
        ("a/x.weird", ["a/x.mp4", "a/x.weird"], "a/x.weird"),  # an ending that is not known
        ("a\\x.mp4", ["a/x.mp4"], "a/x.mp4"),  # as Windows writes it
        ("a\\x.mp4", ["a/x.mp4", "a\\x.mp4"], None),
        ("#1.mp4", ["#1.mp4"], "#1.mp4"),
        ("# 1.mp4", ["1.mp4"], None),
    ],
)
def test_files_of_other_names_are_other_files(named, there, taken, tmp_path):
    source = clip_trees.put(tmp_path / "in", dict.fromkeys(there, b""))
    table = clip_trees.put(tmp_path, {"list.csv": f"path\n{named}\n"}) / "list.csv"
    assert [clip.media for clip in catalogue(source, table=str(table)).clips] == ([taken] if taken else [])


def test_an_exact_name_goes_before_one_without_leading_zeros(tmp_path):
    source = clip_trees.put(tmp_path, {"vggss.json": json.dumps([{"file": "clip_0007", "bbox": [[0, 0, 1, 1]]}])})
    clip_trees.put(source, {"a/clip_7.mp4": b"", "b/clip_0007.mp4": b""})
    assert [clip.media for clip in catalogue(source, "vggss").clips] == ["b/clip_0007.mp4"]


@pytest.mark.parametrize(
    "folder, stray", [("with_third_folder", "unlabeled/x.mp4"), ("with_stray_file", "trailer.mp4")]
)
def test_what_lies_beside_splits_does_not_end_them(folder, stray):
    read = catalogue(CASES / "04_stray_file_ends_splits" / folder)
    assert {clip.id: clip.split for clip in read.clips} == {"train-dog-1": "train", "test-dog-3": "test"}
    assert read.classes == ("dog",) and found(read) == {"no_split": [stray]}


@pytest.mark.parametrize(
    "names, splits",
    [
        (["train/a.mp4", "eval/b.mp4", "x.mp4"], {"train-a": "train", "eval-b": "test"}),
        (["Set/Train/dog/a.mp4", "Set/Test/dog/b.mp4"], {"Set-Train-dog-a": "train", "Set-Test-dog-b": "test"}),
        (["test/a.mp4", "dog/b.mp4"], {"test-a": "test"}),
        (["train/dog/a.mp4", "x.mp4"], {"train-dog-a": "train"}),
        (["train/a.mp4", "dog/b.mp4"], {"train-a": "train", "dog-b": "train"}),  # the sound of a train
        (["train horning/a.mp4", "dog/b.mp4"], {"train horning-a": "train", "dog-b": "train"}),
        (["training/a.mp4", "testing/b.mp4"], {"training-a": "train", "testing-b": "test"}),
        (["dog/train.mp4", "dog/test.mp4"], {"dog-train": "train", "dog-test": "train"}),
    ],
)
def test_folders_that_are_splits(names, splits, tmp_path):
    read = catalogue(clip_trees.put(tmp_path, dict.fromkeys(names, b"")))
    assert {clip.id: clip.split for clip in read.clips} == splits
    assert len(read.clips) + len(read.findings) == len(names)


def test_splits_below_classes_are_refused(tmp_path):
    source = clip_trees.put(tmp_path, dict.fromkeys(["dog/train/a.mp4", "dog/test/b.mp4", "cat/train/c.mp4"], b""))
    with pytest.raises(UserError, match="has folders called test, train below others: name the folder"):
        catalogue(source)


def test_boxes_without_area_mark_no_pixel():
    read = catalogue(CASES / "06_vggss_empty_box", "vggss")
    boxes = {clip.id: clip.boxes for clip in read.clips}
    assert set(boxes) == {"aaaaaaaaaaa_000032", "bbbbbbbbbbb_000055"}
    np.testing.assert_allclose(boxes["bbbbbbbbbbb_000055"], [[0.1, 0.5, 0.6, 0.6], [0.1, 0.2, 0.3, 0.4]])
    assert found(read) == {"bad_row": ["vggss.json:3"]} and "no box has an area" in read.findings[0].message


@pytest.mark.parametrize(
    "boxes, stored",
    [
        ([[0.6, 0.7, 0.2, 0.1]], [[0.1, 0.2, 0.7, 0.6]]),  # drawn backwards
        ([[-1, 0.5, 3, 1.5]], [[0.5, 0, 1, 1]]),
        ([[1.5, 0, 2, 1], [0, 0, 1, 1]], [[0, 0, 1, 1]]),  # beyond the frame
        ([[0, 0, 100, 200]], None),  # in pixels
        ([["nan", 0, 1, 1]], None),
        ([[0, 0, 1]], None),
        (None, None),
        ([5], None),
    ],
)
def test_boxes_as_people_draw_them(boxes, stored, tmp_path):
    clip_trees.put(tmp_path, {"a.mp4": b"", "vggss.json": json.dumps([{"file": "a", "bbox": boxes}])})
    read = catalogue(tmp_path, "vggss")
    assert [clip.boxes for clip in read.clips] == ([tuple(map(tuple, stored))] if stored else [])
    assert len(read.findings) == (not stored)


NAMES = [
    "Screen Recording 2024-01-01 at 1.00.00\u202fPM",
    "nbsp\u00a0x",
    "full\u3000width",
    "می\u200cخواهم",
    "क्\u200dष",
    "\U0001f468\u200d\U0001f469",
    "trailing ",
    " leading",
    "\U0001fae9 newer than the tables",
]


def test_names_of_all_scripts_are_stored(tmp_path):
    content = (CASES / "01_table_takes_another_file" / "src" / "cat" / "1.mp4").read_bytes()
    source = clip_trees.put(tmp_path / "in", {f"c{name}x/{name}.mp4": content for name in NAMES})
    report = clip_trees.prepare("folder", source, tmp_path / "set")
    assert set(clip_trees.stored(tmp_path / "set")) == {f"c{name}x-{name}" for name in NAMES}
    assert records.class_names(tmp_path / "set") == sorted(f"c{name}x" for name in NAMES)
    assert not clip_trees.causes(report).keys() - {"duplicate_content"}


@pytest.mark.parametrize(
    "name", ["", "  ", "a\nb", "a\rb", "a\u2028b", "a\x85b", "a\x1bb", "a/b", "caf\udce9", "x" * 201]
)
def test_names_that_can_be_no_id(name):
    with pytest.raises(ValueError, match="^id "):
        check_id(name)


def test_photographs_are_frames_as_a_viewer_shows_them(tmp_path):
    clip_trees.prepare("flickr_soundnet", CASES / "18_photos_as_frames", tmp_path / "set")
    clips = clip_trees.stored(tmp_path / "set", "test")
    turned, deep = (simplejpeg.decode_jpeg(clips[name]["frames"][0]) for name in ("turned", "deep"))
    assert turned.shape[0] / turned.shape[1] == pytest.approx(240 / 320)
    corners = np.array([[turned[row, column] for column in (4, -4)] for row in (4, -4)]).reshape(4, 3).astype(int)
    np.testing.assert_allclose(corners, [[220, 30, 30], [30, 200, 30], [30, 30, 220], [220, 220, 30]], atol=20)
    assert abs(float(deep.mean()) - 105) < 1


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.fromarray(np.full((4, 6), 40_000, np.uint16)), 156),
        (Image.fromarray(np.full((4, 6), 40_000, np.int32)), 156),
        (Image.new("L", (6, 4), 77), 77),
        (Image.new("1", (6, 4), 1), 255),
        (Image.new("RGBA", (6, 4), (10, 10, 10, 255)), 10),
        (Image.new("CMYK", (6, 4), (0, 0, 0, 55)), 200),
        (Image.new("P", (6, 4), 0), 0),
    ],
)
def test_images_of_all_modes(image, expected):
    pixels = clip_records._rgb(image)
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8 and (pixels == expected).all()


def test_files_of_other_endings_are_media_or_counted(tmp_path):
    content = (CASES / "01_table_takes_another_file" / "src" / "cat" / "1.mp4").read_bytes()
    media = ["a.mp4", "b3g2.3g2", "basf.asf", "bdivx.divx", "bf4v.f4v", "bm4b.m4b"]
    others = ["bnone", "bnone2", "x.weird", "notes.txt", "list.csv"]
    source = clip_trees.put(tmp_path / "in", dict.fromkeys([*media, *others], content))
    report = clip_trees.prepare("folder", source, tmp_path / "set")
    assert len(clip_trees.stored(tmp_path / "set")) == len(media)
    named = {finding["clip"]: finding["message"] for finding in report["findings"] if finding["cause"] == "not_media"}
    assert set(named) == {"without ending", ".weird"} and named["without ending"].startswith(
        "2 files are left out, e.g. bnone"
    )


def test_a_folder_without_annotations_says_so(tmp_path):
    with pytest.raises(UserError, match=r"^there is no .*label2idx\.json"):
        catalogue(tmp_path, "avsbench_s4")


@pytest.mark.parametrize(
    "names",
    [["a/b.mp4", "a-b.mp4"], ["a/b/c.mp4", "a-b/c.mp4", "a/b-c.mp4"], ["a/b.mp4", "a/b.mkv", "a-b.mp4"]],
)
def test_paths_that_look_alike_have_ids_of_their_own(names, tmp_path):
    read = catalogue(clip_trees.put(tmp_path, dict.fromkeys(names, b"")))
    assert len({clip.id for clip in read.clips}) == len(names) == len(read.clips)
    table = clip_trees.put(tmp_path, {"list.csv": "path\n" + "\n".join(names)}) / "list.csv"
    by_table = catalogue(tmp_path, table=str(table))
    assert {clip.id: clip.media for clip in by_table.clips} == {clip.id: clip.media for clip in read.clips}


def test_events_that_begin_together_are_clips_of_their_own(tmp_path):
    rows = [
        "a.mp4,dog,1,2",
        "a.mp4,cat,1,3",
        "a.mp4,cat,1,2",
        "a.mp4,dog,1,2",
        "a.mp4,dog,123456.71,",
        "a.mp4,dog,123456.72,",
    ]
    table = (
        clip_trees.put(tmp_path, {"a.mp4": b"", "list.csv": "path,label,start,end\n" + "\n".join(rows)}) / "list.csv"
    )
    ids = [clip.id for clip in catalogue(tmp_path, table=str(table)).clips]
    assert ids == [
        "a_1_2",
        "a_1_3",
        "a_1_2_2",
        "a_1_2",
        "a_123456.71",
        "a_123456.72",
    ]  # the fourth row is the first again


@pytest.mark.parametrize(
    "name, seconds, frame, length",
    [
        ("abc", 24.0, 70, 10),  # the whole recording: from 14 s on
        ("abc_000014", 24.0, 0, 10),  # far longer than the name says: its beginning
        ("abc_000014_000024", 10.0, 0, 10),
        ("abc", 10.0, 0, 10),  # cut already
        ("abc", 9.0, 0, 9),
        ("abc", 16.0, None, 0),  # neither the part alone nor long enough to hold it
    ],
)
def test_only_the_annotated_part_of_a_file_is_taken(name, seconds, frame, length, tmp_path):
    source = clip_trees.put(
        tmp_path / "in", {"vggsound.csv": "abc,14,dog,train\n", f"{name}.mp4": clip_trees.clip(0, seconds)}
    )
    report = clip_trees.prepare("vggsound", source, tmp_path / "set")
    if frame is None:
        assert clip_trees.causes(report) == {"undecodable": {"abc_000014"}}
        return
    (record,) = clip_trees.stored(tmp_path / "set").values()
    assert record["duration"] == pytest.approx(length, abs=0.1) and record["source_start"] == 14
    shown = made_media.number_of(simplejpeg.decode_jpeg(record["frames"][0]))
    assert abs(shown - frame - 0.5 * clip_trees.FPS) <= 1
    assert ("too_long" in clip_trees.causes(report)) == (seconds > 15)


def test_both_clips_of_a_pair_are_the_annotated_parts_of_their_recordings(tmp_path):
    rows = "abc,4,playing cello,test\nxyz,8,playing flute,test\n"
    lists = {"vggsound.csv": rows, "vggmusic_eval_ss.csv": "abc_000004,xyz_000008\n"}
    recordings = {"abc.mp4": clip_trees.clip(0, 24.0), "xyz.mp4": clip_trees.clip(40, 24.0)}
    source = clip_trees.put(tmp_path / "in", lists | recordings)
    clip_trees.prepare("vggsound_music", source, tmp_path / "set")
    (pair,) = clip_trees.stored(tmp_path / "set", "test_pairs").values()
    for sound, start in zip(pair["sources"], (4, 40 + 8), strict=True):
        heard, rate = soundfile.read(io.BytesIO(sound))
        right = made_media.hum(start + np.arange(len(heard)) / rate)
        assert len(heard) == 10 * rate and np.corrcoef(heard, right)[0, 1] > 0.99


def test_what_is_not_stored_is_listed_with_its_cause(tmp_path):
    """skipped.jsonl: the fields of all commands, the same twice, also what no file is there for."""
    source = clip_trees.put(tmp_path / "in", {"a.mp4": clip_trees.clip(1), "bad.mp4": b"x", "mute.mp4": b""})
    mute = made_media.encoded([made_media.numbered_frame(number) for number in range(10)])
    clip_trees.put(source, {"mute.mp4": mute, "odd.weird": b""})
    rows = "path,id\na.mp4,one\na.mp4,one\nabsent.mp4,two\nbad.mp4,three\nmute.mp4,four\na.mp4,a/b\n"
    table = clip_trees.put(tmp_path, {"list.csv": rows}) / "list.csv"
    for output, workers in (("set", 1), ("again", 2)):
        clip_trees.prepare("folder", source, tmp_path / output, workers, table=str(table), skip=("no_sound",))
    clip_trees.assert_same_files(tmp_path / "set", tmp_path / "again")
    skipped = workdir.read_skipped(tmp_path / "set")
    assert {(failure.clip, failure.stage) for failure in skipped} == {
        ("one", "annotations"),
        ("two", "files"),
        ("three", "open"),
        ("four", "sound"),
        (f"{table}:7", "annotations"),
    }
    assert all(failure.cause and "\n" not in failure.cause for failure in skipped)
    assert {failure.clip for failure in skipped}.isdisjoint(clip_trees.stored(tmp_path / "set").keys() - {"one"})


@pytest.mark.parametrize("file", ["prepare.json", "report.json"])
@pytest.mark.parametrize("content", [b"", b'{"dataset": ', b"\xff\xfe", b"[]", None])
def test_a_damaged_output_is_named(file, content, tmp_path):
    source = clip_trees.put(tmp_path / "in", {"a.mp4": clip_trees.clip(1)})
    clip_trees.put(tmp_path / "set", {"dataset_info.json": "{}", "prepare.json": b"", "report.json": b""})
    job = Job("folder", Folder(source), Folder(tmp_path / "set"))
    settings = run._settings(job, checked(READERS["folder"].read(Folder(source))))
    (tmp_path / "set" / "prepare.json").write_text(json.dumps(settings))
    (tmp_path / "set" / file).write_bytes(content) if content is not None else (tmp_path / "set" / file).unlink()
    with pytest.raises(UserError, match="is damaged|holds other files"):
        run.prepare(job)


@pytest.mark.parametrize("content", [b"", b'{"stored": 1', b"\xff\xfe", b"[]", b'{"stored": "1"}'])
def test_a_damaged_summary_is_named_and_made_again(content, tmp_path):
    clip_trees.put(tmp_path / "in", {"a.mp4": clip_trees.clip(1)})
    job = Job("folder", Folder(tmp_path / "in"), Folder(tmp_path / "set"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run.prepare(job)
    (summary,) = (tmp_path / "set" / "unfinished").iterdir()
    summary.write_bytes(content)
    with pytest.raises(UserError, match=rf"is damaged \(unfinished/{summary.name}\): remove this file"):
        run.prepare(job)
    summary.unlink()
    run.prepare(job)
    assert clip_trees.stored(tmp_path / "set").keys() == {"a"}


@pytest.mark.parametrize("part", ["s4", "ms3"])
def test_avsbench_as_first_released(part, tmp_path):
    """Frames and masks of seconds 1 to 5; of training clips of the single-source part the first mask alone."""
    single = part == "s4"
    below, category = f"data/{part}_data/", "dog/" if single else ""
    rows = ["name,a_id,category,split", "abc,0,dog,train", "xyz,1,cat,test"]
    if not single:
        rows = ["video_id,start,end,split", "abc,0,5,train"]
    clip_trees.put(tmp_path, {f"data/{part}_meta_data.csv": "\n".join(rows)})
    clip_trees.put(tmp_path, {f"{below}audio_wav/train/{category}abc.wav": b""})
    frames = f"visual_frames/train/{category}abc/abc" if single else "visual_frames/abc/abc.mp4"
    clip_trees.put(tmp_path, {f"{below}{frames}_{second}.png": b"" for second in range(5, 0, -1)})
    masks = range(1, 2 if single else 6)
    clip_trees.put(tmp_path, {f"{below}gt_masks/train/{category}abc/abc_{second}.png": b"" for second in masks})
    read = catalogue(tmp_path, f"avsbench_{part}")
    (clip,) = read.clips
    assert (clip.id, clip.split, clip.image_times) == ("abc", "train", (0.5, 1.5, 2.5, 3.5, 4.5))
    assert [name[-5] for name in clip.images] == list("12345") and clip.mask_frames == tuple(range(len(masks)))
    assert clip.labels == ((1,) if single else ()) and read.classes == (("cat", "dog") if single else ())
    assert found(read) == ({"missing": ["xyz"]} if single else {})


def test_names_in_an_ascii_locale(tmp_path, ascii_locale):
    """Decoding processes, too, read names beyond ASCII, where even Python's UTF-8 mode is switched off."""
    clip_trees.put(tmp_path / "vidéos", {"čat/клип.mp4": clip_trees.clip(1)})
    done = subprocess.run(
        [sys.executable, "-m", "av_mae.prepare", "--dataset=folder", "--source=vidéos", "--output=säts"],
        cwd=tmp_path,
        capture_output=True,
        env=ascii_locale,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert set(clip_trees.stored(tmp_path / "säts")) == {"čat-клип"}


def test_a_set_without_any_clip_is_an_error(tmp_path):
    source = clip_trees.put(tmp_path / "in", {"a.mp4": b"x", "b.mp4": b"y"})
    with pytest.raises(UserError, match=r"^none of the 2 clips could be stored: the file cannot be decoded \(2 ×\)"):
        prepare.main(["--dataset=folder", f"--source={source}", f"--output={tmp_path / 'set'}"])
    assert "undecodable" in (tmp_path / "set" / "report.html").read_text()
