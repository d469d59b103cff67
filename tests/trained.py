"""A small run that tests train."""

import json
import os
import signal
from pathlib import Path

import pytest
from conftest import ONE_LAYER, tiny

from configs import base
from hybrid_attn import config
from hybrid_attn.train import loop
from hybrid_attn.train.metrics import Metrics

STEPS, EDGE = 6, 3
NEW_MESH = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2}


def stage(steps, seq_len, batch):
    return {"steps": steps, "seq_len": seq_len, "batch": batch, "microbatches": 1, "mixture": {}}


def config_of(corpus, **changes):
    """Six steps on eight devices, checkpoints every two, every step logged."""
    values = {
        "mesh.fsdp": 2,
        "data.sources": {"text": base.source(paths=(corpus,))},
        "stages": [stage(STEPS, 48, 8)],
        "train.log_every": 1,
        "train.checkpoint_every": 2,
        "evals.tokens": 400,
        "evals.lengths": (2.0,),
        "optim.warmup_steps": 2,
    }
    return tiny(ONE_LAYER | values | changes)


def config_of_two_meshes(corpus) -> config.Config:
    """Two stages, of which the second has another window and another mesh, without an evaluation."""
    changes = base.override({"model.kinds.L.window": 9} | NEW_MESH)
    stages = [stage(EDGE, 48, 8), stage(STEPS - EDGE, 96, 4) | {"override": changes}]
    return config_of(corpus, stages=stages, **{"train.keep": STEPS, "evals.names": ()})


def losses(workdir):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "skipped" not in line}


def train_until(step, c, workdir, **arguments):
    """Trains until the run, when it reports `step`, gets the signal to stop."""
    report = Metrics.advance

    def advance(self, number):
        report(self, number)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "advance", advance)
        assert not loop.train(c, workdir, **arguments)
