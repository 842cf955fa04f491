"""What the world hands in, and must not be taken for something else: spaces in names, two spellings of one name, parts
that the file does not have, numbers that are no class."""

import errno
import io
import json
import os
import unicodedata

import av
import clip_trees
import made_media
import numpy as np
import pytest
from layouts import avsbench, picture
from PIL import Image

from av_mae.data import records
from av_mae.errors import UserError
from av_mae.prepare.masks import palette, read_mask
from av_mae.prepare.readers import READERS
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip, checked
from av_mae.storage import Folder

NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    "row, taken",
    [
        ('" a.mp4",dog', " a.mp4"),
        ('"a.mp4 ",dog', "a.mp4 "),
        ('" a.mp4", " dog "', " a.mp4"),
        (" a.mp4,dog", " a.mp4"),  # as the file is called
        ("a.mp4 , dog", "a.mp4 "),
        (" b.mp4 ,dog", "b.mp4"),  # no file is called so with its spaces
        ('" b.mp4",dog', None),
        ('"c,""d"".mp4" ,dog', None),
        ('"c,""d"".mp4", dog', 'c,"d".mp4'),
        ("\tb.mp4\t,dog", "b.mp4"),
    ],
)
def test_a_table_names_files_as_they_are_written(row, taken, tmp_path):
    there = [" a.mp4", "a.mp4", "a.mp4 ", "b.mp4", 'c,"d".mp4']
    source = clip_trees.put(tmp_path / "in", dict.fromkeys(there, b""))
    table = clip_trees.put(tmp_path, {"list.csv": f"path, label\n{row}\nb.mp4,cat\n"}) / "list.csv"
    read = READERS["folder"].read(Folder(source), table=str(table))
    assert [clip.media for clip in read.clips] == [*([taken] if taken else []), "b.mp4"]
    assert all(label in ("dog", "cat") for label in read.classes) and (taken or read.findings)


def test_two_spellings_of_a_class_are_one(tmp_path):
    there = {f"{NFC}/a.mp4": b"", f"{NFD}/b.mp4": b"", "dog/c.mp4": b""}
    read = READERS["folder"].read(Folder(clip_trees.put(tmp_path / "in", there)))
    assert read.classes == (NFC, "dog") and sorted(clip.labels for clip in read.clips) == [(0,), (0,), (1,)]
    table = clip_trees.put(tmp_path, {"list.csv": f"path,label\ndog/c.mp4,{NFD};{NFC}\n"}) / "list.csv"
    read = READERS["folder"].read(Folder(tmp_path / "in"), table=str(table))
    assert read.classes == (NFC,) and read.clips[0].labels == (0,)
    with pytest.raises(UserError, match=f"class name '{NFC}' stands for several classes: rename one of them"):
        records.features([NFD, "dog", NFC])  # of a file that numbers them


def test_ids_that_look_the_same_are_two_only_where_files_are(tmp_path):
    source = clip_trees.put(tmp_path / "in", {f"{NFC}.mp4": b"", f"{NFD}.mp4": b""})
    ids = {unicodedata.normalize("NFC", clip.id) for clip in checked(READERS["folder"].read(Folder(source))).clips}
    assert len(ids) == 2
    table = clip_trees.put(tmp_path, {"list.csv": f"path\n{NFC}.mp4\n{NFD}.mp4\n"}) / "list.csv"
    read = checked(READERS["folder"].read(Folder(source), str(table)))
    assert ids == {unicodedata.normalize("NFC", clip.id) for clip in read.clips}
    clips = [SourceClip(name, "train", f"{number}.mp4") for number, name in enumerate((NFD, NFC))]
    read = checked(Catalogue((), clips))
    assert [clip.media for clip in read.clips] == ["0.mp4"]
    assert [(finding.cause, finding.clip) for finding in read.findings] == [("duplicate_id", NFC)]


