"""The mesh, the rows of a process, and where parameters lie."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_training import first_parameters, make_step, on_mesh, recipe, unfused

from av_mae.config import MeshConfig
from av_mae.errors import UserError
from av_mae.training import mesh


@pytest.mark.parametrize("config, devices, expected", [
    (MeshConfig(), 8, (8, 1, 1)),
    (MeshConfig(-1, 4), 8, (2, 4, 1)),
    (MeshConfig(2, -1), 8, (2, 4, 1)),
    (MeshConfig(1, 1), 1, (1, 1, 1)),
    (MeshConfig(3, 2, -1), 6, (3, 2, 1)),
])
def test_shape(config, devices, expected):
    assert mesh.mesh_shape(config, devices) == expected


@pytest.mark.parametrize("config, devices, message", [
    (MeshConfig(2, 2), 8, r"mesh.data=2, mesh.fsdp=2, mesh.tensor=1 makes 4, there are 8 devices"),
    (MeshConfig(-1, 3), 8, r"must divide the 8 devices, got .*mesh.fsdp=3"),
    (MeshConfig(-1, 1, 2), 8, r"mesh.tensor=2 is not supported yet"),
    (MeshConfig(4, 1, -1), 8, r"mesh.tensor=2 is not supported yet"),
])
def test_shape_refused(config, devices, message):
    with pytest.raises(UserError, match=message):
        mesh.mesh_shape(config, devices)


@pytest.mark.parametrize("batch_size, accumulation", [(12, 1), (16, 4), (4, 1)])
def test_batch_that_does_not_divide_is_refused(batch_size, accumulation):
    made = mesh.make_mesh(MeshConfig(2, 4))
    with pytest.raises(UserError, match=rf"batch_size={batch_size} must be a multiple of .* 2 × 4 × {accumulation} ="):
        mesh.check_batch(made, batch_size, accumulation)
    with pytest.raises(UserError, match="must be a multiple"):
        make_step(recipe(batch_size=12, mesh=MeshConfig(8)), 8)


def test_rows_of_one_process_are_all_rows():
    rows = mesh.local_rows(mesh.batch_sharding(mesh.make_mesh(MeshConfig(4, 2))), 24)
    np.testing.assert_array_equal(rows, np.arange(24))


def test_rows_of_a_process_with_some_devices():
    made = mesh.make_mesh(MeshConfig(4, 2))
    full = mesh.batch_sharding(made).devices_indices_map((24,))
    mine = {device: full[device] for device in list(made.devices.flat)[4:]}
    sharding = SimpleNamespace(addressable_devices_indices_map=lambda shape: mine)
    np.testing.assert_array_equal(mesh.local_rows(sharding, 24), np.arange(12, 24))


@pytest.mark.parametrize("shape, expected", [
    ((768, 3072), PartitionSpec("fsdp", None)),
    ((770, 3072), PartitionSpec(None, "fsdp")),  # 4 does not divide the inputs: the outputs are cut
    ((768,), PartitionSpec()),  # small
    ((32768,), PartitionSpec("fsdp")),
    ((1, 196, 512), PartitionSpec(None, "fsdp", None)),
    ((1, 97, 512), PartitionSpec(None, None, "fsdp")),
    ((3, 3, 64, 128), PartitionSpec(None, None, "fsdp", None)),
    ((99, 99), PartitionSpec()),  # nothing divides, but it is not large
])
def test_parameter_spec(shape, expected):
    assert mesh.parameter_spec("name", shape, mesh.make_mesh(MeshConfig(2, 4))) == expected


def test_large_parameter_left_whole_is_refused():
    made = mesh.make_mesh(MeshConfig(2, 4))
    with pytest.raises(UserError, match=r"mesh.fsdp=4 divides no dimension of parameter encoder.x \(333, 333\)"):
        mesh.parameter_spec("encoder.x", (333, 333), made)
    whole = mesh.make_mesh(MeshConfig(8, 1))
    assert mesh.parameter_spec("encoder.x", (333, 333), whole) == PartitionSpec()


def test_state_is_born_in_shards(monkeypatch):
    """No device ever gets a whole large parameter or moment: the init's own outputs are cut."""
    monkeypatch.setattr(mesh, "SMALL", 64)
    step = on_mesh(recipe(unfused()), 2, 4)
    state = step.init()
    moments = state.opt_state[1]
    for arrays in (state.params, moments.mu, moments.nu):
        for name, x in arrays.items():
            expected = x.size // 4 if x.ndim > 1 and x.size >= 64 else x.size
            if x.ndim > 1:
                assert {math.prod(shard.data.shape) for shard in x.addressable_shards} == {expected}, name
    for name, x in first_parameters(unfused()).items():  # and the mesh does not change a value
        np.testing.assert_array_equal(jax.device_get(state.params[name]), x, err_msg=name)


def test_gathered_weights_are_not_kept_for_the_backward_pass(monkeypatch):
    """The gradient gathers every cut weight a second time instead of keeping it whole in between."""
    monkeypatch.setattr(mesh, "SMALL", 64)
    step = on_mesh(recipe(), 2, 4)
    cut = sum(not sharding.is_fully_replicated for sharding in step.shardings.params.values())
    batch = {"image": jax.ShapeDtypeStruct((16, 32, 48, 3), np.uint8),
             "audio": jax.ShapeDtypeStruct((16, 32, 32), np.float32), "valid": jax.ShapeDtypeStruct((16,), bool)}
    text = step.step.lower(step.abstract_state(), batch).as_text()
    constraints = text.count("sdy.sharding_constraint")
    # gather, gather once more, sum and cut of the gradient
    assert cut > 20 and constraints > 3.6 * cut
