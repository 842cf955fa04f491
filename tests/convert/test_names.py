"""Published names and layouts: which tensor is which, by hand; every array of a model once; what has no name."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from tiny_training import MODEL

from av_mae import models
from av_mae.convert.names import LINEAR, PAIRS, ROWS, axes, names_of, patches
from av_mae.errors import UserError
from av_mae.models.kinds import flat_values

RANDOM = np.random.default_rng(0)


def model_of(kind="factorized", image=None, audio=None, **fusion):
    config = dataclasses.replace(
        MODEL,
        image=dataclasses.replace(MODEL.image, **(image or {})),
        audio=dataclasses.replace(MODEL.audio, **(audio or {})),
        fusion=dataclasses.replace(MODEL.fusion, kind=kind, **fusion),
    )
    return nnx.eval_shape(lambda: models.AVMAE(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("kind", ["factorized", "dense", "token", "none"])
def test_every_array_has_one_name(kind):
    model = model_of(kind)
    named = [path for rule in names_of(model).rules.values() for path in rule.here]
    assert sorted(named) == sorted(flat_values(model))


def test_queries_keys_and_values_lie_one_after_the_other():
    rules = names_of(model_of()).rules
    begin = "encoder.image.blocks.0.attention"
    assert rules["encoder.image.blocks.0.attn.qkv.weight"].here == (
        f"{begin}.query.kernel",
        f"{begin}.key.kernel",
        f"{begin}.value.kernel",
    )
    weight = RANDOM.normal(size=(6, 4))
    query, key, value = LINEAR.split(weight, 3)
    for part, rows in ((query, weight[:2]), (key, weight[2:4]), (value, weight[4:])):
        np.testing.assert_array_equal(part, rows.T)


def test_halves_of_pairs():
    """[audio ; image] in dense, [image ; audio] in factorized; keys before values; one bias."""
    begin = "encoder.fusion_blocks.0.attention"
    dense = names_of(model_of("dense")).rules
    assert dense["encoder.fusion_blocks.0.attn.kv.weight"].here == (
        f"{begin}.key_audio.kernel",
        f"{begin}.key_image.kernel",
        f"{begin}.value_audio.kernel",
        f"{begin}.value_image.kernel",
    )
    assert dense["encoder.fusion_blocks.0.attn.kv.bias"].here == (
        f"{begin}.key_image.bias",
        f"{begin}.value_image.bias",
    )
    factorized = names_of(model_of()).rules
    assert factorized["encoder.fusion_blocks.0.attn.v.weight"].here == (
        f"{begin}.pairs.value_image.kernel",
        f"{begin}.pairs.value_audio.kernel",
    )
    weight = RANDOM.normal(size=(4, 6))
    quarters = PAIRS.split(weight, 4)
    for part, expected in zip(quarters, (weight[:2, :3], weight[:2, 3:], weight[2:, :3], weight[2:, 3:]), strict=True):
        np.testing.assert_array_equal(part, expected.T)


def test_norms_of_token_fusion_are_swapped():
    for kind, stream in (("token", "audio"), ("dense", "image"), ("factorized", "image")):
        rule = names_of(model_of(kind)).rules["encoder.fusion_blocks.0.norm1_img.weight"]
        assert rule.here == (f"encoder.fusion_blocks.0.norm_{stream}.scale",)


@pytest.mark.parametrize(
    "layout,shape,parts",
    [
        (ROWS, (6,), 3),
        (ROWS, (1, 5, 4), 1),
        (LINEAR, (6, 4), 1),
        (LINEAR, (6, 4), 2),
        (PAIRS, (6, 4), 2),
        (PAIRS, (6, 4), 4),
        (axes((2, 3, 1, 0)), (5, 4, 3, 2), 1),
        (axes((2, 3, 0, 1)), (5, 4, 3, 2), 1),
        (axes(()), (), 1),
    ],
)
def test_layouts_come_back(layout, shape, parts):
    value = RANDOM.normal(size=shape)
    pieces = layout.split(value, parts)
    assert len(pieces) == parts and layout.shape([piece.shape for piece in pieces]) == shape
    np.testing.assert_array_equal(layout.join(pieces), value)


def test_patch_embedding_against_a_convolution():
    """A patch of 2 × 3 in 2 channels: row, column, channel, whatever the order of the convolution's axes."""
    layout = patches(models.StreamConfig(size=(4, 6), channels=2, patch=(2, 3), width=4, heads=1, mask_ratio=0.5))
    weight, patch = RANDOM.normal(size=(5, 2, 2, 3)), RANDOM.normal(size=(2, 3, 2))
    (kernel,) = layout.split(weight, 1)
    expected = [
        sum(weight[o, c, i, j] * patch[i, j, c] for c in range(2) for i in range(2) for j in range(3)) for o in range(5)
    ]
    np.testing.assert_allclose(patch.reshape(-1) @ kernel, expected, rtol=1e-12)
    np.testing.assert_array_equal(layout.join([kernel]), weight)
    assert layout.shape([kernel.shape]) == weight.shape


def test_fusion_at_some_layers_keeps_its_numbers():
    depth = {"depth": 3}
    names = names_of(model_of(image=depth, audio=depth, layers=(0, 2))).rules
    assert {name.split(".")[2] for name in names if name.startswith("encoder.fusion_blocks.")} == {"0", "2"}


@pytest.mark.parametrize(
    "options,message",
    [
        ({"kind": "bilinear", "pair_attention": "chunked"}, "no bilinear fusion"),
        ({"kind": "dense", "audio": {"width": 64, "heads": 4}}, "equally wide; here the audio stream is 64 wide"),
        ({"kind": "dense", "image": {"depth": 2}}, "2 and 1 layers"),
    ],
)
def test_what_has_no_published_form(options, message):
    with pytest.raises(UserError, match=message):
        names_of(model_of(**options))
