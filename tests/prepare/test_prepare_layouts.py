"""Each data set's layout, made of real clips: one command prepares it, twice the same, with what it annotates."""

import io

import clip_trees
import layouts
import numpy as np
import pytest
import soundfile
from PIL import Image

from av_mae.data import records
from av_mae.prepare import __main__ as prepare
from av_mae.prepare.readers import READERS
from av_mae.storage import Folder

# Of each set: the clips of each split with their labels.
CLIPS = {
    "vggsound": {
        "train": {"aaaaaaaaaaa_000030": ["playing cello"]},
        "test": {"bbb-bbb_bbb_000030": ["dog barking, loud"], "_0_0c0_0ccc_000000": ["playing flute"]},
    },
    "vggsound_music": {
        "train": {"aaaaaaaaaaa_000030": ["cello"]},
        "test": {"_0_0c0_0ccc_000000": ["flute"]},
        "test_pairs": {"_0_0c0_0ccc_000000+aaaaaaaaaaa_000030": ["flute"]},
    },
    "audioset": {
        "train": {"--aaa_aaaaa_000030": ["Speech", "Music"]},
        "balanced": {"bbbbbbbbbbb_000000": ["Bird, chirping"]},
        "test": {"ccccccccccc_000005": ["Bird, chirping", "Speech"]},
    },
    "music_solo": {
        "test": {"aaaaaaaaaaa": ["cello"]},
        "train": {"bbbbbbbbbbb.0": ["flute"], "bbbbbbbbbbb.10": ["flute"]},
    },
    "music_duet": {"test": {"ccccccccccc": ["cello", "flute"]}},
    "music_21": {
        "test": {"aaaaaaaaaaa": ["cello"]},
        "train": {"bbbbbbbbbbb.0": ["flute"], "bbbbbbbbbbb.10": ["flute"]},
    },
    "avsbench_s4": {"train": {"one": ["guitar"]}},
    "avsbench_ms3": {"validation": {"two": ["guitar", "c9"]}},
    "avsbench_avss": {
        "train": {"one": ["guitar"]},
        "validation": {"two": ["guitar", "c9"]},
        "test": {"three": ["man"]},
    },
    "vggss": {"test": {"aaaaaaaaaaa_000030": ["cello"], "bbbbbbbbbbb_000007": ["flute"]}},
    "flickr_soundnet": {"test": {"111": [], "222": []}},
    "grid": {
        "test": {"s1_brbk7n": ["command bin", "colour red", "preposition by", "letter k", "digit seven", "adverb now"]},
        "train": {
            "s3_lbax4n": ["command lay", "colour blue", "preposition at", "letter x", "digit four", "adverb now"],
            "s5_lbbc2a": ["command lay", "colour blue", "preposition by", "letter c", "digit two", "adverb again"],
        },
    },
}
FOUND = {
    "vggsound": {"missing": {"ddddddddddd_000007"}},
    "vggsound_music": {"missing": {"ddddddddddd_000007"}},
    "audioset": {"missing": {"ddddddddddd_000005"}},
    "music_solo": {"missing": {"absent"}},
    "music_duet": {},
    "music_21": {},
    "avsbench_s4": {},
    "avsbench_ms3": {},
    "avsbench_avss": {"missing": {"four"}, "bad_row": {"metadata.csv:6"}},
    "vggss": {"bad_row": {"vggss.json:3"}},
    "flickr_soundnet": {"bad_row": {"Annotations/333.xml:1"}},
    "grid": {"bad_row": {"s1_hello"}},
}
RULES = ("bad_row", "bad_id", "missing", "duplicate_id", "undecodable")


def test_every_set_is_tested():
    assert set(CLIPS) == set(FOUND) == set(layouts.MAKERS) == set(READERS) - {"folder"}


