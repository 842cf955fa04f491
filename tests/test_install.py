"""A wheel of the package in an empty folder, without the checkout: recipes, console command, a whole small run."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from av_mae import __main__ as console
from av_mae import recipes


def test_overview_names_every_command(root, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["av_mae"])
    console.main()
    said = capsys.readouterr().out
    commands = [path.stem for path in (root / "av_mae").glob("*.py") if "run_command(main)" in path.read_text()]
    commands += [path.parent.name for path in (root / "av_mae").glob("*/__main__.py")]
    assert set(commands) <= set(console.COMMANDS) and all(f"\n  {name} " in said for name in commands)


def test_unknown_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["av_mae", "trian"])
    with pytest.raises(SystemExit) as stop:
        console.main()
    assert stop.value.code == 2 and "did you mean train?" in capsys.readouterr().err


def test_recipes_by_name_from_any_folder(tmp_path, monkeypatch):
    expected = recipes.load_recipe("configs/demo.py:band")
    monkeypatch.chdir(tmp_path)
    assert recipes.load_recipe("demo:band") == recipes.load_recipe("configs/demo.py:band") == expected
    (tmp_path / "mine.py").write_text("from av_mae import recipes, config\n" + OWN)
    assert recipes.load_recipe("mine.py").steps == 7


OWN = "def get_config():\n    return recipes.as_recipe(config.TrainConfig(steps=7))\n"


def installed(root, folder):
    """Builds a wheel from a copy of what git knows and installs it; returns the environment's folder of programs."""
    checkout, wheels = folder / "checkout", folder / "wheels"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True).stdout.split(b"\0")
    for name in (os.fsdecode(name) for name in names if name.startswith((b"av_mae/", b"configs/", b"setup.py"))):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_file():
            (checkout / name).write_bytes((root / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}", str(checkout)], check=True
    )
    (wheel,) = wheels.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"av_mae/py.typed", "av_mae/configs/demo.py", "av_mae/assets/view.css"} <= set(names)
    assert all(name.startswith(("av_mae/", "av_mae-")) for name in names)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, f"--python={python}", "install", "--no-deps", str(wheel)], check=True)
    # The dependencies are those of this environment, whose own av_mae comes after the wheel's.
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


@pytest.mark.slow
def test_a_wheel_prepares_trains_evaluates_and_exports(root, tmp_path):
    programs, here = installed(root, tmp_path), tmp_path / "empty"
    here.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "AV_MAE"))}

    def av_mae(*arguments):
        done = subprocess.run(
            [programs / "av_mae", *arguments], cwd=here, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where = [programs / "python", "-c", "import av_mae; print(av_mae.__file__)"]
    assert str(tmp_path / "venv") in subprocess.check_output(where, cwd=here, env=environment, text=True)
    assert "benchmark" in av_mae()
    av_mae("prepare", "--dataset=toy_band", "--output=set", "--clips=24", "--test_clips=12", "--workers=1")
    tiny = ["batch_size=8", "model.image.depth=1", "model.audio.depth=1", "model.decoder.depth=1", "steps=20"]
    tiny += ["data.path=set", "data.weights=None", "optimizer.warmup=1", "log_every=5", "images_every=0"]
    av_mae("train", "--config=demo:demo", "--workdir=run", *(f"--config.{value}" for value in tiny))
    av_mae(
        "evaluate",
        "--config=reconstruction",
        "--workdir=results",
        "--config.init=run",
        "--config.data.path=set",
        "--config.bootstrap=100",
    )
    av_mae("export", "--checkpoint=run", "--data=set:test", "--output=embeddings")
    av_mae("view", "--workdir=run")
    assert json.loads((here / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 20
    assert json.loads((here / "results" / "results.json").read_text())["clips"] == 12
    assert list((here / "embeddings").glob("*.parquet")) and (here / "run" / "view.html").is_file()
