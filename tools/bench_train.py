"""Times training steps beside `transformers` and beside full attention: python tools/bench_train.py

    python tools/bench_train.py --part=transformers --lengths=8K --json=transformers.json
    python tools/bench_train.py --part=layouts --lengths=8K,32K --config.model.num_layers=4

transformers: the same model (ours, exported), tokens, loss and AdamW, here and in `transformers` on PyTorch with its scaled
dot-product attention; on a CPU with the extra `oracle`. It gives windowed layers a mask and computes all S x S scores, which
the column of FLOPs counts. Where its activations do not fit into --memory_gib, it recomputes those of each layer.
layouts: the model of --config, and the same with its windowed layer type in every layer, without the window.

Contenders take their steps alternately; the best of --repeats counts: forward, backward and update. MFU is relative to the best
matmul between the steps, by the FLOPs that the model needs. Memory is that of a step beyond parameters and tokens, and here
beyond the optimiser state. A dash is explained under the table.
"""

import dataclasses
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags
from jax.sharding import NamedSharding

from hybrid_attn import config, config_file, programs
from hybrid_attn.bench import measurement
from hybrid_attn.bench.measurement import Processes, Ready, Task
from hybrid_attn.config import Config
from hybrid_attn.convert import families, hf
from hybrid_attn.model import execution_on, flops, init, specs
from hybrid_attn.model.attention import attended_pairs, attention_flops
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import TOKENS_BT, make_mesh
from hybrid_attn.train.optim import schedule
from hybrid_attn.train.step import init_state, make_step

BENCH = Path(__file__).parents[1] / "configs" / "bench.py"
LENGTHS = {"transformers": ["8K", "32K"], "layouts": ["8K", "32K", "64K"]}
PART = flags.DEFINE_enum("part", "both", [*LENGTHS, "both"], "What to compare with.")
ROWS = flags.DEFINE_list("lengths", None, f"Tokens of a packed sequence; K is 1,024. By default {LENGTHS}.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Steps of each contender.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 300.0, "Leave out a step that would take longer, judged by one of a shorter sequence.")
MEMORY_GIB = flags.DEFINE_float("memory_gib", 12.0, "Leave out contenders that need more.", lower_bound=0.1)
JSON = flags.DEFINE_string("json", None, "File for the numbers of the tables.")
CONFIG = config_file.define("config", str(BENCH), "The model, the optimiser and how they run.", config.Config)


def batch_of(c: Config) -> dict[str, np.ndarray]:
    """Sequences of random tokens, one document each; the target of a token is the next one, and the last has none."""
    stage = c.stages[0]
    tokens = np.random.default_rng(0).integers(0, c.model.vocab_size, (stage.batch, stage.seq_len), np.int32)
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "positions": np.broadcast_to(np.arange(stage.seq_len, dtype=np.int32), tokens.shape),
        "segments": np.ones_like(tokens),
        "weights": weights,
        "bytes": weights,
    }


def make_ours(values: dict) -> Ready:
    """Steps of the trainer on one device; on an accelerator, memory is what the compiler reserves."""
    c = config.build(values)
    mesh = make_mesh(c.mesh, jax.devices()[:1])
    fit.check(c, mesh.shape)
    with jax.set_mesh(mesh):
        state = jax.jit(init_state, static_argnums=0)(c)
        batch = jax.device_put(batch_of(c), NamedSharding(mesh, TOKENS_BT))
        program = make_step(c.at(0), execution_on(jax.default_backend(), c.model, c.train)).lower(state, batch).compile()

    def run() -> float:
        nonlocal state
        state, metrics = program(state, batch)
        return float(jax.block_until_ready(metrics)["loss"])

    reserved = None if jax.default_backend() == "cpu" else program.memory_analysis().temp_size_in_bytes
    return Ready(run, reserved)


def export(values: dict, directory: str) -> list[str]:
    """Exports the initial parameters of the trainer; returns the names of the tensors with weight decay."""
    c = config.build(values)
    with jax.set_mesh(make_mesh(c.mesh, jax.devices()[:1])):
        params = jax.jit(init, static_argnums=0)(c.model, jax.random.key(c.seed))
    has_decay = hf.flat(jax.tree.map(lambda spec: spec.decay, specs(c.model)))
    shapes = {path: x.shape for path, x in hf.flat(params).items()}
    description = hf.describe(c.model, directory, c.stages[0].seq_len)
    hf.write(directory, c.model, description, shapes, hf.by_period(params), "float32")
    tensors = families.tensors(c.model, description["model_type"], shapes)
    return [tensor.name for tensor in tensors if has_decay[tensor.path]]


