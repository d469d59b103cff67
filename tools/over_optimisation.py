"""Trains on preferences for too long, and shows when quality falls and when the indicators of over-optimisation turn.

    python tools/over_optimisation.py --out=runs/over_optimisation

The language is a Markov chain over --letters, each of which has two followers; half of the letters of a text are noise. A
model is trained on texts, then on few pairs of completions, of which the one with more transitions of the chain is chosen. The
true quality of what it samples is the share of these transitions. There is a run for each objective and seed, which changes
texts, pairs and first parameters. What is complete in --out is not repeated; other --letters, --steps and --every have runs of
their own there. Exit codes: 2 for a wrong flag or input.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from hybrid_attn import checkpoint, compiled, config, programs
from hybrid_attn.bench.measurement import table
from hybrid_attn.config import Config
from hybrid_attn.configs import base
from hybrid_attn.data import chat, corpora, prepare
from hybrid_attn.data.conversations import Chat
from hybrid_attn.data.records import Fields
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.evals import EvalModel, Spec, preferences
from hybrid_attn.files import write_atomically
from hybrid_attn.infer import loading
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.infer.sampling import Sampling
from hybrid_attn.model import execution_on
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.train import loop
from hybrid_attn.train.turn import PATIENCE, turn_of

OUT = flags.DEFINE_string("out", None, "Folder of the data, the runs and the measurements.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.", 1)
STEPS = flags.DEFINE_integer("steps", 300, "Steps on pairs.", 1)
EVERY = flags.DEFINE_integer("every", 20, "Steps between two checkpoints, each of which is measured.", 1)
SAMPLES = flags.DEFINE_integer("samples", 256, "Completions that are sampled from a checkpoint.", 1)

LETTERS = flags.DEFINE_integer("letters", 24, "Letters of the language.", 3, 26)
PROMPT, LENGTH = 4, 12  # letters of a prompt, of a completion
NUMBERS, TEXT_STEPS = {"texts": 4096, "pairs": 512}, 300
SIZES = {"pattern": "LG", "num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "d_ff": 160}
OBJECTIVES = {
    "dpo": base.preference(beta=0.1),
    "ipo": base.preference(beta=0.1),
    "hinge": base.preference(beta=None, margin=1.0, alpha=0.1),
}
INDICATORS = ("entropy_bits", "mass")
SHOWN = {"quality": "{:.2f}", "letters": "{:.1f}", "margin": "{:.1f}", "chosen": "{:.1f}"}
BYTES = load_tokenizer("bytes")


def text_of(letters: list[int]) -> str:
    return "".join(chr(ord("a") + letter) for letter in letters)


@functools.cache
def followers(letter: int) -> np.ndarray:
    """The two letters that may follow a letter."""
    return np.random.default_rng(letter).permutation(LETTERS.value)[:2]


def sampled_letters(rng: np.random.Generator, before: int, number: int) -> list[int]:
    """So many letters after the letter `before`: half of them from the chain, half of them noise."""
    letters = [before]
    for _ in range(number):
        is_noise = rng.random() >= 0.5
        follows = rng.integers(LETTERS.value) if is_noise else rng.choice(followers(letters[-1]), p=(0.7, 0.3))
        letters.append(int(follows))
    return letters[1:]


def prompt_of(rng: np.random.Generator) -> list[int]:
    first = int(rng.integers(LETTERS.value))
    return [first, *sampled_letters(rng, first, PROMPT - 1)]


def quality(before: int, completion: list[int]) -> float:
    """The share of the transitions of a completion, the first from the letter `before`, that the chain has.

    A completion has `LENGTH` letters: what is missing or is no letter counts as wrong.
    """
    letters = [before, *completion[:LENGTH]]
    pairs = zip(letters, letters[1:], strict=False)
    return sum(is_letter(a) and b in followers(a) for a, b in pairs) / LENGTH


def is_letter(number: int) -> bool:
    return 0 <= number < LETTERS.value


def first_letters(completion: list[int]) -> int:
    """How many letters a completion has before anything else, such as its end."""
    return next((i for i, number in enumerate(completion) if not is_letter(number)), len(completion))


def write_pairs(folder: Path, name: str, seed: int) -> None:
    """A token store of pairs in `folder`, whose halves differ in their quality."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record) + "\n" for record in sampled_pairs(NUMBERS[name], seed)]
        write_atomically(path, "".join(lines).encode())
    form = Chat("preference", chat.load_template(None, "bytes"), ("assistant",))
    options = prepare.Options("bytes", Fields("text", None), "jsonl", "none", False, "stop", shard_bytes=None)
    prepare.prepare([str(path)], str(folder / name), dataclasses.replace(options, chat=form), 1, print)


def sampled_pairs(number: int, seed: int) -> list[dict[str, str]]:
    """Records of prompts and completions, of which the chosen one has the higher quality."""
    rng, records = np.random.default_rng((seed, number)), []
    while len(records) < number:
        prompt = prompt_of(rng)
        halves = sorted((sampled_letters(rng, prompt[-1], LENGTH) for _ in range(2)), key=lambda x: -quality(prompt[-1], x))
        if quality(prompt[-1], halves[0]) > quality(prompt[-1], halves[1]):
            records.append(dict(zip(("prompt", "chosen", "rejected"), map(text_of, (prompt, *halves)), strict=True)))
    return records


