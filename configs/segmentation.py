"""Segmentation of what sounds: a mask over the frame, from a pretrained encoder.

Command:
    python -m av_mae.evaluate --config=configs/segmentation.py:demo --workdir=runs/segmentation \
        --config.init=runs/demo --config.data.path=runs/scene

Published protocols, with an encoder of configs/pretrain.py; the sets of AVSBench are made by
python -m av_mae.prepare --dataset=avsbench_s4 (avsbench_ms3, avsbench_avss):
    python -m av_mae.evaluate --config=configs/segmentation.py:s4 --workdir=runs/s4 --config.init=RUN \
        --config.data.path=DIR
Variants:
    s4, ms3    One source (its first frame is annotated in training), several sources: a binary mask of every annotated
               frame. AdamW 2e-4, layer decay 0.75, 100 epochs (20 of warm-up), audio that holds the frame. Published
               for s4: `miou` .8994, `f_score` .9234 (.9027, .9249 from AudioSet weights); for ms3: not known here.
    avss       Semantic masks of 71 classes, likewise. Published: not known here.
Hardware of these: a GPU host or a TPU slice. Expected duration: not measured; nobody has run them to the end with this
code.

Variant `demo`: Toy Band scenes (python -m av_mae.prepare --dataset=toy_band --variant=scene --output=runs/scene
--clips=4000). Hardware: 2 CPU cores, about 10 minutes. One seed gave on 400 test clips: IoU of the sounding object .712
[.698, .727] with the right audio, .126 with a swapped one, .162 with none; the right object marked most .995.
"""

from av_mae import recipes
from av_mae.config import DataConfig, OptimizerConfig
from av_mae.evaluate.segmentation import SegmentationConfig
from av_mae.models.config import SegmenterConfig

CLASSES = {"s4": 1, "ms3": 1, "avss": 71}
VARIANTS = (*CLASSES, "demo")


def published(variant):
    return recipes.as_recipe(
        SegmentationConfig(
            epochs=100.0,
            batch_size=128,
            layer_decay=0.75,
            head=SegmenterConfig(classes=CLASSES[variant]),
            data=DataConfig(workers=16),
            optimizer=OptimizerConfig(base_lr=2e-4, warmup=20.0, weight_decay=0.05, b2=0.999),
        )
    )


def get_config(variant="demo"):
    if variant != "demo":
        return published(variant)
    return recipes.as_recipe(
        SegmentationConfig(
            steps=600,
            batch_size=32,
            dtype="float32",
            encoder_rate=0.5,
            init="runs/demo",
            head=SegmenterConfig(width=32),
            data=DataConfig(path="runs/scene", crop_scale=(1.0, 1.0), volume_db=0.0),
            optimizer=OptimizerConfig(base_lr=8e-3, warmup=50.0, weight_decay=0.05, b2=0.999),
            checkpoint_every=200,
        )
    )
