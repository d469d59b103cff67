"""The feed-forwards of experts, forward and backward, as we compute them and by `jax.lax.ragged_dot`.

The contender `dense` is one feed-forward of all copies of the tokens: it has the FLOPs of the experts of a token, and is the
time that they would take if sorting copies and reading many matrices cost nothing. Which experts a token has is random. All
contenders are called in turn, at all numbers of experts.
"""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_attn.bench import measurement
from hybrid_attn.bench.contender import Ready
from hybrid_attn.bench.measurement import Processes, Task
from hybrid_attn.bench.part import Figure, Part, Run, chosen
from hybrid_attn.model import flops
from hybrid_attn.model.grouped import blocks_of, grouped_mlp, rows_of_block
from hybrid_attn.model.mlp import ChunkedMLP, Gating, in_chunks
from hybrid_attn.parallel.mesh import mesh_over_first
from hybrid_attn.trees import check

OPTIONS = {
    "experts": "8+64",
    "contenders": "ours+dense",  # and ragged_dot, whose time grows with the experts
    "top_k": 2,
    "d_model": 256,
    "d_ff": 512,  # of one expert
}
GROWTH = {(8, 64): 1.3}  # the target: time with the most experts over that with the fewest
MLP = ChunkedMLP(Gating("silu", None, 1.0), jax.lax.dot_general, saves_products=False)
CHUNK = 512  # tokens of `dense` at a time


class Case(NamedTuple):
    """n tokens of width D, each with k of E experts of width F."""

    n: int
    k: int
    D: int
    F: int
    E: int

    @property
    def flops(self) -> int:
        return flops.TRAIN * 6 * self.n * self.k * self.D * self.F

    def arrays(self) -> tuple[jax.Array, ...]:
        """x_nD, the gradient of the output, gates_nk, expert_nk and three matrices [E, D, F], the last [E, F, D]."""
        rng = np.random.default_rng(0)
        x_nD, dy_nD, *weights = (
            jnp.asarray(rng.normal(size=size, scale=size[-2] ** -0.5), jnp.float32)
            for size in ((self.n, self.D), (self.n, self.D), *[(self.E, self.D, self.F)] * 2, (self.E, self.F, self.D))
        )
        gates_nk, expert_nk = jax.lax.top_k(jax.nn.softmax(jnp.asarray(rng.normal(size=(self.n, self.E)))), min(self.k, self.E))
        return x_nD, dy_nD, gates_nk.astype(jnp.float32), expert_nk, *weights


