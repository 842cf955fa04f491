"""Devices as a mesh with the axes 'data', 'fsdp' and 'tensor', and where rows and parameters lie on it."""

import functools
import json
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from av_mae.config import MeshConfig
from av_mae.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))

# What the dimensions of a parameter are called, by their number (kernels are [inputs, outputs], convolutions
# [rows, columns, inputs, outputs], tokens and decoder positions [1, tokens, width]).
LOGICAL_NAMES = {
    0: (),
    1: ("width",),
    2: ("inputs", "outputs"),
    3: ("one", "tokens", "width"),
    4: ("rows", "columns", "inputs", "outputs"),
}
# Which logical dimension is cut over which mesh axis, in order of preference: the first that the axis divides wins.
SHARDING_RULES = (("inputs", "fsdp"), ("outputs", "fsdp"), ("tokens", "fsdp"), ("width", "fsdp"))
# A parameter with fewer values than this may stay whole on every device: cutting a bias costs more than it saves.
SMALL = 2 ** 12
# A parameter with more values than this must be cut when there is an axis to cut it over.
LARGE = 2 ** 16


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Sizes of the axes (data, fsdp, tensor) over the given number of devices; -1 takes what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the tensor axis is used.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    shown = f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh axes must be at least 1, and at most one of them -1 (what is left), got {shown}")
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        if devices % rest:
            raise UserError(f"the mesh axes that are given must divide the {devices} devices, got {shown}")
        sizes[sizes.index(-1)] = devices // rest
    if math.prod(sizes) != devices:
        raise UserError(f"the mesh axes must multiply to the number of devices: {shown} makes "
                        f"{math.prod(sizes)}, there are {devices} devices; set one axis to -1 to take what is left")
    if sizes[2] > 1:
        raise UserError(f"mesh.tensor={sizes[2]} is not supported yet, only 1 is: use mesh.fsdp to cut parameters")
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the given devices (None: all devices of all processes).

    Raises:
      UserError: see `mesh_shape`.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


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


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How one parameter is cut by SHARDING_RULES.

    A dimension that the axis does not divide is passed over for the next one in the rules. A parameter that no rule
    fits stays whole on every device if it is not large.

    Raises:
      UserError: a large parameter would stay whole on every device.
    """
    if len(shape) not in LOGICAL_NAMES:
        raise ValueError(f"parameter {name} has {len(shape)} dimensions {shape}; the sharding rules know up to 4")
    names, values = LOGICAL_NAMES[len(shape)], math.prod(shape)
    for logical, axis in SHARDING_RULES:
        if values < SMALL or mesh.shape[axis] == 1 or logical not in names:
            continue
        dimension = names.index(logical)
        if shape[dimension] % mesh.shape[axis] == 0:
            return PartitionSpec(*(axis if i == dimension else None for i in range(len(shape))))
    if values > LARGE and mesh.shape["fsdp"] > 1:
        raise UserError(f"mesh.fsdp={mesh.shape['fsdp']} divides no dimension of parameter {name} {shape}, which is "
                        "too large to stay whole on every device: choose an fsdp that divides the model's widths")
    return PartitionSpec()


def parameter_shardings(shapes: Mapping[str, tuple[int, ...]], mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of each parameter by name."""
    return {name: NamedSharding(mesh, parameter_spec(name, shape, mesh)) for name, shape in shapes.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_one(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, replicated(sharding.mesh))


def _gather_one_forward(x: jax.Array, sharding: NamedSharding):
    return _gather_one(x, sharding), None


def _gather_one_backward(sharding: NamedSharding, _, gradient: jax.Array):
    # First the sum over devices, then the cut (together a reduce-scatter): asked for the cut alone, the compiler
    # moves activations to where the cut is.
    whole = jax.lax.with_sharding_constraint(gradient, replicated(sharding.mesh))
    return (jax.lax.with_sharding_constraint(whole, sharding),)


_gather_one.defvjp(_gather_one_forward, _gather_one_backward)


def gather(params: Mapping[str, jax.Array], shardings: Mapping[str, NamedSharding],
           dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Parameters in the dtype of the computation, whole where they are read; their gradients are cut again.

    Said explicitly because the compiler, left alone, moves activations between devices instead of weights.
    """
    cast = {name: x.astype(dtype) for name, x in params.items()}
    return {name: x if shardings[name].is_fully_replicated else _gather_one(x, shardings[name])
            for name, x in cast.items()}


def keep_all_but_gathered(primitive, *_, **parameters) -> bool:
    """Policy of jax.checkpoint: gathered weights are gathered again in the backward pass, not kept until then."""
    jaxpr = parameters.get("call_jaxpr")
    inside = [equation.primitive.name for equation in jaxpr.eqns] if jaxpr is not None else []
    return "sharding_constraint" not in (primitive.name, *inside)
