"""Readers of data sets as users have them: `read(name, folder)` → Catalogue of classes, clips and findings.

A reader is a module with DESCRIPTION, LICENCE and functions read(folder, …) → Catalogue. It reads annotations and lists
of files; it opens no media.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from av_mae.prepare.readers.catalogue import Catalogue, SourceClip
from av_mae.storage import Folder

__all__ = ["Catalogue", "NAMES", "Reader", "SourceClip", "reader"]

# The name of a data set → its reader's module, function and arguments.
_READERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "folder": ("folder", "read", {}),
    "vggsound": ("vggsound", "read", {}),
    "vggsound_music": ("vggsound", "read_music", {}),
    "audioset": ("audioset", "read", {}),
    "music_solo": ("music", "read", {"part": "solo"}),
    "music_duet": ("music", "read", {"part": "duet"}),
    "music_21": ("music", "read", {"part": "21"}),
    "avsbench_s4": ("avsbench", "read", {"part": "s4"}),
    "avsbench_ms3": ("avsbench", "read", {"part": "ms3"}),
    "avsbench_avss": ("avsbench", "read", {"part": "avss"}),
    "vggss": ("vggss", "read", {}),
    "flickr_soundnet": ("flickr_soundnet", "read", {}),
    "grid": ("grid", "read", {}),
}
NAMES = tuple(_READERS)


class Reader(NamedTuple):
    """How a data set is read. `read` takes the source folder (a Folder)."""

    description: str
    licence: str
    read: Callable[[Folder], Catalogue]


def reader(name: str, **options: Any) -> Reader:
    """The reader of one of NAMES; `options` go on to its `read`."""
    module_name, function, arguments = _READERS[name]
    module: ModuleType = importlib.import_module(f"av_mae.prepare.readers.{module_name}")
    read = functools.partial(getattr(module, function), **arguments, **options)
    return Reader(module.DESCRIPTION, module.LICENCE, read)
