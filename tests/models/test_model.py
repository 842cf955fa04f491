"""The whole model in every kind against float64 NumPy (numpy_model.py), and the rules that its sizes keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy_model import NumPyModel, positions_of

from av_mae import models
from av_mae.errors import UserError
from av_mae.models import encoder as stack
from av_mae.models.layers import Block
from av_mae.models.masked_autoencoder import SwinBlock

KINDS = {
    "token": {},
    "dense": {},
    "factorized": {},
    "none": {},
    "bilinear-chunked": {"pair_attention": "chunked"},
    "bilinear-materialized": {"pair_attention": "materialized"},
}
# What each stream's Swin blocks do on its grid (4, 4) and (2, 8): window and shift, block by block.
SWIN_WINDOWS = {"image": [((2, 2), (0, 0)), ((2, 2), (1, 1))], "audio": [((2, 2), (0, 0)), ((2, 2), (0, 0))]}


def config_of(kind="factorized", decoder="plain", audio=None, **fusion):
    """Streams that differ in size, patch (neither square), width and depth; both have 16 patches and keep 4,
    so that their decoders share shapes (test_plain.py and test_golden.py keep different numbers)."""
    fusion = {"tokens": (3, 2, 1), "heads": 2, "attention_ratio": 0.5, "mlp_ratio": 1.5} | fusion
    image = models.StreamConfig(
        size=(12, 20), channels=3, patch=(3, 5), width=16, depth=3, heads=2, mlp_ratio=2.0, mask_ratio=0.7
    )
    sound = {"width": 16, "heads": 2} if kind == "token" else {"width": 24, "heads": 4, "mlp_ratio": 1.0}
    audio = models.StreamConfig(
        **{
            "size": (8, 24),
            "channels": 1,
            "patch": (4, 3),
            "depth": 2,
            "mlp_ratio": 2.0,
            "mask_ratio": 0.7,
            "normalize_targets": False,
        }
        | sound
        | (audio or {})
    )
    return models.AVMAEConfig(
        image=image,
        audio=audio,
        fusion=models.FusionConfig(kind=kind.split("-")[0], **fusion),
        decoder=models.DecoderConfig(kind=decoder, width=8, depth=2, heads=2, mlp_ratio=2.0, window=(2, 2)),
    )


def filled(make, seed=1):
    """The module that `make()` builds, with NumPy's draws as parameters, so that no bias or norm is neutral."""
    graph, state = nnx.split(nnx.eval_shape(make))
    generator, flat = np.random.default_rng(seed), nnx.to_flat_state(state)
    for path, variable in flat:
        value = float(path[-1] == "scale") + 0.25 * generator.normal(size=variable.shape)
        variable.set_value(jnp.asarray(value, jnp.float32))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def model_of(*args, **options):
    return filled(lambda: models.AVMAE(config_of(*args, **options), rngs=nnx.Rngs(0)))


def shallow(kind, decoder="plain"):
    """One layer of everything: for what is compiled."""
    config = config_of(kind, decoder, audio={"depth": 1})
    config = dataclasses.replace(
        config, image=dataclasses.replace(config.image, depth=1), decoder=dataclasses.replace(config.decoder, depth=1)
    )
    return filled(lambda: models.AVMAE(config, rngs=nnx.Rngs(0)))


def inputs(batch, seed=0):
    """image, audio, image_noise, audio_noise for `config_of`."""
    generator = np.random.default_rng(seed)
    return tuple(
        map(
            np.float32,
            (
                generator.normal(size=(batch, 12, 20, 3)),
                generator.normal(size=(batch, 8, 24)),
                generator.random((batch, 16)),
                generator.random((batch, 16)),
            ),
        )
    )


def near(value, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=tolerance, atol=tolerance)


def compiled(method="losses"):
    """model, *clips → losses or output, compiled. Op by op is cheaper only where many tests share the shapes."""

    def run(graph, state, *clips):
        model = nnx.merge(graph, state)
        return model.losses(*clips) if method == "losses" else model(*clips)

    function = jax.jit(run, static_argnums=0)
    return lambda model, *clips: function(*nnx.split(model), *clips)


