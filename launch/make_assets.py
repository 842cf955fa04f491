"""Makes the shipped sources of Spoken Digits: handwriting.npz (MNIST) and speech.npz (FSDD). Run once:

    python launch/make_assets.py --mnist=mnist_train_first10k.npz --fsdd=FOLDER_OF_WAV

handwriting.npz: `images` uint8 [n, 28, 28], `digits` uint8 [n]; `train` of them, the first, are for training.
speech.npz: FLAC files of 8 kHz mono one after another in `flac` uint8, recording i at offsets[i]:offsets[i + 1];
`digits`, `takes` uint8, `speakers` uint8 as numbers into `names`. Both hold plain arrays, nothing pickled.
"""

import argparse
import io
import pathlib
import sys

import numpy as np
import soundfile

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "av_mae" / "assets"
SEED = 2312
IMAGES, TRAIN_IMAGES = 6000, 5000
LONGEST = 0.9  # seconds; the few longer recordings hold mostly silence
RATE = 8000


def make_handwriting(source: str, target: pathlib.Path) -> None:
    """A random part of MNIST: its file is sorted by label, so it is permuted before it is cut."""
    with np.load(source, allow_pickle=False) as stored:
        images, digits = stored["images"], stored["labels"]
    chosen = np.random.default_rng(SEED).permutation(len(digits))[:IMAGES]
    np.savez_compressed(
        target, images=images[chosen], digits=digits[chosen].astype(np.uint8), train=np.int64(TRAIN_IMAGES)
    )


def make_speech(source: str, target: pathlib.Path) -> None:
    """All FSDD recordings of at most LONGEST seconds, re-encoded without loss."""
    files, rows = [], []
    for path in sorted(pathlib.Path(source).glob("*.wav")):
        sound, rate = soundfile.read(path, dtype="int16")
        if rate != RATE or sound.ndim != 1:
            raise ValueError(f"{path} must be {RATE} Hz mono, got {rate} Hz and shape {sound.shape}")
        digit, speaker, take = path.stem.split("_")
        if len(sound) > LONGEST * RATE:
            continue
        file = io.BytesIO()
        soundfile.write(file, sound, rate, format="FLAC", subtype="PCM_16", compression_level=1.0)
        files.append(file.getvalue())
        rows.append((int(digit), speaker, int(take)))
    digits, speakers, takes = zip(*rows)
    names = sorted(set(speakers))
    np.savez(
        target,
        flac=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0, *map(len, files)]),
        digits=np.array(digits, np.uint8),
        speakers=np.array([names.index(speaker) for speaker in speakers], np.uint8),
        takes=np.array(takes, np.uint8),
        names=np.array(names),
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", required=True, help="npz with images [n, 28, 28] and labels [n]")
    parser.add_argument("--fsdd", required=True, help="folder of DIGIT_SPEAKER_TAKE.wav")
    options = parser.parse_args(argv)
    make_handwriting(options.mnist, FOLDER / "handwriting.npz")
    make_speech(options.fsdd, FOLDER / "speech.npz")


if __name__ == "__main__":
    main(sys.argv[1:])
