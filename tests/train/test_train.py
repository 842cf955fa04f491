"""The train command in this process: what it refuses, and the state it begins with."""

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import first_parameters, make_step, recipe, unfused
from tiny_training import first_state as state_zero
from train_processes import RECIPE

from av_mae import checkpoint, recipes, workdir
from av_mae.errors import UserError, run_command
from av_mae.train import __main__ as train
from av_mae.train import run


@pytest.fixture
def command(tmp_path):
    """Runs the command on a tiny recipe whose data are not there."""
    config = tmp_path / "tiny.py"
    config.write_text(RECIPE.format(path=str(tmp_path / "nothing")))

    def run(*options, workdir=tmp_path / "run"):
        train.main([f"--config={config}", f"--workdir={workdir}", *options])

    return run


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "nothing"),  # the data's folder is named
        (["--config.data.path="], "data.path must name at least one prepared set"),
        (
            ["--config.batch_size=12"],
            r"batch_size=12 must be a multiple of data × fsdp × grad_accumulation = 8 × 1 × 1",
        ),
        (["--config.mesh.data=3"], "mesh.data=3, mesh.fsdp=1, mesh.tensor=1 makes 3, there are 8 devices"),
        (["--config.mesh.tensor=3"], "must divide the 8 devices, got .*mesh.tensor=3"),
        (["--config.model.image.mask_ratio=1.5"], "mask_ratio=1.5 must be between 0 and 1"),
        (["--config.model.audio.mask_ratio=0"], r"mask_ratio=0(\.0)? must be between 0 and 1"),
        (["--config.epochs=3", "--config.steps=120"], "exactly one of steps=120 and epochs=3.0"),
        (["--config.chekpoint_every=3"], "did you mean 'checkpoint_every'"),
        (["--process_id=1"], "need a coordinator"),
    ],
)
def test_refused_in_one_message(command, options, message):
    with pytest.raises(UserError, match=message):
        command(*options)


def test_workdir_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --workdir=.*file/run: Not a directory"):
        command(workdir=tmp_path / "file" / "run")


def test_workdir_without_permission(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(workdir.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match="cannot write to --workdir=.*: Permission denied; name a folder"):
        workdir.make_workdir(str(tmp_path))


def test_a_refusal_is_one_line_and_a_status(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["train", "--config=configs/demo.py", f"--workdir={tmp_path}", "--config.data.path=/nowhere/at/all"]
    )
    with pytest.raises(SystemExit) as ended:
        run_command(train.main)
    shown = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(shown) == 1 and shown[0].startswith("error: ") and "/nowhere" in shown[0]


def test_help_shows_options_and_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "--workdir" in shown and "python -m av_mae.train --config=" in shown


def first_state(step, checkpoints, config):
    """As the command begins."""
    return run.first_state(step, checkpoints, config, lambda: train.first_weights(step, config))


def saved_run(workdir, config, step, params=None):
    """A workdir with one checkpoint."""
    train_step = make_step(config)
    state = state_zero(train_step)
    if params is not None:
        state = dataclasses.replace(state, params=params(state.params))
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    checkpoints.save(step, state, config, position=step * config.batch_size, skipped=5)
    checkpoints.wait()
    return train_step, checkpoints


def test_order_own_checkpoint_then_init_then_random(tmp_path):
    config = recipe(unfused())
    twice = {name: jnp.asarray(2 * x) for name, x in first_parameters(config.model).items()}
    other, _ = saved_run(tmp_path / "other", config, 3, params=lambda _: twice)
    with_init = dataclasses.replace(config, init=str(tmp_path / "other"))
    empty = checkpoint.Checkpoints(tmp_path / "new" / "checkpoints")
    random = first_state(other, empty, config)
    started = first_state(other, empty, with_init)
    for begin, factor in ((random, 1), (started, 2)):
        assert begin.meta == {"step": 0, "position": 0, "skipped": 0} and int(begin.state.step) == 0
        for name, x in twice.items():
            np.testing.assert_array_equal(begin.state.params[name], x * (factor / 2), err_msg=name)
    own, checkpoints = saved_run(tmp_path / "own", with_init, 7)
    resumed = first_state(own, checkpoints, with_init)
    assert int(resumed.state.step) == 7 and resumed.meta["skipped"] == 5
    assert resumed.meta["position"] == 7 * config.batch_size
    assert jax.tree.structure(resumed.state) == jax.tree.structure(own.abstract_state())


def test_another_batch_size_must_fit_the_position(tmp_path):
    smaller, larger = (recipe(unfused(), batch_size=size) for size in (12, 32))
    _, checkpoints = saved_run(tmp_path, recipe(unfused()), 3)
    first_state(make_step(smaller), checkpoints, smaller)
    with pytest.raises(UserError, match="batch_size=32 must divide the position .* 48 clips"):
        first_state(make_step(larger), checkpoints, larger)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    config = recipe(unfused())
    _, checkpoints = saved_run(tmp_path, config, 3)
    wider = dataclasses.replace(config.model, decoder=dataclasses.replace(config.model.decoder, width=64))
    other = dataclasses.replace(config, model=wider)
    with pytest.raises(UserError, match="model.decoder.width is 32 in it and 64 in the recipe"):
        first_state(make_step(other), checkpoints, other)
    other = dataclasses.replace(other, init=str(tmp_path))
    with pytest.raises(UserError, match=r"parameter .*decoder.* is \(32, 128\)|parameter .* is .* in it"):
        first_state(make_step(other), checkpoint.Checkpoints(tmp_path / "new"), other)


def test_config_json_is_read_back(tmp_path):
    config = recipe()
    recipes.save(config, tmp_path / "config.json")
    assert recipes.load(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 16


def test_finished_run_says_so_and_changes_nothing(tmp_path, monkeypatch, capsys):
    config = recipe(unfused(), steps=3)
    saved_run(tmp_path, config, 3)
    monkeypatch.setattr(run, "open_training_data", lambda *_: contextlib.nullcontext(SimpleNamespace(clips=9)))
    train.run(config, tmp_path)
    assert "this run is finished: it has done 3 of 3 steps" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.json"]
