"""Visual sound localization: where it sounds, from training without boxes, or from the pretrained model as it is.

Command:
    python -m av_mae.evaluate --config=configs/localization.py:demo --workdir=runs/localization \
        --config.init=runs/demo --config.data.path=runs/scene

On annotated sets (DeepAVFusion reports them, but released no code for them: the training is ours):
    python -m av_mae.evaluate --config=configs/localization.py:vggss --workdir=runs/vggss --config.init=RUN \
        --config.data.path=VGGSOUND --config.test_path=VGGSS
    vggss      The head is trained without boxes on VGGSound's training clips (python -m av_mae.prepare
               --dataset=vggsound), and measured on VGG-SS (--dataset=vggss): all boxes of a frame are true.
    flickr     The same on Flickr-SoundNet (--dataset=flickr_soundnet): true where 2 of 3 annotators say so.
The map's upper half is compared, as published for both sets (`ciou` at 0.5, `auc`). Published values: not known here.
Hardware of these: a GPU host or a TPU slice. Expected duration: not measured; nobody has run them to the end with this
code.

Variants of the demo: `demo`, a head trained on Toy Band scenes (python -m av_mae.prepare --dataset=toy_band
--variant=scene --output=runs/scene); `occlusion` and `attention`, maps of the pretrained model on the same scenes.
"""

from av_mae import recipes
from av_mae.config import DataConfig, OptimizerConfig
from av_mae.evaluate.localization import LocalizationConfig
from av_mae.models.config import LocalizerConfig

VARIANTS = ("vggss", "flickr", "demo", "occlusion", "attention")


def annotated(variant):
    return recipes.as_recipe(
        LocalizationConfig(
            epochs=10.0,
            batch_size=256,
            encoder_rate=0.1,
            against="box",
            top=0.5,
            agreeing=2 if variant == "flickr" else 1,
            data=DataConfig(workers=16),
            optimizer=OptimizerConfig(base_lr=3e-4, warmup=1.0, weight_decay=0.05, b2=0.999),
        )
    )


def get_config(variant="demo"):
    if variant in ("vggss", "flickr"):
        return annotated(variant)
    return recipes.as_recipe(
        LocalizationConfig(
            steps=600,
            batch_size=64,
            dtype="float32",
            encoder_rate=1.0,
            shifts=2,
            head=LocalizerConfig(temperature=0.05),
            against="box",
            init="runs/demo",
            method="contrastive" if variant == "demo" else variant,
            data=DataConfig(path="runs/scene", crop_scale=(1.0, 1.0), volume_db=0.0),
            optimizer=OptimizerConfig(base_lr=8e-3, warmup=50.0, weight_decay=0.05, b2=0.999),
            checkpoint_every=300,
        )
    )
