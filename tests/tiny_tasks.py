"""A tiny pretrained checkpoint and small Toy Band sets for tests of the downstream tasks."""

import pathlib

import jax

from av_mae.checkpoint import Checkpoints
from av_mae.config import DataConfig, OptimizerConfig, SoundConfig, TrainConfig
from av_mae.models.config import AVMAEConfig, DecoderConfig, FusionConfig, StreamConfig
from av_mae.prepare import __main__ as prepare
from av_mae.train import optimizer, step
from av_mae.train import sharding as mesh

ENCODER = dict(width=32, depth=2, heads=2, mask_ratio=0.5)
MODEL = AVMAEConfig(
    image=StreamConfig(size=(32, 32), patch=16, normalize_targets=False, **ENCODER),
    audio=StreamConfig(size=(32, 64), channels=1, patch=16, normalize_targets=False, **ENCODER),
    fusion=FusionConfig(tokens=(2, 1, 1), heads=2),
    decoder=DecoderConfig(width=32, depth=1, heads=2),
)
SOUND = SoundConfig(rate=8000, n_fft=400, hop=125, mels=32, log_floor=1e-3, mean=-1.9, std=1.4)
VARIANTS = {"classification": "single", "localization": "scene", "segmentation": "scene", "separation": "mixture"}


def pretrained(folder: pathlib.Path) -> pathlib.Path:
    """A work directory with one checkpoint of random weights."""
    config = TrainConfig(
        steps=1,
        batch_size=8,
        dtype="float32",
        model=MODEL,
        data=DataConfig(sound=SOUND),
        optimizer=OptimizerConfig(warmup=0.0),
    )
    train_step = step.TrainStep(config, mesh.make_mesh(config.mesh, jax.devices()[:1]), optimizer.Length(1, 0, 1))
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(0, train_step.init(), config, position=0, skipped=0)
    checkpoints.close()
    return folder


def prepared(folder: pathlib.Path, variant: str, clips: int = 24, test_clips: int = 21) -> pathlib.Path:
    path = folder / variant
    prepare.main(
        [
            "--dataset=toy_band",
            f"--variant={variant}",
            f"--output={path}",
            f"--clips={clips}",
            f"--test_clips={test_clips}",
            "--workers=1",
        ]
    )
    return path


def arguments(task: str, workdir: pathlib.Path, init: pathlib.Path, data: pathlib.Path, *overrides: str) -> list[str]:
    """Of `av_mae.evaluate`, for a few steps."""
    values = [
        f"init={init}",
        f"data.path={data}",
        "steps=3",
        "batch_size=8",
        "checkpoint_every=2",
        "log_every=1",
        "bootstrap=100",
        "test_batch_size=8",
        "pictures=2",
        "optimizer.warmup=1",
        *overrides,
    ]
    if task == "segmentation":
        values.append("head.width=8")
    return [f"--config=configs/{task}.py:demo", f"--workdir={workdir}", *(f"--config.{value}" for value in values)]
