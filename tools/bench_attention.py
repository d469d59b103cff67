"""Time and memory of attention, forward and backward, here and in other libraries: python tools/bench_attention.py

    python tools/bench_attention.py --kind=local --lengths=2K,8K,32K --json=attention.json

One layer's kernel with the gradients of its queries, keys and values, for a window (local) and for all earlier tokens (global).
Contenders: `ours`; `jax.nn`, which is jax.nn.dot_product_attention as XLA compiles it; `torch`, on a CPU with the extra
`oracle`, which is scaled_dot_product_attention with a boolean mask for the window. The last two compute all S x S scores for a
window. Contenders are called alternately, and the best of --repeats calls counts. FLOPs are those of the visible pairs, three
times the forward pass, and the peak is the fastest matmul between the calls. Memory is what one call takes beyond its inputs;
the mask of `torch` counts there, but not in its time. A dash is explained under the table.
"""

import dataclasses
import importlib.util
from importlib.metadata import version
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from hybrid_attn import kernels, programs
from hybrid_attn.bench import measurement
from hybrid_attn.bench.measurement import Processes, Ready, Task
from hybrid_attn.convert.layers import PLAIN
from hybrid_attn.model import flops
from hybrid_attn.model.attention import attended_pairs, attention_flops
from hybrid_attn.trees import check

LENGTHS = flags.DEFINE_list("lengths", ["2K", "4K", "8K", "16K", "32K", "64K", "128K"], "Tokens; K is 1,024.")
CONTENDERS = flags.DEFINE_list("contenders", ["ours", "jax.nn", "torch"], "Implementations to measure.")
KIND = flags.DEFINE_enum("kind", "both", ["local", "global", "both"], "Layers to measure.")
HEADS = flags.DEFINE_integer("heads", 4, "Query heads.", lower_bound=1)
KV_HEADS = flags.DEFINE_integer("kv_heads", 2, "Key and value heads.", lower_bound=1)
HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Head size.", lower_bound=1)
WINDOW = flags.DEFINE_integer("window", 1024, "Keys that a query of a local layer sees.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the inputs.")
KERNEL = flags.DEFINE_enum("kernel", "auto", ["auto", *kernels.KERNELS], "Kernel of `ours`.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Calls of each contender; at least two, since the first is cold.", lower_bound=2)
SECONDS = flags.DEFINE_float("seconds", 60.0, "Leave out a call that would take longer, judged by a shorter one.")
MEMORY_GIB = flags.DEFINE_float("memory_gib", 12.0, "Leave out contenders that need more.", lower_bound=0.1)
JSON = flags.DEFINE_string("json", None, "File for the numbers of the tables.")


class Case(NamedTuple):
    """One layer of attention: N query heads and K key/value heads of size H over S tokens."""

    S: int
    N: int
    K: int
    H: int
    window: int | None
    dtype: str
    kernel: str

    @property
    def flops(self) -> int:
        pairs = attended_pairs(dataclasses.replace(PLAIN, window=self.window), self.S)
        return flops.TRAIN * attention_flops(self.N, self.H, pairs)

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

    def both(q, k, v, do, pos, seg):
        o, back = jax.vjp(lambda q, k, v: attend(q, k, v, pos, seg), q, k, v)
        return o, back(do)

    arrays = [jnp.asarray(x, case.dtype) for x in case.inputs()]
    arrays += [jnp.arange(case.S, dtype=jnp.int32)[None], jnp.ones((1, case.S), jnp.int32)]
    program = jax.jit(both).lower(*arrays).compile()
    size = program.memory_analysis()
    reserved = None if jax.default_backend() == "cpu" else size.temp_size_in_bytes + size.output_size_in_bytes

    def run():
        jax.block_until_ready(program(*arrays))

    return Ready(run, reserved)


def make_torch(case: Case) -> Ready:
    import torch

    def both(q, k, v, do, mask):
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        torch.autograd.grad(o, (q, k, v), do)

    def run():
        nonlocal mask
        if mask is None and case.window is not None and case.window < case.S:  # in the first call, which is not the best
            mask = torch.ones(case.S, case.S, dtype=torch.bool).tril_().triu_(1 - case.window)
        both(q, k, v, do, mask)

    torch.set_num_threads(measurement.threads())
    q, k, v, do = (torch.from_numpy(x).to(getattr(torch, case.dtype)).transpose(1, 2).contiguous() for x in case.inputs())
    mask, short = None, [x[:, :, :16].detach().requires_grad_() for x in (q, k, v, do)]
    both(*short, None)  # starts the threads
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return Ready(run, None)


MAKERS = {"ours": ("jax", make_ours), "jax.nn": ("jax", make_jax_nn), "torch": ("torch", make_torch)}


