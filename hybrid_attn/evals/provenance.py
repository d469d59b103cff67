"""Where the numbers of an evaluation come from."""

import hashlib
import json
import subprocess
from pathlib import Path

import jax

from hybrid_attn import config
from hybrid_attn.model import flops


def provenance(checkpoint: str, step: int, c: config.Config, words, text: str) -> dict:
    """Of the model of `c` at `step`, asked in the tokens of `words` about needles in `text`."""
    model = {"layers": c.model.layers, "parameters": flops.parameters(c.model), "seq_len": c.stages[-1].seq_len}
    return {
        "checkpoint": checkpoint,
        "step": step,
        "model": model,
        "config": _sha(json.dumps(config.to_dict(c), sort_keys=True)),
        "tokenizer": words.hash,
        "haystack": _sha(text),
        "revision": _revision(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def _revision() -> str:
    """Of this program, where it lies in a git repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError as cause:
        return f"unknown, for git does not run here: {cause.strerror}"
    return done.stdout.strip() or "not a git repository"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
