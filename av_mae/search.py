"""`python -m av_mae.search`: the clips of an export that are closest to a clip, by cosine, with a contact sheet.

The search is exact and goes file by file: no more than a block of rows is in memory.
"""

import argparse
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from av_mae import preprocess
from av_mae.console import first_line, note, quiet_libraries
from av_mae.data.copies import LOCAL, copy_set
from av_mae.errors import CHECKPOINT_STORES, ClipFailure, StoreError, UserError, check_numbers, one_line, run_command
from av_mae.evaluate.cosine import Hits, closest, unit
from av_mae.export import tables
from av_mae.export.embeddings import Embedder, model_identity
from av_mae.export.inputs import open_input, split_of
from av_mae.loading import load
from av_mae.plots import gallery, save_png
from av_mae.storage import as_path, is_url, reached

EXAMPLE = """examples:
  python -m av_mae.search --index=embeddings --query=clip.mp4 --modality=audio --top=5
  python -m av_mae.search --index=embeddings --modality=fusion --faiss=fusion.npy
"""
BLOCK = 16384  # rows
MOST_SHARDS = 99_999  # that their names can count
LEAST_SPREAD = 1e-4  # of the largest: what spreads less is noise
ROW_COLUMNS = ("id", "path", "place", "start", "label")
SUFFIXES = (".npy", ".fvecs")
URLS = {"--index": CHECKPOINT_STORES, "--checkpoint": CHECKPOINT_STORES}  # options that take those of stores


class Index:
    """The embeddings of one export. Rows are counted through its files in the order of their names.

    Raises:
      UserError: the folder holds no export, or an unfinished one.
    """

    def __init__(self, folder: pathlib.Path):
        record = tables.read_record(folder)
        if record is None:
            raise UserError(f"--index={folder} holds no embeddings: make them with python -m av_mae.export")
        self.folder, self.settings, self.source = folder, record["settings"], record["source"]
        shards = self._shards()
        paths = [tables.shard_path(folder, shard, shards) for shard in range(shards)]
        unfinished = [path.name for path in paths if not tables.is_finished(path)]
        if unfinished:
            raise UserError(
                f"--index={folder} is not finished: {len(unfinished)} of {shards} files are not there, the "
                f"first is {unfinished[0]}; run its export again"
            )
        self._files = [tables.opened(path) for path in paths]
        self._first = np.cumsum([0] + [file.metadata.num_rows for file in self._files])
        schema = self._files[0].schema_arrow
        kinds = {name: schema.field(name).type for name in schema.names}
        if any(file.schema_arrow != schema for file in self._files):
            raise self._damaged("its tables have different columns")
        if kinds.get("id") != pa.string() or kinds.get("start") != pa.float64() or not self.columns:
            raise self._damaged("its tables lack ids, starts or embeddings")

    def _shards(self) -> int:
        """How many files there must be."""
        clips, shard_clips = (self.settings.get(name) for name in ("clips", "shard_clips"))
        if not (isinstance(clips, int) and isinstance(shard_clips, int) and 0 < clips <= MOST_SHARDS * shard_clips):
            raise self._damaged(f"{clips=!r} and {shard_clips=!r} in {tables.RECORD}")
        return -(-clips // shard_clips)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"--index={self.folder} is damaged ({what}): run its export again")

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def columns(self) -> list[str]:
        """The columns of embeddings that can be searched."""
        return [
            field.name
            for field in self._files[0].schema_arrow
            if pa.types.is_fixed_size_list(field.type) and not pa.types.is_nested(field.type.value_type)
        ]

    def blocks(self, column: str) -> Iterator[np.ndarray]:
        """The rows of a column in order, of length 1: float32 [n, D].

        Raises:
          UserError: there is no such column, or a value is missing or not finite.
        """
        if column not in self.columns:
            raise UserError(f"--modality={column}: {self.folder} has {', '.join(self.columns)}")
        for file in self._files:
            for batch in file.iter_batches(BLOCK, columns=[column]):
                values = batch.column(0)
                if values.null_count:
                    raise self._damaged(f"{column} has rows without a value")
                yield unit(values.flatten().to_numpy().reshape(len(values), values.type.list_size))

    def search(self, queries: np.ndarray, column: str, top: int, whiten: bool = False) -> Hits:
        """The rows closest to each query; of equally close ones the first.

        Args:
          queries: float [q, D].
          column: which embeddings are compared.
          top: how many rows of each query.
          whiten: whether cosines are taken in units of the index's own spread, see `whitening`.
        """
        if column in self.columns:
            size = self._files[0].schema_arrow.field(column).type.list_size
            if size != queries.shape[-1]:
                raise self._damaged(f"{column} has {size} values a row, a query {queries.shape[-1]}")
        change = self.whitening(column) if whiten else unit
        blocks = self.blocks(column)
        return closest(change(queries), map(change, blocks) if whiten else blocks, top)

    def whitening(self, column: str) -> Callable[[np.ndarray], np.ndarray]:
        """A function of rows [n, D] after which the index's rows have mean 0 and about the same spread in all
        directions, and length 1: what all clips share no longer outweighs how they differ."""
        total, products = 0.0, 0.0
        for block in self.blocks(column):
            block = block.astype(np.float64)
            total, products = total + block.sum(0), products + block.T @ block
        mean = total / len(self)
        spread, directions = np.linalg.eigh(products / len(self) - np.outer(mean, mean))
        matrix = directions / np.sqrt(np.maximum(spread, LEAST_SPREAD * spread.max()))
        return lambda rows: unit((unit(rows) - mean) @ matrix)

    def describe(self, row: int) -> dict[str, Any]:
        """id, path, place, start and label (its name where that is known) of a row."""
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        file = self._files[number]
        columns = [name for name in ROW_COLUMNS if name in file.schema_arrow.names]
        found = {
            name: values[0]
            for name, values in file.read(columns).slice(row - int(self._first[number]), 1).to_pydict().items()
        }
        classes, label = self.settings.get("classes"), found.get("label")
        if isinstance(classes, list) and isinstance(label, int) and 0 <= label < len(classes):
            found["label"] = classes[label]
        return found

    def write_vectors(self, path: pathlib.Path, column: str) -> None:
        """All rows of a column, of length 1, as FAISS and others read them: float32 `.npy` [n, D], or `.fvecs` (before
        each row its length as int32). Inner products are cosines. Their ids, a line each, go to `PATH.ids.txt`, control
        characters and line ends as escapes.

        Raises:
          UserError: another suffix, or no such column.
          OSError: the file system refuses.
        """
        if path.suffix not in SUFFIXES:
            raise UserError(f"--faiss={path} must end in {' or '.join(SUFFIXES)}")
        blocks = self.blocks(column)
        first = next(blocks, np.zeros((0, 0), np.float32))
        unfinished = path.with_name(f".{path.name}.unfinished")
        with open(unfinished, "wb") as file:
            if path.suffix == ".npy":
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(self), first.shape[1])}
                np.lib.format.write_array_header_1_0(file, header)
            for block in itertools.chain([first], blocks):
                length = np.full((len(block), 1), block.shape[1], "<i4").view("<f4")
                file.write(block.tobytes() if path.suffix == ".npy" else np.hstack([length, block]).tobytes())
        unfinished.replace(path)
        with open(f"{path}.ids.txt", "w", encoding="utf-8") as file:
            for table in self._files:
                file.writelines(f"{one_line(name)}\n" for name in table.read(["id"])["id"].to_pylist())


