"""Bytes of the KV cache of a model after a prompt and while it is read in chunks, against those of full attention."""

import jax
import jax.numpy as jnp

from hybrid_attn import config
from hybrid_attn.bench import answers, measurement
from hybrid_attn.bench.machine import GIB
from hybrid_attn.bench.measurement import Processes
from hybrid_attn.bench.part import ROOT, Figure, Part, Run
from hybrid_attn.config import Config
from hybrid_attn.config_file import load
from hybrid_attn.infer import cache as caches
from hybrid_attn.model import execution_on, flops
from hybrid_attn.parallel.mesh import make_mesh

SMALL = "configs/hybrid_8k.py"  # the model whose cache an engine allocates, to check the computed sizes
ALLOCATED, NEW = 4096, 32  # tokens of that cache, and those of its answer


def cache_bytes(c: Config, length: int, chunk: int) -> int:
    """Bytes in bfloat16 of the cache of one sequence of `length` tokens, `chunk` read at a time; nothing is allocated."""
    cache = jax.eval_shape(lambda: caches.empty(c.model, 1, length, chunk, jnp.dtype("bfloat16"), False))
    arrays = [x for layer in cache.layers for x in (layer.k_BKSH, layer.v_BKSH)] + jax.tree.leaves(cache.inputs)
    return sum(x.size * x.dtype.itemsize for x in arrays)


def sizes(values: dict, lengths: list[int], chunk: int) -> list[dict]:
    """Bytes after a prompt and while it is read in chunks, of the model and of full attention, and the formula's."""
    c, records = config.build(values), []
    full = measurement.full_attention(c)
    with jax.set_mesh(make_mesh(c.mesh, jax.devices()[:1])):
        for S in lengths:
            records.append({"tokens": S, "bytes": cache_bytes(c, S, 1), "reading": cache_bytes(c, S, chunk)})
            records[-1] |= {"full": cache_bytes(full, S, 1), "formula": flops.cache_bytes(c.model, S)}
    return records


def allocated(values: dict, length: int, new: int, chunk: int) -> dict:
    """Bytes of the cache that an engine allocates for a sequence of `length`, and the formula's for the same dtype."""
    c = config.build(values)
    answer = answers.make_ours(values, length - new, new, chunk).run()
    bytes_per_value = execution_on(jax.default_backend(), c.model, c.train).dtype.itemsize
    return {"tokens": length, "allocated": answer.cache_bytes, "formula": flops.cache_bytes(c.model, length, bytes_per_value)}


def measure(processes: Processes, run: Run) -> list[dict]:
    """A record for each length, and last one of a cache that a small engine allocates."""
    small, chunk = config.to_dict(config.build(load(str(ROOT / SMALL)))), run.options["chunk"]
    records = processes.call("jax", sizes, config.to_dict(run.config), run.lengths, chunk)
    return [*records, processes.call("jax", allocated, small, ALLOCATED, NEW, chunk)]


def table(records: list[dict]) -> str:
    *records, last = records
    header = ("tokens", "full GiB", "hybrid GiB", "share", "formula's share", "share while read in chunks")
    rows = []
    for r in records:
        shares = [f"{r[size] / r['full']:.3f}" for size in ("bytes", "formula", "reading")]
        rows.append([f"{r['tokens']:,}", f"{r['full'] / GIB:.3f}", f"{r['bytes'] / GIB:.3f}", *shares])
    text = (
        f"In bfloat16, one sequence. An engine of {SMALL} allocates {last['allocated']:,} bytes for {last['tokens']:,} tokens"
    )
    return f"{measurement.table(header, rows)}\n\n{text}; the formula says {last['formula']:,}."


def figures(records: list[dict]) -> dict[str, Figure]:
    return {
        f"cache / full attention's, {r['tokens']:,} tokens": Figure(r["bytes"] / r["full"], "times", at_least=False)
        for r in records[:-1]
    }


LENGTHS = ("8K", "32K", "128K", "256K", "1024K")
PART = Part("Bytes of the cache", f"{SMALL}:8b", LENGTHS, measure, table, figures, answers.CHUNK)
