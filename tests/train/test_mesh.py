"""The mesh, the rows of a process, and where parameters lie."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_training import first_parameters, make_step, recipe

from av_mae.config import MeshConfig
from av_mae.errors import UserError
from av_mae.train import sharding as mesh
from av_mae.train import step


@pytest.mark.parametrize(
    "config, devices, expected",
    [
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(-1, 4), 8, (2, 4, 1)),
        (MeshConfig(2, -1), 8, (2, 4, 1)),
        (MeshConfig(1, 1), 1, (1, 1, 1)),
        (MeshConfig(3, 2, -1), 6, (3, 2, 1)),
        (MeshConfig(-1, 1, 2), 8, (4, 1, 2)),
        (MeshConfig(2, 1, -1), 12, (2, 1, 6)),
    ],
)
def test_shape(config, devices, expected):
    assert mesh.mesh_shape(config, devices) == expected


@pytest.mark.parametrize(
    "config, devices, message",
    [
        (MeshConfig(2, 2), 8, r"mesh.data=2, mesh.fsdp=2, mesh.tensor=1 makes 4, there are 8 devices"),
        (MeshConfig(-1, 3), 8, r"must divide the 8 devices, got .*mesh.fsdp=3"),
        (MeshConfig(4, 1, 3), 8, r"mesh.data=4, mesh.fsdp=1, mesh.tensor=3 makes 12"),
    ],
)
def test_shape_refused(config, devices, message):
    with pytest.raises(UserError, match=message):
        mesh.mesh_shape(config, devices)


@pytest.mark.parametrize("slices, per_slice, shape", [((0, 0, 1, 1), 2, (2, 2, 1)), ((0, 0, 1, 1, 2, 2), 2, (6, 1, 1))])
def test_slices_lie_along_data(slices, per_slice, shape):
    """Neighbours along fsdp are of one slice; along data, one slice comes after the other."""
    devices = [SimpleNamespace(slice_index=number, platform="tpu") for number in slices]
    made = mesh.slices_of(MeshConfig(), devices[::-1])
    assert [{device.slice_index for device in part} for part in made] == [{n} for n in sorted({*slices})[::-1]]
    assert {len(part) for part in made} == {per_slice}
    assert mesh.mesh_shape(MeshConfig(-1, shape[1]), len(devices), len(made)) == shape
    hosts = [SimpleNamespace(slice_index=number, platform="gpu") for number in slices]  # of GPUs: no border for fsdp
    assert mesh.slices_of(MeshConfig(), hosts) == [hosts]


@pytest.mark.parametrize("shape", [(4, 4, 1), (16, 1, 1), (2, 8, 1), (1, 8, 2)])
def test_a_torus_of_4_x_4_takes_every_mesh(shape):
    """Also those for which an axis of the torus is split; along fsdp the first two chips are neighbours."""
    chips = [
        SimpleNamespace(
            id=4 * y + x, coords=(x, y, 0), core_on_chip=0, platform="tpu", process_index=0, device_kind="TPU v5 lite"
        )
        for y in range(4)
        for x in range(4)
    ]
    arranged = mesh.arranged(shape, chips)
    assert arranged.shape == shape and {chip.id for chip in arranged.flat} == set(range(16))
    along = arranged.reshape(-1, shape[1], shape[2])[0, :2, 0]
    assert sum(abs(one - other) for one, other in zip(along[0].coords, along[-1].coords, strict=True)) in (0, 1)


def test_slices_told_by_the_configuration():
    made = mesh.make_mesh(MeshConfig(4, 2, 1, slices=2))
    assert [device.id for device in made.devices[:2].flat] == [device.id for device in jax.devices()[:4]]
    with pytest.raises(UserError, match="mesh.data=1 must be a multiple of the 2 slices"):
        mesh.make_mesh(MeshConfig(1, 8, 1, slices=2))
    with pytest.raises(UserError, match="mesh.slices=3 does not fit 8 devices on 1 slices"):
        mesh.make_mesh(MeshConfig(slices=3))


@pytest.mark.parametrize(
    "parameters, tensor, expected",
    [(100, 1, 1), (10**6, 1, 1), (2 * 10**6, 1, 1), (3 * 10**6, 1, 2), (9 * 10**6, 1, 8), (9 * 10**6, 2, 4)],
)
def test_mesh_that_fits_the_model(parameters, tensor, expected):
    """18 bytes a parameter in 40 % of 100 MB: 2.2 million on each device."""
    config = MeshConfig(-1, 0, tensor)
    assert mesh.fitted(config, jax.devices(), parameters, 100 * 10**6) == MeshConfig(-1, expected, tensor)
    assert mesh.fitted(MeshConfig(-1, 2), jax.devices(), parameters, 1) == MeshConfig(-1, 2)


def test_model_that_no_mesh_fits():
    with pytest.raises(UserError, match=r"18 million parameters need 0.3 GB .* the 8 devices .* 40% of the 0.1 GB"):
        mesh.fitted(MeshConfig(), jax.devices(), 18 * 10**6, 100 * 10**6)


def test_recipe_is_fitted_to_this_machine(monkeypatch):
    assert mesh.memory_limit() == 0 and step.fitted_mesh(recipe()) == recipe().mesh  # CPUs tell no limit
    parameters = sum(x.size for x in first_parameters(recipe().model).values())
    for devices in (1, 2, 8):  # a tenth more than 18 bytes a parameter over so many devices, in 40 % of the memory
        monkeypatch.setattr(step, "memory_limit", lambda devices=devices: int(1.1 * 18 * parameters / 0.4 / devices))
        assert step.fitted_mesh(recipe()) == MeshConfig(-1, devices)


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
