"""VGG-SS: the test set of visual sound localization on VGGSound.

vggss.json, a list of {"file", "class", "bbox": [[xmin, ymin, xmax, ymax], …] in 0…1}, and VGGSound's test clips.
"""

from av_mae.prepare.readers import catalogue as tables
from av_mae.prepare.readers.boxes import Clips, add, box
from av_mae.prepare.readers.catalogue import Catalogue
from av_mae.storage import Folder

DESCRIPTION = "VGG-SS (Chen et al., CVPR 2021): boxes around what sounds in test clips of VGGSound."
LICENCE = "Annotations: CC BY 4.0. The videos belong to their uploaders on YouTube."


def read(folder: Folder) -> Catalogue:
    """Split `test`, one annotator."""
    catalogue, files, name = Catalogue(), Clips(folder), tables.find(folder, "vggss.json")
    entries = tables.read_json(folder, name, list)
    classes = sorted({entry["class"] for entry in entries if isinstance(entry, dict) and "class" in entry})
    catalogue.classes, numbers = tuple(classes), {label: number for number, label in enumerate(classes)}
    for number, entry in enumerate(entries, 1):

        def one():
            if not isinstance(entry, dict) or not {"file", "bbox"} <= entry.keys():
                raise ValueError("an entry needs file and bbox")
            add(
                catalogue,
                files,
                entry["file"],
                [[box(values, 1.0) for values in entry["bbox"]]],
                numbers.get(entry.get("class")),
            )

        tables.guarded(catalogue, name, number, one)
    return catalogue