def make_transformers(values: dict, directory: str, decayed_names: list[str], remat: str) -> Ready:
    """Steps of the exported model in `transformers`, with the update of hybrid_attn/train/optim.py."""
    import torch
    import transformers

    c, optim = config.build(values), config.build(values).optim
    torch.set_num_threads(measurement.threads())
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
    model.train()
    if remat != "none":
        model.activation_checkpointing_enable()
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [x for name, x in parameters.items() if name in decayed_names], "weight_decay": optim.weight_decay},
        {"params": [x for name, x in parameters.items() if name not in decayed_names], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(optim.b1, optim.b2), eps=optim.eps, fused=True)
    rates = [float(schedule(optim, c.total_steps)(step)) for step in range(c.total_steps)]
    tokens = torch.from_numpy(batch_of(c)["tokens"]).long()

    def loss_of(tokens):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def run() -> float:
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), optim.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = rates[0]
        rates.pop(0)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    loss_of(tokens[:, :16]).backward()  # starts the threads
    adamw.zero_grad()
    return Ready(run, None)


def at_length(c: Config, S: int) -> Config:
    return dataclasses.replace(c, stages=(dataclasses.replace(c.stages[0], steps=REPEATS.value, seq_len=S),))


def needed(c: Config) -> float:
    """FLOPs that a step needs."""
    stage = c.stages[0]
    return stage.batch * stage.seq_len * flops.train_flops_per_token(c.model, stage.seq_len)


def computed_with_masks(c: Config) -> float:
    """FLOPs of a step that computes all S x S scores of every layer whose window is shorter than the sequence."""
    (B, S), m = (c.stages[0].batch, c.stages[0].seq_len), c.model
    windowed = [layer for layer in map(m.kinds.get, m.layers) if layer.window is not None and layer.window < S]
    masked = sum(S**2 - attended_pairs(layer, S) for layer in windowed)
    return needed(c) + B * flops.TRAIN * attention_flops(m.num_heads, m.head_dim, masked)


class Contender(NamedTuple):
    """A config, the FLOPs of a step of it as this contender computes it, and the task."""

    config: Config
    computed: float
    task: Task


def ours(c: Config) -> Contender:
    return Contender(c, needed(c), Task("jax", make_ours, (config.to_dict(c),)))


def in_transformers(c: Config, directory: str, decayed_names: list[str], remat: str) -> Contender:
    return Contender(
        c, computed_with_masks(c), Task("torch", make_transformers, (config.to_dict(c), directory, decayed_names, remat))
    )


def compare(processes: Processes, title: str, contenders: dict[str, Contender], dtype: str, done: list[dict]) -> list[dict]:
    """A record for each contender; those of shorter sequences, `done`, predict whether a step takes too long."""
    records, tasks = {}, {"matmul": Task("jax", measurement.make_matmul, (dtype,))}  # first: it starts the threads
    for name, (c, computed, task) in contenders.items():
        stage = c.stages[0]
        record = {"contender": name, "layers": c.model.layers, "tokens": stage.seq_len, "batch": stage.batch}
        record |= {"needed_flops": needed(c), "computed_flops": computed}
        before = [r for r in done if r["contender"] == name and "seconds" in r]
        if before and before[-1]["seconds"] * computed / before[-1]["computed_flops"] > SECONDS.value:
            record["missing"] = f"a step might take more than {SECONDS.value:g} s"
        else:
            tasks[name] = task
        records[name] = record
    measured = processes.race(title, tasks, REPEATS.value)
    peak = max(measured.pop("matmul").results)
    for name, x in measured.items():
        new = {"missing": x.missing, "fits": False}
        if x.missing is None:
            new = {"seconds": min(x.seconds), "calls": x.seconds, "losses": x.results, "memory": x.memory, "peak": peak}
        records[name] |= new
    return list(records.values())


def beside_transformers(processes: Processes, c: Config, lengths: list[int], dtype: str) -> list[dict]:
    records = []
    for S in lengths:
        at_S = at_length(c, S)
        with tempfile.TemporaryDirectory() as directory:
            decayed_names = processes.call("jax", export, config.to_dict(at_S), directory)
            pair = {"ours": ours(at_S), "transformers": in_transformers(at_S, directory, decayed_names, c.train.remat)}
            new = compare(processes, f"transformers {S:,}", pair, dtype, records)
            if c.train.remat == "none" and not new[1].get("fits", True):
                pair = {
                    "ours": ours(at_S),
                    "transformers, recomputing": in_transformers(at_S, directory, decayed_names, "layer"),
                }
                new = [new[1], *compare(processes, f"transformers {S:,}", pair, dtype, records)]
        records += new
    return records


