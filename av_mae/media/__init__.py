"""Finds a clip's file among those that a user has, whatever its ending and however its times are written."""

import re
from collections.abc import Iterable

SOUNDS = frozenset(
    """wav flac mp3 m4a aac ogg opus wma aiff aif aifc m4b mp2 mpga oga spx ac3 eac3 dts amr au caf ape wv tta mka w64
    """.split()
)
MEDIA = SOUNDS | frozenset(
    """mp4 m4v mov mkv webm avi flv ts mpg mpeg wmv 3gp ogv m2ts mts vob
    asf mxf f4v 3g2 divx xvid mpe mpv m1v m2v m2t ogm ogx qt dv nut rm rmvb wtv""".split()
)
IMAGES = frozenset("jpg jpeg png bmp webp".split())
_TIMES = re.compile(r"(?<=[_.-])0+(?=\d)")


def ending(name: str) -> str:
    """'a/b.MP4' → 'mp4'."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""


def stem(name: str) -> str:
    """'a/b.c.mp4' → 'b.c'."""
    base = name.rpartition("/")[2]
    return base.rpartition(".")[0] if "." in base else base


def plain(name: str) -> str:
    """A stem whose times have no leading zeros: 'abc_000030_000040' → 'abc_30_40'."""
    match = re.search(r"(?:[_.-]\d+)+$", name)
    return name[: match.start()] + _TIMES.sub("", match.group()) if match else name


class MediaFiles:
    """The files of a source folder, found by stem. Of several, video comes before sound, then the sorted first."""

    def __init__(self, names: Iterable[str], endings: frozenset[str] = MEDIA):
        self._by_stem: dict[str, str] = {}
        self._by_path: dict[str, list[str]] = {}
        self.names = sorted(
            (name for name in names if ending(name) in endings), key=lambda name: (ending(name) in SOUNDS, name)
        )
        for key in (stem, lambda name: plain(stem(name))):  # a stem as it is goes before one without leading zeros
            for name in self.names:
                self._by_stem.setdefault(key(name), name)
        for name in self.names:
            self._by_path.setdefault(name[: len(name) - len(ending(name))], []).append(name)

    def at(self, path: str) -> str | None:
        """The file at a path, or the only one there whose name has another ending; `None` where there is none."""
        others = self._by_path.get(path[: len(path) - len(ending(path))], [])
        return path if path in others else others[0] if len(others) == 1 else None

    def find(self, *stems: str) -> str | None:
        """The file that has one of the stems, the first that fits."""
        keys = (key for name in stems for key in (name, plain(name)))
        return next((self._by_stem[key] for key in keys if key in self._by_stem), None)

    def segment(self, name: str, start: float, end: float | None = None) -> str | None:
        """The file of a recording's part: `NAME_START`, `NAME_START_END`, in seconds or milliseconds, or `NAME`."""
        end = start + 10 if end is None else end
        seconds = [
            (f"{round(start)}", f"{round(end)}"),
            (f"{int(start)}", f"{int(end)}"),
            (f"{round(start * 1000)}", f"{round(end * 1000)}"),
        ]
        return self.find(
            *(f"{name}_{first}{tail}" for first, last in seconds for tail in ("", f"_{last}")),
            *(f"{name}-{first}" for first, _ in seconds),
            name,
        )
