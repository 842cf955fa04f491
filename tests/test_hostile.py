"""What people share besides prepared sets: nothing in it is imported or run, and what is wrong is one line."""

import os
import shutil
import sys

import hostile_runs
import numpy as np
import pytest
from tiny_export import made_index, write_checkpoint
from tiny_training import recipe

from av_mae import loading, model_card, search
from av_mae.errors import UserError
from av_mae.evaluate.bootstrap import Report


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("shared") / "run")


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that must not be there at the end, in a folder where `evil` can be imported."""
    path = tmp_path / "canary"
    hostile_runs.write_evil(tmp_path, path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield path
    assert not path.exists() and not any(name.split(".")[-1] == "evil" for name in sys.modules)


def refused(use) -> str:
    with pytest.raises(UserError) as caught:
        use()
    return str(caught.value)


@pytest.mark.parametrize("kind", hostile_runs.CHECKPOINTS)
def test_nothing_that_a_checkpoint_names_is_run(kind, shared_run, canary, tmp_path):
    shutil.copytree(shared_run, tmp_path / "x")
    hostile_runs.CHECKPOINTS[kind](tmp_path / "x", canary)
    assert len(refused(lambda: loading.load("x")).splitlines()) == 1


def searched(folder) -> str:
    """What a search prints, and vectors as written."""
    index = search.Index(folder)
    hits = index.search(np.ones((1, 5), np.float32), "audio", 3)
    index.write_vectors(folder / "vectors.npy", "audio")
    return "\n".join(search.lines(index, hits))


@pytest.mark.parametrize("kind", [*hostile_runs.INDEXES, *hostile_runs.HARMLESS_INDEXES])
def test_nothing_that_an_index_names_is_run(kind, canary, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    made_index(tmp_path / "index", vectors, 100)
    before = searched(tmp_path / "index")
    (hostile_runs.INDEXES | hostile_runs.HARMLESS_INDEXES)[kind](tmp_path / "index", canary)
    if kind in hostile_runs.HARMLESS_INDEXES:
        assert searched(tmp_path / "index") == before
    elif kind == "ids that write to the terminal":
        assert searched(tmp_path / "index").replace("\n", "").isprintable()
    else:
        message = refused(lambda: searched(tmp_path / "index"))
        assert len(message.splitlines()) == 1 and str(tmp_path / "index") in message


@pytest.mark.parametrize("kind", hostile_runs.REGISTRIES)
def test_nothing_that_a_registry_names_is_run(kind, canary, tmp_path, monkeypatch, capsys):
    (tmp_path / "models.toml").write_text(hostile_runs.REGISTRIES[kind])
    monkeypatch.setenv(loading.VARIABLE, os.fspath(tmp_path / "models.toml"))
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit):
        search.run_command(lambda argv: loading.resolve("x"))
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.removesuffix("\n").isprintable()


CARDS = {
    "a list": "[]",
    "no figures": '{"evaluations": {"a": {}}}',
    "evaluations are a list": '{"evaluations": [1]}',
    "depth without end": "[" * 100_000,
    "no text": b"\xff\xfe\x00",
    "numbers are texts": '{"av_mae": 1, "parameters": "many", "evaluations": {}}',
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_that_av_mae_did_not_write_costs_no_evaluation(kind, shared_run, tmp_path, capsys):
    """Cards are read at the end of an evaluation: its results must not be lost by one; the card stays."""
    shutil.copytree(shared_run, tmp_path / "x")
    content = CARDS[kind] if isinstance(CARDS[kind], bytes) else CARDS[kind].encode()
    (tmp_path / "x" / "card.json").write_bytes(content)
    model_card.add_evaluation(str(tmp_path / "x"), tmp_path / "y", "classification", "set", Report({}, 1, 0, ""))
    assert (tmp_path / "x" / "card.json").read_bytes() == content and not (tmp_path / "x" / "README.md").exists()


@pytest.mark.parametrize("name", ["card.json", "README.md"])
def test_a_card_is_not_written_through_a_link(name, shared_run, tmp_path):
    shutil.copytree(shared_run, tmp_path / "x")
    model_card.write_card(tmp_path / "x", recipe(), 5)
    precious = tmp_path / "precious"
    shutil.move(tmp_path / "x" / name, precious)
    (tmp_path / "x" / name).symlink_to(precious)
    before = precious.read_bytes()
    model_card.add_evaluation(str(tmp_path / "x"), tmp_path / "y", "classification", "set", Report({}, 1, 0, ""))
    assert precious.read_bytes() == before and not (tmp_path / "x" / name).is_symlink()
    assert "1 clips (0 skipped)" in (tmp_path / "x" / "README.md").read_text()
