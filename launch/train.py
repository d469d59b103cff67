"""Trains the model of a config: python launch/train.py --config=configs/hybrid_8k.py

A key is overridden as --config.optim.lr=1e-3, a stage's as --config.stages[0].steps=500. The same command run again goes
on where it stopped. Exit codes: 0 done, or stopped by a signal with everything saved; 1 a failure while running; 2 a wrong
flag, config or input, such as devices or data that the config does not suit; 130 a second Ctrl-C.

Started several times by SLURM, Open MPI, a TPU pod or a Kubernetes job, or with the three flags that say which process this is,
all of them train one model. Process 0 prints; the failure of one ends all with its message.
"""

import logging
import re
import traceback
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from hybrid_attn import config, programs
from hybrid_attn.evals.provenance import revision
from hybrid_attn.parallel import processes
from hybrid_attn.parallel.identity import identity
from hybrid_attn.train import loop

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with its argument after a colon.")
WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints and metrics; by default runs/ and the config's name.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of which the port after it is used too.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
JOIN_TIMEOUT = flags.DEFINE_float("join_timeout", 300, "Seconds within which all processes must have joined.", 1)
flags.mark_flag_as_required("config")


def default_workdir(config_path: str) -> str:
    """`runs/hybrid_8k_1b` for `configs/hybrid_8k.py:1b`."""
    path, _, argument = config_path.partition(":")
    name = Path(path).stem + (f"_{argument}" if argument else "")
    return str(Path("runs") / re.sub(r"[^\w.-]", "_", name))


def main(argv):
    logging.getLogger().setLevel(logging.WARNING)
    give_up, peers = programs.fail, None
    try:
        programs.check_arguments(argv)
        peers = processes.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, JOIN_TIMEOUT.value)
        if peers:
            give_up = peers.fail
            logging.disable(logging.NOTSET if peers.number == 0 else logging.CRITICAL)
        c = config.build(CONFIG.value)
        workdir = WORKDIR.value or default_workdir(flags.FLAGS["config"].config_filename)
        if peers:
            peers.agree(identity(config.to_dict(c), workdir, revision(Path(__file__))))
        loop.train(c, workdir, peers)
    except KeyboardInterrupt:
        give_up("interrupted before this step was saved; the last checkpoint is kept", 130)
    except Exception as error:
        code = programs.exit_code(error)
        if code is not None:
            give_up(str(error), code)
        if peers is None:
            raise
        peers.fail(f"{type(error).__name__}: {error}", 1, traceback.format_exc())


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
