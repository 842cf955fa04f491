"""Search over exported embeddings: exact, whatever the blocks; the clip itself first; vectors as FAISS reads them."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tiny_export import export, made_index, write_checkpoint, write_media, write_set

from av_mae import search
from av_mae.errors import UserError
from av_mae.export import embeddings as embedder
from av_mae.export import tables

NAMES = [f"{letter}.mp4" for letter in "abcdefg"]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        first = embedder.jax.local_devices()[:1]
        patch.setattr(embedder.jax, "local_devices", lambda: first)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The export of seven files in three shards, its checkpoint and the files."""
    folder = tmp_path_factory.mktemp("search")
    checkpoint, media = write_checkpoint(folder / "run"), write_media(folder / "media", NAMES)
    export(checkpoint, media, folder / "index", shard_clips=3)
    return folder / "index", checkpoint, media


@pytest.mark.parametrize("shard_clips,block,dtype", [(11, 4, "float32"), (100, 1000, "float32"), (7, 3, "float16")])
def test_search_is_exact(tmp_path, monkeypatch, shard_clips, block, dtype):
    """Against all cosines at once in float64; equal clips in their order; fewer clips than are asked for."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((37, 5)).astype(dtype)
    vectors[30] = 2 * vectors[4]  # just as close to everything
    vectors[12] = 0
    queries = np.concatenate([random.standard_normal((6, 5)), vectors[[4]]]).astype(np.float32)
    monkeypatch.setattr(search, "BLOCK", block)
    found = made_index(tmp_path / "index", vectors, shard_clips)
    exact = vectors.astype(float) / np.maximum(np.linalg.norm(vectors.astype(float), axis=1, keepdims=True), 1e-12)
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ exact.T
    hits = found.search(queries, "audio", 10)
    np.testing.assert_allclose(hits.similarity, -np.sort(-cosines, axis=1)[:, :10], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(cosines, hits.row, 1), hits.similarity, rtol=0, atol=1e-6)
    assert all(len(set(rows)) == 10 for rows in hits.row.tolist()) and hits.row[-1, :2].tolist() == [4, 30]
    assert found.search(queries, "audio", 100).row.shape == (7, 37) and len(found) == 37


def test_whitened_search(tmp_path):
    """Kinds that differ in a direction of small spread, under one of large spread: only whitening tells them apart."""
    random = np.random.default_rng(0)
    kind = np.arange(200) % 2
    vectors = random.standard_normal((200, 6)) * [0.02, 3, 3, 0.02, 0.02, 0.02] + [0, 0, 0, 9, 0, 0]
    vectors[:, 0] += 0.3 * kind
    found = made_index(tmp_path / "index", vectors.astype(np.float32), 150)
    queries = vectors[:40].astype(np.float32)
    same = {
        whiten: np.mean(kind[found.search(queries, "audio", 20, whiten).row] == kind[:40, None])
        for whiten in (False, True)
    }
    assert same[False] < 0.65 and same[True] > 0.75
    vectors = random.standard_normal((50, 4)).astype(np.float32) * [1, 0.5, 0.7, 0.3] + 0.5
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    white = (rows - rows.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T, bias=True))).T  # another root
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    hits = made_index(tmp_path / "other", vectors, 30).search(vectors[:9], "audio", 5, whiten=True)
    np.testing.assert_allclose(hits.similarity, -np.sort(-(white[:9] @ white.T), axis=1)[:, :5], atol=1e-3)


def test_vectors_for_faiss(tmp_path):
    vectors = np.random.default_rng(1).standard_normal((9, 4)).astype(np.float32)
    found = made_index(tmp_path / "index", vectors, 5)
    wanted = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found.write_vectors(tmp_path / "v.npy", "audio")
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), wanted, rtol=1e-6)
    found.write_vectors(tmp_path / "v.fvecs", "audio")
    raw = np.fromfile(tmp_path / "v.fvecs", np.int32).reshape(-1, 5)
    assert (raw[:, 0] == 4).all()
    np.testing.assert_allclose(raw[:, 1:].view(np.float32), wanted, rtol=1e-6)
    assert (tmp_path / "v.npy.ids.txt").read_text().split() == [f"clip{position}" for position in range(9)]
    with pytest.raises(UserError, match="--faiss=.*v.bin must end in .npy or .fvecs"):
        found.write_vectors(tmp_path / "v.bin", "audio")


@pytest.mark.parametrize("modality", ["image", "audio", "fusion"])
def test_a_clip_finds_itself_first(exported, modality, tmp_path, capsys):
    folder, _, media = exported
    for name in NAMES[::3]:
        search.main(
            [
                f"--index={folder}",
                f"--query={media / name}",
                f"--modality={modality}",
                "--top=3",
                f"--sheet={tmp_path / 'hits.png'}",
            ]
        )
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 4 and said[0].split()[:3] == ["1", "1.0000", name]
    plot = np.asarray(Image.open(tmp_path / "hits.png"))
    assert plot.shape[0] > plot.shape[1] and plot.std() > 10


def test_hits_of_a_prepared_set_have_class_names(exported, tmp_path, capsys):
    _, checkpoint, media = exported
    clips = write_set(tmp_path / "set", 3)
    export(checkpoint, f"{clips}:test", tmp_path / "index", stride=0.4)
    search.main([f"--index={tmp_path / 'index'}", f"--query={media / 'a.mp4'}", f"--sheet={tmp_path / 'hits.png'}"])
    said = [line.split() for line in capsys.readouterr().out.splitlines()[:-1]]
    assert len(said) == 9 and {(line[2], line[-1]) for line in said} == {("c-0", "s"), ("c-1", "even"), ("c-2", "odd")}
    assert sorted({float(line[3]) for line in said}) == [0.0, 0.4, 0.8]


def test_queries_that_lack_something(exported, shared, tmp_path, capsys):
    folder = exported[0]
    arguments = [f"--index={folder}", f"--sheet={tmp_path / 'hits.png'}", "--top=1"]
    silent = shared / "media" / "broken" / "sample_video_only.mp4"
    search.main([*arguments, f"--query={silent}", "--modality=image"])
    assert "has no audio: zeros stand for it" in capsys.readouterr().err
    for more, message in (
        ([f"--query={silent}", "--modality=audio"], "has no audio to search by"),
        (["--query=none.mp4"], "there is no such file"),
        ([f"--query={exported[2] / 'a.mp4'}", "--modality=taste"], "--modality=taste must be one of"),
        ([], "nothing to do"),
        (["--query=x", "--top=0"], "--top=0 must be at least 1"),
        (["--query=x", "--start=nan"], "--start=nan must be at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            search.main([*arguments, *more])


def test_indexes_that_do_not_fit(exported, tmp_path, capsys):
    folder, checkpoint, media = exported
    query = f"--query={media / 'a.mp4'}"
    with pytest.raises(UserError, match="holds no embeddings: make them with python -m av_mae.export"):
        search.main([f"--index={tmp_path}", query])
    other = write_checkpoint(tmp_path / "run", change=0.5)
    with pytest.raises(UserError, match="is not the encoder that made"):
        search.main([f"--index={folder}", query, f"--checkpoint={other}"])
    for path in folder.rglob("*"):
        if path.is_file():
            copy = tmp_path / "copy" / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "copy" / "export.json").read_text())
    record["source"]["data"] = str(tmp_path / "moved")
    (tmp_path / "copy" / "export.json").write_text(json.dumps(record))
    search.main([f"--index={tmp_path / 'copy'}", query, f"--checkpoint={checkpoint}"])
    said = capsys.readouterr()
    assert "no contact sheet: --data=" in said.err and len(said.out.splitlines()) == len(NAMES)
    tables.shard_path(tmp_path / "copy", 1, 3).unlink()
    with pytest.raises(UserError, match="is not finished: 1 of 3 files are not there, the first is 00001-of-00003"):
        search.main([f"--index={tmp_path / 'copy'}", query])


def test_ids_of_any_name_are_a_line_each(tmp_path):
    index = made_index(tmp_path / "index", np.eye(3, 4, dtype=np.float32), 5)
    names = ["new\nline", "back\u2028ward\x1b[2J", "plain\u00a0ü"]
    index._files[0].close()
    rows = pyarrow.parquet.read_table(next((tmp_path / "index").rglob("*.parquet")))
    rows = rows.set_column(rows.column_names.index("id"), "id", pyarrow.array(names))
    pyarrow.parquet.write_table(rows, tmp_path / "named.parquet")
    index._files = [pyarrow.parquet.ParquetFile(tmp_path / "named.parquet")]
    index.write_vectors(tmp_path / "v.npy", "audio")
    lines = (tmp_path / "v.npy.ids.txt").read_text(encoding="utf-8").split("\n")
    assert lines == [r"new\nline", r"back\u2028ward\x1b[2J", "plain\u00a0ü", ""]
