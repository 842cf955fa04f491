"""Pretraining by masked reconstruction at the published settings, on your own prepared clips.

Command (any variant):
    python -m av_mae.train --config=configs/pretrain.py:vggsound --workdir=runs/vggsound \
        --config.data.path=DIR[,DIR]

Variants:
    vggsound    The published VGGSound recipe: base, factorized, attention ratio 0.25, MLP ratio 1, 200 epochs with
                40 of warm-up, batch 512, base learning rate 1.5e-4 (3e-4 at batch 512).
                Published linear probe on VGGSound 53.08, fine-tuned 58.19 (as DeepAVFusion reports).
    audioset    The published AudioSet recipe: the same with attention ratio 1.0, MLP ratio 4 and batch 2,048
                (learning rate 1.2e-3). Published from these weights, fine-tuned on VGGSound: 57.91.
    SIZE, SIZE_FUSION
                tiny, small, base, large, huge with factorized (default), dense, token, bilinear or none (two
                encoders that do not meet: the unimodal baseline); otherwise as vggsound. For example `small_dense`.

Hardware: made for a TPU slice or a GPU host; the mesh takes every device, and shards parameters and optimizer state
over as few of them as their memory asks for (`--config.mesh.fsdp=N`: over N). Predicted hours are in docs/scaling.md.
Expected time and results here: not measured yet; nobody has run these recipes to the end with this code.
"""

from av_mae import config as sizes
from av_mae import recipes
from av_mae.config import DataConfig, OptimizerConfig, TrainConfig

VARIANTS = ("vggsound", "audioset") + sizes.size_variants()


def get_config(variant="vggsound"):
    size, _, fusion = ("base" if variant in ("vggsound", "audioset") else variant).partition("_")
    config = recipes.as_recipe(
        TrainConfig(
            epochs=200.0,
            batch_size=512,
            dtype="bfloat16",
            data=DataConfig(workers=16),
            model=sizes.sized_model(size, fusion or "factorized"),
            optimizer=OptimizerConfig(base_lr=1.5e-4, warmup=40.0, weight_decay=0.05, b1=0.9, b2=0.95),
            checkpoint_every=1000,
            log_every=50,
            images_every=5000,
        )
    )
    if variant == "audioset":
        config.batch_size = 2048
        config.model.fusion.attention_ratio = 1.0
        config.model.fusion.mlp_ratio = 4.0
    return config
