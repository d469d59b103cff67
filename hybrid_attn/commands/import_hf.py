"""Imports a Hugging Face directory as a checkpoint: python tools/import_hf.py --model=DIR --out=DIR

--out becomes a directory of checkpoints with step 0, and a folder `companions` with the tokenizer and config files. The config
of the checkpoint is --config with the imported model. docs/families.md lists the supported families.
"""

import functools
from pathlib import Path

import jax
from absl import flags

from hybrid_attn import config, config_file, programs
from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.configs import base
from hybrid_attn.convert import families, hf
from hybrid_attn.files import IMPORTED_FILES
from hybrid_attn.model import abstract_params, flops
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.train.step import init_state

MODEL = flags.DEFINE_string("model", None, "Directory with config.json and safetensors.", required=True)
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
    values = CONFIG.value.values | {"model": config.to_dict(model)}
    if (Path(MODEL.value) / "tokenizer.json").exists():
        values["data"]["tokenizer"] = str(Path(OUT.value) / IMPORTED_FILES / "tokenizer.json")
    c = config.build(values)
    with hf.new_directory(OUT.value) as directory, jax.set_mesh(make_mesh(c.mesh)):
        params = hf.read_params(MODEL.value, model, described["model_type"], abstract_params(model))
        checkpoints = Checkpoints(directory, keep=1, every=1)
        first = jax.jit(init_state, static_argnums=0, donate_argnums=1)
        state = first(c, params) if OPTIMISER.value else {"params": params}
        origin = f"{described['model_type']} from {MODEL.value}"
        checkpoints.save(0, state, {"stage_steps": [], "stage": {}, "imported": origin}, config.to_dict(c), wait=True)
        checkpoints.close()
        copied = hf.copy_files(MODEL.value, directory / IMPORTED_FILES)
    print(f"{OUT.value}: {flops.parameters(model):,} parameters of {described['model_type']}, with {', '.join(copied)}")


def main(argv):
    programs.run(import_model, argv, "the model; give --config a mesh of more devices")


start = functools.partial(programs.start, main, __name__)  # the console script
