"""VGGSound: 10 s clips of 309 classes, in the layout of the published system, and its subset of musical instruments.

annotations/vggsound.csv (id, start, label, split) and clips/CLASS/ID_START.mp4, ID_START_END.mp4, or any other folders.
The subset's lists are vggmusic_train.txt (ID_START, class) and vggmusic_eval_ss.csv (two ID_START and their classes).
"""

import dataclasses

from av_mae.media.files import MediaFiles
from av_mae.prepare.readers import catalogue as tables
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip, check_id, split_name
from av_mae.storage import Folder

DESCRIPTION = "VGGSound (Chen et al., ICASSP 2020): sounds whose source is seen, 10 s each."
LICENCE = "Annotations: CC BY 4.0. The videos belong to their uploaders on YouTube."
HEADER = ("id", "youtube_id", "youtube id", "ytid", "video_id", "# youtube id")
MUSIC = "playing "


def read(folder: Folder) -> Catalogue:
    """Splits `train` and `test`."""
    catalogue, files = Catalogue(), MediaFiles(folder.files())
    rows = _annotations(folder, catalogue)
    classes = sorted({label for _, _, label, _ in rows})
    catalogue.classes, numbers = tuple(classes), {label: number for number, label in enumerate(classes)}
    for name, start, label, split in rows:
        _add(catalogue, files, name, start, numbers[label], split)
    return catalogue


def read_music(folder: Folder) -> Catalogue:
    """Splits `train`, `test`, and `test_pairs`: the first clip of a pair with the sum of both sounds. Without the
    subset's lists, all classes that begin with 'playing', and no pairs."""
    catalogue, files = Catalogue(), MediaFiles(folder.files())
    rows = [row for row in _annotations(folder, catalogue) if row[2].startswith(MUSIC)]
    listed = tables.find(folder, "vggmusic_train.txt", "vggmusic_train.csv", needed=False)
    if listed:
        kept = {fields[0] for _, fields in tables.rows(folder, listed, 2, catalogue)}
        rows = [row for row in rows if row[3] != "train" or _clip_name(*row[:2]) in kept]
    classes = sorted({label.removeprefix(MUSIC) for _, _, label, _ in rows})
    catalogue.classes, numbers = tuple(classes), {label: number for number, label in enumerate(classes)}
    for name, start, label, split in rows:
        _add(catalogue, files, name, start, numbers[label.removeprefix(MUSIC)], split)
    pairs = tables.find(folder, "vggmusic_eval_ss.csv", "vggmusic_test_pairs.csv", needed=False)
    if pairs:
        _add_pairs(catalogue, folder, pairs)
    return catalogue


def _annotations(folder: Folder, catalogue: Catalogue) -> list[tuple[str, float, str, str]]:
    """Recording, start in seconds, label and split of each good row."""
    name, rows = tables.find(folder, "vggsound.csv"), []
    for number, fields in tables.rows(folder, name, 4, catalogue, HEADER):

        def add():
            check_id(fields[0])
            rows.append((fields[0], tables.number(fields[1], "start"), fields[2], split_name(fields[3])))

        tables.guarded(catalogue, name, number, add)
    return rows


def _clip_name(recording: str, start: float) -> str:
    return f"{recording}_{round(start):06d}"


def _add(catalogue: Catalogue, files: MediaFiles, recording: str, start: float, label: int, split: str) -> None:
    name, media = _clip_name(recording, start), files.segment(recording, start)
    if media is None:
        catalogue.note("missing", name, "files", f"no file {name}.mp4 or alike", split)
        return
    catalogue.clips.append(SourceClip(name, split, media, labels=(label,), source=recording, source_start=start))


def _add_pairs(catalogue: Catalogue, folder: Folder, name: str) -> None:
    clips = {clip.id: clip for clip in catalogue.clips}
    for _, fields in tables.rows(folder, name, range(2, 9), catalogue, ("source_1", "id1")):
        first, second = fields[:2]
        pair = f"{first}+{second}"
        absent = [half for half in (first, second) if half not in clips]
        if absent:
            catalogue.note("missing", pair, "files", f"{name}: there is no clip {absent[0]}", "test_pairs")
            continue
        catalogue.clips.append(dataclasses.replace(clips[first], id=pair, split="test_pairs", mixed_with=clips[second]))
