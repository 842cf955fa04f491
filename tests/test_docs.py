"""The documentation: built strictly, its links and generated parts, its Python, and the tutorial as it is typed."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
import typed_commands

from av_mae import config as sizes
from av_mae import recipes
from av_mae.config import TrainConfig
from av_mae.evaluate.task import TASKS, task_class
from av_mae.models import flops
from av_mae.train import run
from av_mae.train import sharding as mesh

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BY_HAND = [page for page in PAGES if page.name not in ("benchmarks.md", "data.md", "scaling.md", "pods.md")]
TUTORIAL = ROOT / "docs" / "tutorial.md"


def blocks(page: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


COMMANDS = sorted(
    {
        (page.relative_to(ROOT).as_posix(), line)
        for page in BY_HAND
        for block in blocks(page, "bash")
        for line in block.splitlines()
        if "av_mae." in line
    }
)
PYTHON = [
    (page.relative_to(ROOT).as_posix(), block)
    for page in BY_HAND
    if page != TUTORIAL
    for block in blocks(page, "python")
]


@pytest.fixture
def in_docs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))


@pytest.mark.parametrize("page,command", COMMANDS)
def test_commands_fit(page, command, capsys):
    typed_commands.check(command, capsys)


@pytest.mark.parametrize("page,code", PYTHON)
def test_python_runs(page, code):
    exec(compile(code, page, "exec"), {})


def test_generated_parts_are_up_to_date(in_docs):
    generate = importlib.import_module("generate")
    found = {}
    for page in PAGES:
        text = page.read_text()
        assert generate.filled(text) == text, f"{page}: run python docs/generate.py"
        found |= {name: page for _, name, _ in generate.PART.findall(text)}
    assert found.keys() == generate.PARTS.keys()


def test_configuration_page_has_every_key_with_its_default():
    rows = dict(
        re.findall(
            r"^\| `([\w.]+)` \| [^|]+ \| `(.*)` \|$", (ROOT / "docs/reference/config.md").read_text(), re.MULTILINE
        )
    )
    for kind in (TrainConfig, *(task_class(name).config_class for name in TASKS)):
        assert set(recipes.keys(kind)) <= rows.keys()
    config = TrainConfig(steps=1)
    assert (rows["optimizer.base_lr"], rows["dtype"], rows["model.fusion.tokens"]) == tuple(
        map(repr, (config.optimizer.base_lr, config.dtype, config.model.fusion.tokens))
    )


def test_diagrams_can_be_drawn(in_docs, tmp_path):
    """`pairs` also asserts what it shows; files are compared by their outlines, which versions of fonts leave."""
    diagrams = importlib.import_module("diagrams")
    diagrams.draw(tmp_path)
    for name in diagrams.DIAGRAMS:
        new, stored = (
            re.findall(r"<g id=\"(\w+)\"", (folder / f"{name}.svg").read_text())
            for folder in (tmp_path, ROOT / "docs" / "diagrams")
        )
        assert new == stored and len(new) > 5, f"{name}.svg: run python docs/diagrams.py"


def test_cost_of_pairs_projected_one_by_one():
    """The page's figure of all pairs projected one by one, which flops.py has no form of: from its sizes."""
    config = sizes.sized_model("base", "dense")
    image, audio, tokens, width, inner = 196, 96, 32, 768, 192
    separable = 2 * (image + audio) * width * 2 * inner
    pairs = 2 * image * audio * 2 * width * 2 * inner
    attention = 4 * tokens * inner * (image * audio - image - audio)
    plain = flops.encoder_flops(config, False) + 12 * (pairs - separable + attention)
    text = (ROOT / "docs/explanation/cost.md").read_text()
    assert f"{plain / 1e9:.0f} instead of {flops.encoder_flops(config, False) / 1e9:.0f} GFLOP" in text


def test_site_is_built_without_warnings(tmp_path):
    """Strict: links between pages, anchors, files and names of the interface that are not there are errors."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "reference/api.html").read_text()
    assert "av_mae.load" in text and "separable" in text
    loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", text)
    assert not loaded, "pages load nothing from elsewhere"


def test_broken_link_is_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("[there](nowhere.md) [anchor](#none)\n")
    config = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"nav:\n.*", "nav: [index.md]\n", config, flags=re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0 and "nowhere.md" in done.stderr and "#none" in done.stderr


def test_files_that_the_pages_name_are_there():
    for page in [*BY_HAND, ROOT / "CONTRIBUTING.md"]:
        for path in re.findall(r"`((?:av_mae|configs|docs|launch|tests)/[\w/]+\.\w+)`", page.read_text()):
            assert (ROOT / path).is_file(), f"{page} names {path}"


@pytest.mark.slow
def test_tutorial_from_folder_to_search(tmp_path, monkeypatch, capsys):
    """Its blocks one after the other as they are typed, with less data and fewer steps appended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "make_mesh", lambda config: mesh.make_mesh(config, jax.devices()[:1]))
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", TUTORIAL.read_text(), re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(block, "tutorial.md", "exec"), {})
            continue
        for line in block.splitlines():
            if "av_mae." in line:
                typed_commands.run(line)
            else:
                subprocess.run(shlex.split(line), check=True)
    said = capsys.readouterr().out
    assert re.search(r"^21 clips; closest: ", said, re.MULTILINE)
    hits = re.findall(r"^ +\d  (\d\.\d+)  (\S+)", said, re.MULTILINE)
    assert len(hits) == 5 and hits[0][1] == "test/toy_band_single_test_000003.mp4" and float(hits[0][0]) > 0.999
    assert (tmp_path / "runs/hits.png").stat().st_size > 10_000
    assert np.isfinite([float(similarity) for similarity, _ in hits]).all()


def test_names_of_the_reference_are_there():
    """Each name that the reference lists for a module exists where the page says."""
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    found = re.findall(
        r"^::: (\S+)\n    options:\n(?:      (?!members).*\n)*      members: \[(.+)\]", page, re.MULTILINE
    )
    assert len(found) > 5
    for module, names in found:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
