"""Training steps of several contenders, taken alternately: what parts that time steps share.

A step is forward, backward and update. MFU is relative to the best matmul between the steps, by the FLOPs that the model needs.
Memory is that of a step beyond parameters and tokens, and of ours beyond the optimiser state.
"""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding

from hybrid_attn import config, trees
from hybrid_attn.bench import measurement
from hybrid_attn.bench.contender import Ready
from hybrid_attn.bench.measurement import Processes, Task
from hybrid_attn.bench.part import Run, share_of_peak
from hybrid_attn.config import Config
from hybrid_attn.config_model import attention_heads
from hybrid_attn.configs import base
from hybrid_attn.model import flops
from hybrid_attn.model.attention import attended_pairs, attention_flops
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import TOKENS_BT, make_mesh
from hybrid_attn.train.step import executions, init_state, make_steps
from hybrid_attn.trees import check

OF_PEAK = {8192: 0.5}  # the target: the share of the matmul peak that our step reaches, by tokens
TRANSLATED = ("lr", "b1", "b2", "eps", "weight_decay", "clip_norm", "schedule", "warmup_steps", "decay_fraction", "decay_shape")
TRANSLATED += ("final_lr_ratio",)  # keys of optim that steps of other libraries have too
OF_STAGE = ("name", "steps", "tokens", "seq_len", "batch")  # keys of a stage that they have
HEADER = (
    *("contender", "layers", "tokens", "s", "best", "tokens/s", "time / ours", "FLOPs / ours", "MFU", "GiB"),
    *("first loss", "last"),
)


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
    runs = executions(c, jax.default_backend())
    (step,) = make_steps(c, runs, statistics=statistics)
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
    return Ready(run, reserved, flops.parameters(c.model), runs[0].kernel)


def ours(c: Config, statistics: bool = False) -> tuple[Config, Task]:
    return c, Task("jax", make_ours, (config.to_dict(c), statistics))


def at_length(c: Config, S: int, repeats: int) -> Config:
    """`c` with sequences of S tokens, and as many steps as are taken."""
    return dataclasses.replace(c, stages=(dataclasses.replace(c.stages[0], steps=repeats + 1, seq_len=S),))


def check_update(c: Config) -> None:
    """ValueError where the steps of another library, which translate what `TRANSLATED` names, would not be those of `c`."""
    usual, lines = config.build(base.get_config().to_dict()), []
    for group, translated, pair in (
        ("optim.", TRANSLATED, (usual.optim, c.optim)),
        ("stages[0].", OF_STAGE, (usual.stages[0], c.stages[0])),
    ):
        fields = [{key: x for key, x in config.to_dict(of).items() if key not in translated} for of in pair]
        lines += trees.differences(*fields, group)
    problem = f"other libraries take plain steps of AdamW here, and --config differs from that in {'; '.join(lines)}"
    check(not lines, f"{problem}; leave these at their defaults")


def needed(c: Config) -> float:
    """FLOPs that a step needs."""
    stage = c.stages[0]
    return stage.batch * stage.seq_len * flops.train_flops_per_token(c.model, stage.seq_len)


def computed_with_masks(c: Config) -> float:
    """FLOPs of a step that computes all S x S scores of every layer whose window is shorter than the sequence."""
    (B, S), m = (c.stages[0].batch, c.stages[0].seq_len), c.model
    windowed = [layer for layer in map(m.kinds.get, m.layers) if layer.window is not None and layer.window < S]
    masked = sum(attention_heads(m, layer)[0] * (S**2 - attended_pairs(layer, S)) for layer in windowed)
    return needed(c) + B * flops.TRAIN * attention_flops(1, m.head_dim, masked)


def about(name: str, c: Config, masked: bool) -> dict:
    """What the record of a contender says before it is measured; one with masks computes all S x S scores."""
    stage = c.stages[0]
    record = {"contender": name, "layers": c.model.layers, "tokens": stage.seq_len, "batch": stage.batch}
    return record | {"needed_flops": needed(c), "computed_flops": computed_with_masks(c) if masked else needed(c)}


def too_long(record: dict, done: list[dict], seconds: float) -> str:
    """Why a step is not taken if it might take more than `seconds` by the last record of its contender in `done`, or empty."""
    before = [r for r in done if r["contender"] == record["contender"] and "seconds" in r]
    expected = before[-1]["seconds"] * record["computed_flops"] / before[-1]["computed_flops"] if before else 0.0
    return f"a step might take more than {seconds:g} s" if expected > seconds else ""


def compare(
    processes: Processes, run: Run, title: str, contenders: dict[str, tuple[Config, Task | str]], done: list[dict]
) -> list[dict]:
    """A record for each contender; those of shorter sequences, `done`, predict whether a step takes too long.

    In place of its task a contender may have the reason why it is missing.
    """
    records, tasks = {}, {"matmul": Task("jax", measurement.make_matmul, (run.dtype,))}  # first: it starts the threads
    for name, (c, task) in contenders.items():
        records[name] = about(name, c, masked=isinstance(task, str) or task.library == "torch")
        reason = task if isinstance(task, str) else too_long(records[name], done, run.seconds)
        if reason:
            records[name]["missing"] = reason
        else:
            tasks[name] = task
    measured = processes.race(f"{title} {c.stages[0].seq_len:,}", tasks, run.repeats)
    peak = max(measured.pop("matmul").results)
    for name, x in measured.items():
        more = {"fits": False} if x.missing else {"losses": x.results, "cpu": float(np.median(x.cpu_seconds)), "peak": peak}
        records[name] |= x.record | more
    return list(records.values())


def table(records: list[dict]) -> str:
    ours = {r["tokens"]: r for r in records if r["contender"] == "ours"}

    def cells(r: dict) -> list[str]:
        mine, row = ours[r["tokens"]], [r["contender"], r["layers"], f"{r['tokens']:,}"]
        flops_ratio = f"{r['computed_flops'] / mine['computed_flops']:.2f}"
        if "missing" in r:
            return [*row, "—", "—", "—", "—", flops_ratio]
        seconds = r["seconds"]
        ratio = f"{seconds / mine['seconds']:.2f}" if "seconds" in mine else "—"
        row += [f"{seconds:.3g}", f"{r['best']:.3g}", f"{r['batch'] * r['tokens'] / seconds:,.0f}", ratio, flops_ratio]
        row += [share_of_peak(r, r["needed_flops"], seconds).shown, measurement.gib(r["memory"])]
        return row + [f"{r['losses'][i]:.5f}" for i in (0, -1)]

    return measurement.table(HEADER, [cells(r) for r in records]) + measurement.missing(records)


def check_losses(records: list[dict]) -> None:
    """ValueError where two contenders did not compute the same function of the same parameters."""
    first = {(r["tokens"], r["contender"]): r["losses"][0] for r in records if "losses" in r}
    for (S, name), loss in first.items():
        own = first.get((S, "ours"), loss)
        check(abs(loss - own) <= 1e-3, f"the first losses at {S:,} tokens differ: ours {own:.5f}, {name} {loss:.5f}")
