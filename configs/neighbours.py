"""Nearest neighbours and retrieval of held-out clips by the features of a pretrained encoder; nothing is trained.

Command:
    python -m av_mae.evaluate --config=configs/neighbours.py --workdir=runs/neighbours --config.init=RUN \
        --config.data.path=DIR[,DIR]

Variant `demo`: Toy Band, with what `bash launch/demo.sh` left in runs/demo. Hardware: anything; 1,500 clips take 10
seconds on 2 CPU cores. After the demo's 5,000 steps the nearest other clip is of the same class for 97.9 % of 1,500
clips by audio, 80.1 % by image, 99.2 % by fusion tokens and 99.5 % by all. Retrieval is at chance (recall at 10 of .004
to .007, chance .007), fused or not: rebuilding patches never asks the two streams for the same features. Published
values: none that can be compared without the published data.

The search goes block by block, so that 200,000 clips fit in memory (docs/benchmarks.md).
"""

from av_mae import recipes
from av_mae.config import DataConfig
from av_mae.evaluate.neighbours import NeighboursConfig

VARIANTS = ("demo",)


def get_config(variant=""):
    if variant == "demo":
        return recipes.as_recipe(
            NeighboursConfig(
                batch_size=64, dtype="float32", init="runs/demo", data=DataConfig(path="runs/demo/data/toy_band")
            )
        )
    return recipes.as_recipe(NeighboursConfig(data=DataConfig(workers=16), test_batch_size=256))
