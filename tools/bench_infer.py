"""Times answers against `transformers` and against full attention, and measures caches: python tools/bench_infer.py

    python tools/bench_infer.py --part=transformers --lengths=2K,8K,32K --json=transformers.json
    python tools/bench_infer.py --part=growth --config.model.num_layers=4

cache: bytes of the caches of --cache_config, after a prompt and while it is read in chunks, against those of full attention.
transformers: the same model (ours, exported) and prompts, continued greedily here and by `generate` of `transformers` on
PyTorch with its cache; on a CPU with the extra `oracle`. A length is that of a prompt and its answer.
growth: seconds of a token of --config, and of the same model with full attention and the local layers' RoPE in every layer,
after prompts of growing length. The cache has the length of the prompt but not its tokens, which do not change the time.
long: --long_config reads a prompt of 131,072 tokens; the highest memory of its process.

Contenders run alternately, and the best of --repeats counts. A dash is explained under the table.
"""

import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import PartitionSpec as P

from hybrid_attn import config, config_file, programs
from hybrid_attn.bench import measurement
from hybrid_attn.bench.measurement import GIB, Processes, Ready, Task
from hybrid_attn.config import Config
from hybrid_attn.infer import cache as caches
from hybrid_attn.infer import steps
from hybrid_attn.infer.engine import DEFAULT_CHUNK, Engine, EngineOptions
from hybrid_attn.infer.sampling import GREEDY
from hybrid_attn.model import execution_on, flops, init
from hybrid_attn.parallel.mesh import BATCH, make_mesh

CONFIGS = Path(__file__).parents[1] / "configs"
LENGTHS = {
    "cache": ["8K", "32K", "128K", "256K", "1024K"],
    "transformers": ["2K", "8K", "32K"],
    "growth": ["2K", "8K", "32K", "128K"],
    "long": ["128K"],
}
ALLOCATED = 4096  # tokens of the cache that an engine allocates, to check the computed sizes
PART = flags.DEFINE_enum("part", "all", [*LENGTHS, "all"], "What to measure.")
TOKENS = flags.DEFINE_list("lengths", None, f"Numbers of tokens; K is 1,024. By default {LENGTHS}.")
NEW = flags.DEFINE_integer("new", 32, "Tokens of an answer.", lower_bound=2)
CHUNK = flags.DEFINE_integer("chunk", DEFAULT_CHUNK, "Tokens of a prompt that our engine reads at a time.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 3, "Answers of each contender.", lower_bound=1)
MEMORY_GIB = flags.DEFINE_float("memory_gib", 12.0, "Leave out contenders that need more.", lower_bound=0.1)
JSON = flags.DEFINE_string("json", None, "File for the numbers of the tables.")
CONFIG = config_file.define("config", str(CONFIGS / "bench.py"), "The model of parts transformers and growth.", config.Config)
CACHE = config_file.define("cache_config", str(CONFIGS / "hybrid_8k.py") + ":8b", "The model of part=cache.", config.Config)
LONG = config_file.define("long_config", str(CONFIGS / "hybrid_8k.py"), "The model of part=long.", config.Config)


class Measurement(NamedTuple):
    """Seconds of the prefill, seconds of each decoded token, the tokens, and the bytes of the cache if known."""

    prefill: float
    token: float
    tokens: list[int]
    cache_bytes: int | None


def prompt_of(c: Config, length: int) -> list[int]:
    return np.random.default_rng(0).integers(0, c.model.vocab_size, length).tolist()


def make_ours(values: dict, length: int, new: int, chunk: int) -> Ready:
    """Answers of the engine to one prompt, with its programs compiled."""
    c = config.build(values)
    mesh, prompt = make_mesh(c.mesh, jax.devices()[:1]), prompt_of(c, length)
    with jax.set_mesh(mesh):
        engine = Engine(jax.jit(init, static_argnums=0)(c.model, jax.random.key(c.seed)), c, EngineOptions(chunk))
        first = prompt[:chunk]
        engine.generate([first], length - len(first) + new, on_tokens=lambda *_: True)  # in a cache of the same size

    def run() -> Measurement:
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            (answer,) = engine.generate([prompt], new)
        seconds, timing = time.perf_counter() - start, engine.timing
        return Measurement(seconds - timing.decode_s, timing.decode_s / new, answer.tokens.tolist(), timing.cache_bytes)

    return Ready(run, None)


def make_transformers(values: dict, length: int, new: int, directory: str) -> Ready:
    """Answers of the exported model by `generate` of `transformers`."""
    import torch

    model = measurement.exported_model(directory).eval()
    prompt = torch.tensor([prompt_of(config.build(values), length)])

    def answer(prompt) -> Measurement:
        times = [time.perf_counter()]

        def record_time(*_, **__):
            times.append(time.perf_counter())
            return torch.zeros(1, dtype=torch.bool)

        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, eos_token_id=None,
            stopping_criteria=[record_time],
        )  # fmt: skip
        tokens = output[0, prompt.shape[1] :].tolist()
        return Measurement(times[1] - times[0], (times[-1] - times[1]) / (len(tokens) - 1), tokens, None)

    answer(prompt[:, :16])  # starts the threads
    return Ready(lambda: answer(prompt), None)


