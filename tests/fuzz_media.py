"""Random damages of media files: what preparing makes of each, beside a decode by the ffmpeg program.

python tests/fuzz_media.py --count=2000 --seed=1

Every result must be a record that is right (as long as what ffmpeg decodes, the same samples, each frame that of its
time) or a named failure or finding; where ffmpeg prints errors there must be one. Prints the counts by container and
every damage that broke the rule, by which it can be made again.
"""

import argparse
import collections
import dataclasses
import io
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import av
import made_media
import numpy as np
import simplejpeg
import soundfile

from av_mae.errors import ClipFailure
from av_mae.media import bounded
from av_mae.prepare.clips import Outcome, RecordOptions, make_record
from av_mae.prepare.readers.catalogue import SourceClip

RATE, FPS, SECONDS = 16000, 10, 4
TIME_LIMIT = 20.0
NO_FRAMES = np.zeros((0, *made_media.SIZE), np.uint8)
OPTIONS = RecordOptions(frame_rate=5.0)
OTHER_FRAMES = 2  # that may look like another one: damage within a picture need not show in the file
NOISE = 25  # of 255, on the frames, so that pictures are as large as sounds
LENGTH_ERROR = 0.15  # seconds between the two decoders' lengths: a block at either end
ALIKE = 0.9  # correlation of the two decoders' samples
MOST_UNLIKE = 0.4  # of the tenths of a second, where blocks are damaged without a sign of it
OTHERS = {"mkv": "matroska", "ts": "mpegts"}  # FFmpeg's names of formats
# container → what is made of it: codec of the video, of the audio, options of the container
KINDS: dict[str, list[tuple[str | None, str, dict[str, str]]]] = {
    "mp4": [("libx264", "aac", {}), ("libx264", "aac", {"movflags": "frag_keyframe+empty_moov"}), ("mpeg4", "aac", {})],
    "mkv": [("libx264", "aac", {}), ("mjpeg", "flac", {}), ("libx264", "pcm_s16le", {})],
    "webm": [("libvpx", "libopus", {}), ("libvpx-vp9", "libopus", {})],
    "flv": [("libx264", "aac", {}), ("libx264", "libmp3lame", {})],
    "avi": [("mpeg4", "libmp3lame", {}), ("mjpeg", "pcm_s16le", {}), ("libx264", "ac3", {})],
    "ogg": [(None, "vorbis", {}), (None, "libopus", {}), (None, "flac", {})],
    "flac": [(None, "flac", {})],
    "mp3": [(None, "libmp3lame", {}), (None, "libmp3lame", {"write_xing": "0"})],
    "wav": [(None, "pcm_s16le", {}), (None, "pcm_f32le", {})],
    "ts": [("libx264", "aac", {}), ("mpeg2video", "mp2", {})],
}


@dataclasses.dataclass(frozen=True)
class Damage:
    """One damaged file: its container, the kind of it, what was done to it, and its bytes."""

    container: str
    kind: int
    what: str
    content: bytes


def whole_file(container: str, kind: int) -> bytes:
    """A file of numbered frames with noise and a sound that is known at every moment."""
    video, audio, options = KINDS[container][kind]
    noise = np.random.default_rng(0)
    rate = 48000 if audio in ("libopus", "ac3") else 44100 if container == "flv" else RATE
    sound = made_media.hum(np.arange(SECONDS * rate) / rate) + noise.normal(0, 0.02, SECONDS * rate)
    if audio == "vorbis":  # PyAV has no encoder of it
        file = io.BytesIO()
        soundfile.write(file, sound, RATE, format="OGG", subtype="VORBIS")
        return file.getvalue()
    frames = None
    if video:
        numbered = [made_media.numbered_frame(number).astype(int) for number in range(SECONDS * FPS)]
        frames = [
            np.clip(frame + noise.integers(-NOISE, NOISE, frame.shape), 0, 255).astype(np.uint8) for frame in numbered
        ]
    return made_media.encoded(
        frames,
        sound,
        fps=FPS,
        rate=rate,
        video=video or "",
        audio=audio,
        format=OTHERS.get(container, container),
        options=options,
    )


def damage(generator: np.random.Generator, container: str) -> Damage:
    """A file of a container, cut, with flipped bits, with a block of zeros, or with two blocks swapped."""
    kind = int(generator.integers(len(KINDS[container])))
    content = bytearray(_whole(container, kind))
    size = len(content)
    how = ["cut", "flip", "zero", "swap"][generator.integers(4)]
    if how == "cut":
        at = int(generator.integers(1, size))
        what, content = f"cut at {at}", content[:at]
    elif how == "flip":
        positions = sorted(set(generator.integers(size, size=int(generator.integers(1, 33))).tolist()))
        for position in positions:
            content[position] ^= 1 << int(generator.integers(8))
        what = f"flip at {positions}"
    else:
        length = int(2 ** generator.uniform(4, np.log2(size / 4)))
        first, second = sorted(generator.integers(0, size - 2 * length, 2).tolist())
        second += length
        if how == "zero":
            content[first : first + length] = bytes(length)
            what = f"zero {first}+{length}"
        else:
            block = content[first : first + length]
            content[first : first + length] = content[second : second + length]
            content[second : second + length] = block
            what = f"swap {first}, {second}+{length}"
    return Damage(container, kind, f"{what} of {size}", bytes(content))


