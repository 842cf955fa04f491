"""The code keeps its shape: no circles, nothing below imports what is above, files and functions of a readable size."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("measure", ROOT / "docs" / "measure.py")
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)
TREES = measure.sources()
GRAPH = measure.imports(TREES)
# What each room may import at most, from the ground up; commands (`__main__`) may import everything.
GROUND = {"config", "console", "errors", "models", "recipes", "storage", "workdir", "lock"}
BELOW = {
    "errors": set(),
    "console": set(),
    "storage": GROUND,
    "media": GROUND - {"models"},
    "data": GROUND | {"media"},
    "models": {"errors", "console"},
    "checkpoint": GROUND | {"checkpoint_files"},
    "checkpoint_files": {"errors", "storage"},
    "prepare": GROUND | {"media", "data"},
    "train": GROUND | {"media", "data", "plots", "checkpoint", "convert", "model_card"},
}


def test_no_modules_import_one_another():
    assert measure.circles(GRAPH) == []
    assert measure.circles(measure.rooms(GRAPH)) == []


@pytest.mark.parametrize("room", BELOW)
def test_nothing_imports_what_is_above_it(room):
    found = {other.removeprefix("av_mae.") for other in measure.rooms(GRAPH)[f"av_mae.{room}"]}
    assert found <= BELOW[room]


def test_a_circle_would_be_found():
    """The measure itself: a → b → c → a, and d outside."""
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert measure.circles(graph) == [["a", "b", "c"]]


def test_no_test_imports_another():
    named = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        lines = [line.split() for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not {words[1] for words in lines} & named, path


def test_preparing_does_without_jax():
    """JAX takes seconds to import, in each decoding process too."""
    modules = "av_mae.prepare.run, av_mae.prepare.demo, av_mae.media.decode"
    script = f"import {modules}, sys; print(sorted({{'jax', 'flax', 'orbax', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stdout + done.stderr