def make_growth(values: dict, length: int, chunk: int) -> Ready:
    """Seconds of a token at the end of a sequence of `length`; the cache has the length but no tokens of it."""
    c, new = config.build(values), steps.SLICE
    mesh = make_mesh(c.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        engine = Engine(jax.jit(init, static_argnums=0)(c.model, jax.random.key(c.seed)), c, EngineOptions(chunk))
        capacity = chunk * caches.power_of_two(-(-length // chunk))
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

    run()  # compiles
    return Ready(run, None)


def against_transformers(processes: Processes, c: Config, lengths: list[int]) -> list[dict]:
    """A record for each contender and length."""
    values, new, records = config.to_dict(c), NEW.value, []
    with tempfile.TemporaryDirectory() as directory:
        processes.call("jax", measurement.export, values, directory, max(lengths))
        for S in lengths:
            tasks = {"ours": Task("jax", make_ours, (values, S - new, new, CHUNK.value))}
            tasks["transformers"] = Task("torch", make_transformers, (values, S - new, new, directory))
            for name, x in processes.race(f"transformers {S:,}", tasks, REPEATS.value).items():
                records.append({"contender": name, "tokens": S, "prompt": S - new, "missing": x.missing})
                if x.missing is None:
                    best = {"prefill": min(a.prefill for a in x.results), "token": min(a.token for a in x.results)}
                    records[-1] |= best | {"calls": [a[:2] for a in x.results], "answer": x.results[0].tokens}
                    records[-1]["memory"] = x.memory
    return records


def show_against_transformers(records: list[dict]) -> None:
    header = "contender, tokens, prefill s, tokens/s, time / ours, ms a token, tokens/s, time / ours, same, GiB".split(", ")
    ours = {r["tokens"]: r for r in records if r["contender"] == "ours"}

    def cells(r: dict) -> list[str]:
        our, row = ours[r["tokens"]], [r["contender"], f"{r['tokens']:,}"]
        if r["missing"] or our["missing"]:
            return row
        same = sum(a == b for a, b in zip(r["answer"], our["answer"], strict=True))
        row += [f"{r['prefill']:.3g}", f"{r['prompt'] / r['prefill']:,.0f}", f"{r['prefill'] / our['prefill']:.2f}"]
        row += [f"{1e3 * r['token']:.3g}", f"{1 / r['token']:,.1f}", f"{r['token'] / our['token']:.2f}"]
        return [*row, f"{same}/{len(our['answer'])}", measurement.gib(r["memory"])]

    print(measurement.table(header, [cells(r) for r in records]))
    measurement.print_missing(records)


def against_full_attention(processes: Processes, c: Config, lengths: list[int]) -> list[dict]:
    pair, records = {"hybrid": c, "full attention": measurement.full_attention(c)}, []
    for S in lengths:
        tasks = {name: Task("jax", make_growth, (config.to_dict(x), S, CHUNK.value)) for name, x in pair.items()}
        for name, x in processes.race(f"growth {S:,}", tasks, REPEATS.value).items():
            record = {"contender": name, "layers": pair[name].model.layers, "tokens": S, "missing": x.missing}
            records.append(record | ({} if x.missing else {"token": min(x.results), "calls": x.results}))
    return records


def show_growth(records: list[dict]) -> None:
    """Slopes are of the straight line through all lengths."""
    slopes, rows = {}, []
    for r in records:
        rows.append([r["contender"], r["layers"], f"{r['tokens']:,}", "—" if r["missing"] else f"{1e3 * r['token']:.3g}"])
    print(measurement.table(("contender", "layers", "tokens", "ms a token"), rows))
    measurement.print_missing(records)
    for name in ("hybrid", "full attention"):
        points = [(r["tokens"], r["token"]) for r in records if r["contender"] == name and not r["missing"]]
        if len(points) > 1:
            slopes[name] = np.polyfit(*zip(*points, strict=True), 1)[0]
            print(f"{name}: {1e9 * slopes[name]:.3g} ms more for a million tokens more")
    if len(slopes) == 2:
        print(f"the hybrid's token grows {slopes['hybrid'] / slopes['full attention']:.2f} times as fast")


def cache_bytes(c: Config, length: int, chunk: int) -> int:
    """Bytes in bfloat16 of the cache of one sequence of `length` tokens, `chunk` read at a time; nothing is allocated."""
    cache = jax.eval_shape(lambda: caches.empty(c.model, 1, length, chunk, jnp.dtype("bfloat16"), False))
    return sum(x.size * x.dtype.itemsize for layer in cache.layers for x in (layer.k_BKSH, layer.v_BKSH))


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
    answer = make_ours(values, length - new, new, chunk).run()
    bytes_per_value = execution_on(jax.default_backend(), c.model, c.train).dtype.itemsize
    return {"tokens": length, "allocated": answer.cache_bytes, "formula": flops.cache_bytes(c.model, length, bytes_per_value)}


def cache_sizes(processes: Processes, c: Config, lengths: list[int]) -> list[dict]:
    """A record for each length, and last one of a cache that a small engine allocates."""
    small = config.to_dict(config.build(LONG.value.values))
    records = processes.call("jax", sizes, config.to_dict(c), lengths, CHUNK.value)
    return [*records, processes.call("jax", allocated, small, ALLOCATED, NEW.value, CHUNK.value)]


def show_cache_sizes(records: list[dict]) -> None:
    *records, last = records
    header = ("tokens", "full GiB", "hybrid GiB", "share", "formula's share", "share while read in chunks")
    rows = []
    for r in records:
        shares = [f"{r[size] / r['full']:.3f}" for size in ("bytes", "formula", "reading")]
        rows.append([f"{r['tokens']:,}", f"{r['full'] / GIB:.3f}", f"{r['bytes'] / GIB:.3f}", *shares])
    print(measurement.table(header, rows))
    title = f"allocated by an engine of --long_config for {last['tokens']:,} tokens"
    print(f"{title}: {last['allocated']:,} bytes; the formula says {last['formula']:,}")


def long_prompts(processes: Processes, c: Config, lengths: list[int]) -> list[dict]:
    """A record for each length; the prompts run one after the other in a process of their own."""
    records = []
    for S in lengths:
        task = Task("long", make_ours, (config.to_dict(c), S, NEW.value, CHUNK.value))
        result = processes.race(f"long {S:,}", {"ours": task}, REPEATS.value)["ours"]
        records.append({"tokens": S, "missing": result.missing})
        if result.missing is None:
            best = min(result.results, key=lambda x: x.prefill)
            records[-1] |= {"prefill": best.prefill, "token": best.token, "cache": best.cache_bytes, "memory": result.memory}
            records[-1] |= {"peak": processes.call("long", measurement.highest_memory)}
            records[-1] |= {"formula": flops.cache_bytes(c.model, S, 4)}
    return records


def show_long_prompts(records: list[dict]) -> None:
    header = "tokens, prefill s, tokens/s, ms a token, cache MiB, formula's, GiB beyond weights, GiB of the process".split(", ")
    rows = []
    for r in records:
        rows.append([f"{r['tokens']:,}"])
        if not r["missing"]:
            rows[-1] += [f"{r['prefill']:.3g}", f"{r['tokens'] / r['prefill']:,.0f}", f"{1e3 * r['token']:.3g}"]
            rows[-1] += [f"{r['cache'] / 2**20:.1f}", f"{r['formula'] / 2**20:.1f}"]
            rows[-1] += [measurement.gib(r["memory"]), measurement.gib(r["peak"])]
    print(measurement.table(header, rows))
    measurement.print_missing(records, lambda r: f"{r['tokens']:,} tokens")


BENCHMARKS = {  # the flag of the model's config, the measurement, and the function that prints it
    "cache": (CACHE, cache_sizes, show_cache_sizes),
    "transformers": (CONFIG, against_transformers, show_against_transformers),
    "growth": (CONFIG, against_full_attention, show_growth),
    "long": (LONG, long_prompts, show_long_prompts),
}


def bench() -> None:
    parts = {part: functions for part, functions in BENCHMARKS.items() if PART.value in (part, "all")}
    lengths = {part: measurement.lengths(TOKENS.value or LENGTHS[part]) for part in parts}
    configs = {part: config.build(flag.value.values) for part, (flag, *_) in parts.items()}
    records = {}
    with Processes(round(MEMORY_GIB.value * GIB)) as processes:
        platform = processes.call("jax", jax.default_backend)
        print(f"{platform}, {measurement.threads()} threads, jax {version('jax')}")
        for part, (_, measure, show) in parts.items():
            c = configs[part]
            dtype = "bfloat16" if part == "cache" else str(execution_on(platform, c.model, c.train).dtype)
            print(f"\n{part}: {flops.parameters(c.model):,} parameters, layers {c.model.layers}, {dtype}")
            if part == "transformers":
                if reason := measurement.no_transformers(platform, dtype, PART.value):
                    print(f"— {reason}")
                    continue
                print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")))
            records[part] = measure(processes, c, lengths[part])
            show(records[part])
    measurement.write_json(JSON.value, {"platform": platform, "records": records})


def main(argv):
    programs.run(bench, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
