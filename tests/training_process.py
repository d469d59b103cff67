"""One of several processes with CPU devices: python tests/training_process.py PART ADDRESS COUNT NUMBER DEVICES FOLDER

PART names what it does there; the corpus is FOLDER/corpus.
"""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import tiny
from jax.experimental import multihost_utils
from test_spikes import poisoned
from trained import EDGE, config_of_two_meshes

from configs import base
from hybrid_attn import config
from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.evals.table import EVALS
from hybrid_attn.parallel import processes
from hybrid_attn.train import loop

MESHES = ((1, 2, 2, 2), (1, 1, 4, 2))  # two processes share the parameters, or the tokens of a row
STEPS = 6


def config_of(folder: Path, sizes: tuple):
    stage = {"steps": STEPS, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}
    values = {
        **{f"mesh.{axis}": size for axis, size in zip(("data", "fsdp", "context", "tensor"), sizes, strict=True)},
        "data.sources": {"text": base.source(paths=(f"{folder}/corpus/*.txt",))},
        "stages": [stage],
        "train.log_every": 1,
        "train.remat": "none",  # less to compile
        "train.checkpoint_every": 100,
        "evals.names": ("position", "needle"),
        "evals.every": STEPS - 1,
        "evals.tokens": 400,
        "evals.lengths": (20.0,),  # the fewest 48 tokens that hold four needles
        "evals.samples": 1,
        "optim.warmup_steps": 2,
    }
    return tiny(values)


def signalled_at(step: int) -> None:
    """Has this process get SIGTERM when it has reported `step`."""
    advance = loop.Metrics.advance

    def advance_and_signal(self, number):
        advance(self, number)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # so that few steps are made meanwhile

    loop.Metrics.advance = advance_and_signal


def train_and_stop(folder: Path, peers) -> None:
    """Disks that are not shared, and a run that ends by a signal to process 1."""
    with pytest.raises(OSError, match="not on a disk that all processes share: 1 cannot see it"):
        Checkpoints(folder / f"disk{peers.number}", keep=1, every=1)
    if peers.number == 1:
        signalled_at(2)
    assert not loop.train(config_of(folder, MESHES[0]), folder / "stopped", peers)


def resume_and_stop_in_the_evaluation(folder: Path, peers) -> None:
    """On another mesh; a signal comes to process 1 in the first unit of the evaluation before the last step."""
    position = EVALS["position"]

    def measure_and_signal(*args):
        if peers.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return position.measure(*args)

    EVALS["position"] = position._replace(measure=measure_and_signal)
    assert not loop.train(config_of(folder, MESHES[1]), folder / "stopped", peers)


def resume_and_break(folder: Path, peers) -> None:
    """Goes on to the end; then process 1 meets an error, and process 0 waits for it."""
    assert loop.train(config_of(folder, MESHES[1]), folder / "stopped", peers)
    multihost_utils.process_allgather(np.ones(1))  # when process 0 has written its report
    if peers.number == 1:
        peers.fail("a device of mine is broken", 3)
    multihost_utils.process_allgather(np.ones(1))
    time.sleep(60)


def stop_in_the_evaluation(folder: Path, peers) -> None:
    if peers.number == 0:
        signal.signal(signal.SIGTERM, lambda *_: peers.request_stop())
    peers.all_saved("stopped in the evaluation")
    print("ready", flush=True)
    for _ in range(600):  # not one long sleep: a signal that comes just before a sleep begins is handled after it
        time.sleep(0.1)


def wait_for_death(folder: Path, peers) -> None:
    print("ready", flush=True)
    time.sleep(60)


def wait_for_a_stopped_process(folder: Path, peers) -> None:
    """In a collective, as a training does."""
    multihost_utils.process_allgather(np.ones(1))
    print("ready", flush=True)
    while True:
        multihost_utils.process_allgather(np.ones(1))
        time.sleep(0.01)


def config_with_rollbacks(folder: Path):
    """A checkpoint of every step; two spikes in a row lead to a rollback by two steps or more."""
    values = config.to_dict(config_of(folder, MESHES[0]))
    values["train"] |= {"checkpoint_every": 1, "keep": 4}
    values["optim"] |= {"spike_factor": 3.0, "max_consecutive_spikes": 1, "rollback_steps": 2}
    values["evals"]["names"] = []
    return config.build(values)


def roll_back(folder: Path, peers) -> None:
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, {4, 5})
        assert loop.train(config_with_rollbacks(folder), folder / "back", peers)


def stop_near_the_edge(folder: Path, peers) -> None:
    """A run whose mesh changes at an edge gets a signal before it."""
    if peers.number == 1:
        signalled_at(EDGE - 1)
    assert not loop.train(config_of_two_meshes(f"{folder}/corpus/*.txt"), folder / "meshes", peers)


def go_on_near_the_edge(folder: Path, peers) -> None:
    assert loop.train(config_of_two_meshes(f"{folder}/corpus/*.txt"), folder / "meshes", peers)


def meet_a_wrong_input(folder: Path, peers) -> None:
    if peers.number == 1:
        peers.fail("no such tokenizer", 2)
    multihost_utils.process_allgather(np.ones(1))


def miss_a_file_of_a_stopped_process(folder: Path, peers) -> None:
    print("ready", flush=True)
    (folder / f"joined{peers.number}").touch()
    if peers.number == 0:
        while not (folder / "joined1").exists():  # the service of JAX in this process lets the other one join
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGSTOP)
    while not (folder / "stopped").exists():
        time.sleep(0.01)
    peers.fail("no such file", 2, "looked for the file")


def meet(folder: Path, number: str) -> None:
    """Waits for processes 0 to 2: what they import may take one of them longer than the timeout of another."""
    (folder / f"imported{number}").touch()
    while not all((folder / f"imported{i}").exists() for i in range(3)):
        time.sleep(0.01)


def main(part: str, address: str, count: str, number: str, devices: str, folder: str) -> None:
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
    try:
        if part == "join":
            meet(Path(folder), number)
        timeout = 3 if part == "join" else 120
        silence = 4 if part == "wait_for_a_stopped_process" else processes.SILENCE
        peers = processes.start(address, int(count), int(number), timeout, silence)
    except OSError as error:
        sys.exit(f"error: {error}")
    try:
        SCENARIOS[part](Path(folder), peers)
    except Exception as error:  # as the training program does: a traceback is printed whole, before the error that ends the run
        peers.fail(f"{type(error).__name__}: {error}", 1, traceback.format_exc())


RESUMED = (resume_and_stop_in_the_evaluation, resume_and_break, go_on_near_the_edge)
STOPPED = (train_and_stop, stop_near_the_edge, stop_in_the_evaluation)
SCENARIOS = {f.__name__: f for f in (*STOPPED, *RESUMED, roll_back, wait_for_death)}
SCENARIOS |= {f.__name__: f for f in (wait_for_a_stopped_process, meet_a_wrong_input, miss_a_file_of_a_stopped_process)}


if __name__ == "__main__":
    main(*sys.argv[1:])
