"""Time and memory of one layer's attention, here and in other libraries, for a window and for all earlier tokens.

Contenders: `ours`; `jax.nn`, which is jax.nn.dot_product_attention as XLA compiles it; `torch`, on a CPU, which is
scaled_dot_product_attention with a boolean mask for the window. The last two compute all S x S scores for a window. FLOPs are
those of the visible pairs, three times the forward pass where gradients are computed, and the peak is the fastest matmul
between the calls. Memory is what one call takes beyond its inputs; the mask of `torch` counts there, but not in its time.
"""

import dataclasses
import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_attn import kernels
from hybrid_attn.bench import machine, measurement
from hybrid_attn.bench.contender import Ready
from hybrid_attn.bench.measurement import Processes, Task
from hybrid_attn.bench.part import Figure, Part, Run, chosen
from hybrid_attn.convert.normal import PLAIN
from hybrid_attn.model import flops
from hybrid_attn.model.attention import attended_pairs, attention_flops
from hybrid_attn.trees import check

OPTIONS = {
    "kinds": "local+global",  # layers to measure
    "contenders": "ours+jax.nn+torch",
    "passes": "both",  # both | forward
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "window": 1024,
    "dtype": "float32",
    "kernel": "auto",  # of `ours`
}
PASSES = {"both": "forward and backward", "forward": "forward"}
SAMPLE = 0.5  # seconds of calls that are timed together
BESIDE_TORCH = 1.0  # the target: at least its speed on the prefix
RATE_IN_A_WINDOW = 0.9  # the target: the FLOP rate in a window over that on the prefix


class Case(NamedTuple):
    """One layer of attention: N query heads and K key/value heads of size H over S tokens."""

    S: int
    N: int
    K: int
    H: int
    window: int | None
    dtype: str
    kernel: str
    passes: str

    @property
    def flops(self) -> int:
        pairs = attended_pairs(dataclasses.replace(PLAIN, window=self.window), self.S)
        return (flops.TRAIN if self.passes == "both" else 1) * attention_flops(self.N, self.H, pairs)

    def inputs(self) -> list[np.ndarray]:
        """q_BSNH, k_BSKH, v_BSKH and the gradient of the output, do_BSNH."""
        rng = np.random.default_rng(0)
        return [rng.normal(size=(1, self.S, heads, self.H)).astype(np.float32) for heads in (self.N, self.K, self.K, self.N)]


def make_ours(case: Case) -> Ready:
    kernel = kernels.choose(case.kernel, jax.default_backend())

    def attend(q, k, v, pos, seg):
        options = kernels.AttentionOptions(case.window, case.H**-0.5)
        return kernels.attend(kernel, options, kernels.Queries(q, pos, seg), kernels.Keys(k, v, pos, seg))[0]

    return ready(case, attend)


def make_jax_nn(case: Case) -> Ready:
    window = {"is_causal": True} if case.window is None else {"local_window_size": (case.window - 1, 0)}
    return ready(case, lambda q, k, v, pos, seg: jax.nn.dot_product_attention(q, k, v, implementation="xla", **window))


def ready(case: Case, attend) -> Ready:
    """`attend` and its gradients, compiled; on an accelerator, memory is what the compiler reserves."""

    def work(q, k, v, do, pos, seg):
        if case.passes == "forward":
            return attend(q, k, v, pos, seg)
        o, back = jax.vjp(lambda q, k, v: attend(q, k, v, pos, seg), q, k, v)
        return o, back(do)

    arrays = [jnp.asarray(x, case.dtype) for x in case.inputs()]
    arrays += [jnp.arange(case.S, dtype=jnp.int32)[None], jnp.ones((1, case.S), jnp.int32)]
    program = jax.jit(work).lower(*arrays).compile()
    size = program.memory_analysis()
    reserved = None if jax.default_backend() == "cpu" else size.temp_size_in_bytes + size.output_size_in_bytes

    def run():
        jax.block_until_ready(program(*arrays))

    return Ready(run, reserved)


