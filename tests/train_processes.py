"""Runs `python -m av_mae.train` in processes of its own for tests: a tiny recipe on a small prepared set."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from av_mae.checkpoint_files import find_checkpoint
from av_mae.prepare import __main__ as prepare
from av_mae.storage import Folder

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMING = ("clips_per_second", "input_wait", "flops_per_second", "goodput")
RECIPE = '''
"""A tiny model on a small set."""
from av_mae import recipes
from av_mae.config import DataConfig, OptimizerConfig, SoundConfig, TrainConfig
from av_mae.models.config import AVMAEConfig, DecoderConfig, FusionConfig, StreamConfig

def get_config():
    encoder = dict(width=32, depth=1, heads=2, mask_ratio=0.5)
    return recipes.as_recipe(TrainConfig(
        steps=120, batch_size=8, dtype="float32", checkpoint_every=10, log_every=1, images_every=0,
        validate_every=0,
        data=DataConfig(path={path!r}, workers=1,
                        sound=SoundConfig(rate=8000, n_fft=400, hop=125, mels=32, log_floor=1e-3)),
        model=AVMAEConfig(image=StreamConfig(size=(32, 32), patch=16, **encoder),
                          audio=StreamConfig(size=(32, 32), channels=1, patch=16, **encoder),
                          fusion=FusionConfig(kind="none"), decoder=DecoderConfig(width=32, depth=1, heads=2)),
        optimizer=OptimizerConfig(base_lr=0.03, warmup=10.0)))
'''

# Python as the launch scripts want it, which makes environments by copying itself.
PYTHON = """#!/bin/bash
case "$*" in
  "-m venv"*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
  "-m pip"*) ;;
  *) exec {python} "$@" ;;
esac
"""


def run_environment(folder: pathlib.Path, devices: int = 1) -> dict[str, str]:
    """Of a command in a process of its own; compiled programs are shared by all those of a folder."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Training:
    """A prepared set, a recipe and an environment that runs share."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        prepare.main(
            ["--dataset=toy_band", f"--output={folder / 'toy'}", "--clips=20", "--test_clips=4", "--workers=1"]
        )
        self.config = folder / "tiny.py"
        self.config.write_text(RECIPE.format(path=str(folder / "toy")))

    def environment(self, devices: int = 1) -> dict[str, str]:
        return run_environment(self.folder, devices)

    def place(self, workdir: str) -> str:
        """A work directory's path, or its URL."""
        return workdir if "://" in workdir else str(self.folder / workdir)

    def start(
        self, workdir: str, *arguments: str, devices: int = 1, program: tuple[str, ...] = ("-m", "av_mae.train")
    ) -> subprocess.Popen:
        """Starts a run."""
        command = [
            sys.executable,
            *program,
            f"--config={self.config}",
            f"--workdir={self.place(workdir)}",
            *arguments,
        ]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment(devices), stderr=subprocess.PIPE, text=True
        )

    def run(self, workdir: str, *arguments: str, devices: int = 1) -> tuple[int, str]:
        """Runs to the end; returns exit status and stderr."""
        process = self.start(workdir, *arguments, devices=devices)
        message = process.communicate(timeout=300)[1]
        return process.returncode, message

    def metrics(self, workdir: str) -> list[dict]:
        """metrics.jsonl without what depends on the clock; a line that is being written is left out."""
        folder = Folder(self.place(workdir))
        text = folder.read("metrics.jsonl").decode() if folder.exists("metrics.jsonl") else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [{name: x for name, x in line.items() if name not in TIMING} for line in lines]

    def wait_for_step(self, workdir: str, step: int, process: subprocess.Popen) -> None:
        """Returns once the run has logged `step`."""
        while process.poll() is None:
            lines = self.metrics(workdir)
            if lines and lines[-1]["step"] >= step:
                return
            time.sleep(0.002)
        raise AssertionError(f"the run ended before step {step}: {process.communicate()[1]}")

    def arrays(self, workdir: str) -> dict[str, np.ndarray]:
        """Model and optimizer of the newest checkpoint, by item and name."""
        folder = find_checkpoint(self.place(workdir))
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        arrays = {}
        for item in ("model", "optimizer"):
            with ocp.StandardCheckpointer() as reader:
                saved = reader.metadata(folder / item).item_metadata.tree
                shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in saved.items()}
                arrays |= {f"{item}/{name}": np.asarray(x) for name, x in reader.restore(folder / item, shapes).items()}
        return arrays


def assert_same_arrays(ours: dict, expected: dict) -> None:
    """Bit by bit."""
    assert ours.keys() == expected.keys() and ours
    for name, x in expected.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)
