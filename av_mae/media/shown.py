"""What FFmpeg has decoded, as arrays: pictures as they are meant to be seen, sound as one channel of floats."""

from typing import Any

import av
import numpy as np
import simplejpeg
from av.sidedata.sidedata import Type as SideData

# PyAV knows no name for side data that FFmpeg 8 has added, e.g. EXIF, and fails at any frame that has some.
SideData._missing_ = classmethod(lambda kind, value: kind.VIDEO_HINT)  # type: ignore[assignment, method-assign]


# Of a JPEG that libjpeg can decode, but not as it was: other complaints are of bytes between what it reads.
CORRUPT = ("premature end of data segment", "bad Huffman code")


def corrupt_jpeg(packet: av.Packet) -> str:
    """What is damaged in a packet of Motion JPEG; '' where nothing is, and for all other codecs.

    FFmpeg 8 takes a code that no table has for the end of a block, and says nothing.
    """
    if packet.stream.codec_context.name != "mjpeg" or not packet.size:
        return ""
    try:
        simplejpeg.decode_jpeg(bytes(packet), "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:  # also of JPEGs that libjpeg does not know, and FFmpeg does
        return str(error) if str(error).endswith(CORRUPT) else ""
    return ""


def upright(frame: Any, aspect: float) -> np.ndarray:
    """A decoded frame with samples of this aspect, turned and with square pixels: uint8 [H, W, 3]."""
    width = max(1, round(frame.width * aspect))
    pixels: np.ndarray = frame.reformat(width=width, format="rgb24", threads=1).to_ndarray()
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    # A point (x, y) is shown at (a x + c y, b x + d y); of the angles, the nearest quarter turn counts.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def mono(frame: av.AudioFrame) -> np.ndarray:
    """Channels averaged, whole numbers scaled to -1…1: float32 [samples]."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    mean: np.ndarray = samples.mean(axis=0, dtype=np.float32)
    if samples.dtype == np.uint8:  # silence is 128
        return np.asarray(mean / 128 - 1)
    return np.asarray(mean / 2.0 ** (8 * samples.dtype.itemsize - 1) if samples.dtype.kind == "i" else mean)