def make_torch(case: Case) -> Ready:
    import torch

    def work(q, k, v, do, mask):
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        if case.passes == "both":
            torch.autograd.grad(o, (q, k, v), do)

    def run():
        nonlocal mask
        if mask is None and case.window is not None and case.window < case.S:  # in the first call, which is not timed
            mask = torch.ones(case.S, case.S, dtype=torch.bool).tril_().triu_(1 - case.window)
        work(q, k, v, do, mask)

    torch.set_num_threads(machine.threads())
    q, k, v, do = (torch.from_numpy(x).to(getattr(torch, case.dtype)).transpose(1, 2).contiguous() for x in case.inputs())
    mask, trained = None, case.passes == "both"
    short = [x[:, :, :16].detach().requires_grad_(trained) for x in (q, k, v, do)]
    work(*short, None)  # starts the threads
    q, k, v = (x.requires_grad_(trained) for x in (q, k, v))
    return Ready(run, None)


MAKERS = {"ours": ("jax", make_ours), "jax.nn": ("jax", make_jax_nn), "torch": ("torch", make_torch)}


def cases_of(run: Run) -> dict[str, list[Case]]:
    """The cases of each kind of layer, by growing length; ValueError for options that fit nothing."""
    o = run.options
    for name in ("heads", "kv_heads", "head_dim", "window"):
        check(o[name] > 0, f"--options has {name}={o[name]}, which must be positive")
    check(o["heads"] % o["kv_heads"] == 0, f"--options has heads={o['heads']}, no multiple of kv_heads={o['kv_heads']}")
    for name, known in (("passes", PASSES), ("dtype", ("float32", "bfloat16")), ("kernel", ("auto", *kernels.KERNELS))):
        check(o[name] in known, f"--options has {name}={o[name]!r}; use {' or '.join(known)}")
    windows, sizes = {"local": o["window"], "global": None}, (o["heads"], o["kv_heads"], o["head_dim"])
    how = o["dtype"], o["kernel"], o["passes"]
    kinds = chosen("kinds", o["kinds"], tuple(windows))
    return {kind: [Case(S, *sizes, windows[kind], *how) for S in run.lengths] for kind in kinds}


def measure(processes: Processes, run: Run) -> list[dict]:
    """A record for each kind, length and contender; those that once did not fit are missing from then on."""
    cases, names = cases_of(run), chosen("contenders", run.options["contenders"], tuple(MAKERS))
    absent = {}
    if "torch" in names and run.platform != "cpu":
        absent["torch"] = "it would run on the CPU"
    elif "torch" in names and not importlib.util.find_spec("torch"):
        absent["torch"] = "not installed; install the extra `oracle`"
    records, missing = [], {(kind, name): reason for kind in cases for name, reason in absent.items()}
    for of_kinds in zip(*cases.values(), strict=True):
        for r in records:
            if "seconds" in r and r["seconds"] * (of_kinds[0].S / r["tokens"]) ** 2 > run.seconds:
                missing.setdefault((r["kind"], r["contender"]), f"a call might take more than {run.seconds:g} s")
        records += measure_length(processes, run, dict(zip(cases, of_kinds, strict=True)), names, missing)
    return sorted(records, key=lambda r: list(cases).index(r["kind"]))


def measure_length(processes, run: Run, cases: dict[str, Case], names: list[str], missing: dict) -> list[dict]:
    """A record for each kind and contender, called in turn at one length; adds those that do not fit to `missing`."""
    first = next(iter(cases.values()))
    tasks = {"matmul": Task("jax", measurement.make_matmul, (first.dtype,))}  # first: it starts the threads
    contenders = [(kind, name) for kind in cases for name in names]
    present = [pair for pair in contenders if pair not in missing]
    tasks |= {f"{name}, {kind}": Task(*MAKERS[name], (cases[kind],)) for kind, name in present}
    measured = processes.race(f"attention {first.S:,}", tasks, run.repeats, SAMPLE)
    peak, records = max(measured.pop("matmul").results), []
    for kind, name in contenders:
        case, x = cases[kind], measured.get(f"{name}, {kind}")
        if x and x.missing:
            missing[kind, name] = x.missing
        record = {"kind": kind, "contender": name, "tokens": case.S, "flops": case.flops, "peak": peak}
        record |= {"heads": f"{case.N}/{case.K} of {case.H}", "window": case.window, "passes": case.passes, "dtype": case.dtype}
        records.append(record | (x.record if x else {"missing": missing[kind, name]}))
    return records


