"""The notebooks of colabs/: small, without stored output, and run from top to bottom with fewer clips and steps."""

import ast
import base64
import importlib
import importlib.util
import io
import pathlib
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import tiny_tasks
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
CLIPS = {"CLIPS": 24, "TEST_CLIPS": 12}
PRETRAINING = CLIPS | {
    "STEPS": 4,
    "OPTIONS": [
        "--config.batch_size=8",
        "--config.optimizer.warmup=1",
        "--config.log_every=1",
        "--config.images_every=0",
        "--config.validate_every=0",
    ],
}
TASK = [
    "--config.steps=2",
    "--config.batch_size=8",
    "--config.test_batch_size=8",
    "--config.optimizer.warmup=1",
    "--config.bootstrap=100",
    "--config.pictures=2",
]
# Fast settings, and the pictures and sounds that each notebook shows.
RUNS = {
    "embeddings": (CLIPS, 2, 0),
    "evaluate": (CLIPS | {"TASK_OPTIONS": TASK}, 4, 6),
    "pods": (
        {
            "TOPOLOGY": "v5e:2x2",
            "OPTIONS": "--config.batch_size=16 --config.model.image.depth=1 "
            "--config.model.audio.depth=1 --config.model.decoder.depth=1",
        },
        1,
        0,
    ),
    "pretrain": (PRETRAINING, 2, 0),
}
# What pods.ipynb prints where there is a compiler for TPUs (libtpu), and where there is none.
COMPILED = r"\| memory of a chip +\| +bytes \|\n.*\n\| state +\| +\d\.\d+ GB \|"
NOT_COMPILED = "compiling for TPUs needs libtpu: pip install"


def test_each_notebook_is_run():
    assert [path.stem for path in NOTEBOOKS] == sorted(RUNS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_output(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert path.stat().st_size < 20_000
    assert "launch/colab.sh" in code[0].source and code[1].metadata.tags == ["parameters"]
    for cell in code[1:]:
        compile(re.sub(r"^!.*", "", cell.source, flags=re.MULTILINE), path.name, "exec")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_of_av_mae_are_there(path):
    """What a notebook imports of av_mae, and what it takes from there, exists: known without running the notebook."""
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"][1:]
    tree = ast.parse(re.sub(r"^!.*", "", "\n".join(cells), flags=re.MULTILINE))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("av_mae"):
            for name in (alias.name for alias in node.names):
                try:
                    modules[name] = importlib.import_module(f"{node.module}.{name}")
                except ImportError:
                    modules[name] = getattr(importlib.import_module(node.module), name)
    assert modules
    first = nbformat.read(path, 4).cells[1].source  # IPython leaves "{sys.executable}" as it is where sys is unknown
    assert all(f"import {name}\n" in first for name in ("os", "sys")) and "if _exit_code:" in first
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "address, message",
    [
        ("", "set REPOSITORY above to the git address of av_mae, then run this cell again"),
        ("nowhere/av_mae.git", "there is no av_mae at REPOSITORY='nowhere/av_mae.git'"),
    ],
)
def test_stops_without_the_repository(path, address, message, tmp_path):
    """Outside a checkout the first cell ends with one line: the cells after it are not run."""
    cell = next(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    script = tmp_path / "first_cell.ipy"
    script.write_text(cell.replace('REPOSITORY = ""', f"REPOSITORY = {address!r}"))
    command = [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", script.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 or "SystemExit" in done.stderr
    assert message in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
    assert "colab.sh: No such file" not in done.stdout + done.stderr


def shown(notebook, kind: str) -> list:
    """What cells displayed of a MIME type."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    return [output.data[kind] for output in outputs if kind in output.data]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_from_top_to_bottom(name, tmp_path):
    import papermill

    parameters, pictures, sounds = RUNS[name]
    if "CHECKPOINT" in (ROOT / "colabs" / f"{name}.ipynb").read_text():  # its pretraining is that of pretrain.ipynb
        parameters = parameters | {"CHECKPOINT": str(tiny_tasks.pretrained(tmp_path / "tiny"))}
    papermill.execute_notebook(
        ROOT / "colabs" / f"{name}.ipynb",
        tmp_path / "done.ipynb",
        cwd=ROOT,
        progress_bar=False,
        parameters=parameters | {"WORKDIR": str(tmp_path / "work")},
    )
    done = nbformat.read(tmp_path / "done.ipynb", 4)
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in shown(done, "image/png")]
    assert len(images) == pictures and all(image.std() > 5 for image in images)
    assert sum("<audio" in text for text in shown(done, "text/html")) == sounds
    assert not [output for cell in done.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    printed = "".join(output.text for cell in done.cells for output in cell.get("outputs", ()) if "text" in output)
    assert "command not found" not in printed
    if name == "pods":
        compiler = importlib.util.find_spec("libtpu") is not None
        assert (bool(re.search(COMPILED, printed)), NOT_COMPILED in printed) == (compiler, not compiler)
