"""Times training steps beside `transformers` and beside full attention: python tools/bench_train.py

    python tools/bench_train.py --part=transformers --lengths=8K --json=transformers.json
    python tools/bench_train.py --part=layouts --lengths=8K,32K --config.model.num_layers=4
    python tools/bench_train.py --part=statistics --repeats=10

transformers: the same model (ours, exported), tokens, loss and AdamW, here and in `transformers` on PyTorch with its scaled
dot-product attention; on a CPU with the extra `oracle`. It gives windowed layers a mask and computes all S x S scores, which
the column of FLOPs counts. Where its activations do not fit into --memory_gib, it recomputes those of each layer.
layouts: the model of --config, and the same with its windowed layer type in every layer, without the window.
statistics: the model of --config, and its steps that measure statistics (`train.statistics_every`); not part of "both".

Contenders take their steps alternately; the best of --repeats counts: forward, backward and update. MFU is relative to the best
matmul between the steps, by the FLOPs that the model needs. Memory is that of a step beyond parameters and tokens, and here
beyond the optimiser state. A dash is explained under the table.
"""

import dataclasses
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from jax.sharding import NamedSharding

from hybrid_attn import config, config_file, programs
from hybrid_attn.bench import measurement
from hybrid_attn.bench.measurement import Processes, Ready, Task
from hybrid_attn.config import Config
from hybrid_attn.model import execution_on, flops
from hybrid_attn.model.attention import attended_pairs, attention_flops
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import TOKENS_BT, make_mesh
from hybrid_attn.train.schedule import schedule
from hybrid_attn.train.step import executions, init_state, make_steps
from hybrid_attn.trees import check

BENCH = Path(__file__).parents[1] / "configs" / "bench.py"
LENGTHS = {"transformers": ["8K", "32K"], "layouts": ["8K", "32K", "64K"], "statistics": ["8K"]}
BOTH = ("transformers", "layouts")
EVERY = 10  # steps from one with statistics to the next
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


def make_ours(values: dict, statistics: bool = False) -> Ready:
    """Steps of the trainer on one device; on an accelerator, memory is what the compiler reserves."""
    c = config.build(values)
    (step,) = make_steps(c, executions(c, jax.default_backend()), statistics=statistics)
    mesh = make_mesh(c.mesh, jax.devices()[:1])
    fit.check(c, 1)
    with jax.set_mesh(mesh):
        state = jax.jit(init_state, static_argnums=0)(c)
        batch = jax.device_put(batch_of(c), NamedSharding(mesh, TOKENS_BT))
        program = step.lower(state, batch).compile()

    def run() -> float:
        nonlocal state
        state, metrics = program(state, batch)
        return float(jax.block_until_ready(metrics)["loss"])

    reserved = None if jax.default_backend() == "cpu" else program.memory_analysis().temp_size_in_bytes
    return Ready(run, reserved)


