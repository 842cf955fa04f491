"""Tables, lists and folders that do not say what they seem to: each gives the right value or is named."""

import json
import pathlib

import clip_trees
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import soundfile

from av_mae.errors import UserError
from av_mae.media import encode
from av_mae.prepare.readers import READERS
from av_mae.storage import Folder


def catalogue(source: pathlib.Path, dataset: str = "folder", **options):
    return READERS[dataset].read(Folder(source), **options)


@pytest.mark.parametrize(
    "columns, clip",
    [
        ({"File": "a.mp4", " Split": "test", "START": 1.0, "Labels": "dog;cat;dog"}, ("test", 1.0, ["dog", "cat"])),
        ({"path": "a.mp4", "label": ["Tools; power", None, "x|y"]}, ("train", 0.0, ["Tools; power", "x|y"])),
        ({"path": b"a.mp4", "start": float("nan"), "label": float("nan")}, ("train", 0.0, [])),
    ],
)
def test_columns_of_a_parquet_table(columns, clip, tmp_path):
    clip_trees.put(tmp_path, {"a.mp4": b""})
    parquet.write_table(pyarrow.table({name: [value] for name, value in columns.items()}), tmp_path / "list.parquet")
    read = catalogue(tmp_path, table=str(tmp_path / "list.parquet"))
    (one,) = read.clips
    assert (one.split, one.start, [read.classes[label] for label in one.labels]) == clip


def test_sound_far_beyond_full_scale_is_named(tmp_path):
    """A decoded clip that is too loud has it, one that overshoots by a hair has not."""
    for name, peak in (("loud", 4.0), ("near", 1.02)):
        wave = (peak * np.sin(np.arange(32000) / 9)).astype(np.float32)
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{name}.wav", wave, 16000, subtype="FLOAT")
    report = clip_trees.prepare("folder", tmp_path / "in", tmp_path / "set")
    assert clip_trees.causes(report) == {"clipped": {"loud"}, "no_picture": {"loud", "near"}}


def test_frames_after_the_end_of_the_audio_are_named(tmp_path):
    rows = "vid,uid,s_min,s_sec,a_obj,split,label\n" + "".join(f"v,{name},0,1,dog,train,v1s\n" for name in "ab")
    clip_trees.put(tmp_path / "in", {"label2idx.json": '{"dog": 0}', "metadata.csv": rows})
    for name, seconds in (("a", 2), ("b", 5)):
        frames = {f"v1s/{name}/frames/{second}.png": encode.png(np.eye(8) > second / 9) for second in range(5)}
        wave = np.sin(np.arange(16000 * seconds) / 9)
        clip_trees.put(tmp_path / "in", frames | {f"v1s/{name}/audio.wav": encode.flac(wave, 16000)})
    report = clip_trees.prepare("avsbench_s4", tmp_path / "in", tmp_path / "set")
    assert clip_trees.causes(report).get("damaged") == {"a"}


def test_columns_that_two_can_be_meant_by_are_refused_and_others_named(tmp_path, capsys):
    clip_trees.put(tmp_path, {"a.mp4": b"", "two.csv": "path,label,class\na.mp4,dog,cat\n"})
    with pytest.raises(UserError, match=r"several columns for `label` \(label, class\): leave one"):
        catalogue(tmp_path, table=str(tmp_path / "two.csv"))
    clip_trees.put(tmp_path, {"other.csv": "path,start_time,subset\na.mp4,1,test\n"})
    catalogue(tmp_path, table=str(tmp_path / "other.csv"))
    assert capsys.readouterr().err.endswith("other.csv: not used are the columns start_time, subset\n")


@pytest.mark.parametrize(
    "folders", [["train_videos/dog", "test_videos/dog"], ["Train1", "Test1"], ["train-clean", "dev-clean", "cat"]]
)
def test_folders_that_look_like_splits_are_refused(folders, tmp_path):
    source = clip_trees.put(tmp_path, {f"{folder}/a{number}.mp4": b"" for number, folder in enumerate(folders)})
    with pytest.raises(UserError, match="has folders called .*: call them train, validation and test if they are"):
        catalogue(source)


@pytest.mark.parametrize(
    "dataset, name, content, message",
    [
        ("music_solo", "MUSIC_solo_videos.json", {"videos": ["a"]}, "must hold a list of recordings for each"),
        ("music_solo", "MUSIC_solo_videos.json", {"videos": {"cello": "abc"}}, "must hold a list of recordings for"),
        ("music_solo", "MUSIC_solo_videos.json", {"cello": None}, "must hold a list of recordings for each"),
        ("avsbench_s4", "label2idx.json", {"cat": "0", "dog": 1}, "must number its 2 classes from 0 on"),
        ("avsbench_s4", "label2idx.json", {"cat": False, "dog": True}, "must number its 2 classes from 0 on"),
    ],
)
def test_json_of_another_shape_is_named(dataset, name, content, message, tmp_path):
    clip_trees.put(tmp_path, {name: json.dumps(content), "a.mp4": b""})
    with pytest.raises(UserError, match=message):
        catalogue(tmp_path, dataset)
