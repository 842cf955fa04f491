"""Commands as pages tell to type them: whether they fit the code, and running them in this process, made short."""

import importlib
import importlib.util
import pathlib
import re
import shlex

import pytest

from av_mae import recipes
from av_mae.config import TrainConfig
from av_mae.evaluate import __main__ as evaluate

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = [*(ROOT / "av_mae").glob("*.py"), *(ROOT / "av_mae").glob("*/__main__.py")]
MODULES = sorted(
    path.parent.name if path.stem == "__main__" else path.stem
    for path in FILES
    if re.search(r"^    run_command\(main", path.read_text(), re.M)
)
KINDS = {"train": TrainConfig, "evaluate": evaluate.kind_of, "benchmark": TrainConfig}

# What makes commands short enough for a test, by command.
SHORTER = {
    "prepare": ["--clips=12", "--test_clips=9", "--workers=1"],
    "train": [
        "--config.epochs=0",
        "--config.steps=2",
        "--config.batch_size=8",
        "--config.data.workers=0",
        "--config.model.image.depth=1",
        "--config.model.audio.depth=1",
        "--config.model.decoder.depth=1",
    ],
    "evaluate": ["--config.bootstrap=100"],
    "benchmark": ["--rounds=1"],
}
SHORTER_TASK = ["--config.steps=2", "--config.batch_size=8", "--config.head.width=8"]
SHORTER_STEP = ["--config.model.image.depth=1", "--config.model.audio.depth=1", "--config.model.decoder.depth=1"]


def command_main(module: str):
    """The function that `python -m av_mae.MODULE` runs."""
    name = f"av_mae.{module}"
    package = importlib.util.find_spec(name).submodule_search_locations is not None
    return importlib.import_module(f"{name}.__main__" if package else name).main


def help_of(module: str, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        command_main(module)([*arguments, "--help"])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def check(command: str, capsys) -> None:
    """Options are in the command's help; recipes load with the given values."""
    python, dash_m, name, *arguments = shlex.split(command)
    module = name.removeprefix("av_mae.")
    assert (python, dash_m) == ("python", "-m") and module in MODULES
    text = help_of(module, capsys, *[word for word in arguments[:1] if not word.startswith("-")])
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    for option in options:
        assert option.startswith("--config.") or re.search(rf"{option}\b", text)
    spec = [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    if spec:
        recipes.load_recipe(spec[0], [word for word in arguments if word.startswith("--config.")], KINDS[module])


def run(command: str) -> None:
    """Runs a command with its own options and those that make it short; only sets that are made take `--clips`."""
    name, *arguments = shlex.split(command)[2:]
    module = name.removeprefix("av_mae.")
    more = SHORTER.get(module, [])
    if module == "prepare" and "--dataset=folder" in arguments:
        more = ["--workers=1"]
    if "configs/segmentation.py:demo" in command:
        more = more + SHORTER_TASK
    if "configs/classification.py:folder" in command:
        more = more + SHORTER_TASK[:2]
    if "configs/compare.py" in command:
        more = ["--config.seeds=(0,)"]
    if arguments[0] == "step":
        more = more + SHORTER_STEP
    arguments = [word for word in arguments if not word.startswith("--clips=")]
    command_main(module)([*arguments, *more])