def make_transformers(values: dict, directory: str, decayed_names: list[str], remat: str) -> Ready:
    """Steps of the exported model in `transformers`, with the update of hybrid_attn/train/optim.py."""
    import torch

    c, model = config.build(values), measurement.exported_model(directory).train()
    optim = c.optim
    if remat != "none":
        model.activation_checkpointing_enable()
    groups = [
        {"params": [x for name, x in model.named_parameters() if name in decayed_names], "weight_decay": optim.weight_decay},
        {"params": [x for name, x in model.named_parameters() if name not in decayed_names], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(optim.b1, optim.b2), eps=optim.eps, fused=True)
    rates = iter([float(schedule(optim, c.pieces)(step)) for step in range(c.total_steps)])
    tokens = torch.from_numpy(batch_of(c)["tokens"]).long()

    def loss_of(tokens):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def run() -> float:
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        rate = next(rates)
        for group in adamw.param_groups:
            group["lr"] = rate
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


def ours(c: Config) -> tuple[Config, Task]:
    return c, Task("jax", make_ours, (config.to_dict(c),))


def compare(
    processes: Processes, title: str, contenders: dict[str, tuple[Config, Task]], dtype: str, done: list[dict]
) -> list[dict]:
    """A record for each contender; those of shorter sequences, `done`, predict whether a step takes too long."""
    records, tasks = {}, {"matmul": Task("jax", measurement.make_matmul, (dtype,))}  # first: it starts the threads
    for name, (c, task) in contenders.items():
        stage, computed = c.stages[0], computed_with_masks(c) if task.library == "torch" else needed(c)
        records[name] = {"contender": name, "layers": c.model.layers, "tokens": stage.seq_len, "batch": stage.batch}
        records[name] |= {"needed_flops": needed(c), "computed_flops": computed}
        before = [r for r in done if r["contender"] == name and "seconds" in r]
        if before and before[-1]["seconds"] * computed / before[-1]["computed_flops"] > SECONDS.value:
            records[name]["missing"] = f"a step might take more than {SECONDS.value:g} s"
        else:
            tasks[name] = task
    measured = processes.race(title, tasks, REPEATS.value)
    peak = max(measured.pop("matmul").results)
    for name, x in measured.items():
        if x.missing:
            records[name] |= {"missing": x.missing, "fits": False}
        else:
            records[name] |= {"seconds": min(x.seconds), "calls": x.seconds, "losses": x.results, "cpu": min(x.cpu_seconds)}
            records[name] |= {"memory": x.memory, "peak": peak}
    return list(records.values())


def beside_transformers(processes: Processes, c: Config, lengths: list[int], dtype: str) -> list[dict]:
    records = []
    for S in lengths:
        at_S, title = at_length(c, S), f"transformers {S:,}"
        values = config.to_dict(at_S)
        with tempfile.TemporaryDirectory() as directory:
            args = values, directory, processes.call("jax", measurement.export, values, directory, S)
            task = Task("torch", make_transformers, (*args, c.train.remat))
            new = compare(processes, title, {"ours": ours(at_S), "transformers": (at_S, task)}, dtype, records)
            if c.train.remat == "none" and not new[1].get("fits", True):
                recomputing = at_S, Task("torch", make_transformers, (*args, "layer"))
                pair = {"ours": ours(at_S), "transformers, recomputing": recomputing}
                new = [new[1], *compare(processes, title, pair, dtype, records)]
        records += new
    return records


def beside_full_attention(processes: Processes, c: Config, lengths: list[int], dtype: str) -> list[dict]:
    records = []
    for S in lengths:
        pair = {"ours": ours(at_length(c, S)), "full attention": ours(at_length(measurement.full_attention(c), S))}
        records += compare(processes, f"layouts {S:,}", pair, dtype, records)
    return records


def beside_statistics(processes: Processes, c: Config, lengths: list[int], dtype: str) -> list[dict]:
    records = []
    for S in lengths:
        at_S = at_length(c, S)
        pair = {"ours": ours(at_S), "with statistics": (at_S, Task("jax", make_ours, (config.to_dict(at_S), True)))}
        records += compare(processes, f"statistics {S:,}", pair, dtype, records)
    return records


BENCHMARKS = {"transformers": beside_transformers, "layouts": beside_full_attention, "statistics": beside_statistics}
HEADER = ("contender", "layers", "tokens", "s", "tokens/s", "time / ours", "FLOPs / ours", "MFU", "GiB", "first loss", "last")


def show(records: list[dict], peak: float) -> None:
    ours = {r["tokens"]: r for r in records if r["contender"] == "ours"}

    def cells(r: dict) -> list[str]:
        mine, row = ours[r["tokens"]], [r["contender"], r["layers"], f"{r['tokens']:,}"]
        flops_ratio = f"{r['computed_flops'] / mine['computed_flops']:.2f}"
        if "missing" in r:
            return [*row, "—", "—", "—", flops_ratio]
        seconds = r["seconds"]
        ratio = f"{seconds / mine['seconds']:.2f}" if "seconds" in mine else "—"
        row += [f"{seconds:.3g}", f"{r['batch'] * r['tokens'] / seconds:,.0f}", ratio, flops_ratio]
        row += [f"{r['needed_flops'] / seconds / peak:.0%}", measurement.gib(r["memory"])]
        return row + [f"{r['losses'][i]:.5f}" for i in (0, -1)]

    print(measurement.table(HEADER, [cells(r) for r in records]))
    measurement.print_missing(records)
    print()


def show_cost(records: list[dict]) -> None:
    """Prints the share of the time of steps that statistics cost, and of their time on all processors of a CPU."""
    by_name = {(r["tokens"], r["contender"]): r for r in records if "seconds" in r}
    for (S, name), plain in by_name.items():
        if name == "ours" and (measured := by_name.get((S, "with statistics"))):
            cost, cpu = ((measured[key] / plain[key] - 1) / EVERY for key in ("seconds", "cpu"))
            print(f"{S:,} tokens: statistics at every {EVERY} steps cost {cost:.2%} of a step, {cpu:.2%} of its CPU time\n")


def check_losses(records: list[dict]) -> None:
    """ValueError where two contenders did not compute the same function of the same parameters."""
    first = {(r["tokens"], r["contender"]): r["losses"][0] for r in records if "losses" in r}
    for (S, name), loss in first.items():
        own = first.get((S, "ours"), loss)
        check(abs(loss - own) <= 1e-3, f"the first losses at {S:,} tokens differ: ours {own:.5f}, {name} {loss:.5f}")


def bench() -> None:
    c = config.build(CONFIG.value.values)
    parts = BOTH if PART.value == "both" else (PART.value,)
    lengths = {part: measurement.lengths(LENGTHS[part] if ROWS.value is None else ROWS.value) for part in parts}
    with Processes(round(MEMORY_GIB.value * measurement.GIB)) as processes:
        platform = processes.call("jax", jax.default_backend)
        dtype = str(execution_on(platform, c.model, c.train).dtype)
        if "transformers" in parts and (reason := measurement.no_transformers(platform, dtype, PART.value)):
            print(f"— transformers: {reason}\n")
            parts = [part for part in parts if part != "transformers"]
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
    show_cost(records.get("statistics", []))
    out = {"platform": platform, "versions": versions, "peak": peak, "config": config.to_dict(c), "records": records}
    measurement.write_json(JSON.value, out)
    check_losses(records.get("transformers", []) + records.get("statistics", []))


def main(argv):
    programs.run(bench, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
