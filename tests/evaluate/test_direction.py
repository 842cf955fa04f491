"""From mp4 to metric by the commands, tiny: tasks do better with the right other stream than with a wrong one.

A small encoder is pretrained once; each task then trains for about a minute of one core. Direction is asserted, not
size.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
SMALL = [
    f"model.{stream}.{name}={value}"
    for stream in ("image", "audio")
    for name, value in (("width", 64), ("depth", 2), ("heads", 4))
]


def command(root: pathlib.Path, module: str, *arguments: str) -> None:
    """Runs a command as users do: XLA optimises, which the other tests spare."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", f"av_mae.{module}", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory) -> pathlib.Path:
    """Scenes, mixtures, and an encoder that was pretrained on the scenes."""
    folder = tmp_path_factory.mktemp("direction")
    for variant in ("scene", "mixture"):
        command(
            root,
            "prepare",
            "--dataset=toy_band",
            f"--variant={variant}",
            f"--output={folder / variant}",
            "--clips=600",
            "--test_clips=48",
        )
    values = [f"data.path={folder / 'scene'}", "data.weights=None", "steps=300", "optimizer.warmup=30", *SMALL]
    command(
        root,
        "train",
        "--config=configs/demo.py",
        f"--workdir={folder / 'pretrained'}",
        *(f"--config.{value}" for value in values),
    )
    return folder


def measured(root, folder, task: str, *changes: str) -> dict:
    data = folder / ("mixture" if task == "separation" else "scene")
    values = [
        f"init={folder / 'pretrained'}",
        f"data.path={data}",
        "pictures=0",
        "bootstrap=100",
        "optimizer.warmup=20",
        *changes,
    ]
    command(
        root,
        "evaluate",
        f"--config=configs/{task}.py:demo",
        f"--workdir={folder / task}",
        *(f"--config.{value}" for value in values),
    )
    return json.loads((folder / task / "results.json").read_text())


@pytest.mark.parametrize(
    "task, metric, other, changes",
    [
        ("classification", "accuracy/joint", "blank", ("steps=200", "data.image_noise=0", "data.sound_snr=None")),
        ("localization", "right_object", "swapped", ("steps=150",)),
        ("segmentation", "iou", "swapped", ("steps=150",)),
        ("separation", "sdr", "swapped", ("steps=200",)),
    ],
)
def test_right_is_better(root, folder, task, metric, other, changes):
    results = measured(root, folder, task, *changes)
    assert results[metric]["value"] > results[f"{other}/{metric}"]["value"]
