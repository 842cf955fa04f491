"""The table of pretrainings: its cells, means over seeds, what fails, what is there already; the shipped recipe."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_tasks import prepared, pretrained

from av_mae import plots, recipes
from av_mae.errors import UserError
from av_mae.evaluate import __main__ as evaluate
from av_mae.evaluate import compare
from av_mae.evaluate.bootstrap import Metric, Report
from av_mae.evaluate.compare import CompareConfig, ComparedRow, ComparedTask
from av_mae.train import run
from av_mae.train import sharding as mesh

PROBE = ComparedTask(
    "classification",
    "configs/classification.py:demo",
    "single",
    ("accuracy/image", "accuracy/fusion", "accuracy/joint"),
    ("steps=2", "batch_size=8", "bootstrap=100", "test_batch_size=8", "pictures=0"),
)
MASK = ComparedTask("segmentation", "configs/segmentation.py:demo", "nothing", ("iou",), ("steps=2",))
ROWS = (
    ComparedRow("random", "early", random_weights=True),
    ComparedRow("early fusion", "early"),
    ComparedRow("late fusion", "early", tasks=("classification",), overrides=("head.concatenate=True",)),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    pretrained(folder / "early")
    prepared(folder, "single")
    return folder


def config(runs, **changes) -> CompareConfig:
    return CompareConfig(**{"runs": str(runs), "seeds": (3, 5), "rows": ROWS, "tasks": (PROBE,)} | changes)


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Evaluations give metrics that depend on recipe and seed, and are listed here."""
    calls = []

    def run(config, workdir):
        calls.append("/".join(workdir.parts[-3:]))
        if config.task == "segmentation":
            raise UserError("no such set")
        value = config.seed / 10 + config.random_weights
        metrics = {"accuracy/joint": Metric(value, value - 0.2, value + 0.1), "other": Metric(9, 9, 9)}
        if not config.head.concatenate:
            undefined = float("nan")
            metrics["accuracy/image"] = Metric(undefined, undefined, undefined, {"no label": 1})
        identity = compare.task_run.identity(compare.find_checkpoint(config.init))
        return Report(metrics, 21, 1, "", {"config": recipes.to_dict(config), "checkpoint": identity})

    monkeypatch.setattr(compare.task_run, "run", run)
    return calls


def test_cells_become_rows(runs, measured, tmp_path):
    report = compare.run(config(runs, tasks=(PROBE, MASK)), tmp_path)
    folders = [
        "random/classification",
        "early_fusion/classification",
        "late_fusion/classification",
        "random/segmentation",
        "early_fusion/segmentation",
    ]
    assert measured == [f"{folder}/{seed}" for seed in (3, 5) for folder in folders]
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[0] == (
        "| pretraining | classification: accuracy/image | classification: accuracy/fusion "
        "| classification: accuracy/joint | segmentation: iou |"
    )
    assert lines[2] == "| random | – | – | 1.400 ± 0.141 | – |"
    assert lines[3] == "| early fusion | – | – | 0.400 ± 0.141 | – |"
    assert "Mean ± standard deviation over seeds 3, 5." in lines
    assert "- failed: early_fusion/segmentation/5: no such set" in lines
    joint = report.metrics["random/classification/accuracy/joint"]
    np.testing.assert_allclose([joint.value, joint.low, joint.high], [1.4, 1.1, 1.6])
    results = report.to_json()
    assert results["clips"] == 6 * 21 and results["skipped"] == 6 and len(results["failed"]) == 4
    np.testing.assert_allclose(results["seeds"]["early fusion/classification/accuracy/joint"]["values"], [0.3, 0.5])
    assert results["checkpoints"]["late fusion"]["step"] == 0
    json.dumps(results, allow_nan=False)
    assert np.asarray(Image.open(tmp_path / "comparison.png")).std() > 5


def test_what_is_measured_is_not_measured_again(runs, measured, tmp_path):
    first = compare.run(config(runs), tmp_path).table
    (tmp_path / "early_fusion" / "classification" / "5" / "results.json").unlink()
    older = tmp_path / "random" / "classification" / "5" / "results.json"  # of a program without one of the keys
    older.write_text(older.read_text().replace('"layer_decay": 1.0,', ""))
    measured.clear()
    assert compare.run(config(runs), tmp_path).table == first
    assert measured == ["early_fusion/classification/5"]


