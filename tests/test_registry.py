"""Names for models, and the cards that runs carry."""

import hashlib
import json
import math
import pathlib

import numpy as np
import pytest
from tiny_export import write_checkpoint
from tiny_training import recipe

import av_mae
from av_mae import loading, model_card
from av_mae.errors import UserError
from av_mae.evaluate.bootstrap import Metric, Report
from av_mae.models.kinds import flat_values

ENTRY = '[{name}]\npath = "{path}"\nsha256 = "{sha256}"\nlicence = "CC-BY-4.0"\nfigures = {{"accuracy/joint" = 0.5}}\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "run")


@pytest.fixture
def home(tmp_path, monkeypatch) -> pathlib.Path:
    """The user's own registry, yet to be written; no other."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(loading.VARIABLE, raising=False)
    (tmp_path / "config" / "av_mae").mkdir(parents=True)
    return tmp_path / "config" / "av_mae" / "registry.toml"


def test_load_by_name(run, home, tmp_path, monkeypatch):
    """From the user's file, by a path beside a lab's file, which comes first; what is a path stays one."""
    checksum = loading.checksum(run)
    home.write_text(
        ENTRY.format(name="mine", path=run, sha256=checksum)
        + ENTRY.format(name="both", path="/nowhere", sha256=checksum)
    )
    lab = run.parent / "lab.toml"
    lab.write_text(ENTRY.format(name="both", path="run/checkpoints/0", sha256=checksum))
    monkeypatch.setenv(loading.VARIABLE, str(lab))
    expected = flat_values(av_mae.load(run))
    for name in ("mine", "both"):
        for parameter, x in flat_values(av_mae.load(name)).items():
            np.testing.assert_array_equal(x, expected[parameter])
    assert loading.entries()["both"].licence == "CC-BY-4.0"
    assert loading.entries()["mine"].figures == {"accuracy/joint": 0.5}
    monkeypatch.chdir(run.parent)
    assert loading.resolve("run") == "run"
    with pytest.raises(UserError, match="there is no checkpoint in 'others': .*; registered names are both, mine"):
        av_mae.load("others")


def test_checksums(run, home, tmp_path):
    """That of a file is sha256sum's; that of a checkpoint changes with any of its model's bytes."""
    (tmp_path / "weights.pth").write_bytes(b"weights")
    assert loading.checksum(tmp_path / "weights.pth") == hashlib.sha256(b"weights").hexdigest()
    copy = write_checkpoint(tmp_path / "copy")
    checksum = loading.checksum(copy)
    home.write_text(ENTRY.format(name="copy", path=copy, sha256=checksum))
    assert loading.resolve("copy") == str(copy)
    file = max((copy / "checkpoints" / "0" / "model").rglob("*"), key=lambda path: path.stat().st_size)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=f"copy: .* is not the model that was registered: its sha256 is (?!{checksum})"):
        av_mae.load("copy")


@pytest.mark.parametrize(
    "text,message",
    [
        ("[a\n", "registry .*registry.toml cannot be read"),
        ("a = 1\n", r"\[a\] needs path, sha256 and licence \(text\).*wrong: path, sha256, licence"),
        ('[a]\npath = "x"\nsha256 = "y"\nlicence = 3\nlicense = "z"\n', "wrong: licence, license"),
    ],
)
def test_registries_that_cannot_be_read(home, text, message):
    home.write_text(text)
    with pytest.raises(UserError, match=message):
        av_mae.load("a")


def test_a_registry_that_is_not_there(home, monkeypatch):
    monkeypatch.setenv(loading.VARIABLE, "/nowhere/lab.toml")
    with pytest.raises(UserError, match="AV_MAE_REGISTRY names /nowhere/lab.toml, which is not there"):
        av_mae.load("a")


def test_card_of_a_run_and_its_evaluations(tmp_path, home):
    """Recipe, last metrics, checksum; figures of evaluations; the licence that its owner writes stays."""
    workdir = write_checkpoint(tmp_path / "run")
    (workdir / "metrics.jsonl").write_text('{"step": 19, "loss": 2.0}\n{"step": 20, "loss": 0.5, "grad_norm": 1.0}\n')
    model_card.write_card(workdir, recipe(), 12_345_678)
    card = json.loads((workdir / "card.json").read_text())
    assert card["training"] == {"loss": 0.5} and card["config"]["model"]["fusion"]["tokens"] == [2, 1, 1]
    assert card["sha256"] == loading.checksum(workdir) and card["checkpoint"] == "checkpoints/0"
    (workdir / "card.json").write_text(json.dumps(card | {"licence": "MIT"}))
    undefined = Metric(math.nan, math.nan, math.nan)
    report = Report({"iou": Metric(0.5, 0.25, 0.75), "auc": undefined}, 30, 2, "")
    model_card.add_evaluation(str(workdir / "checkpoints"), tmp_path / "seg", "segmentation", "data/scene", report)
    model_card.write_card(workdir, recipe(), 12_345_678)
    text = (workdir / "README.md").read_text()
    for part in (
        "12.3 million parameters; licence: MIT",
        "| image | 32×48 | 16 | 32 | 1 | 2 | 0.5 |",
        "Fusion `factorized`, tokens [2, 1, 1]",
        "20 steps of 16 clips",
        "| loss | 0.5 |",
        "## Segmentation on `data/scene`",
        "30 clips (2 skipped)",
        "| iou | 0.5 | 0.25 | 0.75 |",
        "| auc | – | – | – |",
        f'sha256 = "{card["sha256"]}"',
    ):
        assert part in text
    (workdir / "README.md").write_text("My own words.")
    model_card.write_card(workdir, recipe(), 12_345_678)
    assert (workdir / "README.md").read_text() == "My own words."


def test_no_card_no_figures(run, tmp_path, capsys):
    """A run without a card is left alone; one that cannot be written is told."""
    report = Report({"iou": Metric(0.5, 0.25, 0.75)}, 1, 0, "")
    model_card.add_evaluation(str(run), tmp_path, "segmentation", "data", report)
    assert not (run / "card.json").exists()
    (run / "card.json").mkdir()
    model_card.write_card(run, recipe(), 1)
    assert "warning: the model card in" in capsys.readouterr().err
    (run / "card.json").rmdir()
