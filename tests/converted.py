"""Helpers of the conversion tests: tiny models in Hugging Face directories.

`golden/` has tiny models with the logits that `tools/make_golden.py` took from the library that defines the families.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy
from conftest import tiny

from hybrid_attn import config
from hybrid_attn.convert import families, hf
from hybrid_attn.model import abstract_params

ROOT = Path(__file__).parents[1]
GOLDEN = {path.name: path for path in sorted((ROOT / "tests" / "golden").iterdir())}
HYBRID = tiny(
    {"model.num_layers": 5, "model.pattern": "LLG", "model.vocab_size": 40, "model.logit_scale": 0.25},
    L={"window": 5, "rope_theta": 100.0},
).model  # a model of cohere2, with layers after the last period


@functools.cache
def abstract(model, mesh):
    """`abstract_params` on the current mesh, cached because it would take most of the time of these tests."""
    return abstract_params(model)


def shapes_of(model) -> dict:
    return {path: x.shape for path, x in hf.flat(abstract(model, jax.sharding.get_mesh())).items()}


def read(directory, dtype="float32"):
    """(model, parameters) of a directory, on the current mesh."""
    described = hf.read_config(directory)
    model = families.model_of(described)
    shapes = abstract(model, jax.sharding.get_mesh())
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), shapes)
    return model, hf.read_params(directory, model, described["model_type"], expected)


def write(directory, model, params, model_type=None, dtype="float32", shard_bytes=10**9):
    directory.mkdir()
    described = hf.describe(model, directory, 64, model_type)
    hf.write(directory, model, described, shapes_of(model), hf.by_period(params), dtype, shard_bytes)
    return directory


def edit(directory, **fields):
    """Changes config.json and removes fields that become None."""
    values = {**hf.read_config(directory), **fields}
    (directory / "config.json").write_text(json.dumps({key: x for key, x in values.items() if x is not None}))


def edit_tensors(directory, change):
    """Rewrites model.safetensors with `change(arrays)`."""
    path = directory / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path)


def assert_same(got, expected):
    got, expected = hf.flat(got), hf.flat(expected)
    assert got.keys() == expected.keys()
    for path, x in got.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(expected[path]), path)


def with_layer_type(model, letter, **changes):
    kinds = {**model.kinds, letter: dataclasses.replace(model.kinds[letter], **changes)}
    return dataclasses.replace(model, kinds=config.Table(kinds))
