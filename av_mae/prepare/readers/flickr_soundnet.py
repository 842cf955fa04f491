"""Flickr-SoundNet: the test set of visual sound localization whose pictures several annotators looked at.

Annotations/NAME.xml, or a JSON file {NAME: [boxes of an annotator, …]}, both with xmin, ymin, xmax, ymax in pixels of a
picture of 256 × 256; frames/NAME.jpg and audio/NAME.wav, or media files.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator

from av_mae.media.files import ending, stem
from av_mae.prepare.readers import catalogue as tables
from av_mae.prepare.readers.boxes import Clips, add, box
from av_mae.prepare.readers.catalogue import Catalogue
from av_mae.storage import Folder

DESCRIPTION = "Flickr-SoundNet (Senocak et al., CVPR 2018): boxes of several annotators around what sounds."
LICENCE = "Annotations: for research, as its authors say. The videos belong to their uploaders on Flickr."
PIXELS = 256  # of the pictures that the annotators saw

Entry = tuple[str, int, Callable[[], tuple[str, list]]]


def read(folder: Folder) -> Catalogue:
    """Split `test`, without classes."""
    catalogue, files = Catalogue(), Clips(folder)
    for name, number, parse in _entries(folder):

        def one():
            clip, boxes = parse()
            add(catalogue, files, clip, [[box(values, PIXELS) for values in own] for own in boxes], None)

        tables.guarded(catalogue, name, number, one)
    return catalogue


def _entries(folder: Folder) -> Iterator[Entry]:
    """(file, entry, function that gives the clip's name and the boxes of each annotator)."""
    listed = tables.find(folder, "flickr_soundnet.json", "flickr_test.json", "annotations.json", needed=False)
    if listed:
        for number, (clip, boxes) in enumerate(tables.read_json(folder, listed, dict).items(), 1):
            yield listed, number, lambda clip=clip, boxes=boxes: (clip, boxes)
    for name in folder.files():
        if ending(name) == "xml" and name.split("/")[0].lower().startswith("anno"):
            yield name, 1, lambda name=name: (stem(name), _xml_boxes(tables.read(folder, name)))


def _xml_boxes(content: bytes) -> list[list[list[str]]]:
    """Each child of the root that has boxes is an annotator.

    A box names its sides, or its last four values are they.
    """
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise ValueError(f"is no XML file: {error}") from None
    annotators = []
    for child in root:
        boxes = [node for node in child.iter() if node.tag in ("bbox", "bndbox")]
        if boxes:
            annotators.append([_sides(node) for node in boxes])
    return annotators


def _sides(node: ElementTree.Element) -> list[str]:
    named = {child.tag.lower(): child.text or "" for child in node}
    if {"xmin", "ymin", "xmax", "ymax"} <= named.keys():
        return [named[side] for side in ("xmin", "ymin", "xmax", "ymax")]
    return [child.text or "" for child in node][-4:]