def open_model(index: Index, checkpoint: str | None) -> Embedder:
    """The encoder that an index was made with, from `checkpoint` or where it was then.

    Raises:
      UserError: it is not there, or is another one.
    """
    path = checkpoint or index.source["checkpoint"]
    model = load(path)
    if model_identity(model) != index.settings["model"]:
        raise UserError(
            f"{path} is not the encoder that made {index.folder}: name that one with --checkpoint, or make "
            "the embeddings again"
        )
    if index.settings["preprocessing"] != preprocess.VERSION:
        raise UserError(
            f"{index.folder} was made with version {index.settings['preprocessing']} of the preprocessing, "
            f"this is {preprocess.VERSION}: make the embeddings again"
        )
    return Embedder(model)


def embed_query(
    embedder: Embedder, path: str, start: float | None, modality: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The query's embedding [1, D], and its clip as `preprocess.load` gives it; zeros stand for what it lacks.

    Raises:
      UserError: the file cannot be read, or lacks what is searched by.
    """
    shape = embedder.shape()
    clip = preprocess.load(path, start, shape.seconds, sound=shape.sound, image_size=shape.image, missing="zeros")
    for stream in ("image", "audio"):
        if not clip[f"has_{stream}"][0]:
            if modality == stream:
                raise UserError(f"{path} has no {stream} to search by: choose another --modality")
            note(f"{path} has no {stream}: zeros stand for it")
    rows = [np.repeat(clip[name], embedder.devices, axis=0) for name in ("image", "audio")]
    columns = jax.device_get(embedder(*jax.device_put(rows, embedder.rows)))
    if modality not in columns:
        raise UserError(f"--modality={modality} must be one of {', '.join(columns)}")
    return columns[modality][:1], clip


def contact_sheet(
    index: Index, embedder: Embedder, query: dict[str, np.ndarray], hits: Hits, local: str | None
) -> np.ndarray | None:
    """Frames and spectrograms of the query and its hits; None where the index's clips are no longer there.

    local: a folder for the copy of clips that are on a store.
    """
    shape = embedder.shape(index.settings["stride"], index.settings["missing"])
    try:
        copy_set(split_of(index.source["data"])[0], local)
        clips = open_input(index.source["data"], shape)
        if clips.fingerprint() != index.settings["data"]:
            raise UserError(f"{index.source['data']} has changed since")
    except (UserError, StoreError) as error:
        note(f"no contact sheet: {error}")
        return None
    rows, titles = [[query["image"][0], query["audio"][0]]], ["query"]
    for number, (row, similarity) in enumerate(zip(hits.row[0], hits.similarity[0]), 1):
        known = index.describe(int(row))
        try:
            _, image, audio = clips.window(known["place"], known["start"])
        except ClipFailure as failure:
            note(f"{known['id']} cannot be shown: {failure}")
            image, audio = (np.zeros_like(query[name][0]) for name in ("image", "audio"))
        rows.append([image, audio])
        titles.append(f"{number}   {similarity:.3f}   {_label(known)}   {known['id'][-24:]}")
    return gallery(rows, ("frame", "audio"), titles)


def lines(index: Index, hits: Hits) -> list[str]:
    """The hits as text: rank, cosine, id, start and label."""
    found = [index.describe(int(row)) for row in hits.row[0]]
    names = [one_line(row["id"]) for row in found]
    width = max(map(len, names))
    return [
        f"{number:>4}  {similarity:.4f}  {names[number - 1]:<{width}}  {row['start']:8.2f} s  {_label(row)}".rstrip()
        for number, (row, similarity) in enumerate(zip(found, hits.similarity[0]), 1)
    ]


def _label(row: dict) -> str:
    return "" if row.get("label") is None else one_line(str(row["label"]))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.search",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Finds the clips of an export that are closest to a clip, by cosine, exactly.",
    )
    parser.add_argument(
        "--index", required=True, metavar="DIR", help="embeddings that python -m av_mae.export wrote, here or on gs://"
    )
    parser.add_argument("--query", metavar="FILE", help="a media file")
    parser.add_argument(
        "--start", type=float, metavar="SECONDS", help="where the query's window begins (the middle of the file)"
    )
    parser.add_argument(
        "--modality",
        default="fusion",
        metavar="NAME",
        help="audio, image or fusion: which embeddings are compared (%(default)s)",
    )
    parser.add_argument(
        "--whiten",
        action="store_true",
        help="cosines in units of the index's own spread: what all clips share counts less",
    )
    parser.add_argument("--top", type=int, default=10, help="hits (%(default)s)")
    parser.add_argument("--checkpoint", metavar="DIR", help="the encoder, if it is not where it was then")
    parser.add_argument("--local", metavar="DIR", help=f"{LOCAL}, for the contact sheet")
    parser.add_argument(
        "--sheet",
        type=pathlib.Path,
        default=pathlib.Path("hits.png"),
        metavar="FILE",
        help="contact sheet of the hits (%(default)s)",
    )
    parser.add_argument(
        "--faiss",
        type=pathlib.Path,
        metavar="FILE",
        help="write the modality's vectors as float32 .npy or .fvecs, which FAISS reads, and their ids",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Searches, or writes vectors, or both."""
    arguments = parse(argv)
    if arguments.query is None and arguments.faiss is None:
        raise UserError("nothing to do: give --query=FILE, or --faiss=FILE for the vectors")
    check_numbers(arguments, {"top": 1, "start": 0})
    quiet_libraries()
    try:
        with reached(arguments.index):
            search(arguments)
    except StoreError:
        raise
    except pa.ArrowException as error:
        raise UserError(f"--index={arguments.index} is damaged ({first_line(error)}): run its export again") from error
    except OSError as error:
        raise UserError(f"cannot write: {error}; name another file") from error


def search(arguments: argparse.Namespace) -> None:
    """Writes the vectors, prints the hits and draws their contact sheet."""
    index = Index(as_path(arguments.index) if is_url(arguments.index) else pathlib.Path(arguments.index))
    if arguments.faiss:
        index.write_vectors(arguments.faiss, arguments.modality)
        print(f"{arguments.faiss}: {len(index)} vectors, ids in {arguments.faiss}.ids.txt")
    if arguments.query is None:
        return
    embedder = open_model(index, arguments.checkpoint)
    vector, clip = embed_query(embedder, arguments.query, arguments.start, arguments.modality)
    hits = index.search(vector, arguments.modality, arguments.top, arguments.whiten)
    print("\n".join(lines(index, hits)))
    sheet = contact_sheet(index, embedder, clip, hits, arguments.local)
    if sheet is not None:
        save_png(arguments.sheet, sheet)
        print(f"contact sheet: {arguments.sheet}")


if __name__ == "__main__":
    run_command(main, URLS)
