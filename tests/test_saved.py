"""What an earlier version wrote (tests/data/saved) still opens, holds the same, and goes on."""

import json

import numpy as np
import pytest
import saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved.unpack(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("name", saved.MODELS)
def test_a_checkpoint_gives_the_same_outputs(folder, name):
    found, (arrays, told) = saved.outputs(folder, name), saved.expected()
    wanted = {key.removeprefix(f"{name}/"): x for key, x in arrays.items() if key.startswith(f"{name}/")}
    assert found.keys() == wanted.keys() and len(found) > 4
    for key, x in wanted.items():
        assert x.std() > 1e-3, key
        np.testing.assert_allclose(found[key], x, rtol=0, atol=1e-5, err_msg=key)
    assert saved.sound_settings(folder, name) == told["sound"]


@pytest.mark.parametrize("name, split", saved.SPLITS)
def test_a_prepared_set_holds_the_same_records(folder, name, split):
    """Fields may be added."""
    found, wanted = saved.records(folder, name, split), saved.expected()[1]["records"][f"{name}:{split}"]
    assert (found["ids"], found["labels"]) == (wanted["ids"], wanted["labels"])
    assert {key: found["first"][key] for key in wanted["first"]} == wanted["first"]


def test_a_report_names_what_failed(folder):
    report = json.loads((folder / "folder" / "report.json").read_text())
    assert report["splits"]["train"]["stored"] == 1 and report["causes"]["undecodable"] == 1
    assert "horn-two" in (folder / "folder" / "report.html").read_text()


def test_embeddings_hold_the_same_rows(folder):
    found, arrays = saved.table(folder), saved.expected()[0]
    wanted = {key.removeprefix("table/"): x for key, x in arrays.items() if key.startswith("table/")}
    assert found.keys() == wanted.keys() and len(wanted["id"]) == 3
    for key, x in wanted.items():
        np.testing.assert_array_equal(found[key], x, err_msg=key)


@pytest.mark.parametrize("stream", saved.STREAMS)
def test_embeddings_are_searched_alike(folder, stream):
    (hits, rows), (arrays, told) = saved.search(folder, stream), saved.expected()
    np.testing.assert_array_equal(hits["row"], arrays[f"search/{stream}/row"])
    np.testing.assert_allclose(hits["similarity"], arrays[f"search/{stream}/similarity"], atol=1e-6)
    assert rows == told["rows"]


def test_embeddings_are_those_of_the_checkpoint(folder, tmp_path):
    """Exported anew, after which the same command on the old folder finds nothing to do."""
    arguments = (
        "--checkpoint=pretraining",
        "--data=toy_band:train",
        "--shard_clips=2",
        "--batch_size=2",
        "--workers=0",
    )
    saved.run(folder, "export", *arguments, f"--output={tmp_path}/embeddings")
    found, wanted = saved.table(tmp_path), saved.table(folder)
    for key, x in wanted.items():
        if key in saved.STREAMS:
            np.testing.assert_allclose(found[key], x, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(found[key], x, err_msg=key)
    paths = sorted((folder / "embeddings" / "embeddings").iterdir())
    times = [path.stat().st_mtime_ns for path in paths]
    saved.run(folder, "export", *arguments, "--output=embeddings")
    assert [path.stat().st_mtime_ns for path in paths] == times


def test_a_pretraining_goes_on(tmp_path):
    """One step from its checkpoint, with the optimizer's state and the place in the data."""
    folder = saved.unpack(tmp_path)
    said, found = saved.resume(folder)
    wanted = saved.expected()[1]["resumed"]
    assert "checkpoint 4" in said or "step 4" in said
    assert [line["step"] for line in saved.read_metrics(folder / "pretraining")] == [1, 2, 3, 4, 5]
    assert found == pytest.approx(wanted, rel=1e-4) and found["step"] == 5
    assert (folder / "pretraining" / "checkpoints" / "5").is_dir()


def test_an_evaluation_goes_on_from_its_checkpoint(tmp_path):
    """A finished head is not trained again; its figures are the same."""
    folder = saved.unpack(tmp_path)
    saved.move(folder)
    results = folder / "classification" / "results.json"
    wanted = json.loads(results.read_text())
    results.unlink()
    recipe = folder / "recipe.py"
    recipe.write_text(saved.RECIPE.format(path=str(folder / "classification" / "config.json")))
    saved.run(folder, "evaluate", f"--config={recipe}", "--workdir=classification")
    found = json.loads(results.read_text())
    metrics = {name: metric for name, metric in wanted.items() if isinstance(metric, dict) and "value" in metric}
    assert len(metrics) > 10
    for name, metric in metrics.items():
        for key in ("value", "low", "high"):
            assert found[name][key] == pytest.approx(metric[key], abs=1e-6), name
    assert [line["step"] for line in saved.read_metrics(folder / "classification")] == [1, 2, 3, 4]
