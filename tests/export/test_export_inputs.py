"""What is exported: folders of media, windows, lists, names of all kinds; what cannot be read is named."""

import math
import os

import numpy as np
import pandas
import pytest
from tiny_export import STREAMS, export, read

import av_mae
from av_mae import preprocess
from av_mae.errors import UserError
from av_mae.export import __main__ as command
from av_mae.export import embeddings, inputs


def test_media_folder_windows_and_lists(checkpoint, media, tmp_path):
    """Files in the order of their names; windows are what `preprocess.load` makes; lists say which part."""
    model = av_mae.load(checkpoint)
    export(checkpoint, media, tmp_path / "folder", stride=0.75)
    found = read(tmp_path / "folder")
    assert found["id"].tolist() == ["a.mp4"] * 3 + ["b/1.mp4"] * 3 + ["b/2.mp4"] * 3 and "label" not in found
    np.testing.assert_allclose(found["start"], np.tile([0, 0.75, 1.5], 3), atol=0.01)
    one = preprocess.load(media / "b" / "1.mp4", 0.75, 0.5, sound=model.sound, image_size=(32, 48))
    wanted = av_mae.encode(model, one).features
    for stream in STREAMS:
        np.testing.assert_allclose(found[stream][4], wanted[stream][0], rtol=0, atol=1e-5)

    (tmp_path / "list.csv").write_text(
        "id,path,start,end,label\n"
        f"x,{media}/b/1.mp4,0.5,1.5,dog\n,{media}/a.mp4,,,\n,none.mp4,1,,cat\n"
        f",{media}/b/1.mp4,0.5,,cat\n,{media}/b/1.mp4,1,1.25,cat\n"
    )
    result = export(checkpoint, tmp_path / "list.csv", tmp_path / "list")
    found = read(tmp_path / "list")
    assert found["id"].tolist() == ["x", f"{media}/a.mp4", f"{media}/b/1.mp4#0.5", f"{media}/b/1.mp4#1"]
    assert found["label"].tolist() == ["dog", None, "cat", "cat"]
    np.testing.assert_allclose(found["start"], [0.75, 0.75, 0.5, 1], atol=0.01)
    np.testing.assert_allclose(found["image"][0], wanted["image"][0], rtol=0, atol=1e-5)
    assert result["failed"] == 1 and result["causes"] == {"open: there is no such file": 1}
    failures = pandas.read_parquet(tmp_path / "list" / "failures.parquet")
    assert failures.values.tolist() == [[2, "none.mp4", str(tmp_path / "none.mp4"), "open: there is no such file"]]


def test_what_lacks_a_stream(checkpoint, shared, tmp_path):
    """Counted with its cause, or embedded with zeros where that is asked for."""
    broken, names = shared / "media" / "broken", ("sample_video_only.mp4", "zero_length.webm", "sample_audio_only.mp4")
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{broken / name},{7}\n" for name in names))
    with pytest.raises(UserError, match="none of the 3 clips can be read; the first error: .*video_only.*sound: there"):
        export(checkpoint, tmp_path / "list.csv", tmp_path / "strict")
    result = export(checkpoint, tmp_path / "list.csv", tmp_path / "zeros", missing="zeros")
    found = read(tmp_path / "zeros")
    assert result["failed"] == 1 and found["place"].tolist() == [0, 2] and found["label"].tolist() == [7, 7]
    assert found["has_image"].tolist() == [True, False] and found["has_audio"].tolist() == [False, True]


