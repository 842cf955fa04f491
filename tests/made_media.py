"""Media files made for tests: frames that show their number, a sound known at every moment."""

import io
from fractions import Fraction

import av
import numpy as np

SIZE = (48, 64)  # height, width
QUADRANTS = np.array([[[200, 30, 40], [30, 180, 60]], [[40, 60, 210], [230, 220, 30]]], np.uint8)
BITS = 12


def hum(time: np.ndarray) -> np.ndarray:
    """A sum of sines whose beats make every moment sound different, to a fraction of a millisecond."""
    generator = np.random.default_rng(5)
    frequencies, phases = generator.uniform(100, 3500, (24, 1)), generator.uniform(0, 2 * np.pi, (24, 1))
    return 0.02 * np.sin(2 * np.pi * frequencies * time + phases).sum(axis=0)


def numbered_frame(number: int) -> np.ndarray:
    """Two rows of white and black blocks: the binary digits of `number`, uint8 [48, 64, 3]."""
    digits = np.array([number >> bit & 1 for bit in range(BITS)], np.uint8).reshape(2, BITS // 2) * 255
    rows, columns = np.arange(SIZE[0]) * 2 // SIZE[0], np.arange(SIZE[1]) * (BITS // 2) // SIZE[1]
    return np.repeat(digits[rows][:, columns, None], 3, axis=2)


def number_of(frame: np.ndarray) -> int:
    """The number that a frame of any size shows."""
    height, width = frame.shape[:2]
    rows = ((np.arange(2) + 0.5) * height / 2).astype(int)
    columns = ((np.arange(BITS // 2) + 0.5) * width / (BITS // 2)).astype(int)
    return sum(1 << bit for bit, value in enumerate(frame[rows][:, columns].mean(axis=2).ravel()) if value > 128)


def quadrants(height: int = 64, width: int = 96) -> np.ndarray:
    """Red, green, blue and yellow quarters."""
    return np.repeat(np.repeat(QUADRANTS, height // 2, axis=0), width // 2, axis=1)


def colours(frame: np.ndarray) -> np.ndarray:
    """Which colour each quarter of a frame has, int [2, 2]: 0 red, 1 green, 2 blue, 3 yellow."""
    height, width = frame.shape[:2]
    centres = frame[[height // 4, -height // 4]][:, [width // 4, -width // 4]].astype(int)
    return np.abs(centres[:, :, None] - QUADRANTS.reshape(4, 3).astype(int)).sum(-1).argmin(-1)


def write(
    file,
    frames,
    sound=None,
    *,
    fps: int = 5,
    rate: int = 16000,
    video: str = "libx264",
    audio: str = "aac",
    format: str = "mp4",
    gop: int = 10,
    aspect: Fraction = Fraction(1),
    options: dict | None = None,
) -> None:
    """Writes uint8 frames [k, H, W, 3] (None: no picture) and a mono sound (None: none) to a path or file object."""
    with av.open(file, "w", format=format, options=options or {}) as container:
        picture = None if frames is None else _picture(container, video, fps, frames[0].shape, gop, aspect)
        stream = None if sound is None else container.add_stream(audio, rate=rate, layout="mono")
        block = rate // fps
        for number in range(len(frames) if frames is not None else -(-len(sound) // block)):
            if picture:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[number]), format="rgb24")
                frame = frame.reformat(format=picture.pix_fmt, threads=1)
                frame.pts, frame.time_base = number, Fraction(1, fps)
                container.mux(picture.encode(frame))
            if stream and number * block < len(sound):
                container.mux(
                    stream.encode(_block(stream, sound[number * block : (number + 1) * block], number * block))
                )
        for track in filter(None, (picture, stream)):
            container.mux(track.encode(None))


def _picture(container, codec: str, fps: int, shape: tuple, gop: int, aspect: Fraction):
    stream = container.add_stream(codec, rate=fps)
    stream.height, stream.width = shape[:2]
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    stream.gop_size, stream.codec_context.thread_count = gop, 1
    stream.codec_context.sample_aspect_ratio = aspect
    if codec == "libx264":
        stream.options = {"preset": "ultrafast", "crf": "10", "bf": "2"}
    return stream


def _block(stream, samples: np.ndarray, start: int) -> av.AudioFrame:
    format = stream.codec_context.format.name
    whole = {"s16": np.int16, "s32": np.int32}.get(format.removesuffix("p"))
    samples = samples.astype(np.float32) if whole is None else (samples * np.iinfo(whole).max).astype(whole)
    frame = av.AudioFrame.from_ndarray(samples[None], format=format, layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = stream.rate, start, Fraction(1, stream.rate)
    return frame


def encoded(*arguments, **options) -> bytes:
    """What `write` writes."""
    file = io.BytesIO()
    write(file, *arguments, **options)
    return file.getvalue()


def with_matrix(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The mp4 with another display matrix in its first track: a point (x, y) is shown at (a x + c y, b x + d y)."""
    place = mp4.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of other fields
    numbers = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return mp4[:place] + b"".join(number.to_bytes(4, "big", signed=True) for number in numbers) + mp4[place + 36 :]
