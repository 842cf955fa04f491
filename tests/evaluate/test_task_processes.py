"""Evaluations in processes of their own: spread over two, and killed at any moment."""

import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_tasks import VARIANTS, arguments, prepared, pretrained
from train_processes import ROOT, free_port, run_environment

pytestmark = pytest.mark.slow
RATES = ("clips_per_second", "encoder_clips_per_second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    pretrained(folder / "pretrained")
    for variant in ("single", "scene"):
        prepared(folder, variant)
    return folder


def start(folder, task: str, workdir: pathlib.Path, *options: str, devices: int = 1):
    """An evaluation with a few more steps than in other tests; `options` are added to its command."""
    config, *values = arguments(
        task, workdir, folder / "pretrained", folder / VARIANTS[task], "steps=30", "checkpoint_every=3"
    )
    command = [
        sys.executable,
        "-m",
        "av_mae.evaluate",
        f"--config={ROOT / config.removeprefix('--config=')}",
        *values,
        *options,
    ]
    return subprocess.Popen(command, env=run_environment(folder, devices), stderr=subprocess.PIPE, text=True)


def finish(*processes) -> None:
    messages = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), messages


def results(workdir: pathlib.Path) -> dict:
    """results.json without what depends on the clock."""
    found = json.loads((workdir / "results.json").read_text())
    return {name: value for name, value in found.items() if name not in RATES}


def kill(process, moment: str) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"meant to kill it {moment}"


def wait_for(process, text: str) -> None:
    """Returns once the process has said `text`."""
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return
    raise AssertionError(f"the evaluation ended without {text!r}: {said}")


def wait_for_step(process, workdir: pathlib.Path, step: int) -> None:
    """Returns once the head has done `step` steps."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"the evaluation ended before step {step}: {process.communicate()[1]}")


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_two_processes_measure_what_one_does(folder, task, tmp_path):
    """The head is trained by one process; one with one device measures it, and two with two each."""
    finish(start(folder, task, tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "results.json").unlink()
    coordinator = f"--coordinator=localhost:{free_port()}"
    finish(
        *(
            start(folder, task, tmp_path / "two", coordinator, f"--process_id={number}", "--process_count=2", devices=2)
            for number in range(2)
        )
    )
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one.keys() == two.keys() and two["clips"] == 21
    for name, metric in one.items():
        if isinstance(metric, dict) and "value" in metric:
            ours, expected = (
                [float("nan") if each[part] is None else each[part] for part in ("value", "low", "high")]
                for each in (two[name], metric)
            )
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_two_processes_train_a_head(folder, tmp_path):
    """From its first step on; both of them end, one writes the results."""
    coordinator = f"--coordinator=localhost:{free_port()}"
    finish(
        *(
            start(
                folder,
                "classification",
                tmp_path,
                coordinator,
                f"--process_id={number}",
                "--process_count=2",
                devices=2,
            )
            for number in range(2)
        )
    )
    assert results(tmp_path)["clips"] == 21
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_killed_at_any_moment_it_ends_with_the_same_results(folder, task, tmp_path):
    """kill -9 while the head is trained, and again while it is measured."""
    finish(start(folder, task, tmp_path / "whole"))
    workdir, step = tmp_path / "killed", random.randint(1, 28)
    process = start(folder, task, workdir)
    wait_for_step(process, workdir, step)
    kill(process, f"at step {step}")
    process = start(folder, task, workdir)
    wait_for(process, random.choice(("steps (100 %)", "measuring right: 21/21")))
    kill(process, "while it measures")
    assert not (workdir / "results.json").exists()
    finish(start(folder, task, workdir))
    assert results(workdir) == results(tmp_path / "whole"), f"killed at step {step}"
