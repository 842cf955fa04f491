"""What the README tells to type works: commands exist, their options and recipes are known, the Python runs."""

import dataclasses
import pathlib
import re
import shlex
import shutil
import subprocess

import jax
import pytest
import typed_commands
from typed_commands import MODULES

from av_mae import convert, recipes
from av_mae.errors import UserError
from av_mae.evaluate import __main__ as evaluate
from av_mae.evaluate import compare
from av_mae.train import run
from av_mae.train import sharding as mesh

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("module", MODULES)
def test_every_command_has_help_with_an_example(module, capsys):
    text = typed_commands.help_of(module, capsys)
    assert "usage: python -m av_mae." + module in text
    assert re.search(rf"examples?:\s+python -m av_mae\.{module} ", text)


def test_the_readme_has_commands():
    assert COMMANDS[:2] == ["bash launch/demo.sh", "bash launch/test.sh"]
    assert {word for line in COMMANDS for word in MODULES if f"av_mae.{word}" in line} == set(MODULES)


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("bash")])
def test_scripts_are_there(command):
    assert (ROOT / command.split()[1]).is_file()


@pytest.mark.parametrize("command", [line for line in COMMANDS if "--dry-run" in line])
def test_launchers_print_what_they_would_run(command, tmp_path):
    done = subprocess.run(
        command.replace("launch/", f"{ROOT}/launch/"),
        shell=True,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=60,
    )
    train = command.partition(" -- ")[2].split()
    assert done.returncode == 0 and not done.stderr
    assert all(word in done.stdout for word in train) and not list(tmp_path.iterdir())
    (spec,) = [word.partition("=")[2] for word in train if word.startswith("--config=")]
    recipes.load_recipe(spec)


@pytest.mark.parametrize("command", [line for line in COMMANDS if "av_mae." in line])
def test_commands_fit(command, capsys):
    typed_commands.check(command, capsys)


def test_evaluate_in_the_readme_needs_its_checkpoint(tmp_path):
    command = next(shlex.split(line) for line in COMMANDS if "av_mae.evaluate" in line)
    arguments = [word for word in command[3:] if not word.startswith(("--workdir", "--config.init"))]
    with pytest.raises(UserError, match="there is no checkpoint in"):
        evaluate.main([*arguments, f"--workdir={tmp_path}", f"--config.init={tmp_path / 'none'}"])


def test_python_runs(capsys):
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    assert "'fusion': (1, 128)" in capsys.readouterr().out


def test_files_that_the_readme_names_are_there():
    for path in re.findall(r"\]\(([\w/.]+)\)", README) + ["LICENSE", "configs/pretrain.py", "launch/requirements.lock"]:
        assert (ROOT / path).exists(), path


# What runs after the README's commands: the pages on exports and weights, and what other pages tell of these runs.
PAGES = [ROOT / "docs" / "howto" / name for name in ("export.md", "weights.md")]
MORE = """python -m av_mae.evaluate --config=configs/reconstruction.py --workdir=runs/small_evaluation \
--config.init=runs/small --config.data.path=runs/demo/data/toy_band
python -m av_mae.inspect runs/demo/data/toy_band --clips=8 --sheet=toy_band.png
python -m av_mae.prepare --dataset=toy_band --output=runs/scene --variant=scene --clips=4000
python -m av_mae.evaluate --config=configs/segmentation.py:demo --workdir=runs/segmentation \
--config.init=runs/demo --config.data.path=runs/scene
python -m av_mae.evaluate --config=configs/neighbours.py:demo --workdir=runs/neighbours
python -m av_mae.evaluate --config=configs/compare.py:demo --workdir=runs/compare
python -m av_mae.benchmark fusion --plot=fusion.png
python -m av_mae.benchmark input --data=runs/demo/data/toy_band --device_rate=500 --workers=2"""


def bash_lines(text: str) -> list[str]:
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


@pytest.mark.slow
def test_commands_run_one_after_the_other(tmp_path, monkeypatch):
    """The README's commands but the scripts, in order, then those of PAGES and MORE, on less data, for fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "make_mesh", lambda config: mesh.make_mesh(config, jax.devices()[:1]))
    cell = compare.Cell.config
    monkeypatch.setattr(
        compare.Cell,
        "config",
        lambda self, runs: dataclasses.replace(cell(self, runs), steps=2, batch_size=8, bootstrap=100),
    )
    typed_commands.run("python -m av_mae.prepare --dataset=toy_band --output=runs/demo/data/toy_band")
    for number, clip in enumerate(sorted(pathlib.Path("runs/demo/data/toy_band/clips/test").glob("*.mp4")), 1):
        target = pathlib.Path("videos", "train" if number < 6 else "test", ("cat", "dog")[number % 2], f"{number}.mp4")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, target)
    rows = recipes.load_recipe("configs/compare.py:demo", [], evaluate.kind_of).rows
    trained = {row.command for row in rows if row.command.startswith("python")}
    for command in ["python -m av_mae.train --config=configs/demo.py --workdir=runs/demo", *sorted(trained)]:
        typed_commands.run(f"{command} --config.data.path=runs/demo/data/toy_band --config.data.weights=None")
    commands = [line for line in COMMANDS if "av_mae." in line] + MORE.splitlines()
    for command in dict.fromkeys([*commands, *(line for page in PAGES for line in bash_lines(page.read_text()))]):
        if (
            "checkpoint_latest.pth" in command and not pathlib.Path("checkpoint_latest.pth").exists()
        ):  # stands for a published file
            convert.main(["--source=runs/small", "--to=safetensors", "--output=checkpoint_latest.pth"])
        typed_commands.run(command)
    for path in (
        "runs/small/metrics.jsonl",
        "runs/small_evaluation/results.json",
        "runs/deepavfusion/config.json",
        "deepavfusion.safetensors",
        "runs/segmentation/results.json",
        "fusion.png",
        "runs/demo/card.json",
        "runs/embeddings/skipped.jsonl",
        "runs/encoder/load_encoder.py",
        "runs/weights/model.safetensors",
        "hits.png",
        "fusion.npy",
        "runs/videos/report.html",
        "runs/classes/images/confusion.png",
        "toy_band.png",
        "videos.png",
        "runs/demo/view.html",
        "runs/neighbours/results.json",
        "runs/compare/comparison.png",
    ):
        assert (tmp_path / path).is_file(), path
    assert (tmp_path / "checkpoint_latest.pth").read_bytes() == (tmp_path / "deepavfusion.safetensors").read_bytes()
