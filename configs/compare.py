"""Comparison of pretrainings: random weights, unimodal, late fusion, token fusion, early fusion; a table of all tasks.

Command (again: it goes on where it stopped):
    python -m av_mae.evaluate --config=configs/compare.py:demo --workdir=runs/compare

The checkpoints are made before, in 8 to 15 minutes each on 2 CPU cores:
    bash launch/demo.sh
    python -m av_mae.train --config=configs/demo.py --workdir=runs/demo_unimodal --config.model.fusion.kind=none
    python -m av_mae.train --config=configs/demo.py --workdir=runs/demo_token --config.model.fusion.kind=token

Variants:
    demo    Linear probe on degraded Toy Band (configs/classification.py:demo), three seeds.
    tasks   Segmentation after 200 steps and separation after 400 steps, one seed (scenes and mixtures: see
            configs/segmentation.py and configs/separation.py).

Rows: `random` weights in the early-fusion encoder; `unimodal`, two encoders that do not meet, a linear classifier each,
joint: their mean; `late fusion`, the same encoders under one linear classifier of both features side by side, which can
say just what that mean can; `token fusion` and `early fusion` (factorized), pretrained with fusion tokens. All see the
same clips, noise and seeds.

Hardware: 2 CPU cores. A cell of the demo takes 2 to 3 minutes of one, so the table of 15 takes about 40. Measured
(docs/tasks.md), joint accuracy: random .379, unimodal .764, late fusion .787, token fusion .886, early fusion .923.
"""

from av_mae import recipes
from av_mae.evaluate.compare import CompareConfig, ComparedRow, ComparedTask

VARIANTS = ("demo", "tasks")
PRETRAIN = "python -m av_mae.train --config=configs/demo.py --workdir=runs/demo_{0} --config.model.fusion.kind={1}"
DEMO = "bash launch/demo.sh"
UNIMODAL = PRETRAIN.format("unimodal", "none")


def get_config(variant="demo"):
    probe = ComparedTask(
        "classification",
        "configs/classification.py:demo",
        "demo/data/toy_band",
        tuple(f"accuracy/{stream}" for stream in ("image", "audio", "fusion", "joint")),
    )
    dense = (
        ComparedTask(
            "segmentation",
            "configs/segmentation.py:demo",
            "scene",
            ("iou", "swapped/iou", "right_object"),
            ("steps=200",),
        ),
        ComparedTask("separation", "configs/separation.py:demo", "mixture", ("sdr_improvement",)),
    )
    late = (ComparedRow("late fusion", "demo_unimodal", UNIMODAL, overrides=("head.concatenate=True",)),)
    return recipes.as_recipe(
        CompareConfig(
            seeds=(0, 1, 2) if variant == "demo" else (0,),
            rows=(
                ComparedRow("random", "demo", DEMO, random_weights=True),
                ComparedRow("unimodal", "demo_unimodal", UNIMODAL),
                *(late if variant == "demo" else ()),
                ComparedRow("token fusion", "demo_token", PRETRAIN.format("token", "token")),
                ComparedRow("early fusion", "demo", DEMO),
            ),
            tasks=(probe,) if variant == "demo" else dense,
        )
    )
