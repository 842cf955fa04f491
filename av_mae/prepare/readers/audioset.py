"""AudioSet: 10 s segments with several of 527 classes.

class_labels_indices.csv (index, mid, display_name) or ontology.csv, and of unbalanced_train_segments.csv,
balanced_train_segments.csv and eval_segments.csv (id, start, end, "mids") those that are there, in annotations/;
clips/XX/ID_START_END.mp4, where XX are the id's first two letters, or any other folders.
"""

from av_mae.errors import UserError
from av_mae.media.files import MediaFiles
from av_mae.prepare.readers import catalogue as tables
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip, check_id
from av_mae.storage import Folder

DESCRIPTION = "AudioSet (Gemmeke et al., ICASSP 2017): segments of YouTube videos with one or more of 527 labels."
LICENCE = "Annotations: CC BY 4.0. The videos belong to their uploaders on YouTube."
SEGMENTS = {
    "train": "unbalanced_train_segments.csv",
    "balanced": "balanced_train_segments.csv",
    "test": "eval_segments.csv",
}


def read(folder: Folder) -> Catalogue:
    """Splits `train` (the unbalanced one), `balanced`, `test` (the evaluation segments)."""
    catalogue, files = Catalogue(), MediaFiles(folder.files())
    numbers = _classes(folder, catalogue)
    tables_there = {
        split: found for split, name in SEGMENTS.items() if (found := tables.find(folder, name, needed=False))
    }
    if not tables_there:
        raise UserError(f"{folder} holds none of {', '.join(SEGMENTS.values())} in its folder annotations")
    for split, name in tables_there.items():
        for number, fields in tables.rows(folder, name, range(4, 99), catalogue, ("ytid",)):
            tables.guarded(catalogue, name, number, lambda: _add(catalogue, files, numbers, split, fields))
    return catalogue


def _classes(folder: Folder, catalogue: Catalogue) -> dict[str, int]:
    """The number of each mid, as the table says or, where it has no numbers, in its order."""
    name = tables.find(folder, "class_labels_indices.csv", "ontology.csv", "mid_to_display_name.csv")
    known: dict[str, tuple[int, str]] = {}
    for row, fields in tables.rows(folder, name, range(2, 4), catalogue, ("index", "mid", "id")):
        number = int(fields[0]) if len(fields) == 3 and fields[0].isdigit() else len(known)
        known.setdefault(fields[-2], (number, fields[-1]))
    by_number = {number: label for number, label in known.values()}
    if sorted(by_number) != list(range(len(known))):
        raise UserError(
            f"{folder.path(name)}: the indices of its {len(known)} classes must be 0 to {len(known) - 1}, each once"
        )
    catalogue.classes = tuple(by_number[number] for number in range(len(known)))
    return {mid: number for mid, (number, _) in known.items()}


def _add(catalogue: Catalogue, files: MediaFiles, numbers: dict[str, int], split: str, fields: list[str]) -> None:
    """Adds the clip of a row. Raises ValueError."""
    recording, start, end = fields[0], tables.number(fields[1], "start"), tables.number(fields[2], "end")
    check_id(recording)
    mids = [mid.strip().strip('"') for field in fields[3:] for mid in field.split(",")]
    unknown = [mid for mid in mids if mid not in numbers]
    if unknown:
        raise ValueError(f"label {unknown[0]!r} is not in the table of classes")
    name = f"{recording}_{round(start):06d}"
    media = files.segment(recording, start, end)
    if media is None:
        catalogue.note("missing", name, "files", f"no file {name}_{round(end):06d}.mp4 or alike", split)
        return
    catalogue.clips.append(
        SourceClip(name, split, media, labels=tuple(numbers[mid] for mid in mids), source=recording, source_start=start)
    )
