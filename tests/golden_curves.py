"""Makes tests/golden_curves.json: what small runs of the public programs come to, as exact numbers.

    python tests/golden_curves.py --out=tests/golden_curves.json

A change that should leave every number as it is, is compared with the file of the code before it: bit for bit with the same
version of jax on the same kind of processor, and closely elsewhere. Everything goes through the programs of launch/ and tools/,
so that this script does not depend on what lies behind them.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = 20
CONFIG = """
from configs import base

def get_config(case):
    c = base.get_config()
    c.model.update(pattern="LLLG", num_layers=4, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=144)
    c.model.kinds.L.window = 48
    if case == "rope":
        c.model.kinds.G.rope_theta = 10_000.0
        c.model.kinds.G.qk_norm = "none"
    c.data.sources.text.paths = ("{corpus}/*.txt",)
    c.stages = [dict(c.stages[0], steps={steps}, seq_len=256, batch=2)]
    c.optim.warmup_steps = 4
    c.train.update(log_every=1, checkpoint_every=100, mlp_chunk=96, loss_chunk=80, kernel="blocked")
    c.evals.names = ()
    if case == "bfloat16":
        c.train.dtype = "bfloat16"
    if case == "stages":
        c.data.packing = "best_fit"
        c.data.sources.code = base.source(paths=("{corpus}/*.py",))
        mixture = dict(text=0.7, code=0.3)
        c.stages = [
            dict(c.stages[0], steps={steps} // 2, seq_len=128, batch=4, mixture=mixture),
            dict(c.stages[0], steps={steps} // 2, seq_len=256, batch=2, microbatches=2, mixture=mixture),
        ]
    if case == "mesh":
        c.stages[0]["batch"] = 4
        c.mesh.update(fsdp=2, context=2, tensor=2)
    return c
"""
CASES = ("hybrid", "rope", "bfloat16", "stages", "mesh")
PROMPTS = ("line 1 of document", "def f(", "the same line, the same line, the")


def processor() -> str:
    """The kind of processor, by what XLA compiles for: its name and its extensions."""
    text = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    extensions = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    vectors = sorted(x for x in (extensions[1].split() if extensions else ()) if re.match(r"avx|fma|amx|sse", x))
    return f"{platform.machine()}, {os.cpu_count()} processors: {' '.join(vectors)}"


def environment(folder: Path) -> dict[str, str]:
    """Without what the tests tell jax and XLA, which would round otherwise."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    }


def run(folder: Path, *command: str, devices: int = 1) -> str:
    """The program's stdout; RuntimeError with its stderr if it fails."""
    env = environment(folder) | {"JAX_NUM_CPU_DEVICES": str(devices)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def write_inputs(folder: Path) -> None:
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for i in range(60):
        lines = (f"line {j} of document {i}, which says {(i * 7919 + j * 104729) % 9973}\n" for j in range(4 + i % 37))
        (corpus / f"{i}.txt").write_text("".join(lines))
        functions = (f"def f{j}(x):\n    return x * {i + j}\n\n\n" for j in range(1 + i % 11))
        (corpus / f"{i}.py").write_text("".join(functions))
    (folder / "config.py").write_text(CONFIG.format(corpus=corpus, steps=STEPS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))


def curve(folder: Path, case: str) -> list[list[float]]:
    """Loss, gradient norm and parameter norm of each step."""
    train = ("launch/train.py", f"--config={folder}/config.py:{case}", f"--workdir={folder}/{case}")
    run(folder, *train, devices=8 if case == "mesh" else 1)
    lines = map(json.loads, (folder / case / "metrics.jsonl").read_text().splitlines())
    return [[line["loss"], line["grad_norm"], line["param_norm"]] for line in lines]


def answers(folder: Path, case: str, *more: str) -> list[dict]:
    """Text, number of tokens and log-probability of each answer."""
    generate = ("tools/generate.py", f"--checkpoint={folder}/{case}", f"--prompts={folder}/prompts.jsonl")
    lines = run(folder, *generate, "--max_new_tokens=24", *more).splitlines()
    return [{key: record[key] for key in ("answer", "tokens", "logprob")} for record in map(json.loads, lines)]


def records(folder: Path, case: str) -> list[dict]:
    """What the evaluations of losses by position and of needles measured."""
    out = folder / f"{case}-evaluated"
    run(
        *(folder, "tools/evaluate.py", f"--checkpoint={folder}/{case}", f"--out={out}", "--suite=position,needle"),
        *("--lengths=256,512", "--samples=2", "--depths=0,50,100", "--tokens=2048", "--trust_checkpoint_data"),
        f"--text={folder}/corpus/*.txt",
    )
    (path,) = out.rglob("records.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


LOGITS = """
import sys
import jax, numpy as np
from hybrid_attn.infer import loading
from hybrid_attn.model import apply, logits, execution_on
from hybrid_attn.parallel.mesh import mesh_over_first
with jax.set_mesh(mesh_over_first()):
    directory = loading.find(sys.argv[1])
    c, params, _ = loading.load(directory, loading.step_of(directory, None))
    tokens_BT = np.arange(96, dtype=np.int32)[None] * 7 % 256
    position_BT, segment_BT = np.arange(96, dtype=np.int32)[None], np.ones((1, 96), np.int32)
    execution = execution_on("cpu", c.model, c.train)
    x_BTD = apply(c.model, params, tokens_BT, position_BT, segment_BT, execution)
    print(np.asarray(logits(c.model, params, x_BTD))[0, -1, :256].tolist())
"""


def last_logits(folder: Path, case: str) -> list[float]:
    """Those of the last of 96 tokens."""
    return json.loads(run(folder, "-c", LOGITS, f"{folder}/{case}"))


def golden(folder: Path) -> dict:
    import jax

    write_inputs(folder)
    curves = {case: curve(folder, case) for case in CASES}
    return {
        "jax": jax.__version__,
        "processor": processor(),
        "curves": curves,
        "logits": last_logits(folder, "hybrid"),
        "answers": {
            "greedy": answers(folder, "hybrid"),
            "sampled": answers(folder, "hybrid", "--temperature=0.8", "--top_k=20", "--seed=7"),
            "int8": answers(folder, "hybrid", "--cache=int8"),
            "compressed": answers(folder, "hybrid", "--compress=snapkv:cap=16,window=4"),
        },
        "records": records(folder, "hybrid"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="File to write.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.out.write_text(json.dumps(golden(Path(folder)), indent=1) + "\n")


if __name__ == "__main__":
    main()