@pytest.mark.parametrize("name", layouts.MAKERS)
def test_a_layout_is_prepared_by_one_command_twice_the_same(name, shared, tmp_path, capsys):
    source = layouts.MAKERS[name](shared, tmp_path / "in")
    for output, workers in (("one", 1), ("two", 2)):
        prepare.main(
            [
                f"--dataset={name}",
                f"--source={source}",
                f"--output={tmp_path / output}",
                "--shard_clips=2",
                f"--workers={workers}",
            ]
        )
    clip_trees.assert_same_files(tmp_path / "one", tmp_path / "two")
    classes = records.class_names(tmp_path / "one")
    stored = {
        split: {
            clip: [classes[label] for label in record["labels"]]
            for clip, record in clip_trees.stored(tmp_path / "one", split).items()
        }
        for split in CLIPS[name]
    }
    assert stored == CLIPS[name]
    assert "clips in " in capsys.readouterr().out


@pytest.mark.parametrize("name", layouts.MAKERS)
def test_what_is_missing_or_wrong_is_listed(name, shared, tmp_path):
    catalogue = READERS[name].read(Folder(layouts.MAKERS[name](shared, tmp_path)))
    found: dict[str, set[str]] = {}
    for finding in catalogue.findings:
        found.setdefault(finding.cause, set()).add(finding.clip)
    assert found == FOUND[name]


def test_a_test_pair_is_the_sum_of_two_clips(shared, tmp_path):
    clip_trees.prepare("vggsound_music", layouts.vggsound(shared, tmp_path / "in"), tmp_path / "set")
    (pair,) = clip_trees.stored(tmp_path / "set", "test_pairs").values()
    (first,) = clip_trees.stored(tmp_path / "set", "test").values()
    (second,) = clip_trees.stored(tmp_path / "set").values()
    mixture, *sources = (soundfile.read(io.BytesIO(sound))[0] for sound in (pair["sound"], *pair["sources"]))
    np.testing.assert_allclose(mixture, sum(sources), atol=1e-4)
    for source, alone in zip(sources, (first, second), strict=True):
        alone = soundfile.read(io.BytesIO(alone["sound"]))[0][: len(source)]
        share = source @ alone / (alone @ alone)  # both as loud as before, or both quieter alike
        np.testing.assert_allclose(source, share * alone, atol=1e-4)
        assert share == pytest.approx(1 / max(1, np.abs(sum(sources)).max() / 0.9999), abs=0.01) or share < 1
    np.testing.assert_array_equal(pair["frames"], first["frames"])


def test_masks_of_avsbench(shared, tmp_path):
    source = layouts.avsbench(shared, tmp_path / "in")
    for part in ("s4", "ms3", "avss"):
        clip_trees.prepare(f"avsbench_{part}", source, tmp_path / part)
    (one,) = clip_trees.stored(tmp_path / "s4").values()
    assert list(one["mask_frames"]) == [0] and len(one["frames"]) == 5 and one["source_start"] == 65
    np.testing.assert_array_equal(one["frame_times"], np.arange(5) + 0.5)
    (two,) = clip_trees.stored(tmp_path / "ms3", "validation").values()
    (semantic,) = clip_trees.stored(tmp_path / "avss", "validation").values()
    assert list(two["mask_frames"]) == list(semantic["mask_frames"]) == list(range(5))
    for number in range(5):
        inside = np.zeros((40, 60), np.uint8)  # as large as the frame
        inside[10:20, 20:40] = 1
        binary, classes = (Image.open(io.BytesIO(record["masks"][number])) for record in (two, semantic))
        assert binary.mode == classes.mode == "L"
        np.testing.assert_array_equal(np.asarray(binary), 255 * inside)
        np.testing.assert_array_equal(np.asarray(classes), (9 if number % 2 else 2) * inside)