def by_blocks(case: Case, x_nD, gates_nk, expert_nk, *weights) -> jax.Array:
    mean = -(-case.n * case.k // case.E)
    return grouped_mlp(MLP, mean, x_nD, gates_nk, blocks_of(expert_nk, case.E, rows_of_block(case.n, mean)), *weights)


def by_ragged_dot(case: Case, x_nD, gates_nk, expert_nk, w_gate, w_up, w_down) -> jax.Array:
    order_m, load_E = jnp.argsort(expert_nk.reshape(-1)), jnp.bincount(expert_nk.reshape(-1), length=case.E)
    x_mD = x_nD[order_m // case.k]
    h_mF = MLP.gating(*(jax.lax.ragged_dot(x_mD, w, load_E) for w in (w_gate, w_up)))
    y_mD = gates_nk.reshape(-1)[order_m, None] * jax.lax.ragged_dot(h_mF, w_down, load_E)
    return jnp.zeros_like(x_nD).at[order_m // case.k].add(y_mD)


def by_one(case: Case, x_nD, gates_nk, expert_nk, *weights) -> jax.Array:
    y_1mD = in_chunks(MLP, CHUNK, jnp.tile(x_nD, (case.k, 1))[None], *(w[0] for w in weights))
    return y_1mD.reshape(case.k, case.n, case.D).sum(0)


CONTENDERS = {"ours": by_blocks, "ragged_dot": by_ragged_dot, "dense": by_one}


def make(name: str, case: Case) -> Ready:
    """The output of a contender and its gradients by the tokens, the gates and the weights, compiled."""

    def work(x_nD, dy_nD, gates_nk, expert_nk, *weights):
        y_nD, back = jax.vjp(lambda x, gates, *w: CONTENDERS[name](case, x, gates, expert_nk, *w), x_nD, gates_nk, *weights)
        return y_nD, back(dy_nD)

    mesh = mesh_over_first()
    with jax.set_mesh(mesh) if name == "dense" else contextlib.nullcontext():  # ragged_dot knows no explicit mesh
        arrays = case.arrays()
        program = jax.jit(work).lower(*arrays).compile()
    return Ready(lambda: jax.block_until_ready(program(*arrays)), None)


def measure(processes: Processes, run: Run) -> list[dict]:
    """A record for each length, number of experts and contender; `dense` has one expert."""
    o, records = run.options, []
    names, numbers = chosen("contenders", o["contenders"], tuple(CONTENDERS)), [int(x) for x in str(o["experts"]).split("+")]
    check(min(numbers) >= o["top_k"], f"--options has top_k={o['top_k']}, more than experts={min(numbers)}")
    for n in run.lengths:
        pairs = [(name, E) for name in names for E in (numbers if name != "dense" else [1])]
        cases = {pair: Case(n, o["top_k"], o["d_model"], o["d_ff"], pair[1] if pair[0] != "dense" else 1) for pair in pairs}
        tasks = {"matmul": Task("jax", measurement.make_matmul, ("float32",))}  # first: it starts the threads
        tasks |= {f"{name}, {E} experts": Task("jax", make, (name, cases[name, E])) for name, E in pairs}
        measured = processes.race(f"experts {n:,}", tasks, run.repeats)
        peak = max(measured.pop("matmul").results)
        for (name, E), x in zip(pairs, measured.values(), strict=True):
            about = {"contender": name, "experts": E, "tokens": n, "flops": cases[name, E].flops, "peak": peak}
            records.append(about | {key: o[key] for key in ("top_k", "d_model", "d_ff")} | x.record)
    return records


def table(records: list[dict]) -> str:
    dense, rows = {r["tokens"]: r.get("seconds") for r in records if r["contender"] == "dense"}, []
    for r in records:
        rows.append([r["contender"], f"{r['experts']}", f"{r['tokens']:,}"])
        if "seconds" in r:
            ideal = dense.get(r["tokens"])
            rows[-1] += [f"{1e3 * r[key]:,.1f}" for key in ("seconds", "best")]
            rows[-1] += [f"{r['flops'] / r['seconds'] / r['peak']:.0%}", f"{r['seconds'] / ideal:.2f}" if ideal else "—"]
    r, header = records[0], ("contender", "experts", "tokens", "ms", "best", "of peak", "time / dense")
    text = f"{r['top_k']} experts of a token, {r['d_model']} x {r['d_ff']}, float32; forward and backward\n\n"
    missing = measurement.missing(records, lambda r: f"{r['contender']}, {r['experts']} experts")
    return text + measurement.table(header, rows) + missing


def figures(records: list[dict]) -> dict[str, Figure]:
    """The times over those of `dense` and over ours, and how ours grows with the experts."""
    seconds, made = {(r["tokens"], r["contender"], r["experts"]): r["seconds"] for r in records if "seconds" in r}, {}
    for (n, name, E), value in seconds.items():
        if name == "ours" and (n, "dense", 1) in seconds:
            made[f"time of {E} experts / dense, {n:,} tokens"] = Figure(value / seconds[n, "dense", 1], "times", at_least=False)
        if name == "ragged_dot" and (n, "ours", E) in seconds:
            made[f"ragged_dot / ours, {E} experts, {n:,} tokens"] = Figure(value / seconds[n, "ours", E], "times")
    for n in dict.fromkeys(r["tokens"] for r in records):
        numbers = sorted(E for tokens, name, E in seconds if (tokens, name) == (n, "ours"))
        if len(numbers) > 1:
            growth = seconds[n, "ours", numbers[-1]] / seconds[n, "ours", numbers[0]]
            name = f"time of {numbers[-1]} experts / {numbers[0]}, {n:,} tokens"
            made[name] = Figure(growth, "times", GROWTH.get((numbers[0], numbers[-1])), at_least=False)
    return made


PART = Part("Experts", None, ("4K", "16K"), measure, table, figures, OPTIONS)
