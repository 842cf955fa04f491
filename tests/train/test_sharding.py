"""Data, fully sharded and tensor parallelism: the same figures on every mesh, and who holds what."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_training import batches, first_parameters, make_step, on_mesh, recipe, run_steps, unfused

from av_mae import config as sizes
from av_mae.config import MeshConfig
from av_mae.errors import UserError
from av_mae.models.config import AVMAEConfig, DecoderConfig, FusionConfig, StreamConfig
from av_mae.models.kinds import define_model
from av_mae.models.layers import FROM_HEADS, TO_HEADS, Initial
from av_mae.train import sharding, step
from av_mae.train import sharding as mesh

# Every factorisation of 8 into data × fsdp × tensor.
MESHES = [(data, fsdp, 8 // (data * fsdp)) for data in (8, 4, 2, 1) for fsdp in (1, 2, 4, 8) if data * fsdp <= 8]
DEFAULT_MESHES = [(2, 2, 2), (1, 1, 8)]
ENCODER = {"width": 32, "depth": 1, "heads": 8}
# As the tiny model, with as many heads as there are devices.
HEADS_8 = AVMAEConfig(
    image=StreamConfig(size=(32, 48), patch=16, mask_ratio=0.5, **ENCODER),
    audio=StreamConfig(size=(32, 32), channels=1, patch=16, mask_ratio=0.5, **ENCODER),
    fusion=FusionConfig(tokens=(2, 1, 1), heads=8),
    decoder=DecoderConfig(width=32, depth=2, heads=8),
)


def of_mesh(shape):
    return mesh.make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])


@pytest.fixture(scope="module")
def reference():
    """Figures of ten steps on one device."""
    config = recipe(HEADS_8)
    return run_steps(make_step(config), batches(config, 10))[1]


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=[] if shape in DEFAULT_MESHES else [pytest.mark.slow]) for shape in MESHES]
)
def test_same_losses_on_every_mesh(monkeypatch, reference, shape):
    monkeypatch.setattr(sharding, "SMALL", 64)
    config = recipe(HEADS_8)
    _, history = run_steps(on_mesh(config, *shape), batches(config, 10))
    for ours, expected in zip(history, reference, strict=True):
        for name in ("loss", "image_loss", "audio_loss", "learning_rate", "valid"):
            np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours["grad_norm"], expected["grad_norm"], rtol=1e-4)
    assert history[0]["loss"] > 1.05 * history[-1]["loss"]


@pytest.fixture(scope="module")
def base_definition():
    """Initial values' shapes and names of two layers of ViT-B, factorized, and of decoders."""
    model = sizes.sized_model("base")
    model = dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, depth=2),
        audio=dataclasses.replace(model.audio, depth=2),
        decoder=dataclasses.replace(model.decoder, depth=2),
    )
    return define_model(step.Pretraining(model).build)[0].initials


@pytest.mark.parametrize("shape", MESHES)
def test_memory_of_base_is_divided(base_definition, shape):
    """Parameters of one device, which moments follow: the total / (fsdp · tensor), within 5 %."""
    shardings = sharding.param_shardings(base_definition, of_mesh(shape))
    total = sum(math.prod(initial.shape) for initial in base_definition.values())
    own = sum(math.prod(shardings[name].stored.shard_shape(initial.shape)) for name, initial in base_definition.items())
    assert total > 5e7
    assert own == pytest.approx(total / (shape[1] * shape[2]), rel=0.05)