_files: dict[tuple[str, int], bytes] = {}


def _whole(container: str, kind: int) -> bytes:
    if (container, kind) not in _files:
        _files[container, kind] = whole_file(container, kind)
    return _files[container, kind]


class Decoded(NamedTuple):
    """What the ffmpeg program makes of a file: the errors it prints, the samples, `None` where that is not known
    (channels or rate change, at which its filters begin anew at 0 s), and the frames in grey, uint8 [n, H, W]."""

    errors: str
    samples: np.ndarray | None
    frames: np.ndarray


class Whole(NamedTuple):
    """What preparing makes of an undamaged file: its audio, how many samples later ffmpeg's begins (it keeps an
    encoder's delay in some containers), and how many seconds late the frames are (B frames without an edit list)."""

    sound: np.ndarray
    late: int
    early: float


class Judge:
    """What preparing and the ffmpeg program make of damaged files, in a folder for temporary files."""

    def __init__(self, folder: str):
        self._folder, self._worker = folder, bounded.Worker()
        self._ffmpeg = shutil.which("ffmpeg")
        self._wholes: dict[tuple[str, int], Whole] = {}

    def __call__(self, damage: Damage) -> tuple[str, str]:
        """What becomes of a file, and what was said of it.

        'good', 'named' (by both), 'named by av_mae alone', or what must not be: 'missed' (ffmpeg prints errors, and
        there is a record without a finding), 'wrong' (another length, other samples, the frame of another time),
        'slow'.
        """
        path = os.path.join(self._folder, f"clip.{damage.container}")
        pathlib.Path(path).write_bytes(damage.content)
        video = KINDS[damage.container][damage.kind][0] is not None
        expected = self._expected(path, video)
        named = "named by av_mae alone" if self._ffmpeg and not expected.errors else "named"
        try:
            outcome = self._prepared(path)
        except ClipFailure as failure:
            if "stopped after" in str(failure):
                return "slow", str(failure)
            if not str(failure).isprintable() or re.search(r"\bdecode: \w*(Error|Exception)\b", str(failure)):
                return "wrong", repr(str(failure))
            return named, str(failure)
        findings = [finding for finding in outcome.findings if video or finding[0] != "no_picture"]
        if findings:
            return named, str(findings)
        if expected.errors:
            return "missed", expected.errors
        wrong = _difference(outcome, expected, self._whole(damage))
        return ("wrong", wrong) if wrong else ("good", "")

    def _prepared(self, path: str) -> Outcome:
        clip = SourceClip(id="a", split="train", media=path)
        return self._worker.call(make_record, clip, {path: path}, OPTIONS, time_limit=TIME_LIMIT)

    def _expected(self, path: str, video: bool) -> Decoded:
        """Nothing without the program."""
        if self._ffmpeg is None:
            return Decoded("", None, NO_FRAMES)
        raw, grey = os.path.join(self._folder, "audio.raw"), os.path.join(self._folder, "video.raw")
        fill = f"aresample={RATE}:async=1:first_pts=0"  # silence where times jump ahead
        command = [self._ffmpeg, "-nostdin", "-y", "-v", "error", "-threads", "1", "-i", path]
        command += ["-map", "0:a:0", "-ac", "1", "-af", fill, "-f", "f32le", raw]
        command += (
            ["-map", "0:V:0", "-vsync", "passthrough", "-pix_fmt", "gray", "-f", "rawvideo", grey] if video else []
        )
        for file in (raw, grey):
            pathlib.Path(file).write_bytes(b"")
        done = subprocess.run(command, capture_output=True, timeout=300)
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if not line.startswith("[f32le")]
        pixels = np.fromfile(grey, np.uint8)
        frames = pixels[: pixels.size - pixels.size % math.prod(made_media.SIZE)].reshape(-1, *made_media.SIZE)
        if done.returncode and not errors:
            errors = [f"exit status {done.returncode}"]
        return Decoded("\n".join(errors), np.fromfile(raw, np.float32) if errors == lines else None, frames)

    def _whole(self, damage: Damage) -> Whole:
        key = damage.container, damage.kind
        if key not in self._wholes:
            path = os.path.join(self._folder, f"whole.{damage.container}")
            pathlib.Path(path).write_bytes(_whole(*key))
            errors, samples, _ = self._expected(path, KINDS[key[0]][key[1]][0] is not None)
            assert not errors, errors
            record = self._prepared(path).record
            assert record is not None
            sound, _ = soundfile.read(io.BytesIO(record["sound"]), dtype="float32")
            late, middle = 0, sound[RATE : 2 * RATE]
            if samples is not None:
                late = max(range(-2000, 2001), key=lambda lag: float(middle @ samples[RATE + lag : 2 * RATE + lag]))
            shown = [(_time_of(jpeg) or 0) - moment for moment, jpeg in zip(record["frame_times"], record["frames"])]
            self._wholes[key] = Whole(sound, late, float(np.median(shown)) if shown else 0.0)
        return self._wholes[key]