@pytest.mark.parametrize(
    "start, end, named",
    [
        ("0", "2.05", ""),
        ("0", "2.5", "x: 2.00 s of 2.50 s are there"),
        ("1.5", "1.9", ""),
        ("1.5", "2.3", "x: 0.50 s of 0.80 s are there"),
    ],
)
def test_a_part_that_the_file_does_not_have_is_named(start, end, named, tmp_path):
    source = clip_trees.put(tmp_path / "in", {"a.mkv": clip_trees.clip(1, 2.0, format="matroska", audio="pcm_s16le")})
    table = clip_trees.put(tmp_path, {"list.csv": f"path,id,start,end\na.mkv,x,{start},{end}\n"}) / "list.csv"
    report = clip_trees.prepare("folder", source, tmp_path / "set", table=str(table), shortest=0.1)
    messages = [finding["message"] for finding in report["findings"] if finding["cause"] == "ends_early"]
    assert len(messages) == bool(named) and all(named in message for message in messages)
    assert set(clip_trees.stored(tmp_path / "set")) == {"x"}
    if named:
        options = {"table": str(table), "shortest": 0.1, "skip": ("ends_early",)}
        report = clip_trees.prepare("folder", source, tmp_path / "none", **options)
        assert report["splits"]["train"]["stored"] == 0


@pytest.mark.parametrize("seconds, named", [(9.9, False), (7.0, False), (6.0, True)])
def test_public_lists_of_ten_seconds_name_only_files_that_lack_a_third(seconds, named, tmp_path):
    there = {
        "vggsound.csv": "aaaaaaaaaaa,30,dog,train\n",
        "aaaaaaaaaaa_000030.mp4": clip_trees.clip(1, seconds),
    }
    report = clip_trees.prepare("vggsound", clip_trees.put(tmp_path / "in", there), tmp_path / "set")
    assert ("ends_early" in clip_trees.causes(report)) == named


def test_the_second_clip_of_a_pair_is_named_where_it_ends_early(tmp_path):
    lists = {
        "vggsound.csv": "abc,4,playing cello,test\nxyz,8,playing flute,test\n",
        "vggmusic_eval_ss.csv": "abc_000004,xyz_000008\n",
    }
    files = {"abc_000004.mp4": clip_trees.clip(0, 10.0), "xyz_000008.mp4": clip_trees.clip(40, 5.0)}
    source = clip_trees.put(tmp_path / "in", lists | files)
    report = clip_trees.prepare("vggsound_music", source, tmp_path / "set")
    named = {finding["clip"]: finding["message"] for finding in report["findings"] if finding["cause"] == "ends_early"}
    assert set(named) == {"xyz_000008", "abc_000004+xyz_000008"}
    assert all(message.startswith("xyz_000008: 5.") for message in named.values())


@pytest.mark.parametrize(
    "picture, sound, named",
    [
        (3.0, 3.0, []),
        (3.0, 2.2, []),
        (3.0, 1.0, [("sound", "a: the sound lasts 1.00 s of 3.00 s")]),
        (1.0, 3.0, [("frame", "a: the picture lasts 1.00 s of 3.00 s")]),
    ],
)
def test_a_picture_or_sound_that_is_far_too_short_is_named(picture, sound, named, tmp_path):
    """As after a download of the two of which one has stopped."""
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        streams = container.add_stream("mpeg4", rate=5), container.add_stream("pcm_s16le", rate=16000, layout="mono")
        streams[0].height, streams[0].width = made_media.SIZE
        for number in range(round(5 * picture)):
            container.mux(
                streams[0].encode(av.VideoFrame.from_ndarray(made_media.numbered_frame(number), format="rgb24"))
            )
        samples = (made_media.hum(np.arange(round(16000 * sound)) / 16000) * 32767).astype(np.int16)
        block = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        block.sample_rate = 16000
        container.mux(streams[1].encode(block))
        for stream in streams:
            container.mux(stream.encode(None))
    report = clip_trees.prepare("folder", clip_trees.put(tmp_path / "in", {"a.mov": file.getvalue()}), tmp_path / "set")
    found = [finding for finding in report["findings"] if finding["cause"] == "ends_early"]
    assert [(finding["stage"], finding["message"]) for finding in found] == named


