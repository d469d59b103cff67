"""Attention and the whole training step compile for real topologies, ahead of time and without the devices.

Needs libtpu (`make test-aot`) or JAX's CUDA plugin and tokamax (`make test-aot-gpu`), and is skipped where they are missing.
Each target compiles in a process of its own, because its environment must stand before JAX starts.
"""

import functools
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
T, S, WINDOW = 4096, 16384, 1024  # queries of a shard of four, keys of the whole row
RAGGED = S - 60  # 4,081 queries of a shard: no multiple of any block
MIB, GB = 2**20, 10**9
# Peak MiB of temporaries of one device, at about twice what was measured; a v5e keeps most of them in VMEM.
TARGETS = {
    "v5e:2x4": {
        "local splash": 4,
        "global splash": 4,
        "ring splash": 8,
        "ragged splash": 8,
        "step splash": 16,
        "slices splash": 17,  # of them 1 is what casts in the loop, not before it, cost in a model so narrow
        "layer splash": 480,
        "offload splash": 170,  # less than what was measured of the layer before it
    },
    "v5p:2x2x2": {"local splash": 80, "global splash": 80},
    "h100:8": {
        **{"local tokamax": 26, "global tokamax": 62, "ragged tokamax": 34, "step tokamax": 130},
        **{"local cudnn": 70, "global cudnn": 70},
    },
}
# What the cases of whole steps change of a small config. The last two keep more of their layers than the 128 MiB of VMEM hold.
# Their number of periods, 17, divides no number of tokens, so that the axis of a stack of layers is known by its size.
NARROW = {"model.d_model": 256, "model.d_ff": 512}
DEEP = {"model.d_model": 512, "model.d_ff": 1024, "model.num_layers": 34, "train.remat": "layer"}
STEPS = {"step": NARROW, "slices": NARROW, "layer": DEEP, "offload": DEEP | {"train.remat": "offload"}}
SPARING = "1b 1048576 in little memory"  # a ring, and offloading
# Whole models: target, mesh, tokens of a row (one for each shard of the batch), most GB of arguments, temporaries and the peak.
PLANS = {
    "8b 8K": ("v5p:4x4x4", {"fsdp": 64}, 8192, 2, 12),
    "8b 8K on v5e": ("v5e:4x4", {"fsdp": 16}, 8192, 8, 13),
    "8b 131072": ("v5p:4x4x4", {"fsdp": 4, "context": 16}, 131_072, 1.6, 12),
    "1b 1048576": ("v5p:4x4x4", {"fsdp": 4, "context": 16}, 1_048_576, 0.25, 28),
    SPARING: ("v5p:4x4x4", {"fsdp": 4, "context": 16}, 1_048_576, 0.25, 14, 9.52),  # MaxText's peak, with global layers alone
    "30b experts 8K": ("v5p:4x4x4", {"fsdp": 8, "expert": 8}, 8192, 5.64, 18, 15.5),
    "30b experts 131072": ("v5p:4x4x4", {"expert": 4, "context": 16}, 131_072, 5.64, 14, 13),
    # MaxText needs 6.03 GB of arguments for this one: 8.03e9 parameters and two moments of Adam in float32 over 16 chips.
    "llama 8K": ("v5p:2x2x4", {"fsdp": 16}, 8192, 6.03, 12),
    "150m 8K on an H100": ("h100:1", {"fsdp": 1}, 8192, 1.86, 1.4),
    "150m 8K on H100s": ("h100:8", {"fsdp": 8}, 8192, 0.24, 0.9),
}
PERIODS = 3  # of LLLG in the model of 150M parameters
GPU_PLAN = "150m 8K on an H100"
# A prompt of the 8B, read in chunks over a split sequence: target, mesh, its tokens, a chunk's, most GB of a chip at the peak.
PROMPT = ("v5p:4x4x4", {"context": 16, "tensor": 4}, 1_048_576, 8192, 8)
# What stands in the compiled text for each kernel: forward, then dq with dk and dv; cuDNN does those in one call, and with
# tokamax one more finds the keys of each query.
CALLS = {"splash": ("tpu_custom_call", 3), "tokamax": ("mosaic_gpu|triton", 4), "cudnn": (r"__cudnn\$fmha", 2)}


