"""A plan says what a compiled step sends and holds, and a layer's keys and values cross the wire as its kind needs."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
S, W, CONTEXT = 262_144, 2048, 16
HEAD, LOCAL, GLOBAL = 8, 3, 1  # dimensions of the one key/value head; layers of each kind
GATHERED = S * (CONTEXT - 1) // CONTEXT  # 245,760 tokens
PLAN = [sys.executable, "tools/plan.py", "--config=configs/hybrid_8k.py"]
NARROW = ["--config.model.d_model=32", "--config.model.d_ff=48", "--config.stages[0].batch=4", "--config.stages[0].seq_len=256"]


@functools.cache
def sent(context: str, balance: bool) -> dict[str, float]:
    """Tokens whose keys and values a layer receives on each of 16 devices, by "pass letter scheme"."""
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, __file__, context, str(balance)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def whole_model(tokens: dict[str, float]) -> float:
    return sum(n * {"L": LOCAL, "G": GLOBAL}[name.split()[1]] for name, n in tokens.items())


def test_a_local_layer_receives_its_window_and_a_global_one_everything():
    tokens = sent("auto", False)
    assert tokens["forward L halo"] == tokens["backward L halo"] == W
    assert tokens["forward G gather"] == tokens["backward G gather"] == GATHERED == 245_760


def test_keys_and_values_of_the_hybrid_are_a_quarter_of_those_of_gathering_everywhere_in_one_slice_a_shard():
    everywhere = sent("gather", False)
    assert everywhere["forward L gather"] == everywhere["forward G gather"] == GATHERED
    assert whole_model(sent("auto", False)) <= 0.26 * whole_model(everywhere)


def test_a_balanced_shard_has_two_halos_and_a_ring_receives_what_a_gather_does():
    tokens = sent("G=ring", True)
    assert W <= tokens["forward L halo"] <= 2 * W
    assert GATHERED <= tokens["forward G ring"] <= S


def plan(*arguments):
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run([*PLAN, *NARROW, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_tool_prints_memory_flops_and_collectives_by_axis():
    done = plan("--target=cpu:4", "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.context=2")
    assert done.returncode == 0, done.stderr
    for words in ("target       cpu:4: 4 cpu", "fsdp 2 x context 2", "memory", "largest", "FLOPs"):
        assert words in done.stdout
    lines = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.startswith("|")]
    assert ["all-gather", "fsdp"] in [line[1:3] for line in lines] and ["reduce-scatter", "fsdp"] in [
        line[1:3] for line in lines
    ]
    assert any(line[3] == "L halo" and line[2] == "context" for line in lines)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--target=v9:2x2"], "'v9:2x2' is not known; write cpu:8"),
        (["--target=cpu:many"], "h100:8"),
        (["--target=cpu:3", "--config.mesh.fsdp=2"], "3 devices do not divide by 2"),
        (["--target=cpu:1", "--stage=1"], "1 stages, counted from 0"),
    ],
)
def test_what_cannot_be_planned_is_an_error_in_a_line(arguments, words):
    done = plan(*arguments)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_tpu_needs_the_compiler_for_it():
    done = plan("--target=v5p:4x4x4")
    assert done.returncode == 2 and 'pip install "hybrid-attn[tpu]"' in done.stderr


def test_what_does_not_fit_is_said_with_the_numbers():
    from hybrid_attn.train.plan import CHIPS, Plan, Target, fits

    target = Target("v5e:1x1", "tpu", [], CHIPS["v5e"].memory)
    small = Plan(target, {}, 0, 0, 0, 0, 15_900_000_000, 0.0, 0.0, (0, "", ""), [], "")
    assert fits(small) == "fits         15.900 GB of 16.000 GB"
    assert fits(small._replace(peak=17_000_000_000)).startswith("DOES NOT FIT 17.000 GB and a device has 16.000 GB")
    assert fits(small._replace(target=target._replace(memory=None))) == ""


def main(context: str, balance: str) -> None:
    """Plans the step of a narrow LLLG on 16 CPU devices and prints what `sent` returns."""
    from configs import base
    from hybrid_attn import config
    from hybrid_attn.train import plan

    c = base.get_config()
    c.model.update(d_model=16, num_heads=1, num_kv_heads=1, head_dim=HEAD, d_ff=16, vocab_size=128)
    c.model.kinds.L.window = W
    c.stages[0].update(seq_len=S, batch=1)
    c.mesh.update(data=1, context=CONTEXT)
    c.train.update(context=context, balance=balance == "True", remat="none")
    found = plan.make_plan(config.build(c), plan.find_target(f"cpu:{CONTEXT}"))
    floats = [x for x in found.collectives if "f32" in x.types]
    tokens = {}
    for name, backward in {"forward": False, "backward": True}.items():
        for scope, size in plan.keys_and_values(floats, backward).items():
            tokens[f"{name} {scope}"] = size / {"L": LOCAL, "G": GLOBAL}[scope[0]] / (2 * 4 * HEAD)
    print(json.dumps(tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
