"""Nearest neighbours and retrieval of held-out clips by the features of a pretrained encoder; nothing is trained.

Command:
    python -m av_mae.evaluate --config=configs/neighbours.py --workdir=runs/neighbours --config.init=RUN \
        --config.data.path=DIR[,DIR]

Variant `demo`: Toy Band, with what `bash launch/demo.sh` left in runs/demo. Hardware: anything; 300 clips take a few
seconds on 2 CPU cores. After the demo's 4,000 steps the nearest other clip is of the same class for 95.3 % of 300 clips
by sound, 52.7 % by image, 98.7 % by fusion tokens and 99.0 % by all. Retrieval is at chance (recall at 10 of .02 to .05,
chance .033), fused or not: rebuilding patches never asks the two streams for the same features. Published figures: none
that can be compared without the published data.

The search goes block by block, so that 200,000 clips fit in memory (docs/benchmarks.md).
"""

from av_mae import recipes
from av_mae.config import DataConfig
from av_mae.task_config import NeighboursConfig

VARIANTS = ("demo",)


def get_config(variant=""):
    if variant == "demo":
        return recipes.as_recipe(NeighboursConfig(
            batch_size=64, dtype="float32", init="runs/demo", data=DataConfig(path="runs/demo/data/toy_band")))
    return recipes.as_recipe(NeighboursConfig(data=DataConfig(workers=16), test_batch_size=256))