def contenders(platform: str) -> tuple[list[str], str | None]:
    """The --contenders that can run here, and the reason if `torch` cannot."""
    unknown = sorted(set(CONTENDERS.value) - set(MAKERS))
    ok = CONTENDERS.value and not unknown
    check(ok, f"--contenders has {', '.join(unknown) or 'nothing'}; known: {', '.join(MAKERS)}")
    names = [name for name in MAKERS if name in CONTENDERS.value]
    why = "it would run on the CPU" if platform != "cpu" else "not installed" if not importlib.util.find_spec("torch") else None
    return [name for name in names if name != "torch" or why is None], why if "torch" in names else None


def measure(processes: Processes, kind: str, names: list[str], lengths: list[int]) -> tuple[list[dict], float]:
    """A record for each length and contender, and the matmul peak."""
    records, peak, last, missing = [], 0.0, {}, {}
    window = WINDOW.value if kind == "local" else None
    for S in lengths:
        case = Case(S, HEADS.value, KV_HEADS.value, HEAD_DIM.value, window, DTYPE.value, KERNEL.value)
        for name, (before, seconds) in last.items():
            if seconds * (S / before) ** 2 > SECONDS.value:
                missing.setdefault(name, f"a call might take more than {SECONDS.value:g} s")
        tasks = {"matmul": Task("jax", measurement.make_matmul, (DTYPE.value,))}  # first: it starts the threads
        tasks |= {name: Task(*MAKERS[name], (case,)) for name in names if name not in missing}
        measured = processes.race(f"{kind} {S:,}", tasks, REPEATS.value)
        peak = max(peak, *measured.pop("matmul").results)
        missing |= {name: x.missing for name, x in measured.items() if x.missing}
        for name in names:
            records.append({"kind": kind, "contender": name, "tokens": S, "flops": case.flops})
            if name in missing:
                records[-1]["missing"] = missing[name]
                continue
            seconds = measured[name].seconds
            last[name] = S, min(seconds)
            records[-1] |= {"seconds": min(seconds), "calls": seconds, "memory": measured[name].memory}
    return records, peak


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


def show(records: list[dict], slopes: list[dict], peak: float) -> None:
    ours, rows = {(r["kind"], r["tokens"]): r.get("seconds") for r in records if r["contender"] == "ours"}, []
    for r in records:
        rows.append([r["kind"], r["contender"], f"{r['tokens']:,}"])
        if "seconds" in r:
            rate, mine = r["flops"] / r["seconds"], ours.get((r["kind"], r["tokens"]))
            memory = "—" if r["memory"] is None else f"{r['memory'] / 2**20:,.0f}"
            faster = f"{r['seconds'] / mine:.2f}" if mine else "—"
            rows[-1] += [f"{1e3 * r['seconds']:,.1f}", f"{rate / 1e9:,.1f}", f"{rate / peak:.0%}", memory, faster]
    print(measurement.table(("kind", "contender", "tokens", "ms", "GFLOP/s", "of peak", "MiB", "time / ours"), rows))
    measurement.print_missing(records, lambda r: f"{r['contender']}, {r['kind']}")
    rows = [[s["kind"], s["contender"], f"{s['tokens'][0]:,} to {s['tokens'][-1]:,}", f"{s['exponent']:.2f}"] for s in slopes]
    if rows:
        print("\n" + measurement.table(("kind", "contender", "tokens", "time grows as tokens to the power"), rows))


def bench() -> None:
    lengths = measurement.lengths(LENGTHS.value)
    check(HEADS.value % KV_HEADS.value == 0, f"--heads={HEADS.value} is not a multiple of --kv_heads={KV_HEADS.value}")
    records, peaks = [], []
    with Processes(round(MEMORY_GIB.value * measurement.GIB)) as processes:
        platform = processes.call("jax", jax.default_backend)
        names, no_torch = contenders(platform)
        for kind in ("local", "global") if KIND.value == "both" else (KIND.value,):
            new, peak = measure(processes, kind, names, lengths)
            records, peaks = records + new, [*peaks, peak]
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch") if name == "jax" or "torch" in names)
    print(
        f"{platform}, {measurement.threads()} threads, {versions}; {DTYPE.value}, {HEADS.value} query and {KV_HEADS.value} "
        f"key/value heads of {HEAD_DIM.value}, window {WINDOW.value:,}; matmul peak {max(peaks) / 1e9:,.1f} GFLOP/s"
    )
    print("forward and backward; of a window, jax.nn and torch compute the whole square\n")
    if no_torch:
        print(f"— torch: {no_torch}\n")
    slopes = exponents(records)
    show(records, slopes, max(peaks))
    out = {"platform": platform, "versions": versions, "peak": max(peaks), "records": records, "exponents": slopes}
    measurement.write_json(JSON.value, out)


def main(argv):
    programs.run(bench, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
