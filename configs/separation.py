"""Sound separation: the audio of what the image shows, from a mixture, with a pretrained encoder.

Command:
    python -m av_mae.evaluate --config=configs/separation.py:demo --workdir=runs/separation \
        --config.init=runs/band --config.data.path=runs/mixture

Published protocol, with an encoder of configs/pretrain.py:
    python -m av_mae.evaluate --config=configs/separation.py:vggsound_music --workdir=runs/vggsound_music \
        --config.init=RUN --config.data.path=DIR --config.pairs=vggmusic_eval_ss.csv
Variants:
    vggsound_music  VGGSound's clips of instruments (python -m av_mae.prepare --dataset=vggsound_music); the test's
                    pairs are those of the list, ids of two clips in each row. Published SDR / SIR / SAR: 5.79 / 8.24 /
                    13.82 (6.93 / 9.93 / 13.49 from AudioSet weights).
    music           MUSIC (--dataset=music_solo, music_21), pairs of test clips drawn once. Published: not known here.
Two clips are summed, the mask is a ratio, its loss weighted; AdamW 3e-4, layer decay 0.75, 300 epochs (40 of warm-up).
Every source of a mixture is looked for by its own image. `--config.data.mix=3` (or 4): of more clips.
Hardware of these: a GPU host or a TPU slice. Expected duration: not measured; nobody has run them to the end with this
code.

Variant `demo`: Toy Band mixtures (python -m av_mae.prepare --dataset=toy_band --variant=mixture --output=runs/mixture
--clips=4000) and the encoder of configs/demo.py:band, whose pretraining has heard mixtures. The mask is a source's
share of the mixture: with the published ratio, which ends at .5 and does not tell quiet from silent as well, an
earlier recipe gave 2.3 dB less. A mask of .5 everywhere is left within 100 steps, with random weights after 350.
Hardware: 2 CPU cores, 8 minutes of training. One seed gave on 200 test clips: SDR improvement mean 8.0 dB, median 6.6
dB (ideal mask: 17.8 dB), 10.6 dB less SDR with a swapped image; random weights at equal steps 3.5 dB and 1.4 dB. With
`--config.steps=700`, 14 minutes: 10.0 dB and 9.0 dB, random weights 8.7 dB and 8.0 dB.
"""

from av_mae import recipes
from av_mae.config import DataConfig, OptimizerConfig
from av_mae.evaluate.separation import SeparationConfig
from av_mae.models.config import SeparatorConfig

VARIANTS = ("vggsound_music", "music", "demo")


def published():
    return recipes.as_recipe(
        SeparationConfig(
            epochs=300.0,
            batch_size=128,
            layer_decay=0.75,
            head=SeparatorConfig(mask="ratio", weighted=True),
            data=DataConfig(workers=16, mix=2),
            optimizer=OptimizerConfig(base_lr=3e-4, warmup=40.0, weight_decay=0.05, b2=0.999),
        )
    )


def get_config(variant="demo"):
    if variant != "demo":
        return published()
    return recipes.as_recipe(
        SeparationConfig(
            steps=400,
            batch_size=64,
            dtype="float32",
            encoder_rate=0.5,
            init="runs/band",
            head=SeparatorConfig(mask="share", weighted=True),
            data=DataConfig(path="runs/mixture", crop_scale=(1.0, 1.0), volume_db=0.0),
            optimizer=OptimizerConfig(base_lr=4e-3, warmup=50.0, weight_decay=0.05, b2=0.999),
            checkpoint_every=200,
        )
    )