def exponents(records: list[dict]) -> list[dict]:
    """The slope of log time over log tokens by least squares, over the larger half of the lengths but at least three."""
    slopes = []
    for kind, name in dict.fromkeys((r["kind"], r["contender"]) for r in records):
        measured = [r for r in records if (r["kind"], r["contender"]) == (kind, name) and "seconds" in r]
        measured = measured[-max(3, (len(measured) + 1) // 2) :]
        tokens, seconds = ([r[key] for r in measured] for key in ("tokens", "seconds"))
        if len(tokens) > 1:
            slope = np.polyfit(np.log(tokens), np.log(seconds), 1)[0]
            slopes.append({"kind": kind, "contender": name, "tokens": tokens, "exponent": float(slope)})
    return slopes


HEADER = ("kind", "contender", "tokens", "ms", "best", "GFLOP/s", "of peak", "MiB", "time / ours")


def table(records: list[dict]) -> str:
    ours, rows = {(r["kind"], r["tokens"]): r.get("seconds") for r in records if r["contender"] == "ours"}, []
    for r in records:
        rows.append([r["kind"], r["contender"], f"{r['tokens']:,}"])
        if "seconds" in r:
            rate, mine = r["flops"] / r["seconds"], ours.get((r["kind"], r["tokens"]))
            memory = "—" if r["memory"] is None else f"{r['memory'] / 2**20:,.0f}"
            rows[-1] += [f"{1e3 * r[key]:,.1f}" for key in ("seconds", "best")]
            rows[-1] += [f"{rate / 1e9:,.1f}", f"{rate / r['peak']:.0%}", memory, f"{r['seconds'] / mine:.2f}" if mine else "—"]
    r, passes = records[0], PASSES[records[0]["passes"]]
    windows = " and ".join(dict.fromkeys(f"{x['window']:,}" for x in records if x["window"])) or "none"
    text = f"{r['heads']}, window {windows}, {r['dtype']}; {passes}; of a window, jax.nn and torch compute the whole square\n\n"
    text += measurement.table(HEADER, rows) + measurement.missing(records, lambda r: f"{r['contender']}, {r['kind']}")
    slopes = exponents(records)
    rows = [[s["kind"], s["contender"], f"{s['tokens'][0]:,} to {s['tokens'][-1]:,}", f"{s['exponent']:.2f}"] for s in slopes]
    if rows:
        text += "\n\n" + measurement.table(("kind", "contender", "tokens", "time grows as tokens to the power"), rows)
    return text


def figures(records: list[dict]) -> dict[str, Figure]:
    """The time of others over ours, and our FLOP rate in a window over that on the prefix."""
    made, seconds = {}, {(r["kind"], r["contender"], r["tokens"]): r for r in records if "seconds" in r}
    for (kind, name, S), r in seconds.items():
        of = f"{S:,} tokens, {r['heads']}, {r['passes']}"
        if name != "ours" and (ours := seconds.get((kind, "ours", S))):
            target = BESIDE_TORCH if (kind, name) == ("global", "torch") else None
            made[f"{name} / ours, {kind}, {of}"] = Figure(r["seconds"] / ours["seconds"], "times", target)
        if (kind, name) == ("local", "ours") and (prefix := seconds.get(("global", "ours", S))):
            rate, other = (x["flops"] / x["seconds"] for x in (r, prefix))
            target = RATE_IN_A_WINDOW if r["window"] < S else None
            made[f"FLOP rate of local / global, {of}"] = Figure(rate / other, "times", target)
    return made


LENGTHS = ("2K", "4K", "8K", "16K", "32K", "64K", "128K")
PART = Part("One layer of attention", None, LENGTHS, measure, table, figures, OPTIONS)
