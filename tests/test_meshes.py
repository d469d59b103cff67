"""On every mesh the model is one function: its loss and all its gradients are those of one device."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import (
    BATCH,
    BLOCKED,
    REFERENCE,
    assert_close,
    batch_of,
    every,
    everything,
    loss_and_grads,
    mesh_of,
    on_mesh,
    random_params,
)

from hybrid_attn.config import Table

ALONE = batch_of(*["a" * 48] * 8)  # a document a sequence; those of BATCH are packed and padded


class Case(NamedTuple):
    """A mesh (data, fsdp, context, tensor, slices), a layout and its window, and how a sequence is split."""

    sizes: tuple[int, ...]
    pattern: str = "LG"
    window: int = 6
    scheme: str = "gather"  # of the global layers
    zigzag: bool = False
    packed: bool = True

    def run(self):
        local = "halo" if self.sizes[2] > 1 else "gather"
        return BLOCKED._replace(context=Table({"L": local, "G": self.scheme}), zigzag=self.zigzag)

    def reference(self):
        return Case((1, 1, 1, 1), self.pattern, self.window, packed=self.packed)

    def batch(self):
        return BATCH if self.packed else ALONE


def slow(*fields, **others):
    return pytest.param(Case(*fields, **others), marks=pytest.mark.slow)


def exhaustive(*fields, **others):
    return pytest.param(Case(*fields, **others), marks=pytest.mark.exhaustive)


# A shard of eight has 6 of the 48 tokens, of four 12, of two 24; many shards of the packed sequences have nothing but padding.
CASES = [
    exhaustive((8, 1, 1, 1)),
    exhaustive((1, 8, 1, 1)),
    slow((1, 1, 1, 8)),
    slow((1, 1, 8, 1), scheme="ring", zigzag=True),
    exhaustive((1, 1, 8, 1), pattern="G", scheme="gather", zigzag=True),
    slow((1, 1, 8, 1), pattern="L", window=30, zigzag=True),
    slow((2, 1, 4, 1), pattern="L", window=12, packed=False),
    exhaustive((2, 1, 4, 1), pattern="G", scheme="ulysses", zigzag=True),
    exhaustive((2, 2, 2, 1), scheme="ring"),
    Case((1, 2, 2, 2), scheme="ulysses", zigzag=True),
    exhaustive((1, 2, 2, 2), pattern="LLLG", scheme="ulysses", zigzag=True),
    slow((2, 1, 2, 1, 2), scheme="gather", zigzag=True),
]


@functools.cache
def result(case: Case, is_reference: bool):
    """Loss and gradients of a case, or of the reference kernel."""
    execution = REFERENCE if is_reference else case.run()
    model = everything(case.pattern, case.window)
    with jax.set_mesh(mesh_of(*case.sizes)):
        return jax.device_get(loss_and_grads(model, execution, random_params(model), on_mesh(case.batch())))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(case):
    actual = result(case, False)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))
    assert_close(actual, result(case.reference(), True), 1e-5)


@pytest.mark.parametrize("scheme", ["gather", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_activations_come_back_in_reading_order(scheme):
    from hybrid_attn.model import apply

    model, results = everything("LG", 6), []
    for sizes, execution in (((1, 1, 1, 1), REFERENCE), ((1, 1, 4, 2), BLOCKED._replace(context=every(scheme), zigzag=True))):
        with jax.set_mesh(mesh_of(*sizes)):
            arrays = [on_mesh(BATCH)[name] for name in ("tokens", "positions", "segments")]
            results.append(
                jax.device_get(jax.jit(apply, static_argnums=(0, 5))(model, random_params(model), *arrays, execution))
            )
    real = BATCH["segments"] > 0
    assert_close(results[1][real], results[0][real], 1e-5)