@pytest.mark.parametrize("shape", [pytest.param((2, 4, 1), marks=pytest.mark.slow), (1, 2, 4)])
def test_state_is_born_in_shards(monkeypatch, shape):
    """No device ever gets a whole large parameter or moment: the init's own outputs are cut."""
    monkeypatch.setattr(sharding, "SMALL", 64)
    model = dataclasses.replace(
        unfused(),
        decoder=DecoderConfig(width=32, depth=1, heads=4),
        image=dataclasses.replace(unfused().image, heads=4),
        audio=dataclasses.replace(unfused().audio, heads=4),
    )
    state = on_mesh(recipe(model), *shape).init()
    moments = state.opt_state[1]
    for arrays in (state.params, moments.mu, moments.nu):
        for name, x in arrays.items():
            held = {math.prod(shard.data.shape) for shard in x.addressable_shards}
            if x.ndim > 1:
                assert held == {x.size // (shape[1] * shape[2]) if x.size >= 64 else x.size}, name
    for name, x in first_parameters(model).items():  # and the mesh does not change a value
        np.testing.assert_array_equal(jax.device_get(state.params[name]), x, err_msg=name)


@pytest.mark.parametrize(
    "devices, shape, axes, stored, read",
    [
        ((2, 4, 1), (768, 3072), ("width", "mlp"), ("fsdp",), ()),
        ((2, 4, 1), (770, 3072), ("width", "mlp"), (None, "fsdp"), ()),  # 4 does not divide the inputs
        ((2, 4, 1), (768,), ("width",), (), ()),  # small
        ((2, 4, 1), (32768,), ("width",), ("fsdp",), ()),
        ((2, 4, 1), (1, 196, 512), (), (None, "fsdp"), ()),
        ((2, 4, 1), (1, 97, 512), (), (None, None, "fsdp"), ()),
        ((2, 4, 1), (3, 3, 64, 128), (), (None, None, "fsdp"), ()),
        ((2, 4, 1), (99, 99), (), (), ()),  # nothing divides, but it is not large
        ((1, 2, 4), (768, 768), TO_HEADS, ("fsdp", "tensor"), (None, "tensor")),
        ((1, 2, 4), (768, 768), FROM_HEADS, ("tensor", "fsdp"), ("tensor",)),
        ((1, 2, 4), (768,), ("heads",), ("tensor",), ("tensor",)),
        ((1, 2, 4), (768, 512), ("width", "width"), ("fsdp", "tensor"), ()),
        ((1, 2, 4), (768, 333), ("width", "width"), (("fsdp", "tensor"),), ()),
        ((1, 2, 4), (333, 768), FROM_HEADS[::-1], (None, ("tensor", "fsdp")), (None, "tensor")),
    ],
)
def test_placement(devices, shape, axes, stored, read):
    placed = sharding.param_sharding("name", Initial("normal", shape, axes=axes), of_mesh(devices))
    assert placed.stored.is_equivalent_to(jax.NamedSharding(of_mesh(devices), PartitionSpec(*stored)), len(shape))
    assert placed.read.is_equivalent_to(jax.NamedSharding(of_mesh(devices), PartitionSpec(*read)), len(shape))


@pytest.mark.parametrize(
    "devices, shape, axes, message",
    [
        ((2, 4, 1), (333, 333), (), r"mesh.fsdp=4 divides no dimension of parameter encoder.x \(333, 333\)"),
        ((2, 1, 4), (333, 333), (), r"mesh.tensor=4 divides no dimension of parameter encoder.x \(333, 333\)"),
        (
            (2, 1, 4),
            (768, 30),
            ("width", "mlp"),
            r"mesh.tensor=4 must divide the 30 of parameter encoder.x \(768, 30\)",
        ),
    ],
)
def test_large_parameter_left_whole_is_refused(devices, shape, axes, message):
    initial = Initial("normal", shape, axes=axes)
    with pytest.raises(UserError, match=message):
        sharding.param_sharding("encoder.x", initial, of_mesh(devices))
    assert not sharding.param_sharding("encoder.x", initial, of_mesh((8, 1, 1))).gathered


def test_heads_cut_in_two_are_refused():
    model = dataclasses.replace(HEADS_8, decoder=DecoderConfig(width=32, depth=1, heads=2))
    with pytest.raises(UserError, match="mesh.tensor=4 must divide model.decoder.heads=2"):
        on_mesh(recipe(model), 2, 1, 4)
    with pytest.raises(UserError, match="mesh.tensor=8 must divide model.image.heads=12"):
        sharding.check_heads(sizes.sized_model("base"), of_mesh((1, 1, 8)))


def test_gathered_weights_are_not_kept_for_the_backward_pass(monkeypatch):
    """The gradient gathers the cut weights that it needs a second time; a policy that saves everything keeps them."""
    monkeypatch.setattr(sharding, "SMALL", 64)
    train_step = on_mesh(recipe(), 2, 4)
    cut = sum(one.gathered for one in train_step.param_shardings.values())
    batch = {
        "image": jax.ShapeDtypeStruct((16, 32, 48, 3), np.uint8),
        "audio": jax.ShapeDtypeStruct((16, 32, 32), np.float32),
        "valid": jax.ShapeDtypeStruct((16,), bool),
    }

    def constraints() -> int:
        program = jax.jit(lambda *arguments: train_step.train_step(*arguments))
        return program.lower(train_step.abstract_state(), batch).as_text().count("sdy.sharding_constraint")

    again = constraints()
    monkeypatch.setattr(train_step, "keep", jax.checkpoint_policies.everything_saveable)
    assert cut > 20 and again - constraints() > 0.6 * cut
