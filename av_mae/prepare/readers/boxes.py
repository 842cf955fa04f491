"""Clips with boxes around what sounds, as media files or as frames/NAME.jpg with audio/NAME.wav."""

from collections.abc import Sequence
from typing import Any

from av_mae.media.files import IMAGES, SOUNDS, MediaFiles, ending
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip, check_id
from av_mae.storage import Folder

Box = tuple[float, float, float, float]


def add(catalogue: Catalogue, files: "Clips", name: str, boxes: list[list[Box]], label: int | None) -> None:
    """Adds the test clip `name` with the boxes of each annotator. Raises ValueError for a name that is no id."""
    check_id(name)
    found = files.find(name)
    if found is None:
        catalogue.note("missing", name, "files", f"no media file {name}, nor frame and sound of this name", "test")
        return
    media, images = found
    catalogue.clips.append(
        SourceClip(
            name,
            "test",
            media,
            images=images,
            labels=() if label is None else (label,),
            source=name,
            boxes=tuple(box for own in boxes for box in own),
            annotators=len(boxes),
            box_annotators=tuple(annotator for annotator, own in enumerate(boxes) for _ in own),
        )
    )


class Clips:
    """Finds a clip's media file, or its sound and picture."""

    def __init__(self, folder: Folder):
        names = folder.files()
        self._videos = MediaFiles(name for name in names if ending(name) not in SOUNDS)
        self._sounds = MediaFiles((name for name in names if ending(name) in SOUNDS), SOUNDS)
        self._images = MediaFiles(names, IMAGES)

    def find(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        video, sound, image = self._videos.find(name), self._sounds.find(name), self._images.find(name)
        if video is None and "_" in name:  # a part of a recording, its name with or without the end
            recording, _, start = name.rpartition("_")
            video = self._videos.segment(recording, float(start)) if start.isdigit() else None
        if video is not None:
            return video, ()
        return (sound, (image,)) if sound and image else None


def box(values: Sequence[Any], scale: float) -> Box:
    """(xmin, ymin, xmax, ymax) in units of 1 / scale → (ymin, xmin, ymax, xmax) in 0…1. Raises ValueError."""
    try:
        left, top, right, bottom = (min(1.0, max(0.0, float(value) / scale)) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"box {list(values)!r} must be the four numbers xmin, ymin, xmax, ymax") from None
    if not (left < right and top < bottom):
        raise ValueError(f"box {list(values)!r} is empty within the picture (xmin, ymin, xmax, ymax)")
    return top, left, bottom, right
