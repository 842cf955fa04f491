"""The rules that the sizes of a model keep, and what their messages say."""

import pytest

from av_mae import models
from av_mae.errors import UserError
from av_mae.evaluate.localization import LocalizationObjective

STREAM, FUSION, DECODER, MODEL = (models.StreamConfig, models.FusionConfig, models.DecoderConfig, models.AVMAEConfig)
SMALL = {"size": (16, 16), "patch": 4, "width": 8, "depth": 1, "heads": 2}


@pytest.mark.parametrize(
    "config,options,message",
    [
        (STREAM, {"size": (16,)}, r"size=\(16,\) must be \(rows, columns\), and patch=4 an int or \(rows, columns\)"),
        (STREAM, {"patch": (4, 4, 4)}, r"patch=\(4, 4, 4\) an int or \(rows, columns\)"),
        (STREAM, {"channels": 0}, r"sizes must be positive, got size=\(16, 16\), patch=4, channels=0"),
        (STREAM, {"patch": (4, 0)}, r"sizes must be positive, .*patch=\(4, 0\)"),
        (STREAM, {"patch": (4, 5)}, r"patch=\(4, 5\) must divide size=\(16, 16\)"),
        (STREAM, {"heads": 3}, "heads=3 must divide width=8"),
        (STREAM, {"heads": 0}, "heads=0 must divide width=8"),
        (STREAM, {"width": 0}, "heads=2 must divide width=0"),
        (STREAM, {"width": 6}, "width=6 must be a multiple of 4 for sin-cos positions"),
        (STREAM, {"depth": 0}, "depth=0 must be at least 1"),
        (STREAM, {"mlp_ratio": 0.1}, "mlp_ratio=0.1 must be positive and leave a hidden unit"),
        (STREAM, {"mask_ratio": 1.0}, "mask_ratio=1.0 must be between 0 and 1, both excluded"),
        (STREAM, {"mask_ratio": 0.0}, "mask_ratio=0.0 must be between 0 and 1, both excluded"),
        (
            STREAM,
            {"mask_ratio": 0.95},
            "mask_ratio=0.95 keeps 0 of 16 patches; at least one must be kept and one removed",
        ),
        (STREAM, {"loss_weight": 0.0}, "loss_weight=0.0 must be positive and finite"),
        (STREAM, {"loss_weight": float("nan")}, "loss_weight=nan must be positive and finite"),
        (STREAM, {"patch": 1, "channels": 1}, "normalize_targets=True needs at least 2 values per patch"),
        (FUSION, {"kind": "late"}, "fusion kind='late' must be one of factorized, dense, token, bilinear, none"),
        (FUSION, {"pair_attention": "x"}, "pair_attention='x' must be one of separable, chunked, materialized"),
        (
            FUSION,
            {"kind": "bilinear"},
            "kind='bilinear' does not separate: set pair_attention='chunked' or 'materialized'",
        ),
        (FUSION, {"layers": "some"}, "fusion layers='some' must be 'all' or a tuple of layer numbers"),
        (FUSION, {"layers": 1}, "fusion layers=1 must be 'all' or a tuple of layer numbers"),
        (FUSION, {"layers": (1, 1)}, r"fusion layers=\(1, 1\) name a layer twice"),
        (FUSION, {"tokens": (0, 8, 8)}, r"fusion tokens=\(0, 8, 8\) must be \(fusion ≥ 1, image-aggregation ≥ 0"),
        (FUSION, {"tokens": (4, 4)}, r"fusion tokens=\(4, 4\) must be"),
        (FUSION, {"tokens": (4, 0, 4)}, "kind='factorized' needs aggregation tokens for both streams"),
        (FUSION, {"attention_ratio": 0.0}, "attention_ratio=0.0 and mlp_ratio=1.0 must be positive"),
        (FUSION, {"heads": 0}, "fusion heads=0 must be at least 1"),
        (FUSION, {"width": 0}, "fusion width=0 must be positive, or None"),
        (DECODER, {"kind": "conv"}, "decoder kind='conv' must be one of plain, swin"),
        (DECODER, {"heads": 7}, "decoder heads=7 must divide width=512"),
        (DECODER, {"width": 18, "heads": 2}, "decoder width=18 must be a multiple of 4"),
        (DECODER, {"mlp_ratio": -1.0}, "decoder mlp_ratio=-1.0 must be positive"),
        (DECODER, {"depth": 0}, "decoder depth=0 must be at least 1"),
        (DECODER, {"window": (4, 0)}, r"decoder window=\(4, 0\) must be \(rows, columns\), both positive"),
        (
            MODEL,
            {"fusion": FUSION(layers=(0, 12))},
            r"fusion layers=\(0, 12\) name layers \[12\]; both .* layers 0 … 11",
        ),
        (MODEL, {"fusion": FUSION(layers=(-1,))}, r"name layers \[-1\]"),
        (MODEL, {"fusion": FUSION(layers=())}, "name no layer; use kind='none' for no fusion"),
        (
            MODEL,
            {"fusion": FUSION(kind="token"), "image": STREAM(width=384)},
            "fusion kind='token' uses one key weight .* must be equal, got 384 and 768",
        ),
        (MODEL, {"fusion": FUSION(heads=7)}, "fusion heads=7 must divide width × attention_ratio = 192"),
        (MODEL, {"fusion": FUSION(heads=64, attention_ratio=1 / 3, width=200)}, "fusion heads=64 must divide .* = 66"),
        (MODEL, {"fusion": FUSION(heads=6, attention_ratio=0.3, width=40)}, "fusion heads=6 must divide width=40"),
        (MODEL, {"fusion": FUSION(mlp_ratio=0.001)}, "fusion mlp_ratio=0.001 leaves no hidden unit"),
        (
            MODEL,
            {"decoder": DECODER(kind="swin")},
            r"Swin window=\(4, 4\) must divide the patch grid \(14, 14\); "
            r"windows that do: \(2, 2\), \(7, 7\), \(14, 14\)",
        ),
        (
            MODEL,
            {"decoder": DECODER(kind="swin"), "image": STREAM(size=(48, 80))},
            r"must divide the patch grid \(3, 5\); windows that do: \(3, 1\), \(1, 5\)",
        ),
    ],
)
def test_rules(config, options, message):
    with pytest.raises(UserError, match=message):
        config(**(SMALL if config is STREAM else {}) | options)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: models.LocalizerConfig(width=0), "localizer width=0 must be at least 1"),
        (lambda: models.LocalizerConfig(temperature=0.0), "localizer temperature=0.0 must be above 0"),
        (
            lambda: LocalizationObjective(MODEL(), models.LocalizerConfig(), -1.0),
            "encoder_rate=-1.0 must be at least 0",
        ),
    ],
)
def test_rules_of_the_localizer(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_windows_that_are_named_do_divide():
    for window in ((2, 2), (7, 7), (14, 14)):
        decoder = DECODER(kind="swin", window=window)
        assert MODEL(decoder=decoder, audio=STREAM(size=(224, 224), channels=1)).decoder.window == window
    for window in ((3, 1), (1, 5)):
        MODEL(decoder=DECODER(kind="swin", window=window), image=STREAM(size=(48, 80)), audio=STREAM(size=(48, 80)))
