"""Answers to a prompt here and in `transformers`: what the parts `prefill` and `decode` share.

The same model (ours, exported) and prompts, continued greedily here and by `generate` of `transformers` on PyTorch with its
cache; on a CPU with the extra `oracle`. A length is that of a prompt and its answer.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from hybrid_attn import config
from hybrid_attn.bench import measurement
from hybrid_attn.bench.measurement import Processes, Ready, Task
from hybrid_attn.bench.part import Run
from hybrid_attn.config import Config
from hybrid_attn.infer.engine import DEFAULT_CHUNK, Engine, EngineOptions
from hybrid_attn.model import init
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.trees import check

CHUNK = {"chunk": DEFAULT_CHUNK}  # tokens of a prompt that our engine reads at a time


class Answer(NamedTuple):
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

    def run() -> Answer:
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            (answer,) = engine.generate([prompt], new)
        seconds, timing = time.perf_counter() - start, engine.timing
        return Answer(seconds - timing.decode_s, timing.decode_s / new, answer.tokens.tolist(), timing.cache_bytes)

    return Ready(run, None)


def make_transformers(values: dict, length: int, new: int, directory: str) -> Ready:
    """Answers of the exported model by `generate` of `transformers`."""
    import torch

    model = measurement.exported_model(directory).eval()
    prompt = torch.tensor([prompt_of(config.build(values), length)])

    def answer(prompt) -> Answer:
        times = [time.perf_counter()]

        def record_time(*_, **__):
            times.append(time.perf_counter())
            return torch.zeros(1, dtype=torch.bool)

        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, eos_token_id=None,
            stopping_criteria=[record_time],
        )  # fmt: skip
        tokens = output[0, prompt.shape[1] :].tolist()
        return Answer(times[1] - times[0], (times[-1] - times[1]) / (len(tokens) - 1), tokens, None)

    answer(prompt[:, :16])  # starts the threads
    return Ready(lambda: answer(prompt), None)


def measure(processes: Processes, run: Run, part: str, new: int, seconds_of: str) -> list[dict]:
    """A record for each contender and length; its `seconds` are the field `seconds_of` of the answers, of `new` tokens."""
    check(new >= 2, f"--options has new={new}, and the time of a token is that of the second and later ones; use 2 or more")
    values, chunk, records = config.to_dict(run.config), run.options["chunk"], []
    check(min(run.lengths) > new, f"--lengths has {min(run.lengths)} tokens, and {new} of them are the answer; use longer ones")
    reason = measurement.no_transformers(run.platform, run.dtype)
    with tempfile.TemporaryDirectory() as directory:
        if not reason:
            processes.call("jax", measurement.export, values, directory, max(run.lengths))
        for S in run.lengths:
            about = {"tokens": S, "prompt": S - new, "new": new}
            tasks = {"ours": Task("jax", make_ours, (values, S - new, new, chunk))}
            if not reason:
                tasks["transformers"] = Task("torch", make_transformers, (values, S - new, new, directory))
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
        same = sum(a == b for a, b in zip(r["answer"], our["answer"], strict=True))
        row += [f"{scale * r['seconds']:.3g}", f"{scale * r['best']:.3g}", f"{r.get(tokens, 1) / r['seconds']:,.1f}"]
        return [*row, f"{r['seconds'] / our['seconds']:.2f}", f"{same}/{len(our['answer'])}", measurement.gib(r["memory"])]

    return measurement.table(header, [cells(r) for r in records]) + measurement.missing(records)
