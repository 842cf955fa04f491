"""Sets of parts of YouTube videos, which are found by the video's id: VGGSound, AudioSet and MUSIC.

VGGSound, 10 s clips of 309 classes: annotations/vggsound.csv (id, start, label, split) and clips/CLASS/ID_START.mp4,
ID_START_END.mp4, or any other folders. Its subset of musical instruments is listed in vggmusic_train.txt (ID_START,
class) and vggmusic_eval_ss.csv (two ID_START and their classes).

AudioSet, 10 s segments with several of 527 classes: class_labels_indices.csv (index, mid, display_name) or
ontology.csv, and of unbalanced_train_segments.csv, balanced_train_segments.csv and eval_segments.csv (id, start, end,
"mids") those that are there, in annotations/; clips/XX/ID_START_END.mp4, where XX are the id's first two letters, or
any other folders.

MUSIC, solos and duets of musical instruments: MUSIC_solo_videos.json, MUSIC_duet_videos.json, MUSIC21_solo_videos.json
({"videos": {"cello": [ids]}}; a duet's key is "cello flute"), or csv files (id, class, …); clips/CLASS/ID.mp4 or its
segments ID.START.mp4, or any other folders.
"""

import collections
import dataclasses

from av_mae.errors import UserError
from av_mae.media import MEDIA, MediaFiles, ending, stem
from av_mae.prepare.readers import catalogue as tables
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip, check_id, split_name
from av_mae.storage import Folder

VGGSOUND = "VGGSound (Chen et al., ICASSP 2020): sounds whose source is seen, 10 s each."
AUDIOSET = "AudioSet (Gemmeke et al., ICASSP 2017): segments of YouTube videos with one or more of 527 labels."
MUSIC = "MUSIC (Zhao et al., ECCV 2018): recordings of solos and duets of musical instruments."
LICENCE = "Annotations: CC BY 4.0. The videos belong to their uploaders on YouTube."
MUSIC_LICENCE = "Annotations: MIT. The videos belong to their uploaders on YouTube."
HEADER = ("id", "ytid", "youtube_id", "youtube id", "# youtube id", "video_id", "vid")
INSTRUMENT = "playing "  # how the names of VGGSound's classes of instruments begin
SEGMENTS = {
    "train": "unbalanced_train_segments.csv",
    "balanced": "balanced_train_segments.csv",
    "test": "eval_segments.csv",
}
MUSIC_FILES = {
    "solo": ("MUSIC_solo_videos.json", "music_solo.json", "music_solo.csv"),
    "duet": ("MUSIC_duet_videos.json", "music_duet.json", "music_duet.csv", "music21_duet.csv"),
    "21": ("MUSIC21_solo_videos.json", "music21_solo.json", "music21_solo.csv", "music_solo21.csv"),
}
MUSIC_TEST = 130  # recordings for testing in DeepAVFusion's split, of all it has


def read_vggsound(folder: Folder) -> Catalogue:
    """Splits `train` and `test`."""
    catalogue, files = Catalogue(), MediaFiles(folder.files())
    rows = _vggsound_rows(folder, catalogue)
    numbers = catalogue.set_classes(label for _, _, label, _ in rows)
    for name, start, label, split in rows:
        _add_part(catalogue, files, (name, start, start + 10), (numbers[label],), split)
    return catalogue


def read_vggsound_music(folder: Folder) -> Catalogue:
    """Splits `train`, `test`, and `test_pairs`: the first clip of a pair with the sum of both clips' audio. Without the
    subset's lists, all classes that begin with 'playing', and no pairs."""
    catalogue, files = Catalogue(), MediaFiles(folder.files())
    rows = [row for row in _vggsound_rows(folder, catalogue) if row[2].startswith(INSTRUMENT)]
    listed = tables.find(folder, "vggmusic_train.txt", "vggmusic_train.csv")
    if listed:
        kept = {fields[0] for _, fields in tables.rows(folder, listed, 2, catalogue)}
        rows = [row for row in rows if row[3] != "train" or _clip_name(*row[:2]) in kept]
    numbers = catalogue.set_classes(label.removeprefix(INSTRUMENT) for _, _, label, _ in rows)
    for name, start, label, split in rows:
        _add_part(catalogue, files, (name, start, start + 10), (numbers[label.removeprefix(INSTRUMENT)],), split)
    pairs = tables.find(folder, "vggmusic_eval_ss.csv", "vggmusic_test_pairs.csv")
    if pairs:
        _add_pairs(catalogue, folder, pairs)
    return catalogue


def _vggsound_rows(folder: Folder, catalogue: Catalogue) -> list[tuple[str, float, str, str]]:
    """Recording, start in seconds, label and split of each good row."""
    name, rows = tables.find_needed(folder, "vggsound.csv"), []
    for number, fields in tables.rows(folder, name, 4, catalogue, HEADER):
        with catalogue.row(name, number):
            check_id(fields[0])
            rows.append((fields[0], tables.number(fields[1], "start"), fields[2], split_name(fields[3])))
    return rows


def _clip_name(recording: str, start: float) -> str:
    return f"{recording}_{round(start):06d}"


