"""A plan has the bytes that a compiled step sends and holds, and a layer's keys and values are sent as its type needs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import conftest
import pytest
from absl.testing import flagsaver

from hybrid_attn.programs import parse

ROOT = Path(__file__).parents[1]
S, W, CONTEXT = 262_144, 2048, 16
HEAD, LOCAL, GLOBAL = 8, 3, 1  # dimensions of the one key/value head; layers of each kind
GATHERED = S * (CONTEXT - 1) // CONTEXT  # 245,760 tokens
CONFIG = "--config=configs/hybrid_8k.py"
NARROW = ["--config.model.d_model=32", "--config.model.d_ff=48", "--config.stages[0].batch=4", "--config.stages[0].seq_len=256"]
NARROW += ["--config.model.pattern=LG", "--config.model.num_layers=2"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
CASES = (("auto", False), ("gather", False), ("G=ring", True))


@pytest.fixture(scope="module")
def sent() -> dict[tuple[str, bool], dict[str, float]]:
    """Of each case, tokens whose keys and values a layer receives on each of 16 devices, by "pass letter scheme"."""
    done = subprocess.run([sys.executable, __file__], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


def whole_model(tokens: dict[str, float]) -> float:
    return sum(n * {"L": LOCAL, "G": GLOBAL}[name.split()[1]] for name, n in tokens.items())


@pytest.mark.slow
def test_a_local_layer_receives_its_window_and_a_global_one_everything(sent):
    tokens = sent["auto", False]
    assert tokens["forward L halo"] == tokens["backward L halo"] == W
    assert tokens["forward G gather"] == tokens["backward G gather"] == GATHERED == 245_760


@pytest.mark.slow
def test_keys_and_values_of_the_hybrid_are_a_quarter_of_those_of_gathering_everywhere_in_one_slice_a_shard(sent):
    everywhere = sent["gather", False]
    assert everywhere["forward L gather"] == everywhere["forward G gather"] == GATHERED
    assert whole_model(sent["auto", False]) <= 0.26 * whole_model(everywhere)


@pytest.mark.slow
def test_a_zigzag_shard_has_two_halos_and_a_ring_receives_as_much_as_a_gather(sent):
    tokens = sent["G=ring", True]
    assert W <= tokens["forward L halo"] <= 2 * W
    assert GATHERED <= tokens["forward G ring"] <= S


def plan(*arguments):
    command = [sys.executable, "tools/plan.py", CONFIG, *NARROW, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)


def sizes(line):
    """Bytes of all the sizes in a line."""
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    return [float(x.replace(",", "")) * units[unit] for x, unit in re.findall(r"([\d,]+\.\d+) (GB|MB|kB)", line)]


def test_a_size_with_a_larger_vocabulary_is_planned_without_a_tokenizer_and_a_line_names_the_tool(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for config, told in (("configs/hybrid_8k.py", False), ("configs/hybrid_8k.py:1b", True)):
        with conftest.tool("plan") as tool, flagsaver.flagsaver():
            stubs = {"find_target": tool.targets, "make_plan": tool.step, "report": tool.step, "fits": tool.step}
            for name, module in stubs.items():
                monkeypatch.setattr(module, name, lambda *_, name=name: name)
            tool.main(parse(["plan.py", f"--config={config}", "--target=v5p:4x4x4"]))
        lines = capsys.readouterr().out.splitlines()
        assert (lines[0], len(lines)) == ("report", 3 if told else 1)
        assert (
            lines[-1].startswith("note         no data was read; launch/train.py would say: model.vocab_size=65536 wastes")
            == told
        )
        assert ("tools/train_tokenizer.py --vocab_size=65536" in lines[-1]) == told


@pytest.mark.slow
def test_the_tool_prints_memory_flops_and_collectives_by_axis():
    done = plan("--target=cpu:4", "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.context=2")
    assert done.returncode == 0, done.stderr
    for message in ("target       cpu:4: 4 cpu", "fsdp 2 x expert 1 x context 2", "memory", "largest", "FLOPs"):
        assert message in done.stdout
    assert "note" not in done.stdout
    memory, largest = (next(line for line in done.stdout.splitlines() if line.startswith(x)) for x in ("memory ", "largest "))
    peak, arguments, others = sizes(memory)
    assert abs(peak - arguments - others) <= 2e3 and others > sizes(largest)[0] > 0
    assert done.stdout.startswith("fits ")
    needed, of, left = sizes(done.stdout.splitlines()[0])
    assert abs(of - needed - left) < 3e6 and abs(needed - peak) <= 1e3
    lines = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.startswith("|")]
    assert ["all-gather", "fsdp"] in [line[1:3] for line in lines] and ["reduce-scatter", "fsdp"] in [
        line[1:3] for line in lines
    ]
    assert any(line[3] == "L halo" and line[2] == "context" for line in lines)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--target=v9:2x2"], "'v9:2x2' is not known; write cpu:8"),
        (["--target=cpu:many"], "h100:8"),
        (["--target=cpu:1e8"], "'cpu:1e8' is not known"),
        (["--target=cpu:100000000"], "target cpu:100000000 has 100,000,000 devices; at most 1,024 can be compiled for"),
        (["--target=h100:100000000"], "at most 65,536 can be compiled for"),
        (["--target=v5p:99999x99999x99999"], "at most 65,536 can be compiled for"),
        (["--target=cpu:1", "--stage=1"], "the config has 1 stage, counted from 0"),
        (["--target=cpu:1", "--kernels"], "--kernels reads programs for GPUs, not for cpu:1; use h100:8"),
    ],
)
def test_a_target_or_config_that_cannot_be_planned_is_an_error_of_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["plan.py", CONFIG, *NARROW, *arguments])  # which keys a config's flags override
    with conftest.tool("plan") as tool, flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        tool.main(parse(sys.argv))
    error = capsys.readouterr().err
    assert (ended.value.code, len(error.splitlines())) == (2, 1) and message in error


def test_devices_that_a_mesh_does_not_suit_are_an_error_in_a_line():
    done = plan("--target=cpu:3", "--config.mesh.fsdp=2")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "3 devices do not divide by 2" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_tpu_needs_the_compiler_for_it():
    done = plan("--target=v5p:4x4x4")
    assert done.returncode == 2 and 'pip install "hybrid-attn[tpu]"' in done.stderr


def test_a_step_that_does_not_fit_is_reported_with_the_numbers():
    from hybrid_attn.plan.step import Plan, fits, verdict
    from hybrid_attn.plan.targets import CHIPS, Target

    target = Target("v5e:1x1", "tpu", [], CHIPS["v5e"].memory)
    small = Plan(target, {}, 0, 0, 0, 15_900_000_000, 0.0, 0.0, 0, 0.0, (0, "", ""), [], "")
    large = small._replace(peak=17_000_000_000)
    assert (fits(small), fits(large)) == (True, False)
    assert verdict(small) == "fits         15.900 GB of the 16.000 GB of a device; 100.000 MB are left"
    assert verdict(large).startswith(
        "DOES NOT FIT 17.000 GB, and 16.000 GB is the memory of a device; 1.000 GB too much: use more"
    )
    assert "a larger mesh.fsdp or mesh.context" in verdict(large)
    assert "a larger mesh.expert, mesh.fsdp or mesh.context" in verdict(large._replace(expert_helps=True))
    assert "a device, all of this machine's; " in verdict(small._replace(target=target._replace(platform="cpu", name="cpu:1")))


@pytest.mark.parametrize(
    "size, expert, tokens, helps",
    [("150m", 1, 1024, False), ("30b", 1, 8192, True), ("30b", 8, 8192, False), ("30b", 8, 64, True), ("30b", 128, 1, False)],
)
def test_a_larger_axis_of_experts_is_advised_where_their_matrices_need_more_than_copies_of_tokens(size, expert, tokens, helps):
    from configs import hybrid_8k, moe
    from hybrid_attn import config
    from hybrid_attn.plan.step import expert_helps

    values = (hybrid_8k if size == "150m" else moe).get_config(size)
    assert expert_helps(config.build(values).model, {"expert": expert, "tensor": 1}, tokens) == helps


def test_the_time_of_a_plan_for_a_tpu_says_what_its_compiler_does_not_estimate():
    from hybrid_attn.plan.collectives import Collective
    from hybrid_attn.plan.step import Plan, time_line
    from hybrid_attn.plan.targets import CHIPS, Target

    target = Target("v5p:2x2x1", "tpu", [], CHIPS["v5p"].memory)
    sent = [
        Collective("all-gather", ("fsdp",), 4, size, 3, ("f32",), "", hidden) for size, hidden in ((10**9, True), (7, False))
    ]
    line = time_line(Plan(target, {}, 0, 0, 0, 0, 0.0, 0.0, 875_000_000, 459e11, (0, "", ""), sent, ""))
    assert "0.500 s by the compiler, 875,000,000 cycles at 1.75 GHz" in line
    assert "(0.200 s if their 4.59e+13 FLOPs run at 50% of the peak)" in line and "(3.000 GB of 3.000 GB arrive" in line


def main() -> None:
    """Plans the step of a narrow LLLG on 16 CPU devices in each case and prints what `sent` has of it."""
    from configs import base
    from hybrid_attn import config
    from hybrid_attn.parallel.context import SCHEMES
    from hybrid_attn.plan import step as plan
    from hybrid_attn.plan import targets

    target = targets.find_target(f"cpu:{CONTEXT}")
    for context, zigzag in CASES:
        c = base.get_config()
        c.model.update(d_model=16, num_heads=1, num_kv_heads=1, head_dim=HEAD, d_ff=16, vocab_size=128)
        c.model.kinds.L.window = W
        c.stages[0].update(seq_len=S, batch=1)
        c.mesh.update(data=1, context=CONTEXT)
        c.train.update(context=context, zigzag=zigzag, remat="none")
        floats = [x for x in plan.make_plan(config.build(c), target).collectives if "f32" in x.types]
        tokens = {}
        for name, backward in {"forward": False, "backward": True}.items():
            sizes = Counter()
            for x in floats:
                if x.backward == backward and plan.payload(x).split()[-1] in SCHEMES:
                    sizes[plan.payload(x)] += x.total
            for scope, size in sizes.items():
                tokens[f"{name} {scope}"] = size / {"L": LOCAL, "G": GLOBAL}[scope[0]] / (2 * 4 * HEAD)
        print(json.dumps(tokens))


if __name__ == "__main__":
    main()
