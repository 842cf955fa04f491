"""AVSBench: 5 s (v1s, v1m) and 10 s (v2) clips as one frame a second, audio and masks of what sounds.

metadata.csv (vid, uid, s_min, s_sec, a_obj, split, label), label2idx.json, and in v1s/, v1m/ and v2/ a folder UID with
audio.wav, frames/0.jpg …, labels_rgb/0.png … or labels_semantic/0.png …

As first released (s4 and ms3): s4_meta_data.csv or ms3_meta_data.csv (with columns name or video_id, category, split),
and at any depth audio_wav/SPLIT/[CATEGORY/]NAME.wav, visual_frames/[SPLIT/CATEGORY/]NAME/*_1.png … and
gt_masks/SPLIT/[CATEGORY/]NAME/*_1.png …, of seconds 1, 2, …
"""

import re

from av_mae.errors import UserError
from av_mae.media import IMAGES, SOUNDS, ending, stem
from av_mae.prepare.readers import catalogue as tables
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip, check_id, split_name
from av_mae.storage import Folder

DESCRIPTION = "AVSBench (Zhou et al., ECCV 2022; semantic: IJCV 2024): which pixels sound, a frame a second."
LICENCE = "For research, as its authors say. The videos belong to their uploaders on YouTube."
PARTS = {"s4": ("v1s",), "ms3": ("v1m",), "avss": ("v1s", "v1m", "v2")}
COLUMNS = 7
FIRST_TABLES = {"s4": "s4_meta_data.csv", "ms3": "ms3_meta_data.csv"}
OFF_SCREEN = "off-the-screen"


def read(folder: Folder, part: str) -> Catalogue:
    """`part`: s4 or ms3 (masks of 0 and 255), avss (masks of class numbers). Splits `train`, `validation`, `test`."""
    catalogue = Catalogue()
    if not folder.exists("label2idx.json") and part in FIRST_TABLES:
        files = folder.files()
        table = next((name for name in files if name.rpartition("/")[2] == FIRST_TABLES[part]), None)
        if table is not None:
            return _read_first(folder, table, files)
    numbers: dict[str, int] = tables.read_json(folder, "label2idx.json", dict)
    if any(type(number) is not int for number in numbers.values()) or sorted(numbers.values()) != list(
        range(len(numbers))
    ):
        raise UserError(f"{folder.path('label2idx.json')} must number its {len(numbers)} classes from 0 on")
    catalogue.classes = tuple(sorted(numbers, key=numbers.__getitem__))
    found: dict[str, list[str]] = {}
    for below in PARTS[part]:
        for name in folder.files(below):
            found.setdefault("/".join(name.split("/")[:2]), []).append(name)
    for number, fields in tables.rows(folder, "metadata.csv", COLUMNS, catalogue, ("vid",)):
        if fields[6] not in PARTS[part]:
            continue
        with catalogue.row("metadata.csv", number):
            _add(catalogue, numbers, found, fields, semantic=part == "avss")
    return catalogue


def _add(
    catalogue: Catalogue, numbers: dict[str, int], found: dict[str, list[str]], fields: list[str], semantic: bool
) -> None:
    """Adds the clip of a row. Raises ValueError."""
    vid, uid, minutes, seconds, objects, split, version = fields
    split, labels = split_name(split), _labels(objects, numbers)
    files = found.get(f"{version}/{uid}", [])
    sound = next((name for name in files if ending(name) in SOUNDS), None)
    frames = _numbered(files, "frames")
    if sound is None or not frames:
        catalogue.note("missing", uid, "files", f"{version}/{uid} has no {'frames' if sound else 'audio'}", split)
        return
    # v1 tells what is not black apart only; of v2, colours are the classes by definition, greys where they are lacking.
    colours, greys = _numbered(files, "labels_rgb"), _numbered(files, "labels_semantic")
    masks = colours or greys
    order = list(frames)
    masked = [number for number in masks if number in frames]
    catalogue.clips.append(
        SourceClip(
            uid,
            split,
            sound,
            images=tuple(frames[number] for number in order),
            image_times=tuple(number + 0.5 for number in order),
            labels=labels,
            source=vid,
            source_start=60 * tables.number(minutes or "0", "s_min") + tables.number(seconds or "0", "s_sec"),
            masks=tuple(masks[number] for number in masked),
            mask_frames=tuple(order.index(number) for number in masked),
            mask_reader=("colours" if colours else "numbers") if semantic else "binary",
            mask_classes=len(numbers),
        )
    )


def _read_first(folder: Folder, table: str, files: list[str]) -> Catalogue:
    """The layout of the first release: frames and masks of the first, second, … second of a clip."""
    catalogue, rows = Catalogue(), []
    columns: list[str] = []
    for number, fields in tables.rows(folder, table, range(2, 9), catalogue):
        if not columns:
            columns = [field.lower() for field in fields]
            if "split" not in columns or not {"name", "video_id"} & set(columns):
                raise UserError(f"{folder.path(table)} needs the columns name or video_id, and split; it has {columns}")
            continue
        with catalogue.row(table, number):
            row = dict(zip(columns, fields, strict=True))
            name = row.get("name") or row.get("video_id", "")
            check_id(name)
            rows.append((name, row.get("category", ""), split_name(row["split"])))
    numbers = catalogue.set_classes(category for _, category, _ in rows if category)
    found: dict[tuple[str, str], dict[int, str]] = {}
    audio = {stem(file): file for file in files if "audio_wav" in file.split("/") and ending(file) in SOUNDS}
    for file in files:
        *_, below, _ = ("", "", *file.split("/"))
        kind = next((part for part in ("visual_frames", "gt_masks") if part in file.split("/")), "")
        second = re.search(r"_(\d+)$", stem(file))
        if kind and second and ending(file) in IMAGES:
            found.setdefault((kind, below), {})[int(second[1])] = file
    for name, category, split in rows:
        frames = dict(sorted(found.get(("visual_frames", name), {}).items()))
        masks = {second: mask for second, mask in found.get(("gt_masks", name), {}).items() if second in frames}
        if name not in audio or not frames:
            catalogue.note("missing", name, "files", f"no {'frames' if name in audio else 'audio'} of {name}", split)
            continue
        order = list(frames)
        catalogue.clips.append(
            SourceClip(
                name,
                split,
                audio[name],
                images=tuple(frames.values()),
                image_times=tuple(second - 0.5 for second in order),
                labels=(numbers[category],) if category else (),
                source=name,
                masks=tuple(masks[second] for second in sorted(masks)),
                mask_frames=tuple(order.index(second) for second in sorted(masks)),
                mask_reader="binary",
            )
        )
    return catalogue


def _numbered(files: list[str], below: str) -> dict[int, str]:
    """The images of a subfolder by rising number: '3.jpg', 'uid_3.png'."""
    numbered = {}
    for name in files:
        match = re.search(r"(\d+)$", stem(name))
        if name.split("/")[2] == below and ending(name) in IMAGES and match:
            numbered[int(match.group())] = name
    return dict(sorted(numbered.items()))


def _labels(objects: str, numbers: dict[str, int]) -> tuple[int, ...]:
    """The classes of what sounds: one name, or several with '_' between. Raises ValueError for an unknown one."""
    names = [objects] if objects in numbers else objects.split("_")
    names = [name for name in names if name != OFF_SCREEN]
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise ValueError(f"object {unknown[0]!r} is not in label2idx.json")
    return tuple(dict.fromkeys(numbers[name] for name in names))