def test_boxes_are_those_of_the_annotations(shared, tmp_path):
    clip_trees.prepare("vggss", layouts.vggss(shared, tmp_path / "in"), tmp_path / "set")
    clips = clip_trees.stored(tmp_path / "set", "test")
    np.testing.assert_allclose(
        clips["aaaaaaaaaaa_000030"]["boxes"], [[0.2, 0.1, 0.6, 0.5], [0.5, 0.5, 1, 1]], atol=1e-6
    )
    np.testing.assert_allclose(clips["bbbbbbbbbbb_000007"]["boxes"], [[0.25, 0, 0.5, 1]])
    clip_trees.prepare("flickr_soundnet", layouts.flickr_soundnet(shared, tmp_path / "flickr"), tmp_path / "boxes")
    clips = clip_trees.stored(tmp_path / "boxes", "test")
    np.testing.assert_allclose(clips["111"]["boxes"], [[0.5, 0.25, 1, 0.75], [0.5, 0, 1, 0.75], [0.5, 0.25, 1, 0.75]])
    assert list(clips["111"]["box_annotators"]) == [0, 0, 1] and clips["111"]["annotators"] == 2
    np.testing.assert_allclose(clips["222"]["boxes"], [[0, 0, 0.25, 0.5]])
    assert clips["222"]["annotators"] == 1 and list(clips["222"]["sounding"]) == [1]


def test_colours_of_classes_are_those_of_pascal_voc():
    """The first colours as its development kit lists them."""
    from av_mae.prepare.masks import palette

    np.testing.assert_array_equal(
        palette()[:10],
        [
            [0, 0, 0],
            [128, 0, 0],
            [0, 128, 0],
            [128, 128, 0],
            [0, 0, 128],
            [128, 0, 128],
            [0, 128, 128],
            [128, 128, 128],
            [64, 0, 0],
            [192, 0, 0],
        ],
    )
    assert len(np.unique(palette(), axis=0)) == 256


@pytest.mark.parametrize(
    "rows",
    [
        "aaaaaaaaaaa,30,playing cello,train",
        "# comment\n\n aaaaaaaaaaa , 30 , playing cello , train \n",
        "id,start,label,split\naaaaaaaaaaa,30.0,playing cello,train",
        '\ufeff"aaaaaaaaaaa","30","playing cello","train"\r\n',
    ],
)
@pytest.mark.parametrize(
    "file",
    [
        "clips/playing_cello/aaaaaaaaaaa_30.mkv",
        "video/aaaaaaaaaaa_000030.webm",
        "aaaaaaaaaaa_000030_000040.mp4",
        "x/aaaaaaaaaaa_30000_40000.mp4",
        "aaaaaaaaaaa-30.avi",
        "aaaaaaaaaaa.mp4",
    ],
)
def test_variants_of_rows_and_names(rows, file, tmp_path):
    source = clip_trees.put(tmp_path, {"annotations/vggsound.csv": rows, file: b""})
    (clip,) = READERS["vggsound"].read(Folder(source)).clips
    assert (clip.id, clip.media, clip.split, clip.source_start) == ("aaaaaaaaaaa_000030", file, "train", 30)


def test_bad_rows_of_vggsound(tmp_path):
    rows = [
        b"aaa,30,dog,train",
        b"aaa,30,dog",
        b"a/b,30,dog,train",
        b"aaa,x,dog,train",
        b"aaa,30,dog,later",
        b"aaa,-3,dog,train",
        b"caf\xe9,30,dog,train",
    ]
    source = clip_trees.put(tmp_path, {"vggsound.csv": b"\n".join(rows), "aaa_30.mp4": b""})
    catalogue = READERS["vggsound"].read(Folder(source))
    assert len(catalogue.clips) == 1
    assert [finding.message for finding in catalogue.findings] == [
        "vggsound.csv, row 2: 3 fields, expected 4",
        "vggsound.csv, row 3: id 'a/b' holds a path separator or a control character",
        "vggsound.csv, row 4: start 'x' is no number",
        catalogue.findings[3].message,
        "vggsound.csv, row 6: start '-3' must be 0 or more",
        "vggsound.csv, row 7: byte 0xe9 at column 4 is not UTF-8",
    ]
    assert catalogue.findings[3].message.startswith("vggsound.csv, row 5: split 'later' must be one of train,")
