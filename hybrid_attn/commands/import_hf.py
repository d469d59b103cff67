"""Imports a Hugging Face directory as a checkpoint: python tools/import_hf.py --model=DIR --out=DIR

--out becomes a directory of checkpoints with step 0, and a folder `companions` with the tokenizer and config files. The config
of the checkpoint is --config with the imported model. docs/families.md lists the supported families. --adapter is a directory
with LoRA in PEFT's files, which the checkpoint then has beside the matrices of the model.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from absl import flags
from flax import traverse_util

from hybrid_attn import config, config_file, programs
from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.configs import base
from hybrid_attn.convert import families, hf, peft
from hybrid_attn.files import IMPORTED_FILES
from hybrid_attn.model import abstract_params, flops, specs, transforms
from hybrid_attn.parallel.mesh import make_mesh, put
from hybrid_attn.train.step import init_state

MODEL = flags.DEFINE_string("model", None, "Directory with config.json and safetensors.", required=True)
ADAPTER = flags.DEFINE_string("adapter", None, "Directory with LoRA of this model, as PEFT stores it.")
OUT = flags.DEFINE_string("out", None, "New directory of checkpoints.", required=True)
OPTIMISER = flags.DEFINE_bool(
    "optimiser", False, "Add a new optimiser state, so that training can continue from this checkpoint."
)
CONFIG = config_file.define(
    "config", base.__file__, "Config of everything but the model; its mesh holds the parameters.", config.Config
)


def import_model() -> None:
    hf.library()  # fails before anything is read
    described = hf.read_config(MODEL.value)
    model = families.model_of(described)
    model, added = (model, {}) if ADAPTER.value is None else with_adapter(model, described["model_type"])
    values = CONFIG.value.values | {"model": config.to_dict(model)}
    if (Path(MODEL.value) / "tokenizer.json").exists():
        values["data"]["tokenizer"] = str(Path(OUT.value) / IMPORTED_FILES / "tokenizer.json")
    c = config.build(values)
    with hf.new_directory(OUT.value) as directory, jax.set_mesh(make_mesh(c.mesh)):
        expected = traverse_util.flatten_dict(abstract_params(model), sep="/")
        base = traverse_util.unflatten_dict({name: x for name, x in expected.items() if name not in added}, sep="/")
        params = traverse_util.flatten_dict(hf.read_params(MODEL.value, model, described["model_type"], base), sep="/")
        params |= {name: put(x, jax.sharding.get_mesh(), expected[name].sharding.spec) for name, x in added.items()}
        params = traverse_util.unflatten_dict(params, sep="/")
        checkpoints = Checkpoints(directory, keep=1, every=1)
        first = jax.jit(init_state, static_argnums=0, donate_argnums=1)
        state = first(c, params) if OPTIMISER.value else {"params": params}
        origin = f"{described['model_type']} from {MODEL.value}"
        checkpoints.save(0, state, {"stage_steps": [], "stage": {}, "imported": origin}, config.to_dict(c), wait=True)
        checkpoints.close()
        copied = hf.copy_files(MODEL.value, directory / IMPORTED_FILES)
    print(f"{OUT.value}: {flops.parameters(model):,} parameters of {described['model_type']}, with {', '.join(copied)}")


def with_adapter(model: config.Model, model_type: str) -> tuple[config.Model, dict[str, np.ndarray]]:
    """The model with the adapter of --adapter, and its arrays by name."""
    flat = traverse_util.flatten_dict(specs(model), sep="/")
    matrices = {name: peft.Matrix(x.shape, x.fan_in) for name, x in flat.items() if transforms.is_plain(x)}
    adapter, arrays = peft.read(ADAPTER.value, model, model_type, matrices)
    added = {f"{name}{transforms.SUFFIX}/{part}": x for name, parts in arrays.items() for part, x in parts.items()}
    return dataclasses.replace(model, adapter=adapter), added


def main(argv):
    programs.run(import_model, argv, "the model; give --config a mesh of more devices")


start = functools.partial(programs.start, main, __name__)  # the console script
