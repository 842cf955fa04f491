"""Small copies of the data sets' layouts, made of real clips."""

import io
import json
import pathlib

import clip_trees
import numpy as np
from PIL import Image

from av_mae.prepare.masks import palette

CLIPS = ("sample_gamma2.2.mp4", "sample_portrait.mp4", "big_buck_bunny_432_433.webm", "flipping_a_pancake.mkv")


def picture(pixels: np.ndarray, format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def real(shared: pathlib.Path, position: int) -> tuple[bytes, str]:
    """A robust clip and its ending."""
    name = CLIPS[position]
    return (shared / "media" / "robust" / name).read_bytes(), name.rpartition(".")[2]


def _clips(shared: pathlib.Path, folder: pathlib.Path, names: list[str]) -> pathlib.Path:
    for position, name in enumerate(names):
        content, ending = real(shared, position)
        clip_trees.put(folder, {f"{name}.{ending}": content})
    return folder


def vggsound(shared, folder):
    _clips(
        shared,
        folder,
        [
            "clips/playing_cello/aaaaaaaaaaa_000030_000040",
            "clips/dog_barking/bbb-bbb_bbb_30",
            "clips/playing_flute/_0_0c0_0ccc_000000_000010",
        ],
    )
    return clip_trees.put(
        folder,
        {
            "annotations/vggsound.csv": 'aaaaaaaaaaa,30,playing cello,train\nbbb-bbb_bbb,30,"dog barking, loud",test\n'
            "_0_0c0_0ccc,0,playing flute,test\nddddddddddd,7,playing flute,test\n",
            "annotations/vggmusic_train.txt": "aaaaaaaaaaa_000030,cello\n",
            "annotations/vggmusic_eval_ss.csv": "source_1,source_2,class_1,class_2,sep_type\n"
            "_0_0c0_0ccc_000000,aaaaaaaaaaa_000030,flute,cello,Easy\n",
        },
    )


def audioset(shared, folder):
    _clips(
        shared,
        folder,
        [
            "clips/--/--aaa_aaaaa_000030_000040",
            "clips/bb/bbbbbbbbbbb_000000_000010",
            "clips/cc/ccccccccccc_000005_000012",
        ],
    )
    lines = (
        "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=1\n# YTID, start_seconds, end_seconds, labels\n"
    )
    return clip_trees.put(
        folder,
        {
            "annotations/class_labels_indices.csv": 'index,mid,display_name\n0,/m/1,"Speech"\n1,/m/2,"Bird, chirping"\n'
            '2,/t/3,"Music"\n',
            "annotations/unbalanced_train_segments.csv": f'{lines}--aaa_aaaaa, 30.000, 40.000, "/m/1,/t/3"\n',
            "annotations/balanced_train_segments.csv": f'{lines}bbbbbbbbbbb, 0.000, 10.000, "/m/2"\n',
            "annotations/eval_segments.csv": f'{lines}ccccccccccc, 5.000, 12.000, "/m/2,/m/1"\n'
            'ddddddddddd, 5.000, 12.000, "/m/2"\n',
        },
    )


def music(shared, folder):
    _clips(
        shared,
        folder,
        [
            "clips/cello/aaaaaaaaaaa",
            "clips/flute/bbbbbbbbbbb.0",
            "clips/flute/bbbbbbbbbbb.10",
            "clips/cello flute/ccccccccccc",
        ],
    )
    return clip_trees.put(
        folder,
        {
            "MUSIC_solo_videos.json": json.dumps(
                {"videos": {"cello": ["aaaaaaaaaaa"], "flute": ["bbbbbbbbbbb", "absent"]}}
            ),
            "MUSIC_duet_videos.json": json.dumps({"videos": {"cello flute": ["ccccccccccc"]}}),
            "anno/music21_solo.csv": "vid,class,url\naaaaaaaaaaa,cello,x\nbbbbbbbbbbb,flute,y\n",
        },
    )


def mask_colours(position: int) -> np.ndarray:
    """A mask of 20 × 30 pixels: the class `place` in a rectangle, black elsewhere."""
    colours = np.zeros((20, 30, 3), np.uint8)
    colours[5:10, 10:20] = palette()[position]
    return colours


def avsbench(shared, folder):
    sound = (shared / "media" / "fsdd" / "0_theo_0.wav").read_bytes()
    rng = np.random.default_rng(0)
    for below, frames, masks in (("v1s/one", 5, 1), ("v1m/two", 5, 5), ("v2/three", 10, 10)):
        clip_trees.put(folder, {f"{below}/audio.wav": sound})
        clip_trees.put(
            folder,
            {
                f"{below}/frames/{number}.jpg": picture(rng.integers(0, 255, (40, 60, 3), np.uint8), "JPEG")
                for number in range(frames)
            },
        )
        clip_trees.put(
            folder,
            {
                f"{below}/labels_rgb/{number}.png": picture(mask_colours(9 if number % 2 else 2), "PNG")
                for number in range(masks)
            },
        )
    return clip_trees.put(
        folder,
        {
            "label2idx.json": json.dumps({"background": 0, "man": 1, "guitar": 2} | {f"c{n}": n for n in range(3, 71)}),
            "metadata.csv": "vid,uid,s_min,s_sec,a_obj,split,label\nvone,one,1,5,guitar,train,v1s\n"
            "vtwo,two,0,20,guitar_c9,val,v1m\nvthree,three,,,man_off-the-screen,test,v2\n"
            "vfour,four,0,0,man,test,v2\nvfive,five,0,0,cat,test,v2\n",
        },
    )


def vggss(shared, folder):
    _clips(shared, folder, ["clips/aaaaaaaaaaa_000030_000040"])
    clip_trees.put(
        folder,
        {
            "frames/bbbbbbbbbbb_000007.jpg": picture(np.full((30, 40, 3), 99, np.uint8), "JPEG"),
            "audio/bbbbbbbbbbb_000007.wav": (shared / "media" / "fsdd" / "1_theo_0.wav").read_bytes(),
        },
    )
    entries = [
        {"file": "aaaaaaaaaaa_000030", "class": "cello", "bbox": [[0.1, 0.2, 0.5, 0.6], [0.5, 0.5, 1.0, 1.01]]},
        {"file": "bbbbbbbbbbb_000007", "class": "flute", "bbox": [["0", "0.25", "1", "0.5"]]},
        {"file": "ccccccccccc_000007", "class": "flute", "bbox": [[0.5, 0.5, 0.5, 0.6]]},
    ]
    return clip_trees.put(folder, {"vggss.json": json.dumps(entries)})


def flickr_soundnet(shared, folder):
    box = "<bbox><name>x</name><xmin>64</xmin><ymin>128</ymin><xmax>192</xmax><ymax>256</ymax></bbox>"
    for name in ("111", "222"):
        sound = shared / "media" / "fsdd" / f"{name[0]}_theo_0.wav"
        clip_trees.put(
            folder,
            {
                f"frames/{name}.jpg": picture(np.full((256, 256, 3), 99, np.uint8), "JPEG"),
                f"audio/{name}.wav": sound.read_bytes(),
            },
        )
    return clip_trees.put(
        folder,
        {
            "Annotations/111.xml": f"<annotation><a>{box}{box.replace('64', '0')}</a><b>{box}</b></annotation>",
            "Annotations/222.xml": "<annotation><a><bbox><n>x</n><a>0</a><b>0</b><c>128</c><d>64</d></bbox></a>"
            "</annotation>",
            "Annotations/333.xml": "<annotation>",
        },
    )


def grid(shared, folder):
    for position, path in enumerate(sorted((shared / "media" / "grid_samples").glob("*.mpg"))[:3]):
        clip_trees.put(folder, {f"s{1 + 2 * position}/video/{path.name}": path.read_bytes()})
    return clip_trees.put(folder, {"s1/video/hello.mpg": b"x", "s1/align/brbk7n.align": "0 1 sil\n"})


MAKERS = {
    "vggsound": vggsound,
    "vggsound_music": vggsound,
    "audioset": audioset,
    "music_solo": music,
    "music_duet": music,
    "music_21": music,
    "avsbench_s4": avsbench,
    "avsbench_ms3": avsbench,
    "avsbench_avss": avsbench,
    "vggss": vggss,
    "flickr_soundnet": flickr_soundnet,
    "grid": grid,
}
