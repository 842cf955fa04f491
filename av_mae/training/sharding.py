"""Where parameters and activations lie on a mesh.

Tensor parallelism (Shoeybi et al. 2019, Megatron-LM, section 3): the projections to heads and into an MLP are cut over
'tensor' by their outputs, those that lead back by their inputs, so that one sum over devices ends each attention and
each MLP. Beyond that every large parameter, with its gradient and its moments, is stored cut over 'fsdp' (and over
'tensor', where the layer itself is not), and gathered where it is read (Rajbhandari et al. 2020, ZeRO, stage 3).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from av_mae.errors import UserError
from av_mae.models.config import AVMAEConfig
from av_mae.models.layers import Initial
from av_mae.training.mesh import ROWS

# What the names of dimensions (models/axes.py) mean on a mesh: the one place that says it. Names that are not here are
# whole where they are computed with.
RULES = {"batch": ROWS[0], "heads": "tensor", "mlp": "tensor"}
# Over what parameters are stored cut, beyond the rules.
STORED_OVER = ("fsdp", "tensor")
# Names of the parameters of encoder and decoder layers, which gather them when they run.
LAYERS = re.compile(r"encoder\.(?:(?:image|audio)\.(?:blocks|bridges)|fusion_blocks)\.|_decoder\.blocks\.")
# A parameter with fewer values than this may stay whole on every device: cutting a bias costs more than it saves.
SMALL = 2 ** 12
# A parameter with more values than this must be cut when there is an axis to cut it over.
LARGE = 2 ** 16


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one parameter lies on the mesh: `stored` in the state, `read` by its layer."""

    stored: NamedSharding
    read: NamedSharding

    @property
    def gathered(self) -> bool:
        return self.stored != self.read


def check_heads(model: AVMAEConfig, mesh: Mesh) -> None:
    """Raises UserError unless mesh.tensor divides all heads, so that none is cut in two."""
    tensor = mesh.shape["tensor"]
    heads = {"model.image.heads": model.image.heads, "model.audio.heads": model.audio.heads,
             "model.decoder.heads": model.decoder.heads}
    if model.fused_layers:
        heads["model.fusion.heads"] = model.fusion.heads
    for key, count in heads.items():
        if count % tensor:
            raise UserError(f"mesh.tensor={tensor} must divide {key}={count}: choose a tensor that divides all heads, "
                            "and mesh.fsdp for the rest")


def _spec(cuts: list[list[str]]) -> PartitionSpec:
    """Mesh axes of each dimension, as short as it goes."""
    return PartitionSpec(*(axes[0] if len(axes) == 1 else tuple(axes) or None for axes in cuts))


def place(name: str, initial: Initial, mesh: Mesh) -> Placement:
    """How one parameter is cut: by RULES, then over each further axis of STORED_OVER where a dimension divides.

    Of a kernel the inputs are tried first, then the outputs; of tokens [1, N, D] the tokens, then the width. A
    parameter that nothing fits stays whole on every device if it is not large.

    Raises:
      UserError: the rules do not divide it, or a large parameter would stay whole.
    """
    shape, size = initial.shape, mesh.shape
    cuts = [[RULES[axis]] if size.get(RULES.get(axis), 1) > 1 else [] for axis in initial.axes or [None] * len(shape)]
    for length, axes in zip(shape, cuts, strict=True):
        if axes and length % size[axes[0]]:
            raise UserError(f"mesh.{axes[0]}={size[axes[0]]} must divide the {length} of parameter {name} {shape}: "
                            f"choose a mesh.{axes[0]} that divides the model's widths")
    read = _spec(cuts)
    for axis in STORED_OVER:
        if size[axis] == 1 or any(axis in axes for axes in cuts) or math.prod(shape) < SMALL:
            continue
        parts = [size[axis] * math.prod(size[other] for other in axes) for axes in cuts]
        fitting = [i for i in range(len(shape))[-2:] if shape[i] % parts[i] == 0]
        if fitting:
            cuts[min(fitting, key=lambda i: len(cuts[i]))].append(axis)
        elif math.prod(shape) > LARGE:
            raise UserError(f"mesh.{axis}={size[axis]} divides no dimension of parameter {name} {shape}, which is too "
                            f"large to stay whole on every device: choose a mesh.{axis} that divides the model's "
                            "widths")
    return Placement(NamedSharding(mesh, _spec(cuts)), NamedSharding(mesh, read))


def place_all(initials: Mapping[str, Initial], mesh: Mesh) -> dict[str, Placement]:
    """The placement of each parameter by name."""
    return {name: place(name, initial, mesh) for name, initial in initials.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_one(x: jax.Array, placement: Placement) -> jax.Array:
    # First where it is stored, or the slices of a loop over stacked layers might be gathered all at once.
    stored = jax.lax.with_sharding_constraint(x, placement.stored)
    return jax.lax.with_sharding_constraint(stored, placement.read)


def _gather_one_forward(x: jax.Array, placement: Placement):
    return _gather_one(x, placement), None


def _gather_one_backward(placement: Placement, _, gradient: jax.Array):
    # First the sum over devices, then the cut (together a reduce-scatter): asked for the cut alone, the compiler
    # moves activations to where the cut is.
    whole = jax.lax.with_sharding_constraint(gradient, placement.read)
    return (jax.lax.with_sharding_constraint(whole, placement.stored),)


_gather_one.defvjp(_gather_one_forward, _gather_one_backward)


def gather(params: Mapping[str, jax.Array], placements: Mapping[str, Placement]) -> dict[str, jax.Array]:
    """Parameters as their layers read them; their gradients are cut again.

    Said explicitly because the compiler, left alone, moves activations between devices instead of weights.
    """
    return {name: _gather_one(x, placements[name]) if placements[name].gathered else x for name, x in params.items()}


def gather_layer(state: nnx.State, mesh: Mesh) -> nnx.State:
    """`gather` for the values of one layer, by what stays with each of how it began (models/layers.py)."""
    values = nnx.to_flat_state(state)
    placements = {path: place(".".join(map(str, path)), variable.initial, mesh) for path, variable in values}
    gathered = gather({path: variable[...] for path, variable in values}, placements)
    return nnx.from_flat_state([(path, variable.replace(gathered[path])) for path, variable in values])


def keep_all_but_gathered(primitive, *_, **parameters) -> bool:
    """Policy of jax.checkpoint: gathered weights are gathered again in the backward pass, not kept until then."""
    jaxpr = parameters.get("call_jaxpr")
    inside = [equation.primitive.name for equation in jaxpr.eqns] if jaxpr is not None else []
    return "sharding_constraint" not in (primitive.name, *inside)
