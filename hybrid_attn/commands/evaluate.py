"""What a model can read: python tools/evaluate.py --checkpoint=runs/hybrid_8k --suite=quick --out=evals/hybrid_8k

--checkpoint is a run's workdir, or a directory of checkpoints such as tools/import_hf.py writes; several of them are compared,
and so are several --step of one. --suite is quick, full, or names of evaluations with commas. The text of haystacks is --text,
patterns of files, or the standard library of Python; held-out documents are those of the model's own sources, or --heldout.
What does not fit a length is left out, and printed. The same command goes on where it was interrupted.
Exit status: 2 for what cannot be evaluated, 1 for failures while running, 130 after Ctrl-C.
"""

import contextlib
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import tqdm
from absl import flags

from hybrid_attn import checkpoint as checkpoints
from hybrid_attn import files, programs
from hybrid_attn.data.synthetic import Task
from hybrid_attn.evals import heldout, keytokens, limits, output, report, ruler, suite, texts
from hybrid_attn.evals.provenance import provenance, trained_length
from hybrid_attn.evals.ruler import compat, qa
from hybrid_attn.evals.ruler.fit import check_known
from hybrid_attn.evals.settings import ASKED, with_own
from hybrid_attn.evals.subject import Subject
from hybrid_attn.infer import loading
from hybrid_attn.infer.engine import ROWS_AT_ONCE, TOKENS_AT_ONCE, Engine
from hybrid_attn.parallel.mesh import AXES, mesh_over_first

