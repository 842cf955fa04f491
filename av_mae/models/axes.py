"""Names of the dimensions of parameters and activations, and how a training step says what they are cut over.

The model names dimensions ('batch', 'heads', 'mlp', 'width', ...); what the names mean on a mesh is decided in one
place, training/mesh.py. Outside `cut_over` the names mean nothing.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Mesh axes by the name of a dimension; a name that is not here stays whole.
Rules = Mapping[str, str | tuple[str, ...]]

_current: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("current", default=None)


@contextlib.contextmanager
def cut_over(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """What is traced inside lies on the mesh as the rules say."""
    token = _current.set((mesh, rules))
    try:
        yield
    finally:
        _current.reset(token)


def constrain(x: jax.Array, last: str | None) -> jax.Array:
    """x [B, ..., last] cut over its batch and its last dimension, whole in between."""
    if _current.get() is None or _current.get()[0].size == 1:
        return x
    mesh, rules = _current.get()
    spec = PartitionSpec(rules["batch"], *(None,) * (x.ndim - 2), rules.get(last))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