def check_against_numpy(model, windows=None):
    """Losses of both kinds, predictions everywhere and at the masked patches, for one clip."""
    clip = inputs(1)
    expected = NumPyModel(model, model.config).run(*(x[0] for x in clip), windows=windows)
    out, losses = model(*clip), model.losses(*clip)
    image_mask, audio_mask = model.masks(1, *map(jnp.asarray, clip[2:]))
    tokens = model.encoder(*clip[:2], image_mask.keep, audio_mask.keep)
    for name, mask, x, loss, whole_loss, prediction, decoder in (
        ("image", image_mask, tokens.image, losses[0], out[0], out[2], model.image_decoder),
        ("audio", audio_mask, tokens.audio, losses[1], out[1], out[3], model.audio_decoder),
    ):
        near(prediction[0], expected[name][1])
        near(loss[0], expected[name][0])
        near(whole_loss, expected[name][0])
        some = mask.removed[:, ::-1]  # any order of the masked patches
        near(decoder(x, tokens.fusion, mask.keep, some)[0], expected[name][1][some[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_kind_with_plain_decoders(kind):
    check_against_numpy(model_of(kind, **KINDS[kind]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bilinear-chunked"])
def test_kind_with_swin_decoders(kind):
    check_against_numpy(model_of(kind, "swin", **KINDS[kind]), SWIN_WINDOWS)


@pytest.mark.parametrize("layers,options", [((1,), {}), ((0,), {"audio": {"depth": 4}}), ((1, 0), {"width": 24})])
def test_chosen_layers_and_widths(layers, options):
    """Fusion at some layers, the sound deeper than the image, fusion tokens as wide as the sound."""
    model = model_of("dense", layers=layers, **options)
    fused = [block is not None for block in model.encoder.fusion_blocks]
    assert fused == [number in layers for number in range(max(3, options.get("audio", {}).get("depth", 2)))]
    check_against_numpy(model)


def test_all_visible_and_layers():
    """Encoder and decoder without masks; the layers that `return_layers` gives lead to the outputs."""
    model, clip = model_of("factorized"), inputs(1)
    tokens = model.encoder(*clip[:2], return_layers=True)
    everything = {"image": np.arange(16), "audio": np.arange(16)}
    reference = NumPyModel(model, model.config)
    expected = reference.encode({"image": clip[0][0], "audio": clip[1][0][..., None]}, everything)
    for name in ("image", "audio", "fusion"):
        near(getattr(tokens, name)[0], expected[name])
    near(model.encoder.audio.norm(tokens.layers[-1].audio), tokens.audio)
    np.testing.assert_array_equal(tokens.layers[2].fusion, tokens.layers[1].fusion)  # layer 2 is the image's alone
    np.testing.assert_array_equal(tokens.layers[2].audio, tokens.layers[1].audio)
    assert not np.array_equal(tokens.layers[2].image, tokens.layers[1].image)
    decoded = reference.decode("audio", expected["audio"], expected["fusion"], everything["audio"], model.config.audio)
    near(model.audio_decoder(tokens.audio, tokens.fusion)[0], decoded)
    pooled = models.pool(tokens)
    for name in pooled:
        near(pooled[name][0], expected[name].mean(0))
    assert set(models.pool(model_of("none").encoder(*clip[:2]))) == {"image", "audio"}


def test_context_is_the_full_block_over_all_tokens():
    """Identity 2: fusion tokens as keys and values only, against all of [fusion ; x] with x kept."""
    block = filled(lambda: Block(16, 2, 2.0, eps=1e-6, rngs=nnx.Rngs(0)))
    x, fusion = (np.random.default_rng(n).normal(size=(1, n, 16)).astype(np.float32) for n in (5, 3))
    expected = NumPyModel(block, None, "block.").block("block", np.concatenate([fusion[0], x[0]]), 2, 1e-6)[3:]
    near(block(x, fusion)[0], expected, 1e-5)
    assert np.abs(block(x)[0] - expected).max() > 0.01


@pytest.mark.parametrize("kind", ["factorized", "none"])
def test_information_crosses_only_through_fusion(kind):
    """Every visible image patch reaches the loss of the sound, no masked one does; without fusion none does."""
    model, (image, audio, *noises) = model_of(kind), inputs(1)
    masked = np.asarray(model.masks(1, *map(jnp.asarray, noises))[0].mask[0], bool)
    before = model.losses(image, audio, *noises)
    for number in range(16):
        changed, (row, column) = image.copy(), divmod(number, 4)
        changed[0, 3 * row, 5 * column] += 1
        image_loss, audio_loss = model.losses(changed, audio, *noises)
        assert (audio_loss[0] == before[1][0]) == (kind == "none" or masked[number])
        assert image_loss[0] != before[0][0]


def test_clips_do_not_see_one_another():
    model, clips, run = shallow("factorized"), inputs(3), compiled()
    losses = np.stack(run(model, *clips))
    order = [2, 0, 1]
    near(np.stack(run(model, *(x[order] for x in clips))), losses[:, order], 1e-6)
    single = [model.losses(*(x[n : n + 1] for x in clips)) for n in range(3)]
    near(np.concatenate([np.stack(loss) for loss in single], axis=1), losses, 1e-5)
    assert np.ptp(losses, axis=1).min() > 1e-3
    near(np.stack(compiled("output")(model, *clips)[:2]), losses.mean(1), 1e-6)
    with_channel = model.losses(*(x[:1] for x in (clips[0], clips[1][..., None], *clips[2:])))
    np.testing.assert_array_equal(np.stack(with_channel), np.stack(single[0]))


def test_masks_from_a_key():
    model = model_of("none")
    first, again, other = (model.masks(2, None, None, jax.random.key(n)) for n in (0, 0, 1))
    for mask, same, different in zip(first, again, other):
        np.testing.assert_array_equal(mask.mask, same.mask)
        assert not np.array_equal(mask.mask, different.mask)
    assert not np.array_equal(first[0].mask[0], first[0].mask[1])
    assert first[0].keep.shape == (2, 4) and first[1].keep.shape == (2, 4)
    given = model.masks(2, jnp.asarray(inputs(2)[2]), None, jax.random.key(0))
    np.testing.assert_array_equal(given[0].mask, models.random_mask(jnp.asarray(inputs(2)[2]), 4).mask)
    np.testing.assert_array_equal(given[1].mask, first[1].mask)
    with pytest.raises(UserError, match="masking needs `rng` or noise for both streams"):
        model.losses(*inputs(1)[:3])


def test_every_layer_is_run_as_asked():
    """Encoder and decoders leave it to `run`; losses stay. That gradients do is shown in test_stack.py."""
    model, clip, seen = shallow("token", "swin"), inputs(1), []

    def run(step, layers, carry, given):
        seen.append(len(layers))
        return stack.in_turn(jax.checkpoint(step, static_argnums=0), layers, carry, given)

    expected = np.stack(model.losses(*clip))
    model.encoder.run = model.image_decoder.run = model.audio_decoder.run = run
    near(np.stack(model.losses(*clip)), expected, 1e-6)
    assert seen == [1, 0, 1, 0, 1]  # the encoder's layer; each decoder's blocks before the last, and the last


def test_bfloat16_parameters_give_bfloat16_activations():
    model, clip = shallow("factorized"), inputs(1)
    expected = np.stack(model.losses(*clip))
    graph, state = nnx.split(model)
    half = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    losses = np.stack(compiled()(half, *clip))
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=0.03)
    assert np.abs(losses - expected).max() > 1e-5  # it did compute in half precision
    shapes = jax.eval_shape(lambda *x: (half.encoder(*x, return_layers=True), half(*clip)[2:4]), *clip[:2])
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    "grid,window,used,shift",
    [
        ((4, 4), (2, 2), (2, 2), (1, 1)),
        ((8, 8), (4, 4), (4, 4), (2, 2)),
        ((8, 4), (4, 2), (4, 2), (2, 1)),
        ((3, 3), (4, 4), (3, 3), (0, 0)),
        ((2, 4), (4, 4), (2, 2), (0, 0)),
        ((1, 6), (1, 3), (1, 3), (0, 0)),
    ],
)
def test_swin_windows_and_shifts(grid, window, used, shift):
    """A grid no longer than the window on one side is cut to windows of that side, and nothing is shifted."""
    make = lambda shifted: nnx.eval_shape(
        lambda: SwinBlock(8, 2, 1.0, grid=grid, window=window, shifted=shifted, rngs=nnx.Rngs(0))
    )
    assert [(block.window, block.shift) for block in map(make, (True, False))] == [(used, shift), (used, (0, 0))]


@pytest.mark.parametrize("grid,window,used,shift", [((6, 9), (2, 3), (2, 3), (1, 1)), ((2, 4), (4, 4), (2, 2), (0, 0))])
def test_swin_block_against_windows_found_by_place(grid, window, used, shift):
    block = filled(lambda: SwinBlock(8, 2, 1.0, grid=grid, window=window, shifted=True, rngs=nnx.Rngs(0)))
    generator, tokens = np.random.default_rng(0), grid[0] * grid[1]
    x, fusion = (generator.normal(size=(2, n, 8)).astype(np.float32) for n in (tokens, 3))
    some = np.array([[tokens - 1, 0], [1, 2]])
    run = jax.jit(lambda state, *args: nnx.merge(nnx.graphdef(block), state)(*args))
    everywhere, at_some = run(nnx.state(block), x, fusion), run(nnx.state(block), x, fusion, some)
    reference = NumPyModel(block, config_of(), "block.")
    for clip in range(2):
        expected = reference.swin_block("block", x[clip], fusion[clip], grid, used, shift)
        near(everywhere[0][clip], expected[0])
        near(at_some[0][clip], expected[0][some[clip]])
        near(everywhere[1][clip], expected[1])


def test_initial_parameters():
    """Xavier uniform over the published system's fused weights, N(0, 0.02) tokens, zero biases, unit norms."""
    stream = {"size": (32, 32), "patch": 8, "width": 64, "depth": 1, "heads": 4, "mlp_ratio": 3.0}
    model = models.AVMAE(
        models.AVMAEConfig(
            image=models.StreamConfig(**stream),
            audio=models.StreamConfig(channels=1, **stream),
            fusion=models.FusionConfig(tokens=(20, 6, 6), heads=4, attention_ratio=0.5, mlp_ratio=3.0),
            decoder=models.DecoderConfig(width=64, depth=1, heads=4, mlp_ratio=3.0),
        ),
        rngs=nnx.Rngs(0),
    )
    p = NumPyModel(model, model.config).p
    block, fusion = "encoder.image.blocks.0", "encoder.fusion_blocks.0"
    fans = {
        f"{block}.attention.query": (64, 192),
        f"{block}.attention.value": (64, 192),
        f"{block}.attention.out": (64, 64),
        f"{block}.mlp.fc1": (64, 192),
        "encoder.image.patch_embed": (192, 64),
        f"{fusion}.attention.aggregate_image.query": (64, 64),
        f"{fusion}.attention.aggregate_audio.key": (64, 128),
        f"{fusion}.attention.pairs.query": (64, 32),
        f"{fusion}.attention.pairs.key_image": (128, 32),
        f"{fusion}.attention.pairs.value_audio": (128, 64),
        f"{fusion}.mlp.fc2": (192, 64),
        "audio_decoder.embed": (64, 64),
        "image_decoder.predict": (64, 192),
    }
    for name, (fan_in, fan_out) in fans.items():
        kernel, bound = p[f"{name}.kernel"], (6 / (fan_in + fan_out)) ** 0.5
        assert 0.98 * bound < np.abs(kernel).max() <= bound * (1 + 1e-6), name
        assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.05), name
    for name, value in p.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif name.endswith("scale"):
            assert (value == 1).all(), name
    assert p["encoder.fusion_tokens"].shape == (1, 32, 64)
    assert p["encoder.fusion_tokens"].std() == pytest.approx(0.02, rel=0.1)
    assert p["image_decoder.mask_token"].std() == pytest.approx(0.02, rel=0.3)
    near(p["audio_decoder.positions"][0], positions_of((4, 4), 64), 1e-6)


@pytest.mark.parametrize(
    "kind,expected",
    [
        ("none", set()),
        ("token", {"fusion_tokens", "fusion_norm", "fusion_blocks"}),
        ("dense", {"fusion_tokens", "fusion_norm", "fusion_blocks", "bridges", "fusion_embed"}),
    ],
)
def test_parameters_of_fusion_exist_only_where_used(kind, expected):
    """Bridges and embeddings of fusion tokens belong to a stream of another width; none without fusion."""
    model = nnx.eval_shape(lambda: models.AVMAE(config_of(kind, layers=(1,)), rngs=nnx.Rngs(0)))
    paths = [tuple(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    parts = {"fusion_tokens", "fusion_norm", "fusion_blocks", "bridges", "fusion_embed"}
    assert {part for path in paths for part in path if part in parts} == expected
    assert not [path for path in paths if {"bridges", "fusion_embed"} & set(path) and "audio" not in path[0] + path[1]]
    assert {path[2] for path in paths if path[1] == "fusion_blocks"} <= {"1"}


@pytest.mark.parametrize(
    "kind,decoder,options",
    [
        ("token", "plain", {}),
        ("bilinear", "plain", {"pair_attention": "materialized"}),
        ("none", "swin", {}),
        ("factorized", "swin", {}),
        ("dense", "swin", {"layers": (1,), "width": 768}),
    ],
)
def test_closed_form_flops_match_the_lowered_program(kind, decoder, options):
    """Wide streams of a few patches, lowered only: elementwise work is small beside matrix products."""
    audio = {"width": 512} if kind == "dense" else {"width": 768}
    stream = {"patch": 16, "heads": 8, "mask_ratio": 0.75}
    config = models.AVMAEConfig(
        image=models.StreamConfig(size=(128, 128), width=768, depth=2, **stream),
        audio=models.StreamConfig(size=(64, 128), channels=1, depth=3, **audio, **stream),
        fusion=models.FusionConfig(kind=kind, heads=8, **options),
        decoder=models.DecoderConfig(kind=decoder, width=512, depth=2, heads=8),
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: models.AVMAE(config, rngs=nnx.Rngs(0))), nnx.Param)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 128, 128, 3), (1, 64, 128), (1, 64), (1, 32))]
    lowered = jax.jit(lambda state, *args: nnx.merge(graph, state).losses(*args)).lower(state, *args)
    found = lowered.cost_analysis()["flops"]
    assert found == pytest.approx(models.closed_form_flops(config), rel=0.05)