def _time_of(jpeg: bytes) -> float | None:
    """Seconds at which a frame was made, by the number it shows; `None` where damage has left no number."""
    frame = simplejpeg.decode_jpeg(jpeg)
    number = made_media.number_of(frame)
    clean = made_media.numbered_frame(number)
    legible = number < SECONDS * FPS and frame.shape == clean.shape and np.abs(frame.astype(int) - clean).mean() < NOISE
    return number / FPS if legible else None


def _difference(outcome: Outcome, expected: Decoded, whole: Whole) -> str:
    """What is wrong with a record without findings; '' where nothing is."""
    record = outcome.record
    assert record is not None
    sound, _ = soundfile.read(io.BytesIO(record["sound"]), dtype="float32")
    others = []
    for moment, jpeg in zip(record["frame_times"].tolist(), record["frames"]):
        made = _time_of(jpeg)
        if made is not None and abs(made - moment - whole.early) > 1.01 / FPS:
            first = max(0, round((moment + whole.early) * FPS) - 1)  # damage may look like another number
            pixels = simplejpeg.decode_jpeg(jpeg, colorspace="GRAY")[..., 0].astype(int)
            if not any(np.abs(pixels - frame).mean() < NOISE for frame in expected.frames[first : first + 3]):
                others.append((round(moment, 2), made))
    if len(others) > OTHER_FRAMES:
        return f"frames of other times: {others[:5]}"
    samples = expected.samples
    if samples is None:
        return ""
    samples = np.concatenate([np.zeros(max(0, -whole.late), np.float32), samples[max(0, whole.late) :]])
    if abs(len(samples) - len(sound)) > LENGTH_ERROR * RATE:
        return f"{len(sound) / RATE:.2f} s of audio, by ffmpeg {len(samples) / RATE:.2f} s"
    # Damage in a header may change the delay that ffmpeg keeps; then the undamaged file tells what is right.
    others = _unlike(samples, sound)
    return f"other samples than ffmpeg's at {others} s" if others and _unlike(whole.sound, sound) else ""


def _unlike(theirs: np.ndarray, ours: np.ndarray) -> list[float]:
    """The tenths of a second that differ, where these are many: what damaged blocks sound like differs from decoder to
    decoder."""
    count = min(len(theirs), len(ours)) // (RATE // 10)
    pairs = [(x[: count * RATE // 10].reshape(count, -1)) for x in (theirs, ours)]
    alike = [float(np.corrcoef(*pair)[0, 1]) for pair in zip(*pairs) if pair[0].std() and pair[1].std()]
    late = [number / 10 for number, value in enumerate(alike) if value < ALIKE]
    return late if len(late) > MOST_UNLIKE * len(alike) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default="", help="the numbers of damages to judge, e.g. 17,203")
    parser.add_argument("--keep", default="", help="folder that takes the files that broke the rule")
    options = parser.parse_args()
    print(f"seed {options.seed}, PyAV {av.__version__}, ffmpeg {_version()}", flush=True)
    only = {int(number) for number in options.only.split(",") if number}
    counts: dict[str, collections.Counter[str]] = {container: collections.Counter() for container in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(folder)
        for number in range(options.count):
            container = list(KINDS)[number % len(KINDS)]
            damaged = damage(np.random.default_rng([options.seed, number]), container)
            if only and number not in only:
                continue
            verdict, said = judge(damaged)
            counts[container][verdict] += 1
            if only or verdict in ("missed", "wrong", "slow"):
                print(
                    f"{number} {container}/{damaged.kind} {damaged.what[:100]}: {verdict}: {said[:300]!r}", flush=True
                )
                if options.keep:
                    pathlib.Path(options.keep, f"{number}.{container}").write_bytes(damaged.content)
    columns = ["good", "named", "named by av_mae alone", "missed", "wrong", "slow"]
    print("| container | " + " | ".join(columns) + " |")
    for container, found in counts.items():
        print(f"| {container} | " + " | ".join(str(found[column]) for column in columns) + " |")
    sys.exit(any(found[column] for found in counts.values() for column in columns[3:]))


def _version() -> str:
    program = shutil.which("ffmpeg")
    return "none" if program is None else subprocess.check_output([program, "-version"], text=True).split()[2]


if __name__ == "__main__":
    main()
