"""Small models of the published system: their configuration and their weights, from the golden files."""

import json

from av_mae import convert, models

KINDS = {"factorized_mmi": "factorized", "dense_mmi": "dense", "token": "token", "factorized_mmi_swin": "factorized"}


def golden_config(shared, name, pair="separable", normalize=True):
    sizes = json.loads((shared / "golden" / "config.json").read_text())
    c = sizes["config"]
    images = sizes["swin_sizes"] if name.endswith("swin") else c
    stream = dict(width=c["width"], depth=c["depth"], heads=c["heads"], normalize_targets=normalize)
    return models.AVMAEConfig(
        image=models.StreamConfig(size=tuple(images["image"]), channels=3, mask_ratio=c["mask"][0], **stream),
        audio=models.StreamConfig(size=tuple(images["audio"]), channels=1, mask_ratio=c["mask"][1], **stream),
        fusion=models.FusionConfig(
            kind=KINDS[name],
            tokens=tuple(c["tokens"]),
            heads=c["heads"],
            attention_ratio=c["attn"],
            mlp_ratio=c["mlp"],
            pair_attention=pair,
        ),
        decoder=models.DecoderConfig(kind="swin" if name.endswith("swin") else "plain", **c["dec"]),
    )


def golden_model(shared, name, **options):
    return convert.load_published(shared / "golden" / f"{name}.pth", golden_config(shared, name, **options))
