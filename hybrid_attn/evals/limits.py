"""What this machine cannot hold, by lower bounds: an error before its memory is full."""

import math
import os

from hybrid_attn.evals.table import EVALS
from hybrid_attn.evals.types import EvalModel, Settings
from hybrid_attn.model import flops
from hybrid_attn.trees import check

MOST_SEQUENCES = 2**20  # most sequences of one evaluation at one length; a record keeps one number per sequence
CHARACTERS = 2  # of a token, in a question's text
ARRAYS = 4  # of d_model float32 numbers a token, that a layer's forward pass holds at least


def host_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_settings(settings: Settings) -> None:
    """ValueError where the questions do not fit into memory, or an evaluation has too many sequences."""
    evaluations = [EVALS[name] for name in settings.evals]
    counts = [(x.questions.count(settings), x.lengths(settings)) for x in evaluations if x.questions]
    size = CHARACTERS * sum(count * sum(lengths) for count, lengths in counts)
    questions = sum(count * len(lengths) for count, lengths in counts)
    _check_fits(f"{questions:,} questions", size, host_memory(), "fewer --samples, or shorter --lengths")
    shortest = min(settings.lengths)
    sequences = math.ceil(settings.tokens / shortest)
    check(
        not any("tokens" in x.flags for x in evaluations) or sequences <= MOST_SEQUENCES,
        f"--tokens={settings.tokens} are {sequences:,} sequences of {shortest:,} tokens; "
        f"use at most {MOST_SEQUENCES * shortest}",
    )


def check_model(eval_model: EvalModel, settings: Settings, batch_size: int) -> None:
    """ValueError where the devices cannot hold the arrays of a forward pass.

    These are the keys and values of `batch_size` prompts, which are read together, or the activations of a sequence, with its
    logits where all exist at once.
    """
    model, mesh = eval_model.model, eval_model.mesh
    known = mesh.devices.flat[0].memory_stats()  # None on a CPU, whose devices share the machine's
    memory = known["bytes_limit"] * mesh.size if known else host_memory()
    evaluations = [EVALS[name] for name in settings.evals]
    prompts = [length for x in evaluations if x.uses_engine for length in x.lengths(settings)]
    if prompts:
        size = batch_size * flops.cache_bytes(model, max(prompts), eval_model.execution.dtype.itemsize)
        what = f"keys and values of {batch_size} prompts of {max(prompts):,} tokens"
        _check_fits(what, size, memory, "shorter --lengths, or a smaller --batch_size")
    of_sequences = [x for x in evaluations if not x.uses_engine]
    if of_sequences:
        longest = max(settings.lengths)
        numbers = ARRAYS * model.d_model + (model.vocab_size if any(x.all_logits for x in of_sequences) else 0)
        _check_fits(f"activations of a sequence of {longest:,} tokens", 4 * longest * numbers, memory, "shorter --lengths")


def _check_fits(what: str, size: int, memory: int, cure: str) -> None:
    check(size <= memory, f"{what} take {size / 2**30:,.1f} GiB or more, and there are {memory / 2**30:,.1f} GiB; use {cure}")
