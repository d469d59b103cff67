"""Where the time of a training step goes: its pieces, compiled alone on the same shapes, beside the whole step.

Attention is the kernel alone. The projections are the mixer with a sum in place of the kernel: products, rotations and norms of
heads. Where layers are rematerialised, what they compute again is in the rest, and so are the residual sums, copies between
the pieces and whatever is faster or slower alone.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn import config, kernels
from hybrid_attn.bench import measurement, training
from hybrid_attn.bench.contender import Ready
from hybrid_attn.bench.measurement import Processes, Task
from hybrid_attn.bench.part import Figure, Part, Run, share_of_peak
from hybrid_attn.config import Config, Model
from hybrid_attn.model import Execution, execution_on, flops, init, specs
from hybrid_attn.model.attention import attended_pairs, attention_flops, attention_options
from hybrid_attn.model.loss import token_losses
from hybrid_attn.model.transformer import bind, final_norm, layer_names, look_up, unembedding
from hybrid_attn.parallel.mesh import ACT_BTD, TOKENS_BT, make_mesh
from hybrid_attn.train.optim import optimiser

STEP, REST = "whole step", "rest"


class Setting(NamedTuple):
    """What a piece is computed with; `letter` is the layer type of a piece of a layer."""

    c: Config
    execution: Execution
    params: dict
    letter: str

    @property
    def positions(self) -> jax.Array:
        stage = self.c.stages[0]
        return put(np.broadcast_to(np.arange(stage.seq_len, dtype=np.int32), (stage.batch, stage.seq_len)), TOKENS_BT)

    @property
    def segments(self) -> jax.Array:
        """One document in each sequence."""
        return jnp.ones_like(self.positions)

    def random(self, *shape: int, spec: P = ACT_BTD) -> jax.Array:
        stage = self.c.stages[0]
        x = np.random.default_rng(0).normal(size=(stage.batch, stage.seq_len, *shape))
        return put(x.astype(self.execution.dtype), spec)

    def layer(self) -> dict:
        """The parameters of one layer of the type."""
        group, name = group_and_name(self.c.model, self.letter)
        leaves = self.params[group][name]
        return jax.tree.map(lambda x: x[0], leaves) if group == "periods" else leaves


def group_and_name(model: Model, letter: str) -> tuple[str, str]:
    """The group of the parameters that has a layer of that type, and the name of the layer in it."""
    return next((group, name) for group, letters, _ in model.groups for name, x in layer_names(letters) if x == letter)


def put(x: np.ndarray, spec: P) -> jax.Array:
    return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec))


def with_gradient(function: Callable) -> Callable:
    """`function` of arrays, and its gradients by the first two, pulled back from itself."""

    def both(weights, x, *others):
        y, pull = jax.vjp(lambda weights, x: function(weights, x, *others), weights, x)
        return y, pull(y)

    return both


def attention_arguments(s: Setting):
    m = s.c.model
    q, k, v = (s.random(heads, m.head_dim, spec=P()) for heads in (m.num_heads, m.num_kv_heads, m.num_kv_heads))
    positions = jax.reshard(s.positions, P())  # a kernel runs inside jax.shard_map, on the arrays of one device
    segments = jnp.ones_like(positions)
    queries, keys = kernels.Queries(q, positions, segments), kernels.Keys(k, v, positions, segments)
    return kernels.KERNELS[s.execution.kernel], attention_options(m, s.letter), queries, keys


def attention_forward(s: Setting):
    kernel, options, queries, keys = attention_arguments(s)
    return functools.partial(kernel.forward, options), (queries, keys)


def attention_backward(s: Setting):
    kernel, options, queries, keys = attention_arguments(s)
    out = jax.jit(functools.partial(kernel.forward, options))(queries, keys)
    return functools.partial(kernel.backward, options), (queries, keys, out, (out[0], jnp.zeros_like(out[1])))


def projections(s: Setting):
    groups = s.c.model.num_heads // s.c.model.num_kv_heads

    def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N):
        return q_BTNH + jnp.repeat(k_BTKH + v_BTKH, groups, axis=2, out_sharding=jax.typeof(q_BTNH).sharding), None

    def project(leaves, x_BTD, positions, segments):
        block = bind(s.c.model, s.letter, leaves, s.execution)
        return getattr(block, block.mixer_name)(x_BTD, positions, segments, attend)[0]

    return with_gradient(project), (s.layer(), s.random(s.c.model.d_model), s.positions, s.segments)


def feed_forward(s: Setting):
    def apply(leaves, x_BTD, segments):
        return bind(s.c.model, s.letter, leaves, s.execution).mlp(x_BTD, segments, s.execution.mlp_chunks(s.letter))[0]

    return with_gradient(apply), (s.layer(), s.random(s.c.model.d_model), s.segments)


def norm(s: Setting):
    def apply(params, x_BTD):
        return final_norm(s.c.model, params, x_BTD)

    return with_gradient(apply), ({"final_norm": s.params["final_norm"]}, s.random(s.c.model.d_model))


def embedding(s: Setting):
    tokens_BT = put(training.batch_of(s.c)["tokens"], TOKENS_BT)

    def apply(embed_VD, dx_BTD):
        x_BTD, pull = jax.vjp(lambda embed_VD: look_up(embed_VD, tokens_BT, s.execution.dtype), embed_VD)
        return x_BTD, pull(dx_BTD)

    return apply, (s.params["embed"], s.random(s.c.model.d_model))


def loss(s: Setting):
    targets_BT = put(training.batch_of(s.c)["targets"], TOKENS_BT)

    def apply(table_VD, x_BTD):
        nll_BT, _ = token_losses(s.c.model, table_VD, x_BTD, targets_BT, s.execution.loss_chunk, s.execution.dot)
        return nll_BT.sum()

    return with_gradient(apply), (unembedding(s.c.model, s.params), s.random(s.c.model.d_model))


def update(s: Setting):
    tx = optimiser(s.c)

    def apply(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates)
        return new, opt_state, optax.tree.norm(grads), optax.tree.norm(new)

    return apply, (s.params, jax.jit(tx.init)(s.params), s.params)


# Pieces of a layer, which each layer of a type computes once, and those of a step; each returns a function and its arguments.
OF_LAYER = {
    "attention forward": attention_forward,
    "attention backward": attention_backward,
    "feed-forward": feed_forward,
    "projections": projections,
}
OF_STEP = {"norms": norm, "embedding": embedding, "loss": loss, "optimiser": update}
NORMS = {"parallel": 1, "pre": 2, "post": 2, "sandwich": 4}  # of a layer, by `model.block`


def make(values: dict, piece: str, letter: str) -> Ready:
    """A piece, compiled; its arguments are its own, and none is donated."""
    c = config.build(values)
    execution = execution_on(jax.default_backend(), c.model, c.train)
    mesh = make_mesh(c.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.jit(init, static_argnums=0)(c.model, jax.random.key(c.seed))
        function, args = (OF_LAYER | OF_STEP)[piece](Setting(c, execution, params, letter))
        program = jax.jit(function).lower(*args).compile()
    return Ready(lambda: jax.block_until_ready(program(*args)) and None, None)


def pieces_of(c: Config) -> dict[str, dict]:
    """By name: the piece, its layer type, how often a step computes it, and the FLOPs of a step in it."""
    m, stage, pieces = c.model, c.stages[0], {}
    letters = {letter: m.layers.count(letter) for letter in sorted(set(m.layers))}
    for piece in OF_LAYER:
        for letter, calls in letters.items():
            name = f"{piece}, {letter}" if piece.startswith("attention") else piece
            known = pieces.setdefault(name, {"piece": piece, "letter": letter, "times": 0, "flops": 0})
            known["times"] += calls
            known["flops"] += calls * stage.batch * piece_flops(c, piece, letter)
    others = {"norms": 1 + len(m.layers) * NORMS[m.block]}
    for piece in OF_STEP:
        count = flops.TRAIN * 2 * stage.batch * stage.seq_len * m.vocab_size * m.d_model if piece == "loss" else 0
        pieces[piece] = {"piece": piece, "letter": m.layers[0], "times": others.get(piece, 1), "flops": count}
    return pieces


def piece_flops(c: Config, piece: str, letter: str) -> int:
    """FLOPs of a piece of one layer for one sequence, of all the passes that the piece has."""
    m, S = c.model, c.stages[0].seq_len
    if piece.startswith("attention"):
        passes = 1 if piece == "attention forward" else flops.TRAIN - 1
        return passes * attention_flops(m.num_heads, m.head_dim, attended_pairs(m.kinds[letter], S))
    group, name = group_and_name(m, letter)
    weights = specs(m)[group][name]["mlp" if piece == "feed-forward" else m.kinds[letter].mixer]
    return flops.TRAIN * 2 * S * sum(spec.multiplications for spec in jax.tree.leaves(weights))


def measure(processes: Processes, run: Run) -> list[dict]:
    """For each length a record of the whole step and of each of its pieces."""
    records = []
    for S in run.lengths:
        c = training.at_length(run.config, S, run.repeats)
        values, pieces = config.to_dict(c), pieces_of(c)
        tasks = {"matmul": Task("jax", measurement.make_matmul, (run.dtype,)), STEP: training.ours(c)[1]}
        tasks |= {name: Task("jax", make, (values, x["piece"], x["letter"])) for name, x in pieces.items()}
        measured = processes.race(f"pieces {S:,}", tasks, run.repeats)
        peak = max(measured.pop("matmul").results)
        for name, x in measured.items():
            about = {"times": 1, "flops": int(training.needed(c))} if name == STEP else pieces[name]
            records.append({"contender": name, "tokens": S, "peak": peak} | about | x.record)
    return records


def table(records: list[dict]) -> str:
    """Milliseconds of a step, by piece."""
    rows, texts = [], []
    for S in dict.fromkeys(r["tokens"] for r in records):
        of_S = {r["contender"]: r for r in records if r["tokens"] == S and "seconds" in r}
        if STEP not in of_S:
            continue
        step, rest = of_S[STEP], of_S[STEP]["seconds"]
        for name, r in of_S.items():
            seconds = r["times"] * r["seconds"]
            rest -= 0 if name == STEP else seconds
            speed = [f"{r['flops'] / seconds / 1e9:,.1f}", share_of_peak(r, r["flops"], seconds).shown] if r["flops"] else []
            shares = [f"{1e3 * seconds:,.1f}", f"{seconds / step['seconds']:.1%}"]
            rows.append([name, f"{S:,}", f"{r['times']}", *shares, *(speed or ["—", "—"]), f"{1e3 * r['best']:,.2f}"])
        rows.append([REST, f"{S:,}", "", f"{1e3 * rest:,.1f}", f"{rest / step['seconds']:.1%}"])
        share = share_of_peak(step, step["flops"], step["seconds"]).shown
        texts.append(f"\n\nAt {S:,} tokens the step reaches {share} of the matmul peak, {step['peak'] / 1e9:,.1f} GFLOP/s.")
    header = ("piece", "tokens", "times a step", "ms a step", "share", "GFLOP/s", "of peak", "ms of its best call")
    return measurement.table(header, rows) + measurement.missing(records) + "".join(texts)


def figures(records: list[dict]) -> dict[str, Figure]:
    """Our share of the matmul peak, and of it each piece's."""
    made = {}
    for r in records:
        if "seconds" in r and r["flops"]:
            name, target = r["contender"], training.OF_PEAK.get(r["tokens"]) if r["contender"] == STEP else None
            share = share_of_peak(r, r["flops"], r["times"] * r["seconds"], target)
            made[f"{name}: share of the matmul peak, {r['tokens']:,} tokens"] = share
    return made


PART = Part("Where the time of a step goes", "configs/bench.py", ("8K",), measure, table, figures)
