"""What a model can read: python tools/evaluate.py --checkpoint=runs/hybrid_8k --suite=quick --out=evals/hybrid_8k

--checkpoint is a run's workdir, or a directory of checkpoints such as tools/import_hf.py writes; given several times, the
models are compared. --suite is quick, full, or names of evaluations with commas. The text of haystacks is --text, patterns of
files, or the standard library of Python; held-out documents are those of the model's own sources. The same command goes on
where it was interrupted. Exit status: 2 for what cannot be evaluated; 130 after Ctrl-C.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import tqdm
from absl import app, flags

from hybrid_attn import checkpoint as checkpoints
from hybrid_attn import config
from hybrid_attn.data import corpora
from hybrid_attn.evals import report, suite, texts
from hybrid_attn.evals.provenance import provenance
from hybrid_attn.evals.ruler import qa
from hybrid_attn.evals.subject import Subject
from hybrid_attn.infer import loading
from hybrid_attn.infer.engine import Engine
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.programs import fail, parse, reason

CHECKPOINT = flags.DEFINE_multi_string("checkpoint", None, "Workdir of a run, or directory of checkpoints.", required=True)
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; by default the newest.")
SUITE = flags.DEFINE_string("suite", "quick", "quick, full, or names of evaluations with commas between them.")
LENGTHS = flags.DEFINE_list("lengths", None, "Tokens of prompt and answer; by default a quarter of the trained length and all.")
SAMPLES = flags.DEFINE_integer("samples", 5, "Questions of each task, length and depth.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 65_536, "Tokens of held-out text, and of drawn rows, at each length.", lower_bound=1)
DEPTHS = flags.DEFINE_list("depths", ["0", "25", "50", "75", "100"], "Where needles are hidden, in percent of the text.")
TEXT = flags.DEFINE_multi_string("text", [], "Pattern of files in which needles are hidden.")
SQUAD = flags.DEFINE_string("squad", None, "dev-v2.0.json of SQuAD, for qa_1.")
HOTPOT = flags.DEFINE_string("hotpot", None, "hotpot_dev_distractor_v1.json of HotpotQA, for qa_2.")
TASKS = flags.DEFINE_list("tasks", [], "Tasks of lm-evaluation-harness, for --suite=harness or full.")
TASK_PATH = flags.DEFINE_string("task_path", None, "Folder of the YAML files of such tasks.")
SEED = flags.DEFINE_integer("seed", 0, "Of the questions.", lower_bound=0)
CHUNK = flags.DEFINE_integer("chunk", 2048, "Tokens of a prompt that are read at a time.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Directory for samples, records and the report.", required=True)
SHORTEST = 2048  # of lengths that nobody named: in bytes, one of RULER's tasks needs 1,747


def lengths(trained: int) -> tuple[int, ...]:
    """Those of --lengths, or some up to the trained length."""
    if LENGTHS.value is None:
        return tuple(sorted({max(SHORTEST, trained // part) for part in (4, 1)}))
    try:
        found = tuple(int(length) for length in LENGTHS.value)
    except ValueError:
        raise ValueError(f"--lengths={','.join(LENGTHS.value)} has what is no number of tokens") from None
    if min(found) < 2:
        raise ValueError(f"--lengths={','.join(LENGTHS.value)}: {min(found)} tokens hold no question; use more")
    return found


def depths() -> tuple[float, ...]:
    try:
        found = tuple(float(depth) for depth in DEPTHS.value)
    except ValueError:
        raise ValueError(f"--depths={','.join(DEPTHS.value)} has what is no number") from None
    if not all(0 <= depth <= 100 for depth in found):
        raise ValueError(f"--depths={','.join(DEPTHS.value)} must lie between 0 and 100 percent")
    return found


def names(checkpoints: Sequence[str]) -> list[str]:
    """A name for each, by which it is known in the report."""
    found: list[str] = []
    for checkpoint in checkpoints:
        path = Path(checkpoint.rstrip("/"))
        name = path.parent.name if path.name == "checkpoints" else path.name
        found.append(name if name not in found else f"{name}-{len(found) + 1}")
    return found


def evaluate(checkpoint: str, name: str, settings: Mapping, text: str, questions: Mapping) -> None:
    """Measures one model into --out."""
    step = checkpoints.steps(loading.find(checkpoint))[-1] if STEP.value is None else STEP.value
    c, params, words = loading.load(checkpoint, step)
    engine = Engine(params, c, chunk=CHUNK.value)
    subject = Subject(c.model, params, engine.run, engine.mesh, words)
    sources = [source for source in c.sources if c.data.sources[source].task is None]
    wanted = suite.Settings(lengths=lengths(c.stages[-1].seq_len), **settings)
    loaded = corpora.load(c.data, sources, words) if {"position", "attention_mass", "key_tokens"} & {*wanted.evals} else {}
    reader = suite.Reader(subject, engine, {source: x.heldout for source, x in loaded.items()}, text, questions)
    about = provenance(checkpoint, step, c, words, text)
    with tqdm.tqdm(desc=name, unit="unit", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:

        def done(unit: suite.Unit, number: int, of: int) -> None:
            bar.total = of
            bar.update(number - bar.n)
            bar.set_postfix_str(unit.name)
            if bar.disable:
                print(f"{name}  {number}/{of}  {unit.name}", flush=True)

        suite.run(
            reader, wanted, {**about, "dtype": str(engine.run.dtype)}, Path(OUT.value) / name, Path(OUT.value) / "samples", done
        )


def main(argv):
    logging.getLogger().setLevel(logging.WARNING)
    try:
        if argv[1:]:
            raise ValueError(f"{' '.join(argv[1:])!r} is no flag; quote what has spaces")
        settings = {"evals": suite.named(SUITE.value), "samples": SAMPLES.value, "tokens": TOKENS.value}
        settings |= {"depths": depths(), "seed": SEED.value, "tasks": tuple(TASKS.value), "task_path": TASK_PATH.value}
        if TASKS.value and "harness" not in settings["evals"]:
            raise ValueError(
                f"--tasks={','.join(TASKS.value)} is of --suite=harness or full, and this is --suite={SUITE.value}"
            )
        files = {"qa_1": (SQUAD.value, qa.read_squad), "qa_2": (HOTPOT.value, qa.read_hotpot)}
        questions = {task: read(Path(path)) for task, (path, read) in files.items() if path is not None}
        text = texts.of_files(tuple(TEXT.value))
        called = dict(zip(names(CHECKPOINT.value), CHECKPOINT.value, strict=True))
        with jax.set_mesh(make_mesh(config.Mesh(1, 1, 1, 1, 1), jax.devices()[:1])):
            for name, checkpoint in called.items():
                evaluate(checkpoint, name, settings, text, questions)
        report.write(Path(OUT.value), [report.read(Path(OUT.value) / name) for name in called])
        print(f"report  {Path(OUT.value) / 'report.html'}")
    except (ValueError, NotImplementedError, ImportError, OSError) as error:
        fail(reason(error), 2)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on with what is not done", file=sys.stderr, flush=True)
        os._exit(130)  # not by SystemExit: a compilation that was interrupted crashes jax where it tidies up


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