def test_numbers_of_a_mask_that_are_no_class_are_named(shared, tmp_path):
    source = avsbench(shared, tmp_path / "in")
    numbers = np.zeros((20, 30), np.uint8)
    numbers[3, 4] = 70
    good = picture(numbers, "PNG")
    numbers[3, 4] = 71
    for number in range(10):
        (source / f"v2/three/labels_rgb/{number}.png").unlink()
        clip_trees.put(source, {f"v2/three/labels_semantic/{number}.png": good})
    report = clip_trees.prepare("avsbench_avss", source, tmp_path / "good")
    assert "undecodable" not in clip_trees.causes(report)
    clip_trees.put(source, {"v2/three/labels_semantic/6.png": picture(numbers, "PNG")})
    report = clip_trees.prepare("avsbench_avss", source, tmp_path / "set")
    (failure,) = [finding for finding in report["findings"] if finding["cause"] == "undecodable"]
    assert (failure["clip"], failure["stage"]) == ("three", "mask")
    assert failure["message"].endswith(
        "v2/three/labels_semantic/6.png: value 71 of a mask is no class, they are 0 to 70"
    )


@pytest.mark.parametrize(
    "image, reader, message",
    [
        (
            Image.fromarray(np.full((4, 5), 300, np.uint16)),
            "numbers",
            "value 300 of a mask is no class, they are 0 to 70",
        ),
        (Image.new("RGB", (5, 4), (1, 2, 3)), "numbers", r"a mask of numbers has the colour \(1, 2, 3\)"),
        (Image.new("RGB", (5, 4), tuple(map(int, palette()[199]))), "colours", "value 199 of a mask is no class"),
        (Image.new("RGB", (5, 4), (1, 2, 3)), "colours", r"colour \(1, 2, 3\) of a mask is no class"),
    ],
)
def test_masks_of_no_class_are_refused(image, reader, message):
    file = io.BytesIO()
    image.save(file, "PNG")
    with pytest.raises(ValueError, match=message):
        read_mask(file.getvalue(), reader, (4, 5), 71)


def test_class_names_in_another_order_are_no_names_of_the_set(tmp_path):
    source = clip_trees.put(tmp_path / "in", {f"{name}/{name}.mp4": clip_trees.clip(ord(name)) for name in "abc"})
    clip_trees.prepare("folder", source, tmp_path / "set")
    assert records.class_names(tmp_path / "set") == ["a", "b", "c"]
    names, fields = tmp_path / "set" / "label.labels.txt", tmp_path / "set" / "features.json"
    whole = names.read_text()
    names.write_text("b\na\nc\n")
    with pytest.raises(
        UserError, match=r"the set in .* is damaged: prepare it again \(label.labels.txt: .* other names"
    ):
        records.class_names(tmp_path / "set")
    names.write_text(whole)
    stored = json.loads(fields.read_text())
    del stored["featuresDict"]["features"]["label"]["description"]  # as earlier versions wrote it
    fields.write_text(json.dumps(stored))
    assert records.class_names(tmp_path / "set") == ["a", "b", "c"]


def test_what_begins_after_the_end_of_its_file_says_so(tmp_path):
    files = {"a.mp4": clip_trees.clip(0, 2.0), "b.mp4": clip_trees.clip(1, 2.0), "c.mp4.part": b"x"}
    source = clip_trees.put(tmp_path / "in", files | {"t.csv": b"path,start,end\na.mp4,50,55\nb.mp4,0,1\n"})
    report = clip_trees.prepare("folder", source, tmp_path / "out", table=str(source / "t.csv"))
    (finding,) = [finding for finding in report["findings"] if finding["cause"] == "undecodable"]
    assert finding["message"].endswith("begins at 50 s, but the file lasts 2.00 s")
    report = clip_trees.prepare("folder", source, tmp_path / "all")
    assert [finding["clip"] for finding in report["findings"] if finding["cause"] == "not_media"]  # c.mp4.part


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refused(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    (tmp_path / "a.mp4").write_bytes(b"x")
    assert Folder(tmp_path).files() == ["a.mp4"]
    said = capsys.readouterr().err
    assert said == f"warning: {tmp_path / 'locked'} cannot be read (Permission denied): what is in it is left out\n"
    assert Folder(tmp_path / "nothing").files() == [] and not capsys.readouterr().err
