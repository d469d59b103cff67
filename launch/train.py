"""Trains the model of a config: python launch/train.py --config=configs/hybrid_8k.py

A key is overridden as --config.optim.lr=1e-3, a stage's as --config.stages[0].steps=500. The same command run again goes
on where it stopped. Exit status: 0 done, or stopped by a signal with everything saved; 1 a failure; 2 a wrong
config; 130 a second Ctrl-C.
"""

import logging
import re
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from hybrid_attn import config
from hybrid_attn.programs import fail, parse
from hybrid_attn.train import loop

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with its argument after a colon.")
WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints and metrics; by default runs/ and the config's name.")
flags.mark_flag_as_required("config")


def default_workdir(config_path: str) -> str:
    """`runs/hybrid_8k_1b` for `configs/hybrid_8k.py:1b`."""
    path, _, argument = config_path.partition(":")
    name = Path(path).stem + (f"_{argument}" if argument else "")
    return str(Path("runs") / re.sub(r"[^\w.-]", "_", name))


def main(_):
    logging.getLogger().setLevel(logging.WARNING)
    try:
        c = config.build(CONFIG.value)
    except ValueError as error:
        fail(str(error), 2)
    workdir = WORKDIR.value or default_workdir(flags.FLAGS["config"].config_filename)
    try:
        loop.train(c, workdir)
    except (ValueError, NotImplementedError, FloatingPointError, OSError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted before this step was saved; the last checkpoint is kept", 130)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