def beside_full_attention(processes: Processes, c: Config, lengths: list[int], dtype: str) -> list[dict]:
    records = []
    for S in lengths:
        pair = {"ours": ours(at_length(c, S)), "full attention": ours(at_length(measurement.full_attention(c), S))}
        records += compare(processes, f"layouts {S:,}", pair, dtype, records)
    return records


BENCHMARKS = {"transformers": beside_transformers, "layouts": beside_full_attention}
HEADER = ("contender", "layers", "tokens", "s", "tokens/s", "time / ours", "FLOPs / ours", "MFU", "GiB", "first loss", "last")


def show(records: list[dict], peak: float) -> None:
    ours = {r["tokens"]: r for r in records if r["contender"] == "ours"}
    rows = []
    for r in records:
        mine = ours[r["tokens"]]
        flops_ratio = f"{r['computed_flops'] / mine['computed_flops']:.2f}"
        row = [r["contender"], r["layers"], f"{r['tokens']:,}"]
        if "missing" in r:
            rows.append([*row, "—", "—", "—", flops_ratio, *["—"] * 4])
            continue
        seconds, losses = r["seconds"], [f"{r['losses'][i]:.5f}" for i in (0, -1)]
        ratio = f"{seconds / mine['seconds']:.2f}" if "seconds" in mine else "—"
        memory = "—" if r["memory"] is None else f"{r['memory'] / measurement.GIB:.2f}"
        rate, mfu = f"{r['batch'] * r['tokens'] / seconds:,.0f}", f"{r['needed_flops'] / seconds / peak:.0%}"
        rows.append([*row, f"{seconds:.3g}", rate, ratio, flops_ratio, mfu, memory, *losses])
    print(measurement.table(HEADER, rows))
    for name, S, reason in ((r["contender"], r["tokens"], r["missing"]) for r in records if "missing" in r):
        print(f"— {name}, {S:,} tokens: {reason}")
    print()


def check_losses(records: list[dict]) -> None:
    """ValueError where two contenders did not compute the same function of the same parameters."""
    first = {(r["tokens"], r["contender"]): r["losses"][0] for r in records if "losses" in r}
    for (S, name), loss in first.items():
        own = first.get((S, "ours"), loss)
        if not abs(loss - own) <= 1e-3:
            raise ValueError(f"the first losses at {S:,} tokens differ: ours {own:.5f}, {name} {loss:.5f}")


def bench() -> None:
    c = config.build(CONFIG.value.values)
    parts = [part for part in BENCHMARKS if PART.value in (part, "both")]
    lengths = {part: measurement.lengths(LENGTHS[part] if ROWS.value is None else ROWS.value) for part in parts}
    with Processes(round(MEMORY_GIB.value * measurement.GIB)) as processes:
        platform = processes.call("jax", jax.default_backend)
        dtype = str(execution_on(platform, c.model, c.train).dtype)
        reason = measurement.no_transformers(platform, dtype) if "transformers" in parts else None
        if reason and PART.value == "transformers":
            raise ValueError(f"--part=transformers: {reason}")
        if reason:
            print(f"— transformers: {reason}\n")
            parts.remove("transformers")
        records = {part: BENCHMARKS[part](processes, c, lengths[part], dtype) for part in parts}
    peak = max((r["peak"] for part in parts for r in records[part] if "peak" in r), default=float("nan"))
    libraries = ("jax", "torch", "transformers") if "transformers" in parts else ("jax",)
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    print(
        f"{platform}, {measurement.threads()} threads, {versions}; {flops.parameters(c.model):,} parameters, {dtype}, "
        f"remat {c.train.remat}; matmul peak {peak / 1e9:,.1f} GFLOP/s\n"
    )
    for part in parts:
        show(records[part], peak)
    if JSON.value:
        out = {"platform": platform, "versions": versions, "peak": peak, "config": config.to_dict(c), "records": records}
        Path(JSON.value).write_text(json.dumps(out, indent=1) + "\n")
    check_losses(records.get("transformers", []))


def main(argv):
    programs.run(bench, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
