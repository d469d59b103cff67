"""Trains the model of a config: python launch/train.py --config=configs/hybrid_8k.py

Keys of the config are flags: --config.optim.lr=1e-3, --config.stages[0].steps=500; --steps and --batch set those of the last
stage. The same command run again continues from the last checkpoint. Exit codes: 0 done, or stopped by a signal with everything
saved; 1 a failure while running; 2 a wrong flag, config or input, such as devices or data that the config does not fit; 130 a
second Ctrl-C, or one before the first step.

Several processes train one model if SLURM, Open MPI, a TPU pod or a Kubernetes job starts them, or if each gets the flags
--coordinator, --num_processes and --process_id. Process 0 prints; an error of one process ends all with its message.
"""

import functools
import logging
import re
import traceback
from pathlib import Path

from absl import flags

from hybrid_attn import config, config_file, programs, trees

CONFIG = config_file.define("config", None, "Config file, with its argument after a colon.", config.Config)
config_file.define_last_stage()
WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints and metrics; by default runs/ and the config's name.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, which also uses PORT + 1.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes that train together.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
JOIN_TIMEOUT = flags.DEFINE_float("join_timeout", 300, "Seconds in which all processes must join.", 1, 10**6)
SKIP_STEPS = flags.DEFINE_string(
    "skip_steps", None, "Steps whose batches are not trained on, such as 40 or 40:42,50; checkpoints record them."
)
ALLOW_LR_JUMP = flags.DEFINE_bool(
    "allow_lr_jump", False, "Continue from a checkpoint although the learning rate differs from its schedule at that step."
)
PROFILE = flags.DEFINE_string("profile", None, "First and last step of a trace for xprof, such as 10:12, in WORKDIR/profile.")
flags.mark_flag_as_required("config")
MEMORY_FOR = "a step of this config (tools/plan.py computes what a step needs)"
INTERRUPTED = "interrupted before this step was saved; the last checkpoint is kept"


def read_workdir() -> str:
    """--workdir, by default runs/hybrid_8k_1b for the config configs/hybrid_8k.py:1b; ValueError where it is empty."""
    if WORKDIR.value is None:
        path, _, argument = CONFIG.value.name.partition(":")
        name = Path(path).stem + (f"_{argument}" if argument else "")
        return str(Path("runs") / re.sub(r"[^\w.-]", "_", name))
    trees.check(bool(WORKDIR.value.strip()), "--workdir is empty; name a directory, or leave the flag out for runs/CONFIG")
    return WORKDIR.value


def train() -> None:
    """Trains; slow imports are here, so that `--help` is fast and Ctrl-C during an import ends the program cleanly."""
    from hybrid_attn import compiled
    from hybrid_attn.evals.provenance import revision
    from hybrid_attn.parallel import processes
    from hybrid_attn.parallel.identity import identity
    from hybrid_attn.train import loop, profile
    from hybrid_attn.train.resume import parse_steps

    peers = processes.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, JOIN_TIMEOUT.value)
    if peers:
        logging.disable(logging.NOTSET if peers.number == 0 else logging.CRITICAL)
    fail = peers.fail if peers else programs.fail
    try:
        c, workdir = config.build(CONFIG.value.values), read_workdir()
        compiled.keep(Path(workdir) / "compiled" if peers else None)
        skip_steps = parse_steps(SKIP_STEPS.value) if SKIP_STEPS.value is not None else []
        steps_to_trace = profile.parse(PROFILE.value) if PROFILE.value is not None else None
        if peers:
            flag_values = {f"--{flag.name}": str(flag.value) for flag in (SKIP_STEPS, ALLOW_LR_JUMP, PROFILE)}
            peers.agree(identity(config.to_dict(c), workdir, revision(Path(__file__))) | flag_values)
        loop.train(c, workdir, peers, skip_steps=skip_steps, allow_lr_jump=ALLOW_LR_JUMP.value, profile=steps_to_trace)
    except KeyboardInterrupt:
        if peers is None:
            raise
        peers.fail(INTERRUPTED, 130)
    except Exception as error:
        code = programs.exit_code(error)
        if code is not None:
            fail(programs.message(error, MEMORY_FOR), code)
        if peers is None:
            raise
        connection_lost = type(error).__name__ == "JaxRuntimeError"  # another process is gone; the hub reports which one
        peers.fail(f"{type(error).__name__}: {error}", 1, "" if connection_lost else traceback.format_exc())


def main(argv):
    programs.run(train, argv, interrupted=INTERRUPTED)


start = functools.partial(programs.start, main, __name__)  # the console script
