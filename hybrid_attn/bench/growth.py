"""Seconds of a new token after prompts of growing length, of a model and of the same with full attention in every layer.

The cache has the length of the prompt but not its tokens, which do not change the time.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn import config
from hybrid_attn.bench import answers, measurement
from hybrid_attn.bench.contender import Ready
from hybrid_attn.bench.measurement import Processes, Task
from hybrid_attn.bench.part import Figure, Part, Run, ratios
from hybrid_attn.infer import cache as caches
from hybrid_attn.infer import steps
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.infer.sampling import GREEDY
from hybrid_attn.model import init
from hybrid_attn.parallel.mesh import BATCH, make_mesh
from hybrid_attn.trees import check


def make(values: dict, length: int, chunk: int) -> Ready:
    """`steps.SLICE` tokens at the end of a sequence of `length`, whose cache has no tokens."""
    c, new = config.build(values), steps.SLICE
    mesh = make_mesh(c.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        engine = Engine(jax.jit(init, static_argnums=0)(c.model, jax.random.key(c.seed)), c, EngineOptions(chunk))
        capacity = caches.request_slots(length, chunk)
        cache = caches.empty(c.model, 1, capacity, 1, engine.execution.dtype, False)
        last_BD = jnp.zeros((1, c.model.d_model), engine.execution.dtype, out_sharding=P(BATCH, None))
    step_config, stop_tokens = steps.StepConfig(c.model, engine.execution, chunk), np.full(1, -1, np.int32)

    def run() -> float:
        nonlocal cache, last_BD
        with jax.set_mesh(mesh):
            cache = cache._replace(lengths_B=jnp.full_like(cache.lengths_B, length - new))
            no_B, seeds_B = jnp.zeros_like(cache.lengths_B, bool), jnp.zeros_like(cache.lengths_B, jnp.uint32)
            state = steps.DecodeState(cache, last_BD)
            part = steps.DecodeSlice(no_B, seeds_B, stop_tokens, 0, new)
            start = time.perf_counter()
            (cache, last_BD), out = steps.decode(step_config, GREEDY, engine.weights, state, part)
            jax.block_until_ready(out)
            return (time.perf_counter() - start) / new

    return Ready(run, None)


def measure(processes: Processes, run: Run) -> list[dict]:
    least = min(run.lengths)
    check(least > steps.SLICE, f"--lengths has {least}: {steps.SLICE} tokens follow a prompt; use {steps.SLICE + 1} or more")
    pair, records = {"ours": run.config, "full attention": measurement.full_attention(run.config)}, []
    for S in run.lengths:
        tasks = {name: Task("jax", make, (config.to_dict(c), S, run.options["chunk"])) for name, c in pair.items()}
        for name, x in processes.race(f"growth {S:,}", tasks, run.repeats).items():
            record = {"contender": name, "layers": pair[name].model.layers, "tokens": S} | x.record
            if not x.missing:
                calls = x.results[1:]
                record |= {"seconds": float(np.median(calls)), "best": min(calls), "calls": calls}
            records.append(record)
    return records


def slopes(records: list[dict]) -> dict[str, float]:
    """Seconds that a token takes longer for a token more, by the straight line through all lengths."""
    fitted = {}
    for name in ("ours", "full attention"):
        points = [(r["tokens"], r["seconds"]) for r in records if r["contender"] == name and "seconds" in r]
        if len(points) > 1:
            fitted[name] = float(np.polyfit(*zip(*points, strict=True), 1)[0])
    return fitted


def table(records: list[dict]) -> str:
    def cells(r: dict) -> list[str]:
        times = [f"{1e3 * r[key]:.3g}" for key in ("seconds", "best")] if "seconds" in r else []
        return [r["contender"], r["layers"], f"{r['tokens']:,}", *times]

    text = measurement.table(("contender", "layers", "tokens", "ms a token", "best"), [cells(r) for r in records])
    fitted = [f"{name}: {1e9 * slope:.3g} ms more for a million tokens more" for name, slope in slopes(records).items()]
    return text + measurement.missing(records) + "".join(f"\n\n{line}" for line in fitted)


def figures(records: list[dict]) -> dict[str, Figure]:
    """The time of full attention over that of the model, and how much slower the model's token grows."""
    made, fitted = ratios(records, "seconds"), slopes(records)
    if len(fitted) == 2:
        made["growth of ours / full attention"] = Figure(fitted["ours"] / fitted["full attention"], "times", at_least=False)
    return made


LENGTHS = ("2K", "8K", "32K", "128K")
PART = Part("A new token as sequences grow", "configs/bench.py", LENGTHS, measure, table, figures, answers.CHUNK)
