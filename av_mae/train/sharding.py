"""Where parameters and activations lie on a mesh.

Tensor parallelism (Shoeybi et al. 2019, Megatron-LM, section 3): the projections to heads and into an MLP are
sharded over 'tensor' by their outputs, those that lead back by their inputs, so that one sum over devices ends each
attention and each MLP. Beyond that every large parameter, with its gradient and its moments, is sharded over 'fsdp'
(and over 'tensor', where the layer itself is not), and gathered where it is read (Rajbhandari et al. 2020, ZeRO,
stage 3).
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from av_mae.config import MeshConfig
from av_mae.errors import ClipFailure, UserError
from av_mae.models.config import AVMAEConfig
from av_mae.models.layers import Initial

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
    parts: dict[int, list[jax.Device]] = {}
    for device in devices:
        number = getattr(device, "slice_index", None) if device.platform == "tpu" else None
        parts.setdefault(number or 0, []).append(device)
    if config.slices in (0, len(parts)):
        return list(parts.values())
    if len(parts) > 1 or len(devices) % config.slices:
        raise UserError(
            f"mesh.slices={config.slices} does not fit {len(devices)} devices on {len(parts)} slices: "
            "leave it at 0 to take what the devices tell"
        )
    size = len(devices) // config.slices
    return [list(devices[start : start + size]) for start in range(0, len(devices), size)]


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
        raise UserError(
            f"the mesh axes must multiply to the number of devices: {shown} makes "
            f"{math.prod(sizes)}, there are {devices} devices; set one axis to -1 to take what is left"
        )
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} must be a multiple of the {slices} slices, between which only gradients "
            f"travel, got {shown}: mesh.fsdp × mesh.tensor must divide the {devices // slices} devices "
            "of one"
        )
    return sizes[0], sizes[1], sizes[2]


def memory_limit() -> int:
    """Bytes that a device of this process has for arrays; 0 where it tells nothing (CPUs)."""
    return int((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0))


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
        raise UserError(
            f"{parameters / 1e6:.0f} million parameters need {size:.1f} GB for themselves, gradients and "
            f"moments; sharded over the {len(slices[0])} devices of a slice that is above {STATE_SHARE:.0%} "
            f"of the {memory / 1e9:.1f} GB of each: use more devices, or set mesh.fsdp yourself"
        )
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
    """Into how many parts the rows of a batch are sharded."""
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def check_batch(mesh: Mesh, batch_size: int, accumulation: int) -> None:
    """Raises UserError unless every device gets the same number of rows in each of `accumulation` parts."""
    shards = row_shards(mesh)
    if accumulation < 1 or batch_size < 1 or batch_size % (shards * accumulation):
        raise UserError(
            f"batch_size={batch_size} must be a multiple of data × fsdp × grad_accumulation = {mesh.shape['data']} × "
            f"{mesh.shape['fsdp']} × {accumulation} = {shards * accumulation}: change batch_size, "
            "grad_accumulation or the mesh"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are sharded over 'data' and 'fsdp', everything else whole."""
    return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process holds: int64 [b], ascending, each once."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def gather_values(values: Sequence[Any]) -> list[Any]:
    """Values that JSON can hold, of all processes, the first process first; every process must call this."""
    if jax.process_count() == 1:
        return list(values)
    own = np.frombuffer(json.dumps(list(values)).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = own
    parts = multihost_utils.process_allgather(padded)
    return [value for part, size in zip(parts, sizes, strict=True) for value in json.loads(part[: int(size)].tobytes())]


def gather_failures(failures: Sequence[ClipFailure]) -> list[ClipFailure]:
    """The failed clips of all processes, those of the first process first; every process must call this."""
    return [ClipFailure(**fields) for fields in gather_values([failure.to_json() for failure in failures])]


# What the names of dimensions (models/layers.py) mean on a mesh: the one place that says it. Names that are not here
# are whole where they are computed with.
RULES: dict[str, str | tuple[str, ...]] = {"batch": ROWS[0], "heads": "tensor", "mlp": "tensor"}
# Axes over which parameters are sharded in the state, beyond the rules.
STATE_AXES = ("fsdp", "tensor")
# Names of the parameters of encoder and decoder layers, which gather them when they run.
LAYERS = re.compile(r"encoder\.(?:(?:image|audio)\.(?:blocks|bridges)|fusion_blocks)\.|_decoder\.blocks\.")
# A parameter with fewer values than this may stay whole on every device: sharding a bias costs more than it saves.
SMALL = 2**12
# A parameter with more values than this must be sharded when there is an axis to shard it over.
LARGE = 2**16


Name = TypeVar("Name", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class ParamSharding:
    """How one parameter lies on the mesh: `stored` in the state, `read` by its layer."""

    stored: NamedSharding
    read: NamedSharding

    @property
    def gathered(self) -> bool:
        """Whether the layer has to gather the parameter."""
        return self.stored != self.read


def check_heads(model: AVMAEConfig, mesh: Mesh) -> None:
    """Raises UserError unless mesh.tensor divides all heads, so that no head is on two devices."""
    tensor = mesh.shape["tensor"]
    heads = {
        "model.image.heads": model.image.heads,
        "model.audio.heads": model.audio.heads,
        "model.decoder.heads": model.decoder.heads,
    }
    if model.fused_layers:
        heads["model.fusion.heads"] = model.fusion.heads
    for key, count in heads.items():
        if count % tensor:
            raise UserError(
                f"mesh.tensor={tensor} must divide {key}={count}: choose a tensor that divides all heads, "
                "and mesh.fsdp for the rest"
            )


def _spec(axes: list[list[str]]) -> PartitionSpec:
    """Mesh axes of each dimension, as short as it goes."""
    return PartitionSpec(*(own[0] if len(own) == 1 else tuple(own) or None for own in axes))


def param_sharding(name: str, initial: Initial, mesh: Mesh) -> ParamSharding:
    """How one parameter is sharded: by RULES, then over each further axis of STATE_AXES where a dimension divides.

    Of a kernel the inputs are tried first, then the outputs; of tokens [1, N, D] the tokens, then the width. A
    parameter that nothing fits stays whole on every device if it is not large.

    Args:
      name: dotted, for errors.
      initial: has the shape and the names of the dimensions.
      mesh: with the axes of AXES.

    Raises:
      UserError: the rules do not divide the parameter, or a large one would stay whole.
    """
    shape, size = initial.shape, mesh.shape
    rules = [RULES.get(dimension or "", "") for dimension in initial.axes or [None] * len(shape)]
    axes = [[str(rule)] if size.get(rule, 1) > 1 else [] for rule in rules]
    for length, own in zip(shape, axes, strict=True):
        if own and length % size[own[0]]:
            raise UserError(
                f"mesh.{own[0]}={size[own[0]]} must divide the {length} of parameter {name} {shape}: "
                f"choose a mesh.{own[0]} that divides the model's widths"
            )
    read = _spec(axes)
    for axis in STATE_AXES:
        if size[axis] == 1 or any(axis in own for own in axes) or math.prod(shape) < SMALL:
            continue
        parts = [size[axis] * math.prod(size[other] for other in own) for own in axes]
        fitting = [i for i in range(len(shape))[-2:] if shape[i] % parts[i] == 0]
        if fitting:
            axes[min(fitting, key=lambda i: len(axes[i]))].append(axis)
        elif math.prod(shape) > LARGE:
            raise UserError(
                f"mesh.{axis}={size[axis]} divides no dimension of parameter {name} {shape}, which is too "
                f"large to stay whole on every device: choose a mesh.{axis} that divides the model's "
                "widths"
            )
    return ParamSharding(NamedSharding(mesh, _spec(axes)), NamedSharding(mesh, read))


def param_shardings(initials: Mapping[str, Initial], mesh: Mesh) -> dict[str, ParamSharding]:
    """The sharding of each parameter by name."""
    return {name: param_sharding(name, initial, mesh) for name, initial in initials.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_one(x: jax.Array, sharding: ParamSharding) -> jax.Array:
    # First as it is stored, or the slices of a loop over stacked layers might be gathered all at once.
    stored = jax.lax.with_sharding_constraint(x, sharding.stored)
    read: jax.Array = jax.lax.with_sharding_constraint(stored, sharding.read)
    return read


def _gather_one_forward(x: jax.Array, sharding: ParamSharding) -> tuple[jax.Array, None]:
    return _gather_one(x, sharding), None


def _gather_one_backward(sharding: ParamSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # First the sum over devices, then the shards (together a reduce-scatter): asked for the shards alone, the compiler
    # moves activations to them.
    whole = jax.lax.with_sharding_constraint(gradient, sharding.read)
    return (jax.lax.with_sharding_constraint(whole, sharding.stored),)


_gather_one.defvjp(_gather_one_forward, _gather_one_backward)


def gather(params: Mapping[Name, jax.Array], shardings: Mapping[Name, ParamSharding]) -> dict[Name, jax.Array]:
    """Parameters as their layers read them; their gradients are sharded again.

    Said explicitly because the compiler, left alone, moves activations between devices instead of weights.
    """
    return {name: _gather_one(x, shardings[name]) if shardings[name].gathered else x for name, x in params.items()}


def gather_layer(state: nnx.State[Any, Any], mesh: Mesh) -> nnx.State[Any, Any]:
    """`gather` for the values of one layer; each value keeps with it how it began (models/layers.py)."""
    values = nnx.to_flat_state(state)
    shardings = {path: param_sharding(".".join(map(str, path)), variable.initial, mesh) for path, variable in values}
    gathered = gather({path: variable[...] for path, variable in values}, shardings)
    return nnx.from_flat_state([(path, variable.replace(gathered[path])) for path, variable in values])


def keep_all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Policy of jax.checkpoint: gathered weights are gathered again in the backward pass, not kept until then."""
    jaxpr = parameters.get("call_jaxpr")
    inside = [equation.primitive.name for equation in jaxpr.eqns] if jaxpr is not None else []
    return "sharding_constraint" not in (primitive.name, *inside)
