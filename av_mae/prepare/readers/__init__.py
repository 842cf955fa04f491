"""Readers of data sets as users have them: a folder as downloaded → Catalogue of classes, clips and findings.

A reader is a function read(folder, …) → Catalogue, entered in READERS with a description and a licence. A reader reads
annotations and lists of files; it opens no media.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from av_mae.prepare.readers import avsbench, boxes, folder, youtube
from av_mae.prepare.readers.catalogue import Catalogue


class Reader(NamedTuple):
    """How a data set is read: `read` takes the source Folder; that of `folder` also a `table`."""

    description: str
    licence: str
    read: Callable[..., Catalogue]


def _music(part: str) -> Reader:
    return Reader(youtube.MUSIC, youtube.MUSIC_LICENCE, functools.partial(youtube.read_music, part=part))


def _avsbench(part: str) -> Reader:
    return Reader(avsbench.DESCRIPTION, avsbench.LICENCE, functools.partial(avsbench.read, part=part))


READERS: dict[str, Reader] = {
    "folder": Reader(folder.DESCRIPTION, folder.LICENCE, folder.read),
    "vggsound": Reader(youtube.VGGSOUND, youtube.LICENCE, youtube.read_vggsound),
    "vggsound_music": Reader(youtube.VGGSOUND, youtube.LICENCE, youtube.read_vggsound_music),
    "audioset": Reader(youtube.AUDIOSET, youtube.LICENCE, youtube.read_audioset),
    "music_solo": _music("solo"),
    "music_duet": _music("duet"),
    "music_21": _music("21"),
    "avsbench_s4": _avsbench("s4"),
    "avsbench_ms3": _avsbench("ms3"),
    "avsbench_avss": _avsbench("avss"),
    "vggss": Reader(boxes.VGGSS, boxes.VGGSS_LICENCE, boxes.read_vggss),
    "flickr_soundnet": Reader(boxes.FLICKR, boxes.FLICKR_LICENCE, boxes.read_flickr_soundnet),
    "grid": Reader(folder.GRID, folder.GRID_LICENCE, folder.read_grid),
}
