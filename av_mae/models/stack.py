"""Layers one after the other: `in_turn` as they stand, `run_layers` as a training step wants them.

Both take (step, layers, carry, inputs), where step(layer, carry, input) → (carry, output) is taken over `layers`, a
list of modules or of tuples of modules, and `inputs`, one for each. They return the last carry and the list of outputs.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Step = Callable[..., tuple]


def in_turn(step: Step, layers: Sequence, carry, inputs: Sequence) -> tuple:
    """Every layer by itself, its values where they are."""
    outputs = []
    for layer, given in zip(layers, inputs, strict=True):
        carry, output = step(layer, carry, given)
        outputs.append(output)
    return carry, outputs


def _kind(layer: tuple) -> tuple:
    """What layers that are one program have in common: all but their values."""
    graph, state = layer
    return graph, jax.tree.structure(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


def run_layers(step: Step, layers: Sequence, carry, inputs: Sequence, *, read: Callable[[nnx.State], nnx.State],
               remat: Callable | None = None, scan: bool = True) -> tuple:
    """Each layer with its values turned from stored ones into those that it computes with by `read`; `remat`, a form of
    jax.checkpoint, wraps both.

    With `scan`, neighbours that differ in their values alone are a loop over their stacked values: the program has each
    kind of layer once, compiles sooner, and what a layer reads lives for one turn. Values that a layer changes (running
    statistics) are lost.
    """
    split = [nnx.split(layer) for layer in layers]
    members = zip(range(len(split)), split, inputs, strict=True)
    outputs = []
    for _, group in itertools.groupby(members, key=lambda member: _kind(member[1]) if scan else member[0]):
        (_, (graph, _), _), *_ = group = list(group)

        def turn(carry, given, graph=graph):
            state, own = given
            return step(nnx.merge(graph, read(state)), carry, own)

        # the passes of a loop cannot be merged with one another: only a layer by itself needs a barrier between them
        turn = turn if remat is None else remat(turn, prevent_cse=len(group) == 1)
        given = [(state, own) for _, (_, state), own in group]
        if len(given) == 1:
            carry, output = turn(carry, given[0])
            outputs.append(output)
            continue
        carry, stacked = jax.lax.scan(turn, carry, jax.tree.map(lambda *x: jnp.stack(x), *given))
        outputs += [jax.tree.map(lambda x, number=number: x[number], stacked) for number in range(len(given))]
    return carry, outputs