def test_a_clip_that_ends_in_a_file_that_goes_on(media):
    """What comes after the end is not heard: the sound is extended by its reversal; the frame lies in the part."""
    sound = av_mae.config.SoundConfig(rate=16000, n_fft=400, hop=160, mels=32)
    part = preprocess.load(media / "a.mp4", 1.0, 0.5, sound=sound, end=1.2)["audio"][0]
    whole = preprocess.load(media / "a.mp4", 1.0, 0.5, sound=sound)["audio"][0]
    np.testing.assert_allclose(part[:, :18], whole[:, :18], atol=1e-2)
    np.testing.assert_allclose(part[:, 22:38], part[:, 18:2:-1], atol=0.35)  # windows are not quite symmetric
    assert np.abs(part[:, 24:] - whole[:, 24:]).mean() > 0.1
    for wrong in (1.0, "2", float("nan")):
        with pytest.raises(UserError, match="end=.* must be a number of seconds above start=1.0"):
            preprocess.load(media / "a.mp4", 1.0, 0.5, end=wrong)


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("a.csv", "file\nx.mp4\n", "needs a column 'path'; it has file"),
        ("a.csv", "path\n", "lists no files"),
        ("a.csv", "path,start\nx.mp4,soon\n", "row 1 has start='soon'"),
        ("a.csv", "path,start,end\nx.mp4,3,2\n", "row 1 ends at 2 s, but must end after its start, 3 s"),
        ("a.csv", "path,start\nx.mp4,-1\n", "row 1 has start=-1"),
        ("a.csv", "path,start\n,1\n", "row 1 has no path"),
        ("a.csv", "path,start\nx.mp4,1,2\n", "cannot be read as a list of files"),
        ("a.parquet", "no parquet", "cannot be read as a list of files"),
        ("a.json", "[]", "must be a folder, or a list that ends in .csv, .tsv or .parquet"),
    ],
)
def test_lists_that_cannot_be_read(checkpoint, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        export(checkpoint, tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_there(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    for data, message in (
        (tmp_path / "empty", "holds no media: no file below it ends in"),
        (tmp_path / "none", "there is no such folder or file"),
        (f"{tmp_path / 'empty'}:test", "is no prepared set, so it has no split 'test'"),
    ):
        with pytest.raises(UserError, match=message):
            export(checkpoint, data, tmp_path / "out")
    with pytest.raises(UserError, match="there is no checkpoint"):
        command.main([f"--checkpoint={tmp_path}", f"--data={tmp_path}", f"--output={tmp_path / 'out'}"])
    for options, message in (
        ({"stride": 0.0}, "--stride=0.0 must be at least 0.001"),
        ({"stride": math.nan}, "--stride=nan must"),
        ({"batch_size": 0}, "--batch_size=0 must be at least 1"),
        ({"batch_size": 10**12}, "--batch_size=1000000000000 must be at most 1_048_576"),
        ({"workers": -1}, "--workers=-1 must"),
        ({"workers": 10**5}, "--workers=100000 must be at most 4_096"),
    ):
        with pytest.raises(UserError, match=message):
            embeddings.Options(**options)


def test_links_and_hidden_files_of_a_folder(media, tmp_path):
    """A link to the folder itself, one to its parent, two to each other's folders: each file once."""
    folder = tmp_path / "clips"
    (folder / "x").mkdir(parents=True)
    (folder / "y").mkdir()
    (folder / ".cache").mkdir()
    for name in ("a.mp4", "x/b.mp4", ".cache/c.mp4", ".d.mp4"):
        (folder / name).write_bytes((media / "a.mp4").read_bytes())
    for link, target in (("loop", "."), ("x/up", ".."), ("x/y", "../y"), ("y/x", "../x")):
        (folder / link).symlink_to(target)
    assert len([entry.id for entry in inputs.list_folder(str(folder))]) == 2


def test_a_name_that_is_no_utf8(checkpoint, media, tmp_path):
    """Its id and path are escaped; the other clips are exported too."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in (b"plain.mp4", b"latin1_\xe9.mp4", b"damaged_\xff.mp4"):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(b"" if name.startswith(b"damaged") else (media / "a.mp4").read_bytes())
    result = export(checkpoint, folder, tmp_path / "out")
    assert read(tmp_path / "out")["id"].tolist() == ["latin1_\\xe9.mp4", "plain.mp4"]
    assert result["failed"] == 1 and "damaged_\\\\xff.mp4" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_ids_that_occur_twice_are_named(media, tmp_path, capsys):
    (tmp_path / "list.csv").write_text(f"path,id\n{media}/a.mp4,x\n{media}/b/1.mp4,x\n{media}/b/2.mp4,y\n")
    inputs.read_list(str(tmp_path / "list.csv"))
    assert "has 1 ids more than once: 'x'" in capsys.readouterr().err
