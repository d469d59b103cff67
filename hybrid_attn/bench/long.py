"""A small model reads a long prompt and answers: time, and the highest memory of its process."""

import statistics

import jax.numpy as jnp

from hybrid_attn import config
from hybrid_attn.bench import answers, measurement
from hybrid_attn.bench.measurement import Processes, Task
from hybrid_attn.bench.part import Figure, Part, Run
from hybrid_attn.model import flops

OPTIONS = answers.CHUNK | {"new": 32}  # tokens of the answer


def measure(processes: Processes, run: Run) -> list[dict]:
    """A record for each length; the prompts run one after the other in a process of their own."""
    records = []
    for S in run.lengths:
        task = Task("long", answers.make_ours, (config.to_dict(run.config), S, run.options["new"], run.options["chunk"]))
        x = processes.race(f"long {S:,}", {"ours": task}, run.repeats)["ours"]
        record = {"contender": "ours", "tokens": S} | x.record
        if not x.missing:
            record |= {key: statistics.median(getattr(a, key) for a in x.results[1:]) for key in ("prefill", "token")}
            record |= {"cache": x.results[0].cache_bytes, "process": processes.call("long", measurement.highest_memory)}
            record["formula"] = flops.cache_bytes(run.config.model, S, jnp.dtype(run.dtype).itemsize)
        records.append(record)
    return records


def table(records: list[dict]) -> str:
    header = "tokens, prefill s, tokens/s, ms a token, cache MiB, formula's, GiB beyond weights, GiB of the process".split(", ")
    rows = []
    for r in records:
        rows.append([f"{r['tokens']:,}"])
        if "missing" not in r:
            rows[-1] += [f"{r['prefill']:.3g}", f"{r['tokens'] / r['prefill']:,.0f}", f"{1e3 * r['token']:.3g}"]
            rows[-1] += [f"{r['cache'] / 2**20:.1f}", f"{r['formula'] / 2**20:.1f}"]
            rows[-1] += [measurement.gib(r["memory"]), measurement.gib(r["process"])]
    return measurement.table(header, rows) + measurement.missing(records)


def figures(records: list[dict]) -> dict[str, Figure]:
    return {
        f"cache / formula, {r['tokens']:,} tokens": Figure(r["cache"] / r["formula"], "times", at_least=False)
        for r in records
        if "cache" in r
    }


PART = Part("131,072 tokens", "configs/hybrid_8k.py", ("128K",), measure, table, figures, OPTIONS)
