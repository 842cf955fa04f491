"""Visual sound localization: where it sounds, from training without boxes, or from the pretrained model as it is.

Command:
    python -m av_mae.evaluate --config=configs/localization.py:demo --workdir=runs/localization \
        --config.init=runs/demo --config.data.path=runs/scene

Variants: `demo`, a head trained on Toy Band scenes (python -m av_mae.prepare --dataset=toy_band --variant=scene
--output=runs/scene); `occlusion` and `attention`, maps of the pretrained model on the same scenes.
"""

from av_mae import recipes
from av_mae.config import DataConfig, OptimizerConfig
from av_mae.models.head_config import LocalizerConfig
from av_mae.task_config import LocalizationConfig

VARIANTS = ("demo", "occlusion", "attention")


def get_config(variant="demo"):
    return recipes.as_recipe(LocalizationConfig(
        steps=1200,
        batch_size=64,
        dtype="float32",
        encoder_rate=1.0,
        head=LocalizerConfig(temperature=0.05),
        against="box",
        init="runs/demo",
        method="contrastive" if variant == "demo" else variant,
        data=DataConfig(path="runs/scene", crop_scale=(1.0, 1.0), volume_db=0.0),
        optimizer=OptimizerConfig(base_lr=8e-3, warmup=50.0, weight_decay=0.05, b2=0.999),
        checkpoint_every=400))