def _add_part(
    catalogue: Catalogue, files: MediaFiles, part: tuple[str, float, float], labels: tuple[int, ...], split: str
) -> None:
    """Adds the clip of a recording's part (recording, start, end)."""
    recording, start, end = part
    name, media = _clip_name(recording, start), files.segment(recording, start, end)
    if media is None:
        catalogue.note("missing", name, "files", f"no file {name}_{round(end):06d}.mp4 or alike", split)
        return
    within = (start if stem(media) == recording else 0.0, end - start)
    catalogue.clips.append(
        SourceClip(name, split, media, labels=labels, source=recording, source_start=start, part=within)
    )


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


def read_audioset(folder: Folder) -> Catalogue:
    """Splits `train` (the unbalanced one), `balanced`, `test` (the evaluation segments)."""
    catalogue, files = Catalogue(), MediaFiles(folder.files())
    numbers = _audioset_classes(folder, catalogue)
    there = {split: found for split, name in SEGMENTS.items() if (found := tables.find(folder, name))}
    if not there:
        raise UserError(f"{folder} holds none of {', '.join(SEGMENTS.values())} in its folder annotations")
    for split, name in there.items():
        for number, fields in tables.rows(folder, name, range(4, 99), catalogue, HEADER):
            with catalogue.row(name, number):
                check_id(fields[0])
                part = fields[0], tables.number(fields[1], "start"), tables.number(fields[2], "end")
                mids = [mid.strip().strip('"') for field in fields[3:] for mid in field.split(",")]
                unknown = [mid for mid in mids if mid not in numbers]
                if unknown:
                    raise ValueError(f"label {unknown[0]!r} is not in the table of classes")
                _add_part(catalogue, files, part, tuple(numbers[mid] for mid in mids), split)
    return catalogue


def _audioset_classes(folder: Folder, catalogue: Catalogue) -> dict[str, int]:
    """The number of each mid, as the table says or, where it has no numbers, in its order."""
    name = tables.find_needed(folder, "class_labels_indices.csv", "ontology.csv", "mid_to_display_name.csv")
    known: dict[str, tuple[int, str]] = {}
    for _, fields in tables.rows(folder, name, range(2, 4), catalogue, ("index", "mid", "id")):
        number = int(fields[0]) if len(fields) == 3 and fields[0].isdecimal() else len(known)
        known.setdefault(fields[-2], (number, fields[-1]))
    by_number = dict(known.values())
    if sorted(by_number) != list(range(len(known))):
        raise UserError(
            f"{folder.path(name)}: the indices of its {len(known)} classes must be 0 to {len(known) - 1}, each once"
        )
    catalogue.classes = tuple(by_number[number] for number in range(len(known)))
    return {mid: number for mid, (number, _) in known.items()}


def read_music(folder: Folder, part: str) -> Catalogue:
    """`part`: solo, duet or 21. Splits as the table's column says.

    Without such a column, as in DeepAVFusion, every n-th recording in the order of ids is `test` (n so that 130 are, at
    least 2), all the rest `train`.
    """
    catalogue, name = Catalogue(), tables.find_needed(folder, *MUSIC_FILES[part])
    rows = (_music_json_rows if name.endswith(".json") else _music_csv_rows)(folder, name, catalogue)
    numbers = catalogue.set_classes(instrument for _, instruments, _ in rows for instrument in instruments)
    found = collections.defaultdict(list)  # the files of each recording: ID.mp4, ID.SEGMENT.mp4
    for file in folder.files():
        if ending(file) in MEDIA:
            found[stem(file).split(".")[0]].append(file)
    recordings = sorted({recording for recording, _, _ in rows if found[recording]})
    test = set(recordings[:: max(2, len(recordings) // MUSIC_TEST)])
    for recording, instruments, split in rows:
        split = split or ("test" if recording in test else "train")
        labels = tuple(numbers[instrument] for instrument in instruments)
        if not found[recording]:
            catalogue.note("missing", recording, "files", f"no file {recording}.mp4 or {recording}.START.mp4", split)
        catalogue.clips += [
            SourceClip(stem(media), split, media, labels=labels, source=recording) for media in found[recording]
        ]
    return catalogue


def _music_json_rows(folder: Folder, name: str, catalogue: Catalogue) -> list[tuple[str, list[str], str]]:
    content: dict = tables.read_json(folder, name, dict)
    rows: list[tuple[str, list[str], str]] = []
    listed = content.get("videos", content)
    if not isinstance(listed, dict) or not all(isinstance(recordings, list) for recordings in listed.values()):
        raise UserError(f"{folder.path(name)} must hold a list of recordings for each instrument")
    for label, recordings in listed.items():
        for recording in recordings:
            with catalogue.row(f"{name}, {label}", len(rows) + 1):
                check_id(recording)
                rows.append((recording, label.split(), ""))
    return rows


def _music_csv_rows(folder: Folder, name: str, catalogue: Catalogue) -> list[tuple[str, list[str], str]]:
    """Rows (id, class, …): duets name two classes with a space or '+' between; a last field that is a split counts."""
    rows = []
    for number, fields in tables.rows(folder, name, range(2, 9), catalogue, HEADER):
        with catalogue.row(name, number):
            check_id(fields[0])
            instruments = fields[1].replace("+", " ").split()
            is_split = len(fields) > 2 and fields[-1].lower() in ("train", "test", "val", "validation")
            rows.append((fields[0], instruments, split_name(fields[-1]) if is_split else ""))
    return rows
