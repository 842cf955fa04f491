"""Segmentation of what sounds: a mask over the frame, from a pretrained encoder.

Command:
    python -m av_mae.evaluate --config=configs/segmentation.py:demo --workdir=runs/segmentation \
        --config.init=runs/demo --config.data.path=runs/scene

Variant `demo`: Toy Band scenes (python -m av_mae.prepare --dataset=toy_band --variant=scene --output=runs/scene
--clips=4000). Hardware: 2 CPU cores, about 10 minutes. One seed gave on 300 test clips: IoU of the sounding object .729
[.713, .745] with the right sound, .116 with a swapped one, .180 with none; the right object marked most .997.
"""

from av_mae import recipes
from av_mae.config import DataConfig, OptimizerConfig
from av_mae.models.head_config import SegmenterConfig
from av_mae.task_config import SegmentationConfig

VARIANTS = ("demo",)


def get_config(variant="demo"):
    return recipes.as_recipe(SegmentationConfig(
        steps=600,
        batch_size=32,
        dtype="float32",
        encoder_rate=0.5,
        init="runs/demo",
        head=SegmenterConfig(width=32),
        data=DataConfig(path="runs/scene", crop_scale=(1.0, 1.0), volume_db=0.0),
        optimizer=OptimizerConfig(base_lr=8e-3, warmup=50.0, weight_decay=0.05, b2=0.999),
        checkpoint_every=200))
