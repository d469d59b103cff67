"""Where the numbers of an evaluation come from."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import jax

from hybrid_attn import config
from hybrid_attn.evals.report import layers
from hybrid_attn.evals.types import EvalContext
from hybrid_attn.model import flops

WRITTEN = (":(top,exclude)*.md", ":(top,exclude)*.svg", ":(top,exclude)studies/*/results.jsonl")  # in the patterns of git


def provenance(
    checkpoint: str, step: int, c: config.Config | config.CheckpointConfig, values: Mapping, context: EvalContext
) -> dict:
    """What run.json says of the model of `c` at `step`. `values` are its full config."""
    _, _, execution, mesh, tokenizer = context.eval_model
    model = {"layers": c.model.layers, "parameters": flops.parameters(c.model), "seq_len": c.stages[c.last_stage(step)].seq_len}
    model["kinds"] = layers.names({letter: c.model.kinds[letter] for letter in sorted(set(c.model.layers))})
    return {
        "checkpoint": checkpoint,
        "step": step,
        "model": model,
        "config": _sha(json.dumps(values, sort_keys=True)),
        "tokenizer": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "haystack": _sha(context.haystack),
        "revision": revision(Path(__file__)),
        "jax": jax.__version__,
        "device": mesh.devices.flat[0].device_kind,
        "dtype": str(execution.dtype),
        "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device",
    }


def revision(file: Path) -> str:
    """Of the program that `file` is of, where a git repository has it; with "-dirty" where tracked files were changed.

    Pages, pictures and recorded results do not count, because programs write them and no run depends on them.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=file.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # the repository around it may be of something else
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *WRITTEN)
        return git("rev-parse", "HEAD") + "-dirty" * bool(changed)
    except subprocess.CalledProcessError:
        return "not in a git repository"
    except OSError as cause:
        return f"unknown, for git does not run here: {cause.strerror}"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
