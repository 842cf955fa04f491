"""GRID: spoken sentences of six words, whose file names spell them.

Videos of any ending in folders s1 … s34 (at any depth) or in none: a name such as brbk7n is 'bin red by k seven now'.
"""

import re

from av_mae.errors import UserError
from av_mae.media.files import MEDIA, SOUNDS, ending, stem
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip
from av_mae.storage import Folder

DESCRIPTION = "GRID (Cooke et al., JASA 2006): 34 speakers read sentences of six words to a camera."
LICENCE = "CC BY 4.0"
WORDS = (
    ("command", {"b": "bin", "l": "lay", "p": "place", "s": "set"}),
    ("colour", {"b": "blue", "g": "green", "r": "red", "w": "white"}),
    ("preposition", {"a": "at", "b": "by", "i": "in", "w": "with"}),
    ("letter", {letter: letter for letter in "abcdefghijklmnopqrstuvxyz"}),
    ("digit", dict(zip("z123456789", "zero one two three four five six seven eight nine".split()))),
    ("adverb", {"a": "again", "n": "now", "p": "please", "s": "soon"}),
)
CLASSES = tuple(f"{kind} {word}" for kind, words in WORDS for word in words.values())
HELD_OUT = ("s1", "s2", "s20", "s22")  # speakers for testing, as in LipNet (Assael et al., 2016)


def read(folder: Folder) -> Catalogue:
    """One label per word, in the order of the sentence. Split `test` holds the speakers HELD_OUT, `train` all else."""
    catalogue, numbers = Catalogue(CLASSES), {name: number for number, name in enumerate(CLASSES)}
    names = [name for name in folder.files() if ending(name) in MEDIA - SOUNDS]
    if not names:
        raise UserError(f"{folder} holds no video")
    for name in names:
        speaker = next((part for part in name.lower().split("/")[:-1] if re.fullmatch(r"s\d+", part)), "")
        sentence = stem(name).lower()
        words = [words.get(letter) for (_, words), letter in zip(WORDS, sentence)]
        clip = f"{speaker}_{sentence}" if speaker else sentence
        if len(sentence) != len(WORDS) or None in words:
            catalogue.note("bad_row", clip, "annotations", f"{name}: {sentence!r} spells no sentence of GRID")
            continue
        labels = tuple(numbers[f"{kind} {word}"] for (kind, _), word in zip(WORDS, words))
        catalogue.clips.append(
            SourceClip(clip, "test" if speaker in HELD_OUT else "train", name, labels=labels, source=clip)
        )
    return catalogue
