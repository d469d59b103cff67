"""What is too much for this machine, by estimates from below: said before memory fills."""

import math
import os

from jax.sharding import Mesh

from hybrid_attn import config
from hybrid_attn.evals import types
from hybrid_attn.infer.engine import Engine
from hybrid_attn.model import flops
from hybrid_attn.trees import check

MOST_ROWS = 2**20  # most rows of one evaluation at one length; a record keeps one number per row
CHARACTERS = 2  # of a token, in a question's text
ARRAYS = 4  # of d_model float32 numbers a token, that a layer's forward pass holds at least


def host_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_memory(mesh: Mesh) -> int:
    """Bytes of all devices of a mesh; those of a CPU share the machine's."""
    known = mesh.devices.flat[0].memory_stats()
    return known["bytes_limit"] * mesh.size if known else host_memory()


def check_settings(wanted: types.Settings) -> None:
    """ValueError where the questions do not fit into memory, or an evaluation has too many rows."""
    cells = {"needle": 2 * len(wanted.depths), "ruler": len(wanted.ruler_tasks)}
    lengths = {name: wanted.lengths_of(name) for name in cells if name in wanted.evals}
    size = CHARACTERS * wanted.samples * sum(cells[name] * sum(those) for name, those in lengths.items())
    questions = wanted.samples * sum(cells[name] * len(those) for name, those in lengths.items())
    _check_fits(f"{questions:,} questions", size, host_memory(), "fewer --samples, or shorter --lengths")
    in_rows = set(wanted.evals) - set(types.ASKED) - {"attention_mass"}
    rows = math.ceil(wanted.tokens / min(wanted.lengths))
    check(
        not in_rows or rows <= MOST_ROWS,
        f"--tokens={wanted.tokens} are {rows:,} rows of {min(wanted.lengths):,} tokens; use at most "
        f"{MOST_ROWS * min(wanted.lengths)}",
    )


def check_rows(model: config.Model, wanted: types.Settings, mesh: Mesh) -> None:
    """ValueError where the devices cannot hold the activations of a row, or its logits where all exist at once."""
    in_rows = [name for name in wanted.evals if name not in types.ASKED]
    if in_rows:
        longest = max(wanted.lengths)
        numbers = ARRAYS * model.d_model + (model.vocab_size if "recall" in in_rows else 0)
        _check_fits(
            f"activations of a row of {longest:,} tokens", 4 * longest * numbers, device_memory(mesh), "shorter --lengths"
        )


def check_caches(model: config.Model, wanted: types.Settings, engine: Engine) -> None:
    """ValueError where the devices cannot hold the keys and values of as many prompts as are read together."""
    lengths = [length for name in types.ASKED if name in wanted.evals for length in wanted.lengths_of(name)]
    if lengths:
        longest, rows = max(lengths), engine.rows
        size = rows * flops.cache_bytes(model, longest, engine.run.dtype.itemsize)
        what = f"keys and values of {rows} prompts of {longest:,} tokens"
        _check_fits(what, size, device_memory(engine.mesh), "shorter --lengths, or fewer --rows")


def _check_fits(what: str, size: int, memory: int, cure: str) -> None:
    check(size <= memory, f"{what} take {size / 2**30:,.1f} GiB or more, and there are {memory / 2**30:,.1f} GiB; use {cure}")
