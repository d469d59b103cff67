"""What a weight transform is: weights that are added beside a matrix, and the product with all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybrid_attn.config_model import Adapter, Model
from hybrid_attn.model.params import MATRIX, Linear, ParamSpec, Weight, multiply
from hybrid_attn.names import matching
from hybrid_attn.parallel.mesh import spec_of

ROUTER_STD = 0.02
SETTINGS = "rank", "alpha", "experts"
SUFFIX = "_adapter"  # of the name of the group that stands beside the matrix in the parameters


class Product(Protocol):
    """The product of activations with a matrix of a layer and the weights that are added beside it."""

    def __call__(
        self, adapter: Adapter, linear: Linear, added: dict[str, jax.Array], x: jax.Array, sharding: P | None
    ) -> jax.Array: ...


class Transform(NamedTuple):
    """A weight transform; `weights` makes what it adds beside a matrix of this spec, by name, with its initial values.

    `merged` is one matrix, on the host, with the same product; it is None where there is none. `reads` are the `SETTINGS` of
    the adapter that the transform reads.
    """

    weights: Callable[[Adapter, ParamSpec, nnx.Rngs], dict[str, Weight]]
    product: Product
    merged: Callable | None
    reads: tuple[str, ...]


def gates(z: jax.Array, router: jax.Array, fan_in: int) -> jax.Array:
    """The weights [..., E] of the parts of a mixture, in float32: a softmax over logits of the last `fan_in` axes of `z`."""
    sharding = P(*spec_of(z)[: z.ndim - fan_in], None)
    with jax.default_matmul_precision("float32"):
        return jax.nn.softmax(multiply(jax.lax.dot_general, z.astype(jnp.float32), router, fan_in, sharding), -1)


def is_plain(spec: ParamSpec) -> bool:
    """Whether a weight is a matrix that activations are multiplied with as it is: no matrix of experts or of a router."""
    return spec.group == MATRIX and spec.active is None and spec.products is None and not spec.exact


def targets(model: Model, weights: Mapping[str, Weight], field: str, patterns: Sequence[str], can: str) -> list[str]:
    """The names of the matrices of the layers, plain ones, that a config's `field` names by `patterns`.

    ValueError for a pattern that names none of them; `can` says what the others cannot do.
    """
    groups = {group for group, _, _ in model.groups}
    names = [name for name, w in weights.items() if name.split("/")[0] in groups and is_plain(w.spec)]
    return sorted(matching(field, patterns, names, f"this model, among the matrices that {can},"))