def test_results_of_another_recipe_are_no_results_of_this_one(runs, measured, tmp_path):
    compare.run(config(runs, seeds=(3,)), tmp_path)
    path = tmp_path / "random" / "classification" / "3" / "results.json"
    path.write_text(path.read_text().replace('"steps": 2,', '"steps": 9,'))
    report = compare.run(config(runs, seeds=(3,)), tmp_path)
    (reason,) = report.details["failed"].values()
    assert "holds the results of another evaluation: config.steps is 9 in it and 2 now" in reason
    assert "seed 3 alone." in report.table and "| early fusion | – | – | 0.300 |" in report.table
    table = compare.run(config(runs), tmp_path).table
    assert "| random | – | – | 1.500 (1 of 2 seeds) |" in table and "| early fusion | – | – | 0.400 ± 0.141 |" in table


def test_what_cannot_work_is_refused_before_anything_is_measured(runs, measured, tmp_path):
    missing = ComparedRow("unimodal", "none", "python -m av_mae.train --workdir=runs/none")
    with pytest.raises(UserError, match="'unimodal' needs a checkpoint in .*none, there is none; make it with: python"):
        compare.run(config(runs, rows=(*ROWS, missing)), tmp_path)
    assert not measured
    with pytest.raises(UserError, match=r"row 'x' has tasks=\('sound',\); the table has \['classification'\]"):
        config(runs, rows=(ComparedRow("x", "early", tasks=("sound",)),))
    with pytest.raises(UserError, match="seeds must have different names, got"):
        config(runs, seeds=(1, 1))
    with pytest.raises(UserError, match="at least one seed"):
        config(runs, seeds=())


@pytest.mark.parametrize("variant, rows, cells", [("demo", 5, 15), ("tasks", 4, 8)])
def test_the_shipped_recipe_has_recipes_for_every_cell(variant, rows, cells):
    table = recipes.load_recipe(f"configs/compare.py:{variant}", ["--config.runs=/data"], evaluate.kind_of)
    found = list(compare.cells(table))
    assert len(table.rows) == rows and len(found) == cells
    for cell in found:
        made = cell.config(pathlib.Path(table.runs))
        assert made.init == f"/data/{cell.row.checkpoint}" and made.data.path == f"/data/{cell.task.data}"
        assert made.seed == cell.seed and made.random_weights == (cell.row.name == "random")
        assert "runs/" + cell.row.checkpoint in cell.row.command or cell.row.command == "bash launch/demo.sh"
        assert getattr(made.head, "concatenate", False) == (cell.row.name == "late fusion")


def test_bars():
    panels = {"a": {"x": [(1.0, 0.1), None], "y": [(0.5, float("nan")), (2.0, 0.3)]}, "b": {"z": [None, None]}}
    plot = plots.bars(panels, ["one", "two"])
    assert plot.dtype == np.uint8 and plot.ndim == 3
    colours = {tuple(colour) for colour in plot.reshape(-1, 3)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours
    other = plots.bars(panels | {"b": {"z": [None, (1.0, 0.0)]}}, ["one", "two"])
    assert (plot != other).any()


@pytest.mark.slow
def test_real_cells(runs, tmp_path, monkeypatch):
    """The same head from the same checkpoint as `evaluate` alone gives; and late fusion."""
    monkeypatch.setattr(run, "make_mesh", lambda config: mesh.make_mesh(config, jax.devices()[:1]))
    report = compare.run(config(runs, seeds=(3,)), tmp_path)
    assert not report.details["failed"]
    for name in ("early_fusion", "late_fusion"):
        results = json.loads((tmp_path / name / "classification" / "3" / "results.json").read_text())
        label = name.replace("_", " ")
        assert report.metrics[f"{label}/classification/accuracy/joint"].value == results["accuracy/joint"]["value"]
        assert ("accuracy/fusion" in results) == (name == "early_fusion")
