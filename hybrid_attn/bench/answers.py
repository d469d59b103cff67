"""Answers to a prompt here and in `transformers`: what the parts `prefill` and `decode` share.

The same model (ours, exported) and prompts, continued greedily here and by `generate` of `transformers` on PyTorch with its
cache; on a CPU with the extra `oracle`. A length is that of a prompt and its answer.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping

import jax
import numpy as np

from hybrid_attn import config
from hybrid_attn.bench import measurement, pytorch
from hybrid_attn.bench.contender import Answer, Ready
from hybrid_attn.bench.measurement import Processes, Task
from hybrid_attn.bench.part import Run
from hybrid_attn.config import Config
from hybrid_attn.infer.engine import DEFAULT_CHUNK, Engine, EngineOptions
from hybrid_attn.model import flops, init
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.trees import check

CHUNK = {"chunk": DEFAULT_CHUNK}  # tokens of a prompt that our engine reads at a time


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

    def run() -> Answer:
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            (answer,) = engine.generate([prompt], new)
        seconds, timing = time.perf_counter() - start, engine.timing
        return Answer(seconds - timing.decode_s, timing.decode_s / new, answer.tokens.tolist(), timing.cache_bytes)

    return Ready(run, None, flops.parameters(c.model), engine.execution.kernel)


def same_tokens(answer: list[int], other: list[int]) -> int:
    """How many tokens of two answers of the same length are the same at the same position."""
    return sum(a == b for a, b in zip(answer, other, strict=True))


def check_new(new: int, lengths: list[int]) -> None:
    """ValueError where answers of `new` tokens are too short to be timed, or leave no prompt."""
    check(new >= 2, f"--options has new={new}, and the time of a token is that of the second and later ones; use 2 or more")
    check(min(lengths) > new, f"--lengths has {min(lengths)} tokens, and {new} of them are the answer; use longer ones")


def measure(processes: Processes, run: Run, part: str, new: int, seconds_of: str) -> list[dict]:
    """A record for each contender and length; its `seconds` are the field `seconds_of` of the answers, of `new` tokens."""
    check_new(new, run.lengths)
    values, chunk, records = config.to_dict(run.config), run.options["chunk"], []
    reason = measurement.no_transformers(run.platform, run.dtype)
    with tempfile.TemporaryDirectory() as directory:
        if not reason:
            processes.call("jax", measurement.export, values, directory, max(run.lengths))
        for S in run.lengths:
            about = {"tokens": S, "prompt": S - new, "new": new}
            tasks = {"ours": Task("jax", make_ours, (values, S - new, new, chunk))}
            if not reason:
                tasks["transformers"] = Task("torch", pytorch.make_answers, (directory, prompt_of(run.config, S - new), new))
            for name, x in processes.race(f"{part} {S:,}", tasks, run.repeats).items():
                records.append({"contender": name} | about | x.record)
                if not x.missing:
                    calls = [getattr(answer, seconds_of) for answer in x.results[1:]]
                    records[-1] |= {"seconds": statistics.median(calls), "best": min(calls), "calls": calls}
                    records[-1]["answer"] = x.results[0].tokens
            if reason:
                records.append({"contender": "transformers"} | about | {"missing": reason})
    return records


def table(records: list[dict], unit: str, scale: float, tokens: str) -> str:
    """Seconds times `scale`, of `tokens` of a record, or of one if it has no such field."""
    header = ("contender", "tokens", unit, "best", "tokens/s", "time / ours", "same tokens", "GiB")
    ours = {r["tokens"]: r for r in records if r["contender"] == "ours"}

    def cells(r: Mapping) -> list[str]:
        our, row = ours[r["tokens"]], [r["contender"], f"{r['tokens']:,}"]
        if "missing" in r or "missing" in our:
            return row
        same = same_tokens(r["answer"], our["answer"])
        row += [f"{scale * r['seconds']:.3g}", f"{scale * r['best']:.3g}", f"{r.get(tokens, 1) / r['seconds']:,.1f}"]
        return [*row, f"{r['seconds'] / our['seconds']:.2f}", f"{same}/{len(our['answer'])}", measurement.gib(r["memory"])]

    return measurement.table(header, [cells(r) for r in records]) + measurement.missing(records)
