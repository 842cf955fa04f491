"""Test sets of visual sound localization: boxes around what sounds, for clips that are media files or
frames/NAME.jpg with audio/NAME.wav.

VGG-SS: vggss.json, a list of {"file", "class", "bbox": [[xmin, ymin, xmax, ymax], …] in 0…1}, and VGGSound's test
clips.

Flickr-SoundNet: Annotations/NAME.xml, or a JSON file {NAME: [boxes of an annotator, …]}, both with xmin, ymin, xmax,
ymax in pixels of an image of 256 × 256.
"""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

from av_mae.media import IMAGES, SOUNDS, MediaFiles, ending, stem
from av_mae.prepare.readers import catalogue as tables
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip, check_id
from av_mae.storage import Folder

VGGSS = "VGG-SS (Chen et al., CVPR 2021): boxes around what sounds in test clips of VGGSound."
VGGSS_LICENCE = "Annotations: CC BY 4.0. The videos belong to their uploaders on YouTube."
FLICKR = "Flickr-SoundNet (Senocak et al., CVPR 2018): boxes of several annotators around what sounds."
FLICKR_LICENCE = "Annotations: for research, as its authors say. The videos belong to their uploaders on Flickr."
PART = 10.0  # seconds of VGGSound's clips
FLICKR_PIXELS = 256  # sides of the images that the annotators saw

FARTHEST = 10  # frames: a box that reaches farther is in another unit

Box = tuple[float, float, float, float]


def read_vggss(folder: Folder) -> Catalogue:
    """Split `test`, one annotator."""
    catalogue, files, name = Catalogue(), Clips(folder), tables.find_needed(folder, "vggss.json")
    entries = tables.read_json(folder, name, list)
    numbers = catalogue.set_classes(
        entry["class"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("class"), str)
    )
    for number, entry in enumerate(entries, 1):
        with catalogue.row(name, number):
            if not isinstance(entry, dict) or not {"file", "bbox"} <= entry.keys():
                raise ValueError("an entry needs file and bbox")
            files.add(catalogue, entry["file"], _boxes([entry["bbox"]], 1.0), numbers.get(entry.get("class", "")))
    return catalogue


def read_flickr_soundnet(folder: Folder) -> Catalogue:
    """Split `test`, without classes."""
    catalogue, files = Catalogue(), Clips(folder)
    listed = tables.find(folder, "flickr_soundnet.json", "flickr_test.json", "annotations.json")
    annotations = tables.read_json(folder, listed, dict) if listed else {}
    for number, (clip, annotators) in enumerate(annotations.items(), 1):
        with catalogue.row(listed or "", number):
            files.add(catalogue, clip, _boxes(annotators, FLICKR_PIXELS), None)
    for name in folder.files():
        if ending(name) == "xml" and name.split("/")[0].lower().startswith("anno"):
            with catalogue.row(name, 1):
                files.add(catalogue, stem(name), _boxes(_xml_boxes(tables.read(folder, name)), FLICKR_PIXELS), None)
    return catalogue


def _boxes(annotators: Sequence[Sequence[Sequence[Any]]], scale: float) -> list[list[Box]]:
    """The boxes of each annotator, without those that have no area: they mark no pixel.

    Raises:
        ValueError: where a box is none, or none has an area.
    """
    boxes = [[box(values, scale) for values in own] for own in annotators]
    kept = [[one for one in own if one[0] < one[2] and one[1] < one[3]] for own in boxes]
    if any(boxes) and not any(kept):
        raise ValueError(f"no box has an area within the frame: {annotators!r} (xmin, ymin, xmax, ymax)")
    return kept


def _xml_boxes(content: bytes) -> list[list[list[str]]]:
    """Each child of the root that has boxes is an annotator.

    A box names its sides, or its last four values are they.
    """
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise ValueError(f"is no XML file: {error}") from None
    found = [[_sides(node) for node in child.iter() if node.tag in ("bbox", "bndbox")] for child in root]
    return [boxes for boxes in found if boxes]


def _sides(node: ElementTree.Element) -> list[str]:
    named = {child.tag.lower(): child.text or "" for child in node}
    if {"xmin", "ymin", "xmax", "ymax"} <= named.keys():
        return [named[side] for side in ("xmin", "ymin", "xmax", "ymax")]
    return [child.text or "" for child in node][-4:]


class Clips:
    """Finds a clip's media file, or its audio and frame."""

    def __init__(self, folder: Folder):
        names = folder.files()
        self._videos = MediaFiles(name for name in names if ending(name) not in SOUNDS)
        self._sounds = MediaFiles((name for name in names if ending(name) in SOUNDS), SOUNDS)
        self._images = MediaFiles(names, IMAGES)

    def find(self, name: str) -> tuple[str, tuple[str, ...], tuple[float, float] | None] | None:
        """The media file, the frames beside it and the clip's part of it; `None` where the clip has no files."""
        video, sound, image = self._videos.find(name), self._sounds.find(name), self._images.find(name)
        recording, _, start = name.rpartition("_")
        if video is None and recording and start.isdigit():  # a part of a recording, its name with or without the end
            video = self._videos.segment(recording, float(start))
            if video is not None and stem(video) == recording:
                return video, (), (float(start), PART)
        if video is not None:
            return video, (), None
        return (sound, (image,), None) if sound and image else None

    def add(self, catalogue: Catalogue, name: str, boxes: list[list[Box]], label: int | None) -> None:
        """Adds a test clip to a catalogue.

        Args:
            catalogue: takes the clip, or a finding where the clip has no files.
            name: the clip's id.
            boxes: of each annotator.
            label: the class, `None` where the set has none.

        Raises:
            ValueError: where `name` cannot be an id.
        """
        check_id(name)
        found = self.find(name)
        if found is None:
            catalogue.note("missing", name, "files", f"no media file {name}, nor frame and audio of this name", "test")
            return
        media, images, part = found
        catalogue.clips.append(
            SourceClip(
                name,
                "test",
                media,
                images=images,
                labels=() if label is None else (label,),
                source=name,
                part=part,
                boxes=tuple(box for own in boxes for box in own),
                annotators=len(boxes),
                box_annotators=tuple(annotator for annotator, own in enumerate(boxes) for _ in own),
            )
        )


def box(values: Sequence[Any], scale: float) -> Box:
    """A box within the frame, whichever corners it was drawn from.

    Args:
        values: (xmin, ymin, xmax, ymax) in units of 1 / scale.
        scale: how many of the units a side of the frame has.

    Returns:
        (ymin, xmin, ymax, xmax) in 0…1.

    Raises:
        ValueError: where `values` are not four finite numbers, or cannot be in these units.
    """
    try:
        left, top, right, bottom = (float(value) / scale for value in values)
        if not all(map(math.isfinite, (left, top, right, bottom))):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"box {list(values)!r} must be the four numbers xmin, ymin, xmax, ymax") from None
    if max(map(abs, (left, top, right, bottom))) > FARTHEST:
        raise ValueError(
            f"box {list(values)!r} reaches far beyond the frame, whose sides are {scale:g}: is it in pixels?"
        )
    left, top, right, bottom = (min(1.0, max(0.0, side)) for side in (left, top, right, bottom))
    return min(top, bottom), min(left, right), max(top, bottom), max(left, right)
