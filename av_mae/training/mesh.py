"""Devices as a mesh with the axes 'data', 'fsdp' and 'tensor', and where the rows of a batch lie on it."""

import dataclasses
import json
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from av_mae.config import MeshConfig
from av_mae.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))
# A trained parameter in memory: value, gradient and two moments in float32, and a copy in bfloat16.
BYTES_PER_PARAMETER = 18
# How much of a device's memory these may take where mesh.fsdp is chosen to fit; the rest is for activations.
STATE_SHARE = 0.4


def slices_of(config: MeshConfig, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Devices that share a fast network, together: as many equal parts as TPUs tell, or `config.slices`.

    Raises:
      UserError: config.slices contradicts the devices, or does not divide them.
    """
    parts = {}
    for device in devices:
        number = getattr(device, "slice_index", None) if device.platform == "tpu" else None
        parts.setdefault(number or 0, []).append(device)
    if config.slices in (0, len(parts)):
        return list(parts.values())
    if len(parts) > 1 or len(devices) % config.slices:
        raise UserError(f"mesh.slices={config.slices} does not fit {len(devices)} devices on {len(parts)} slices: "
                        "leave it at 0 to take what the devices tell")
    size = len(devices) // config.slices
    return [list(devices[start:start + size]) for start in range(0, len(devices), size)]


def mesh_shape(config: MeshConfig, devices: int, slices: int = 1) -> tuple[int, int, int]:
    """Sizes of the axes (data, fsdp, tensor) over the given number of devices; -1 takes what is left.

    fsdp=0 that no `fitted` has replaced is 1.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or fsdp or tensor would reach over slices.
    """
    sizes = [config.data, config.fsdp or 1, config.tensor]
    shown = "mesh.data={}, mesh.fsdp={}, mesh.tensor={}".format(*sizes)
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        if devices % rest:
            raise UserError(f"the mesh axes that are given must divide the {devices} devices, got {shown}")
        sizes[sizes.index(-1)] = devices // rest
    if math.prod(sizes) != devices:
        raise UserError(f"the mesh axes must multiply to the number of devices: {shown} makes "
                        f"{math.prod(sizes)}, there are {devices} devices; set one axis to -1 to take what is left")
    if sizes[0] % slices:
        raise UserError(f"mesh.data={sizes[0]} must be a multiple of the {slices} slices, between which only gradients "
                        f"travel, got {shown}: mesh.fsdp × mesh.tensor must divide the {devices // slices} devices "
                        "of one")
    return tuple(sizes)


def memory_limit() -> int:
    """Bytes that a device of this process has for arrays; 0 where it tells nothing (CPUs)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def fitted(config: MeshConfig, devices: Sequence[jax.Device], parameters: int, memory: int) -> MeshConfig:
    """`config` with its fsdp=0 replaced: as few devices as hold the parameters, beside activations, in `memory` bytes.

    Raises:
      UserError: not even all devices of a slice hold them.
    """
    if config.fsdp:
        return config
    slices = slices_of(config, devices)
    tensor = config.tensor if config.tensor > 0 else 1
    choices = [n for n in range(1, len(slices[0]) + 1) if len(slices[0]) % (n * tensor) == 0]
    needed = BYTES_PER_PARAMETER * parameters / (STATE_SHARE * memory * tensor)
    fitting = [n for n in choices if n >= needed]
    if not fitting:
        size = BYTES_PER_PARAMETER * parameters / 1e9
        raise UserError(f"{parameters / 1e6:.0f} million parameters need {size:.1f} GB for themselves, gradients and "
                        f"moments; cut over the {len(slices[0])} devices of a slice that is above {STATE_SHARE:.0%} "
                        f"of the {memory / 1e9:.1f} GB of each: use more devices, or set mesh.fsdp yourself")
    return dataclasses.replace(config, fsdp=fitting[0])


def arranged(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of a slice in `shape`, neighbours of the last axes beside one another in the slice's torus."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # an axis of the torus has to be split, as for fsdp=8 in 4 × 4 chips
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the given devices (None: all devices of all processes).

    Slices lie one after the other along 'data', so that fsdp and tensor stay on the fast network inside each.

    Raises:
      UserError: see `mesh_shape` and `slices_of`.
    """
    slices = slices_of(config, jax.devices() if devices is None else devices)
    data, fsdp, tensor = mesh_shape(config, sum(map(len, slices)), len(slices))
    inside = [arranged((data // len(slices), fsdp, tensor), part) for part in slices]
    return Mesh(np.concatenate(inside), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, batch_size: int, accumulation: int) -> None:
    """Raises UserError unless every device gets the same number of rows in each of `accumulation` parts."""
    shards = row_shards(mesh)
    if accumulation < 1 or batch_size < 1 or batch_size % (shards * accumulation):
        raise UserError(
            f"batch_size={batch_size} must be a multiple of data × fsdp × grad_accumulation = {mesh.shape['data']} × "
            f"{mesh.shape['fsdp']} × {accumulation} = {shards * accumulation}: change batch_size, "
            "grad_accumulation or the mesh")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over 'data' and 'fsdp', everything else whole."""
    return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process holds: int64 [b], ascending, each once."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def gather_texts(texts: Sequence[str]) -> list[str]:
    """The texts of all processes, those of the first process first; every process must call this."""
    if jax.process_count() == 1:
        return list(texts)
    own = np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[:len(own)] = own
    parts = multihost_utils.process_allgather(padded)
    return [text for part, size in zip(parts, sizes, strict=True) for text in json.loads(part[:int(size)].tobytes())]