def config_of(folder: Path, name: str, seed: int, **stage) -> Config:
    """The run of a stage over the store `name` of `folder`."""
    c = base.get_config()
    c.seed = c.data.seed = seed
    c.model.update(SIZES)
    c.data.sources, c.data.holdout = {name: base.source(store=str(folder / name))}, 0.25
    c.optim.z_loss = 0.0
    c.train.update(checkpoint_every=EVERY.value, keep=10**6, log_every=EVERY.value, sinks=(), remat="none")
    c.evals.names = ()
    c.stages = [base.stage(seq_len=256, batch=max(4, jax.device_count()), **stage)]
    return config.build(c)


def rate(peak: float):
    return base.lr_schedule(start=peak, end=peak / 2, warmup_steps=10)


def workdir_of(out: Path, objective: str, seed: int) -> Path:
    """The workdir of a run on pairs, in the folder of its language and seed."""
    return out / f"letters{LETTERS.value}_seed{seed}" / f"{objective}_{STEPS.value}_{EVERY.value}"


def run_of(workdir: Path, objective: str, seed: int) -> Config:
    """The config of a run on pairs, after the run on texts and after it are trained."""
    folder = workdir.parent
    for name in NUMBERS:
        write_pairs(folder, name, seed)
    texts = config_of(folder, "texts", seed, objective="sft", steps=TEXT_STEPS, lr_schedule=rate(3e-3))
    loop.train(texts, str(folder / "sft"))
    settings = {"objective": objective, "preference": OBJECTIVES[objective]}
    c = config_of(folder, "pairs", seed, steps=STEPS.value, lr_schedule=rate(1e-4), **settings)
    c = dataclasses.replace(c, init_from=dataclasses.replace(c.init_from, path=str(folder / "sft")))
    loop.train(c, str(workdir))
    return c


def measured(c: Config, workdir: Path, step: int, programs_made: dict) -> dict:
    """Held-out pairs, and the quality of completions that a checkpoint samples; of step 0, those of the model it began with."""
    directory, step = (c.init_from.path, None) if step == 0 else (workdir, step)
    params, execution = loading.load(directory, step).params, execution_on(jax.default_backend(), c.model, c.train)
    pairs = corpora.load(c.data, ["pairs"], BYTES)["pairs"].heldout_pairs
    model = EvalModel(c.model, params, execution, jax.sharding.get_mesh(), BYTES)
    record = preferences.record_of(model, Spec(pairs, 256, 10**6))
    rng = np.random.default_rng(0)
    prompts = [prompt_of(rng) for _ in range(SAMPLES.value)]
    tokens = [[BYTES.bos, *BYTES.encode(text_of(prompt).encode())] for prompt in prompts]
    engine = Engine(params, c, EngineOptions(chunk=16, batch_size=SAMPLES.value), programs_made, execution)
    answers = engine.generate(tokens, LENGTH, GenerateOptions(Sampling(temperature=1.0)))
    completions = [[int(x) - ord("a") for x in answer.tokens] for answer in answers]
    shares = [quality(prompt[-1], x) for prompt, x in zip(prompts, completions, strict=True)]
    return record | {"quality": float(np.mean(shares)), "letters": float(np.mean([first_letters(x) for x in completions]))}


def measurements(out: Path, objective: str, seed: int, programs_made: dict) -> dict[int, dict]:
    """What `measured` gives of every checkpoint of a run, by its step; a file of the workdir keeps it."""
    workdir = workdir_of(out, objective, seed)
    path = workdir / f"quality_{SAMPLES.value}.json"
    if not path.exists():
        c = run_of(workdir, objective, seed)
        with jax.set_mesh(make_mesh(c.mesh)):
            steps = [0, *checkpoint.steps(workdir / "checkpoints")]
            records = {step: measured(c, workdir, step, programs_made) for step in steps}
        write_atomically(path, json.dumps(records).encode())
    return {int(step): record for step, record in json.loads(path.read_text()).items()}


def row_of(records: dict[int, dict]) -> list[str]:
    """The step of the best quality, what is shown at the start, there and at the end, and the turns with the quality there.

    The rule sees what a run does, which is not evaluated at step 0.
    """
    of = {name: {step: record[name] for step, record in records.items()} for name in (*SHOWN, *INDICATORS)}
    peak, last = max(of["quality"], key=of["quality"].get), max(records)
    cells = [str(peak), *(", ".join(form.format(of[name][step]) for step in (0, peak, last)) for name, form in SHOWN.items())]
    for name in INDICATORS:
        turn = turn_of(name, {step: x for step, x in of[name].items() if step > 0})
        cells.append(f"{turn.step} ({of['quality'][turn.step]:.2f})" if turn.has_come(PATIENCE) else "no turn")
    return cells


def show() -> None:
    compiled.keep(None)
    out, rows, programs_made = Path(OUT.value), [], {}
    for objective in OBJECTIVES:
        for seed in range(SEEDS.value):
            rows.append([objective, str(seed), *row_of(measurements(out, objective, seed, programs_made))])
    header = ["objective", "seed", "peak", *SHOWN, *(f"turn of {name}" for name in INDICATORS)]
    print(table(header, rows))
    print("peak: the step of the best quality; then values at step 0, there and at the last step; turns with the quality there")


def main(argv):
    programs.run(show, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
