"""Masked reconstruction of held-out clips: errors beside baselines, and with the other stream swapped or blank.

Command:
    python -m av_mae.evaluate --config=configs/reconstruction.py --workdir=runs/evaluation \
        --config.init=RUN --config.data.path=DIR[,DIR]

Variant `demo` reads what `bash launch/demo.sh` left in runs/demo. Hardware: anything; the demo's two sets take about
a minute on 2 CPU cores. Results: README.md, "Two commands".
"""

from av_mae import recipes
from av_mae.evaluate.reconstruction import ReconstructionConfig

VARIANTS = ("demo",)


def get_config(variant=""):
    config = recipes.as_recipe(ReconstructionConfig())
    if variant == "demo":
        config.init = "runs/demo"
        config.data.path = "runs/demo/data/toy_band,runs/demo/data/spoken_digits"
    return config
