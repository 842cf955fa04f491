"""Classification of clips: linear probe on a frozen encoder, or fine-tuning.

Command:
    python -m av_mae.evaluate --config=configs/classification.py:demo --workdir=runs/classification \
        --config.init=runs/demo --config.data.path=runs/demo/data/toy_band
    python -m av_mae.evaluate --config=configs/classification.py:folder --workdir=runs/classes \
        --config.init=runs/demo --config.data.path=DIR --config.head.classes=N

Variants (published protocols; the command is the one above with the variant's name and data):
    vggsound_probe      VGGSound (python -m av_mae.prepare --dataset=vggsound): frozen encoder, input_norm, LARS, base
                        learning rate 0.3, 60 epochs (10 of warm-up), batch 256. Published: 53.08 top-1 of the joint
                        score (`accuracy/joint`, in shares of 1).
    vggsound_finetune   VGGSound: AdamW 3e-4, layer decay 0.75, stochastic depth 0.2, mixup, label smoothing 0.1, loss
                        divided by class frequency, log-odds bias, 100 epochs (20), 10 test windows. Published: 58.19
                        top-1, 57.91 from an encoder pretrained on AudioSet.
    audioset_probe      AudioSet (--dataset=audioset), trained on its balanced part: as vggsound_probe with several
                        labels a clip, 300 epochs (20). Measures `mean_ap/joint`, `auc/joint`, `d_prime/joint`; the
                        published values are not known here.
    audioset_finetune   AudioSet, balanced part: as vggsound_finetune with several labels a clip.
    demo       Linear probe on degraded Toy Band: image noise of deviation 2.0, audio 10 dB under white noise. Hardware:
               2 CPU cores, about 2 minutes. Results: docs/tasks.md.
    digits_probe, digits_finetune
               Spoken Digits with an encoder of their own (docs/tasks.md has the commands). 2 CPU cores, about 4 and 10
               minutes. One seed gave on 300 test clips: joint .453 and .663 (.487 with a blank image).
    folder     Fine-tuning on your own clips: a prepared set with labels and the splits train and test; set
               `--config.head.classes` to as many as it has. The encoder learns at a tenth of the head's rate; frames
               are cropped and mirrored, the volume is changed. Hardware: 2 CPU cores with the demo's encoder, some
               minutes.

Hardware of the published variants: a TPU slice or a GPU host; with a ViT-B encoder 8 accelerators hold a batch of 256.
Expected duration: not measured; nobody has run them to the end with this code.
"""

import dataclasses

from av_mae import recipes
from av_mae.config import DataConfig, OptimizerConfig
from av_mae.evaluate.classification import ClassificationConfig
from av_mae.models.config import ClassificationSettings, ClassifierConfig

VARIANTS = (
    "vggsound_probe",
    "vggsound_finetune",
    "audioset_probe",
    "audioset_finetune",
    "demo",
    "digits_probe",
    "digits_finetune",
    "folder",
)
CLASSES = {"vggsound": 309, "audioset": 527}


def probe(dataset):
    audioset = dataset == "audioset"
    return ClassificationConfig(
        epochs=300.0 if audioset else 60.0,
        batch_size=256,
        encoder_rate=0.0,
        head=ClassifierConfig(CLASSES[dataset], input_norm=True),
        settings=ClassificationSettings(multi_label=audioset),
        data=DataConfig(workers=16, split="balanced" if audioset else "train"),
        optimizer=OptimizerConfig(kind="lars", base_lr=0.3, warmup=20.0 if audioset else 10.0, weight_decay=0.0),
    )


def finetune(dataset):
    audioset = dataset == "audioset"
    return ClassificationConfig(
        epochs=100.0,
        batch_size=256,
        layer_decay=0.75,
        head=ClassifierConfig(CLASSES[dataset]),
        windows=10,
        settings=ClassificationSettings(
            label_smoothing=0.1, mixup=1.0, drop_path=0.2, balanced=True, log_odds=True, multi_label=audioset
        ),
        data=DataConfig(workers=16, split="balanced" if audioset else "train"),
        optimizer=OptimizerConfig(base_lr=3e-4, warmup=20.0, weight_decay=0.05, b2=0.999),
    )


def demo():
    return ClassificationConfig(
        steps=600,
        batch_size=64,
        dtype="float32",
        init="runs/demo",
        encoder_rate=0.0,
        head=ClassifierConfig(8, input_norm=True),
        data=DataConfig(
            path="runs/demo/data/toy_band", crop_scale=(1.0, 1.0), volume_db=0.0, image_noise=2.0, sound_snr=-10.0
        ),
        optimizer=OptimizerConfig(base_lr=4e-2, warmup=50.0, weight_decay=0.0, b2=0.999),
        checkpoint_every=300,
    )


def digits(protocol):
    probed = dataclasses.replace(
        demo(),
        steps=1500,
        init="runs/digits",
        head=ClassifierConfig(10, input_norm=True),
        data=DataConfig(path="runs/spoken_digits", crop_scale=(1.0, 1.0), volume_db=0.0, flip=False),
    )
    if protocol == "probe":
        return probed
    return dataclasses.replace(
        probed,
        steps=2400,
        batch_size=32,
        encoder_rate=1.0,
        head=ClassifierConfig(10),
        checkpoint_every=600,
        data=dataclasses.replace(probed.data, crop_scale=(0.7, 1.0)),
        settings=ClassificationSettings(label_smoothing=0.1, mixup=1.0, drop_path=0.1),
        optimizer=OptimizerConfig(base_lr=8e-3, warmup=100.0, weight_decay=0.05, b2=0.999),
    )


def folder():
    return ClassificationConfig(
        steps=300,
        batch_size=32,
        dtype="float32",
        init="runs/demo",
        encoder_rate=0.1,
        head=ClassifierConfig(input_norm=True),
        optimizer=OptimizerConfig(base_lr=1e-2, warmup=20.0, b2=0.999),
        checkpoint_every=100,
    )


def get_config(variant="vggsound_probe"):
    if variant in ("demo", "folder"):
        return recipes.as_recipe({"demo": demo, "folder": folder}[variant]())
    dataset, _, protocol = variant.partition("_")
    if dataset == "digits":
        return recipes.as_recipe(digits(protocol))
    return recipes.as_recipe({"probe": probe, "finetune": finetune}[protocol](dataset))