SHORTEST = 2048  # of questions whose length nobody named: in bytes, most of RULER's tasks fit
CHECKPOINT = flags.DEFINE_multi_string("checkpoint", None, "Workdir of a run, or directory of checkpoints.", required=True)
STEP = flags.DEFINE_multi_integer("step", None, "Of a checkpoint, by default the newest: one for all, or one for each.")
SUITE = flags.DEFINE_string("suite", "quick", "quick, full, or names of evaluations with commas between them.")
LENGTHS = flags.DEFINE_list(
    "lengths",
    None,
    "Tokens; by default a quarter of the trained length, all, and twice as many; of "
    f"{', '.join(ASKED)} the first two, from {SHORTEST:,} on.",
)
SAMPLES = flags.DEFINE_integer("samples", 5, "Questions of each task, length and depth; of the harness, too.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 65_536, "Tokens of held-out text, and of drawn rows, at each length.", lower_bound=1)
DEPTHS = flags.DEFINE_list("depths", [f"{x:g}" for x in suite.DEPTHS], "Where needles are hidden, in percent of the text.")
TEXT = flags.DEFINE_multi_string(
    "text", [], "Pattern of files, or directory, in which needles are hidden; with --compat those of RULER's essays."
)
HELDOUT = flags.DEFINE_multi_string(
    "heldout",
    [],
    "NAME=FILES: a pattern of text files, or a token store, to measure losses on in place of the model's sources.",
)
TRUST = flags.DEFINE_bool("trust_checkpoint_data", False, "Open the files and URLs that a checkpoint names as its data.")
RULER_TASKS = flags.DEFINE_list("ruler_tasks", [*ruler.NAMES], "Tasks of RULER, for --suite=ruler.")
SQUAD = flags.DEFINE_string("squad", None, "dev-v2.0.json of SQuAD, for qa_1.")
HOTPOT = flags.DEFINE_string("hotpot", None, "hotpot_dev_distractor_v1.json of HotpotQA, for qa_2.")
COMPAT = flags.DEFINE_bool("compat", False, "Ask RULER's own prompts, as its scripts draw them, by default of their seed.")
ENGLISH_WORDS = flags.DEFINE_string("english_words", None, "english_words.json of RULER, for its own longest lists of words.")
TASKS = flags.DEFINE_list("tasks", [], "Tasks of lm-evaluation-harness, for --suite=harness or full.")
TASK_PATH = flags.DEFINE_string("task_path", None, "Folder of the YAML files of such tasks. They run code: !function.")
SEED = flags.DEFINE_integer("seed", suite.SEED, "Of the questions.", lower_bound=0, upper_bound=2**32 - 1)
CHUNK = flags.DEFINE_integer("chunk", TOKENS_AT_ONCE, "Tokens of a prompt that are read at a time.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", None, f"Most prompts that are read together; by default {ROWS_AT_ONCE}.", lower_bound=1)
MESH = flags.DEFINE_string("mesh", "", "Devices along each axis, as context=4,tensor=2; by default one device.")
OUT = flags.DEFINE_string("out", None, "Directory for samples, records and the report.", required=True)
READ_BY = {  # flags that nothing but these evaluations reads
    **dict.fromkeys(("compat", "squad", "hotpot", "ruler_tasks"), ("ruler",)),
    "depths": ("needle",),
    "text": ("needle", "ruler"),
    "heldout": suite.OF_SOURCES,
}


def lengths(trained: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Those of --lengths, or lengths around the trained ones; questions, the slowest part, stop at the trained length."""
    if LENGTHS.value is None:
        around = {length for most in trained for length in (max(2, most // 4), most, 2 * most)}
        asked = {max(SHORTEST, most // part) for most in trained for part in (4, 1)}
        return {"lengths": tuple(sorted(around)), "asked": tuple(sorted(asked))}
    found = numbers("lengths", LENGTHS.value, int)
    if min(found) < 2:
        raise ValueError(f"--lengths={','.join(LENGTHS.value)}: {min(found)} tokens hold no question; use more")
    return {"lengths": found}


def depths() -> tuple[float, ...]:
    found = numbers("depths", DEPTHS.value, float)
    if not all(0 <= depth <= 100 for depth in found):
        raise ValueError(f"--depths={','.join(DEPTHS.value)} must lie between 0 and 100 percent")
    return found


def numbers(flag: str, texts: Sequence[str], kind: type) -> tuple:
    """Each number once."""
    found = []
    for text in texts:
        try:
            found.append(kind(text))
        except ValueError:
            what = "number of tokens" if kind is int else "number"
            raise ValueError(f"--{flag}={','.join(texts)} has {text!r}, which is no {what}") from None
    if not found:
        raise ValueError(f"--{flag}= names none; leave it out for the default")
    return tuple(dict.fromkeys(found))


def names(checkpoints: Sequence[tuple[str, int]]) -> list[str]:
    """A name for each directory and step, by which it is known in the report; the step is in it where there are several."""
    found: list[str] = []
    for checkpoint, step in checkpoints:
        path = Path(os.path.abspath(checkpoint))
        name = path.parent.name if path.name == "checkpoints" else path.name
        if any(other == checkpoint and at != step for other, at in checkpoints):
            name = f"{name}-{step}"
        others = (f"{name}-{number}" for number in itertools.count(2))
        found.append(next(x for x in itertools.chain([name], others) if x and x not in found and not output.is_reserved(x)))
    return found


def models() -> list[tuple[str, int]]:
    """The checkpoints, each by one name however it was written, and of which step."""
    found = [place if "://" in place else os.path.abspath(place) for place in CHECKPOINT.value]
    steps = STEP.value or [None]
    if len(steps) > 1 and len(found) > 1 and len(steps) != len(found):
        raise ValueError(f"--step is given {len(steps)} times for {len(found)} checkpoints; give one for all, or one for each")
    several = max(len(found), len(steps))
    pairs = zip(found * (several // len(found)), steps * (several // len(steps)), strict=True)
    return [(checkpoint, loading.step_of(loading.find(checkpoint), step)) for checkpoint, step in pairs]


def settings(trained: Sequence[int]) -> suite.Settings:
    """What is measured of every checkpoint; their rows of training had `trained` tokens."""
    evals = suite.named(SUITE.value)
    if TASKS.value and "harness" not in evals:
        raise ValueError(f"--tasks={','.join(TASKS.value)} is of --suite=harness or full, and this is --suite={SUITE.value}")
    if "harness" in evals and not TASKS.value and SUITE.value != "full":
        raise ValueError(f"--suite={SUITE.value} asks lm-evaluation-harness, and for no task; name some with --tasks")
    if TASKS.value:
        from hybrid_attn.evals import harness  # an extra

        harness.find_tasks(TASKS.value, TASK_PATH.value)
    for name, users in READ_BY.items():
        flag = flags.FLAGS[name]
        if flag.present and flag.value and not {*users} & {*evals}:
            raise ValueError(f"--{name} is of --suite={' or '.join(users)}, and this is --suite={SUITE.value}")
    if TRUST.value and HELDOUT.value:
        raise ValueError("--trust_checkpoint_data opens the model's own sources, and --heldout replaces them; leave one out")
    if not RULER_TASKS.value:
        raise ValueError("--ruler_tasks= names none; leave it out for all, or leave ruler out of --suite")
    for task in RULER_TASKS.value:
        check_known(task)
    if TASK_PATH.value and not TASKS.value:
        raise ValueError(f"--task_path={TASK_PATH.value} is where --tasks lie, and there are none; name some")
    if ENGLISH_WORDS.value and not COMPAT.value:
        raise ValueError("--english_words is for RULER's own prompts; give --compat, too")
    seed = compat.SEED if COMPAT.value and not SEED.present else SEED.value
    wanted = suite.Settings(
        **{"evals": evals, "samples": SAMPLES.value, "tokens": TOKENS.value, "depths": depths(), "seed": seed},
        **{"tasks": tuple(TASKS.value), "task_path": TASK_PATH.value, "compat": COMPAT.value},
        ruler_tasks=tuple(dict.fromkeys(RULER_TASKS.value)),
        **lengths(trained),
    )
    limits.check_settings(wanted)
    return wanted


def asked_about() -> dict:
    """What every checkpoint is asked about."""
    of_questions = {"qa_1": (SQUAD.value, qa.read_squad), "qa_2": (HOTPOT.value, qa.read_hotpot)}
    questions = {task: read(Path(path)) for task, (path, read) in of_questions.items() if path is not None}
    others = compat.read_others(Path(ENGLISH_WORDS.value)) if ENGLISH_WORDS.value else ()
    return {
        **{"haystack": texts.of_files(tuple(TEXT.value)), "questions": questions},
        "lists": compat.wonderwords(others) if COMPAT.value else None,
        "essays": texts.of_essays(tuple(TEXT.value)) if COMPAT.value and TEXT.value else "",
    }


def data_flags() -> dict:
    """The flags that name what is read beside the checkpoints, in their absolute form, for the commands in a report."""
    heldout_files = [f"{name}={_absolute(where)}" for name, where in heldout.named(HELDOUT.value).items()]
    found = {"trust_checkpoint_data": TRUST.value, "heldout": heldout_files, "text": [*map(_absolute, TEXT.value)]}
    single = {"squad": SQUAD.value, "hotpot": HOTPOT.value, "english_words": ENGLISH_WORDS.value}
    return found | {name: None if where is None else _absolute(where) for name, where in single.items()}


def _absolute(where: str) -> str:
    return where if "://" in where else os.path.abspath(os.path.expanduser(where))


class Chosen(NamedTuple):
    """A checkpoint, its step, and the tokens of a sequence of its training, with what says so."""

    checkpoint: str
    step: int
    trained: int
    trained_from: str


def choose(checkpoint: str, step: int, evals: Sequence[str]) -> Chosen:
    """ValueError where measuring would open what nobody but the checkpoint has named."""
    directory = loading.find(checkpoint)
    c, _, stage_steps = loading.saved_of(directory, step)
    if {*suite.OF_SOURCES} & {*evals} and not (TRUST.value or HELDOUT.value):
        heldout.check_trusted(checkpoint, c)
    return Chosen(checkpoint, step, *trained_length(c, Path(directory), sum(stage_steps) if stage_steps else step))


class Planned(NamedTuple):
    """All that the suite runs with, but for what it tells."""

    reader: suite.Reader
    settings: suite.Settings
    provenance: dict


def plan(chosen: Chosen, wanted: suite.Settings, about: Mapping) -> Planned:
    """What is measured of one model, on the mesh in force; its questions are drawn into --out."""
    checkpoint, step, trained, trained_from = chosen
    c, params, tokenizer = loading.load(checkpoint, step)
    engine = Engine(params, c, chunk=CHUNK.value, rows=ROWS.value)
    subject = Subject(c.model, params, engine.run, engine.mesh, tokenizer)
    limits.check_caches(c.model, wanted, engine)
    limits.check_rows(c.model, wanted, engine.mesh)
    documents = {}
    if {*suite.OF_SOURCES} & {*wanted.evals}:
        named = heldout.named(HELDOUT.value)
        documents = heldout.of_files(named, tokenizer) if named else heldout.of_sources(c, tokenizer)
    stops = tuple(loading.stop_tokens(checkpoint, tokenizer))
    own = {name: Task(x.task, x.pairs) for name, x in c.data.sources.items() if x.task is not None and name in c.sources}
    reader = suite.Reader(subject, engine, documents, trained=trained, tasks=with_own(own), stops=stops, **about)
    wanted = suite.fitting(wanted, reader, Path(OUT.value) / "samples", named=False)
    suite.some_units(wanted, reader)
    saved = checkpoints.read_config(loading.find(checkpoint), step)
    known = provenance(checkpoint, step, c, saved, tokenizer, about["haystack"], engine.run, engine.mesh)
    known["data"] = data_flags()
    known["weights"] = checkpoints.fingerprint(loading.find(checkpoint), step)
    known["heldout"] = {source: x.fingerprint() for source, x in documents.items()}
    if about["essays"]:
        known["essays"] = hashlib.sha256(about["essays"].encode()).hexdigest()
    known["model"] |= {"seq_len": trained, "seq_len_from": trained_from}
    return Planned(reader, wanted, known)


def evaluate(name: str, planned: Planned) -> None:
    """Measures one model into --out, on the mesh in force."""
    for x in planned.settings.absent:
        print(f"{name}  absent  {suite.Unit(*x[:3]).name}  {x.reason}", flush=True)
    out = Path(OUT.value)
    with progress(name, tokens_read(planned)) as done:
        suite.run(*planned, out / name, out / "samples", done)


def tokens_read(planned: Planned) -> dict[suite.Unit, int]:
    """Of each unit, about how many tokens it reads: its time grows with them."""
    settings, read = planned.settings, {}
    questions = dict.fromkeys(("ruler", "harness"), settings.samples) | {"attention_mass": suite.ATTENTION_PROMPTS}
    questions["needle"] = settings.samples * len(settings.depths)
    for unit in suite.units(settings, planned.reader):
        sequences = questions.get(unit.eval, -(-settings.tokens // unit.length))
        read[unit] = sequences * unit.length * (1 + keytokens.SLIDE if unit.eval == "key_tokens" else 1)
    return read


@contextlib.contextmanager
def progress(name: str, read: Mapping[suite.Unit, int]) -> Iterator[Callable[[suite.Unit, int, int], None]]:
    """Gives what shows each unit that is done, by the tokens that it has `read`: a bar on a terminal, a line elsewhere."""
    total, shown = sum(read.values()), {"unit": "tok", "unit_scale": True, "dynamic_ncols": True}
    with tqdm.tqdm(desc=name, total=total, disable=not sys.stderr.isatty(), **shown) as bar:
        done_tokens = 0

        def done(unit: suite.Unit, number: int, of: int) -> None:
            nonlocal done_tokens
            done_tokens += read[unit]
            bar.update(read[unit])
            bar.set_postfix_str(f"{number}/{of} {unit.name}")
            if bar.disable:
                print(f"{name}  {number}/{of}  {done_tokens / total:.0%} of tokens  {unit.name}", flush=True)

        yield done


def evaluate_all() -> None:
    """Measures every checkpoint and writes the report; what is wrong with one is said before another is measured."""
    report.check_drawing()
    for flag, values in (("checkpoint", CHECKPOINT.value), ("out", [OUT.value])):
        for value in values:
            files.check_named(flag, value, "a directory")
    found, evals = models(), suite.named(SUITE.value)
    heldout.named(HELDOUT.value)
    chosen = [choose(*model, evals) for model in found]
    wanted = settings([x.trained for x in chosen])
    about = asked_about()
    called = names(found)
    mesh = mesh_over_first(**programs.pairs(f"--mesh={MESH.value}", MESH.value, dict.fromkeys(AXES, int)))
    out = Path(OUT.value)
    output.check_ours(out)
    with files.lock(out):
        output.mark(out)
        with jax.set_mesh(mesh):
            for x in chosen[1:]:  # before hours go to the first
                plan(x, wanted, about)
            for x, name in zip(chosen, called, strict=True):
                print(f"{name}  trained at {x.trained:,} tokens ({x.trained_from})", flush=True)
                evaluate(name, plan(x, wanted, about))
        summary = report.write(out, [report.read(out / name) for name in called])
    print(f"\n{summary}\nreport  {out / 'report.html'}")


def main(argv):
    memory_for = "what is measured; use shorter --lengths or fewer --rows"
    programs.run(evaluate_all, argv, memory_for, "interrupted; the same command goes on with what is not done")


def start() -> None:
    """The console script."""
    programs.start(main, __name__)
