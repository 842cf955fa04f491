"""MUSIC: solos and duets of musical instruments, in whole recordings or in segments of them.

MUSIC_solo_videos.json, MUSIC_duet_videos.json, MUSIC21_solo_videos.json ({"videos": {"cello": [ids]}}; a duet's key is
"cello flute"), or csv files (id, class, …); clips/CLASS/ID.mp4 or its segments ID.START.mp4, or any other folders.
"""

import collections

from av_mae.media.files import MEDIA, ending, stem
from av_mae.prepare.readers import catalogue as tables
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip, check_id, split_name
from av_mae.storage import Folder

DESCRIPTION = "MUSIC (Zhao et al., ECCV 2018): recordings of solos and duets of musical instruments."
LICENCE = "Annotations: MIT. The videos belong to their uploaders on YouTube."
FILES = {
    "solo": ("MUSIC_solo_videos.json", "music_solo.json", "music_solo.csv"),
    "duet": ("MUSIC_duet_videos.json", "music_duet.json", "music_duet.csv", "music21_duet.csv"),
    "21": ("MUSIC21_solo_videos.json", "music21_solo.json", "music21_solo.csv", "music_solo21.csv"),
}
HEADER = ("id", "ytid", "video_id", "youtube_id", "vid")
HELD_OUT = 130  # recordings for testing in the published system, of all it has


def read(folder: Folder, part: str) -> Catalogue:
    """`part`: solo, duet or 21. Splits as the table's column says; else, as the published system does, every n-th
    recording in the order of ids is `test` (n so that 130 are, at least 2), all the rest `train`."""
    catalogue, name = Catalogue(), tables.find(folder, *FILES[part])
    rows = (_json_rows if name.endswith(".json") else _csv_rows)(folder, name, catalogue)
    classes = sorted({instrument for _, instruments, _ in rows for instrument in instruments})
    catalogue.classes, numbers = tuple(classes), {label: number for number, label in enumerate(classes)}
    found = _segments(folder)
    recordings = sorted({recording for recording, _, _ in rows if found[recording]})
    test = set(recordings[:: max(2, len(recordings) // HELD_OUT)])
    for recording, instruments, split in rows:
        split = split or ("test" if recording in test else "train")
        labels = tuple(numbers[instrument] for instrument in instruments)
        if not found[recording]:
            catalogue.note("missing", recording, "files", f"no file {recording}.mp4 or {recording}.START.mp4", split)
        catalogue.clips += [
            SourceClip(stem(media), split, media, labels=labels, source=recording) for media in found[recording]
        ]
    return catalogue


def _segments(folder: Folder) -> dict[str, list[str]]:
    """The files of each recording: ID.mp4, ID.SEGMENT.mp4."""
    found = collections.defaultdict(list)
    for name in folder.files():
        if ending(name) in MEDIA:
            found[stem(name).split(".")[0]].append(name)
    return found


def _json_rows(folder: Folder, name: str, catalogue: Catalogue) -> list[tuple[str, list[str], str]]:
    content, rows = tables.read_json(folder, name, dict), []
    for label, recordings in content.get("videos", content).items():
        for recording in recordings:

            def add():
                check_id(recording)
                rows.append((recording, label.split(), ""))

            tables.guarded(catalogue, f"{name}, {label}", len(rows) + 1, add)
    return rows


def _csv_rows(folder: Folder, name: str, catalogue: Catalogue) -> list[tuple[str, list[str], str]]:
    """Rows (id, class, …): duets name two classes with a space or '+' between; a last field that is a split counts."""
    rows = []
    for number, fields in tables.rows(folder, name, range(2, 9), catalogue, HEADER):

        def add():
            check_id(fields[0])
            instruments = fields[1].replace("+", " ").split()
            is_split = len(fields) > 2 and fields[-1].lower() in ("train", "test", "val", "validation")
            rows.append((fields[0], instruments, split_name(fields[-1]) if is_split else ""))

        tables.guarded(catalogue, name, number, add)
    return rows