def skip_reason(target):
    if not target.startswith("h100"):
        return None if importlib.util.find_spec("libtpu") else "libtpu is not installed; make test-aot installs it"
    missing = [name for name in ("jax_cuda13_plugin", "tokamax") if not importlib.util.find_spec(name)]
    return f"{' and '.join(missing)} not installed; make test-aot-gpu installs it" if missing else None


@functools.cache
def compiled(*arguments: str, program: str = __file__) -> dict:
    """The report of each case that `main` of a test file gives in another process."""
    env = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}", JAX_PLATFORMS="cpu")
    command = [sys.executable, program, *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return {report["case"]: report for report in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    "target, case",
    [(target, case) for target, cases in TARGETS.items() for case in cases],
    ids=lambda name: name.replace(" ", "-"),
)
def test_it_compiles_to_the_kernel_without_a_buffer_of_queries_by_keys(target, case):
    if reason := skip_reason(target):
        pytest.skip(reason)
    report = compiled(target)[case]
    print(report)
    assert "error" not in report, report["error"]
    assert report["calls"] >= CALLS[case.split()[1]][1]
    assert report["largest"] < T * S // 4, "a buffer of a quarter of queries by keys, or more"
    assert report["temporaries"] <= TARGETS[target][case] * MIB


def test_a_ring_computes_while_keys_and_values_travel():
    """The scheduled program starts the permutes of a round before its kernels, forward and backward, and awaits them after."""
    if reason := skip_reason("v5e:2x4"):
        pytest.skip(reason)
    assert compiled("v5e:2x4")["ring splash"]["hidden"] >= 2


def test_offloading_moves_what_is_kept_of_a_layer_to_the_memory_of_the_host():
    target, local_tokens, layers = "v5e:2x4", S // 4, DEEP["model.num_layers"]
    if reason := skip_reason(target):
        pytest.skip(reason)
    kept, moved = compiled(target)["layer splash"], compiled(target)["offload splash"]
    inputs, outputs, sums = (layers * local_tokens * size for size in (512 * 2, 2 * 128 * 2, 2 * 4))  # of two heads a device
    assert kept["host"] == 0 and moved["host"] == inputs + outputs + sums
    assert kept["temporaries"] - moved["temporaries"] >= inputs  # the compiler's peak is not of HBM alone


def test_a_layer_casts_its_weights_by_itself_not_all_layers_before_the_loop():
    if reason := skip_reason("v5e:2x4"):
        pytest.skip(reason)
    assert compiled("v5e:2x4")["layer splash"]["casts"] == []


@pytest.mark.parametrize("case", [pytest.param(x, marks=[pytest.mark.slow] * ("experts" in x)) for x in PLANS])
def test_a_whole_step_compiles_without_queries_by_keys_or_tokens_by_words_and_fits(case):
    if reason := skip_reason(PLANS[case][0]):
        pytest.skip(reason)
    report = compiled("plan", case)[case]
    print(report)
    assert report["squares"] == [] and report["logits"] == [] and report["hidden_activations"] == []
    assert report["arguments"] <= PLANS[case][3] * GB
    assert report["temporaries"] <= PLANS[case][4] * GB
    assert report["peak"] <= min([report["memory"], *(most * GB for most in PLANS[case][5:])])


def test_a_whole_step_on_an_h100_runs_fused_attention_in_each_layer_and_copies_little():
    if reason := skip_reason("h100"):
        pytest.skip(reason)
    by_pass = {}
    for layer, which_pass, kernel, scope, _, size, times in compiled("plan", GPU_PLAN)[GPU_PLAN]["launches"]:
        by_pass.setdefault((layer, which_pass), []).extend([(kernel, scope, size)] * times)
    assert sorted(by_pass) == sorted(itertools.product(("L0", "L1", "L2", "G3"), ("forward", "recomputed", "backward")))
    for (_, which_pass), launched in by_pass.items():
        fused = Counter((kernel, scope) for kernel, scope, _ in launched if kernel in ("Mosaic", "Triton"))
        fused.pop(("Triton", "visible keys"), None)  # one for all layers of a type in the forward pass
        gradients = {("Triton", "query gradients"): PERIODS, ("Triton", "key gradients"): PERIODS}
        assert fused == (gradients if which_pass == "backward" else {("Mosaic", "tokamax attention"): PERIODS})
        assert len(launched) <= 50 * PERIODS  # with XLA's loops in search of the keys of each query up to 523
        # What XLA takes apart of products that it has joined: values, and the gradient of the output.
        assert sum(size for kernel, _, size in launched if kernel in ("copy", "transpose")) <= 16 * 10**6 * PERIODS


def test_most_weights_and_gradients_of_a_whole_step_arrive_while_the_chip_computes():
    if reason := skip_reason(PLANS["llama 8K"][0]):
        pytest.skip(reason)
    report = compiled("plan", "llama 8K")["llama 8K"]
    assert report["hidden"] >= 0.6 * report["received"] > 0 and report["cycles"] > 0


def test_gradients_of_a_whole_step_over_parts_of_a_slice_are_reduce_scattered():
    if reason := skip_reason(PLANS["8b 131072"][0]):
        pytest.skip(reason)
    received = compiled("plan", "8b 131072")["8b 131072"]["by_kind"]
    weights = 2 * 7.5e9  # bytes of those of all layers and the table in bfloat16
    assert received["reduce-scatter"] >= weights > 2 * received["all-reduce"]


def test_whole_steps_of_a_long_prompt_hold_no_queries_by_keys_and_fit():
    target, axes, length, chunk, most = PROMPT
    if reason := skip_reason(target):
        pytest.skip(reason)
    report = compiled("prompt")["prompt"]
    print(report)
    assert report["squares"] == []
    assert report["peak"] <= most * GB
    # A share of the weights and of what the layers keep: 8 of 32 see everything, the others 16,384 slots each.
    kept = 2 * 8 * 128 * 2 * (8 * length // axes["context"] + 24 * 2 * chunk) // axes["tensor"]
    assert report["kept"] == kept


def test_the_reader_of_arrays_sees_queries_by_keys_in_any_order():
    text = "f32[8,1024,16384] bf16[16384,2,1024]{1,0} f32[1024,64] f32[16384,16384] bf16[8,64]"
    assert with_both(text, 1024, 16384) == ["bf16[16384,2,1024]", "f32[8,1024,16384]"]
    assert with_both(text, 16384, 16384) == ["f32[16384,16384]"]


def test_the_reader_of_schedules_sees_what_a_kernel_hides():
    start, done = "  %s = (f32[8]) collective-permute-start(%x)", "  %d = f32[8] collective-permute-done(%s)"
    kernel = "  %k = f32[8] call()"
    hiding, waiting = ["%a {", start, kernel, kernel, done, "}"], ["%b {", start, done, kernel, start, done, "}"]
    assert hidden("\n".join(hiding + waiting), "call") == 1
    assert hidden("\n".join(waiting), "call") == 0


def with_both(text: str, a: int, b: int | None) -> list[str]:
    """Types of the arrays in an HLO text that have a dimension of `a` and another of `b`."""
    found = set()
    for name, dims in re.findall(r"\b([a-z]\w*)\[([\d,]+)\]", text):
        sizes = [int(d) for d in dims.split(",")]
        if a in sizes and b in sizes and (a != b or sizes.count(a) > 1):
            found.add(f"{name}[{dims}]")
    return sorted(found)


def hidden(text: str, call: str) -> int:
    """Computations of a scheduled HLO text in which a `call` stands between the start of a permute and the first one's end."""
    orders = [""]  # of what stands before the first, too
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            orders.append("")
        elif found := re.search(r" collective-permute-(start|done)\(", line):
            orders[-1] += {"start": "(", "done": ")"}[found[1]]
        elif re.search(call, line):
            orders[-1] += "k"
    return sum(bool(re.search(r"\(k+\)", order)) for order in orders)


def main_plan(case: str) -> None:
    """Plans the whole step of a case and prints a line of JSON."""
    from configs import base, hybrid_8k, moe
    from hybrid_attn import config
    from hybrid_attn.plan import kernels, step, targets
    from hybrid_attn.plan.collectives import KINDS

    (target, axes, length, *_), size = PLANS[case], case.split()[0]
    c = (moe if "experts" in case else hybrid_8k).get_config("8b" if size == "llama" else size)
    if size == "llama":  # Llama 3.1 8B
        c.model.update(pattern="R", block="pre", norm="rms", vocab_size=128_256, tie_embeddings=False, logit_scale=1.0)
        c.model.kinds.R = base.kind(rope_theta=500_000.0)
    c.train.update(moe_kernel="blocked", **({"context": "G=ring", "remat": "offload"} if case == SPARING else {}))
    c.mesh.update({"data": 1, "fsdp": 1, "expert": 1} | axes)
    c.stages[0].update(seq_len=length, batch=c.mesh.fsdp * c.mesh.expert)
    started = time.monotonic()
    found = step.make_plan(config.build(c), targets.find_target(target))
    shard, width = length // axes.get("context", 1), c.model.kinds.G.mlp.d_ff  # of an expert, and else None
    slices = [shard] if shard == length else [shard, shard // 2]  # a balanced shard is an early and a late slice
    report = {
        **{"case": case, "seconds": round(time.monotonic() - started, 1), "memory": found.target.memory},
        **{name: getattr(found, name) for name in ("arguments", "temporaries", "peak", "largest", "cycles")},
        "received": sum(x.total for x in found.collectives),
        "hidden": sum(x.total for x in found.collectives if x.hidden),
        "by_kind": {kind: sum(x.total for x in found.collectives if x.kind == kind) for kind in KINDS},
        "squares": [array for part in slices for array in with_both(found.text, part, length)],
        "logits": with_both(found.text, shard, c.model.vocab_size),
        "hidden_activations": [x for n in (1, 8) for x in with_both(found.text, n * c.mesh.expert * shard, width)],
        "launches": kernels.launches(found.text) if target.startswith("h100") else [],
    }
    print(json.dumps(report))


def main_prompt() -> None:
    """Compiles the reading of one chunk of a long prompt by the 8B, and prints a line of JSON."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from configs import hybrid_8k
    from hybrid_attn import config
    from hybrid_attn.infer import cache, steps
    from hybrid_attn.model import abstract_params, execution_on
    from hybrid_attn.model.transformer import unstacked
    from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT, make_mesh
    from hybrid_attn.plan import targets

    name, axes, length, chunk, _ = PROMPT
    c = hybrid_8k.get_config("8b")
    c.mesh.update({"data": 1, "fsdp": 1} | axes)
    c, target = config.build(c), targets.find_target(name)
    mesh, run = make_mesh(c.mesh, target.devices), execution_on("tpu", c.model, c.train)

    def like(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def placed(tree):
        return jax.tree.map(lambda x: like(x.shape, x.dtype, x.sharding.spec), tree)

    with jax.set_mesh(mesh):
        started = time.monotonic()
        params = placed(abstract_params(c.model))
        weights = placed(jax.eval_shape(functools.partial(unstacked, c.model, dtype=run.dtype), params))
        empty = placed(jax.eval_shape(lambda: cache.empty(c.model, 1, length, chunk, run.dtype, False)))
        program = steps.StepConfig(c.model, run, chunk // axes["context"])
        last = like((1, c.model.d_model), run.dtype, P(BATCH, None))
        tokens, counts = like((1, chunk), jnp.int32, TOKENS_BT), like((1,), jnp.int32, P(BATCH))
        executable = steps.prefill.lower(program, False, weights, steps.DecodeState(empty, last), tokens, counts).compile()
    text, memory = executable.as_text(), executable.memory_analysis()
    arrays = [x for layer in empty.layers for x in (layer.k_BKSH, layer.v_BKSH)]
    report = {
        **{"case": "prompt", "seconds": round(time.monotonic() - started, 1), "memory": target.memory},
        **{"arguments": memory.argument_size_in_bytes, "peak": memory.peak_memory_in_bytes},
        "kept": sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in arrays),
        "squares": [x for keys in (length, length // axes["context"]) for x in with_both(text, chunk, keys)],
    }
    print(json.dumps(report))


def main(target: str) -> None:
    """Compiles every case for `target` and prints a line of JSON for each."""
    import jax
    from conftest import tiny  # configures JAX for tests on CPU, of which all but the platform goes

    from hybrid_attn import config
    from hybrid_attn.parallel.mesh import make_mesh
    from hybrid_attn.plan import targets

    jax.config.update("jax_disable_most_optimizations", False)
    devices = targets.find_target(target).devices
    for case in TARGETS[target]:
        shape, kernel = case.split()
        context = 1 if kernel == "cudnn" else 4
        slices = 2 if shape == "slices" else 1
        sizes = config.Mesh(slice=slices, data=1, fsdp=4 // context, expert=1, context=context, tensor=2)
        mesh = make_mesh(sizes, devices if slices == 1 else slices_of(target, slices))
        with jax.set_mesh(mesh):
            started = time.monotonic()
            try:
                lowered = lower_step(tiny, mesh, shape, kernel) if shape in STEPS else lower_attention(mesh, shape, kernel)
                report = measure(lowered.compile(), kernel, STEPS.get(shape, {}).get("model.num_layers", 2) // 2)
            except Exception as error:  # reported by the test of this case; the others go on
                report = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        print(json.dumps({"case": case, "seconds": round(time.monotonic() - started, 1), **report}), flush=True)


def slices_of(target: str, count: int) -> list:
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=target, num_slices=count).devices


def lower_attention(mesh, shape: str, kernel: str):
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from hybrid_attn.kernels import AttentionOptions, Keys, Queries
    from hybrid_attn.parallel import context
    from hybrid_attn.parallel.mesh import HEADS_BTNH, TOKENS_BT

    scheme = {"global": "gather", "ring": "ring"}.get(shape, "halo")
    attention = AttentionOptions(WINDOW if scheme == "halo" else None, 128**-0.5)
    options = context.ContextOptions(attention, kernel, scheme, zigzag=shape != "ragged")

    def loss(q, k, v, pos, seg):
        return context.attend(options, Queries(q, pos, seg), Keys(k, v, pos, seg)).astype(jnp.float32).sum()

    def like(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows = mesh.shape["fsdp"]
    length = RAGGED if shape == "ragged" else S
    q, kv = (like((rows, length, heads, 128), jnp.bfloat16, HEADS_BTNH) for heads in (8, 2))
    tokens = like((rows, length), jnp.int32, TOKENS_BT)
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv, tokens, tokens)


def lower_step(tiny, mesh, shape: str, kernel: str):
    import jax
    from jax.sharding import NamedSharding

    from hybrid_attn.kernels import KERNELS
    from hybrid_attn.model import execution_on
    from hybrid_attn.parallel.mesh import TOKENS_BT
    from hybrid_attn.train.step import abstract_state, make_step

    c = tiny(
        STEPS[shape] | {"model.head_dim": 128}, L={"window": WINDOW, "rope_theta": 10000.0, "sink": True}, G={"qk_norm": "rms"}
    )
    execution = execution_on(KERNELS[kernel].platforms[0], c.model, c.train)._replace(kernel=kernel)
    step = make_step(c.at(0), execution)
    rows = mesh.shape["slice"]
    kinds = dict.fromkeys(("tokens", "targets", "positions", "segments"), "int32") | {"weights": "float32", "bytes": "float32"}
    sharding = NamedSharding(mesh, TOKENS_BT)
    batch = {name: jax.ShapeDtypeStruct((rows, S), kind, sharding=sharding) for name, kind in kinds.items()}
    return step.lower(abstract_state(c, mesh), batch)


def measure(executable, kernel: str, periods: int) -> dict:
    """How many calls of the kernel, elements of the largest array, casts of whole stacks, bytes of temporaries of one device.

    Of an array that is stacked over `periods`, the elements of one period count.
    """
    text = executable.as_text()
    shapes = [list(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)]
    sizes = (math.prod(shape[1:] if shape[0] == periods else shape) for shape in shapes)
    calls = len(re.findall(rf'custom_call_target="[^"]*({CALLS[kernel][0]})', text))
    memory = executable.memory_analysis()
    bytes_of = {"temporaries": memory.temp_size_in_bytes, "host": memory.host_temp_size_in_bytes}
    casts = re.findall(rf"= (bf16\[{periods},[\d,]+\])\S* convert\(", text)
    return {"calls": calls, "largest": max(sizes), "hidden": hidden(text, CALLS[kernel][0]), "casts": casts, **bytes_of}


if __name__ == "__main__":
    {"plan": main_plan, "prompt": main_prompt}.get(sys.argv[1], functools.partial(main, sys.argv[1]))(*sys.argv[2:])
