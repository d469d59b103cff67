"""What a model can read: python tools/evaluate.py --checkpoint=runs/hybrid_8k --suite=quick --out=evals/hybrid_8k

--checkpoint is a run's workdir, or a directory of checkpoints such as tools/import_hf.py writes. Two or more of them are
compared, and so are two or more --step of one. --suite is quick, full, or names of evaluations with commas. Needles are hidden
in --text, patterns of files, or in the standard library of Python; held-out documents are those of the model's own sources,
or --heldout. Units that do not fit a length are left out, and printed. The same command goes on where it was interrupted.
Exit status: 2 for wrong flags or inputs, 1 for failures while running, 130 after Ctrl-C.
"""

import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import tqdm
from absl import flags

from hybrid_attn import checkpoint as checkpoints
from hybrid_attn import compiled, files, programs
from hybrid_attn.data import synthetic
from hybrid_attn.data.synthetic import Task
from hybrid_attn.evals import haystack, heldout, limits, prompt_set, report, ruler, suite
from hybrid_attn.evals.provenance import provenance
from hybrid_attn.evals.ruler import compat, qa
from hybrid_attn.evals.ruler.fit import check_known
from hybrid_attn.evals.table import EVALS
from hybrid_attn.evals.types import EvalContext, EvalModel, Settings, Unit, with_own
from hybrid_attn.infer import loading
from hybrid_attn.infer.engine import DEFAULT_BATCH_SIZE, DEFAULT_CHUNK, Engine, EngineOptions
from hybrid_attn.infer.sampling import Sampling
from hybrid_attn.model import execution_on
from hybrid_attn.parallel.mesh import AXES, mesh_over_first
from hybrid_attn.trees import check

MARKER = "evaluations.txt"  # in --out: a report replaces files there
MARKED = "tools/evaluate.py made this directory: it replaces report.*, results.json, pictures/ and tables/ here each time.\n"
# Names in --out that no run may have, beside endings of files that are being written or were set aside.
RESERVED = ("samples", "pictures", "tables", "report.html", "report.md", "results.json", MARKER, files.LOCK)
ENDINGS = (".part", ".old")
SHORTEST = 2048  # of questions without --lengths: in bytes, most of RULER's tasks fit
CHECKPOINT = flags.DEFINE_multi_string("checkpoint", None, "Workdir of a run, or directory of checkpoints.", required=True)
STEP = flags.DEFINE_multi_integer("step", None, "Of a checkpoint, by default the newest: one for all, or one for each.")
SUITE = flags.DEFINE_string("suite", "quick", "quick, full, or names of evaluations with commas between them.")
LENGTHS = flags.DEFINE_list(
    "lengths",
    None,
    "Tokens; by default a quarter of the trained length, all, and twice as many; of "
    f"{', '.join(name for name, x in EVALS.items() if x.uses_engine)} the first two, from {SHORTEST:,} on.",
)
SAMPLES = flags.DEFINE_integer("samples", 5, "Questions of each task, length and depth; of the harness, too.", lower_bound=1)
TOKENS = flags.DEFINE_integer(
    "tokens", 65_536, "Tokens of held-out text, and of synthetic sequences, at each length.", lower_bound=1
)
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
PROMPTS = flags.DEFINE_string("prompts", None, "File of prompts or messages, as of tools/generate.py, for win_rate.")
JUDGE = flags.DEFINE_string("judge", None, "Checkpoint that judges the answers: a workdir, or its checkpoints/STEP.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "The most tokens of an answer that is judged.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.5, "Of the sampling of these answers; 0 takes the most likely token.")
TOP_P = flags.DEFINE_float("top_p", 0.75, "Of this sampling: the fewest tokens that have this probability together.")
SEED = flags.DEFINE_integer(
    "seed", suite.SEED, "Of the questions, and of the first answer that is judged.", lower_bound=0, upper_bound=2**32 - 1
)
CHUNK = flags.DEFINE_integer("chunk", DEFAULT_CHUNK, "Tokens of a prompt that are read at a time.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, f"Most prompts in a batch; by default {DEFAULT_BATCH_SIZE}.", lower_bound=1
)
MESH = flags.DEFINE_string("mesh", "", "Devices along each axis, as context=4,tensor=2; by default one device.")
OUT = flags.DEFINE_string("out", None, "Directory for samples, records and the report.", required=True)
OF_ANSWERS = ("max_new_tokens", "temperature", "top_p")  # flags that are an error without --prompts
# Flags that are an error where no evaluation of --suite reads them.
SPECIAL = ("compat", "squad", "hotpot", "ruler_tasks", "depths", "text", "heldout", "prompts", "judge", *OF_ANSWERS)


def lengths(trained: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """--lengths, or lengths around the trained ones; those of questions, which take most time, end at the trained length."""
    if LENGTHS.value is None:
        around = {length for most in trained for length in (max(2, most // 4), most, 2 * most)}
        of_questions = {max(SHORTEST, most // part) for most in trained for part in (4, 1)}
        return {"lengths": tuple(sorted(around)), "engine_lengths": tuple(sorted(of_questions))}
    chosen = numbers("lengths", LENGTHS.value, int)
    check(min(chosen) >= 2, f"--lengths={','.join(LENGTHS.value)}: {min(chosen)} tokens hold no question; use more")
    return {"lengths": chosen}


def depths() -> tuple[float, ...]:
    percents = numbers("depths", DEPTHS.value, float)
    check(all(0 <= x <= 100 for x in percents), f"--depths={','.join(DEPTHS.value)} must lie between 0 and 100 percent")
    return percents


def numbers(flag: str, texts: Sequence[str], kind: type) -> tuple:
    """Each number once."""
    values = []
    for text in texts:
        try:
            values.append(kind(text))
        except ValueError:
            what = "number of tokens" if kind is int else "number"
            raise ValueError(f"--{flag}={','.join(texts)} has {text!r}, which is no {what}") from None
    check(bool(values), f"--{flag}= names none; leave it out for the default")
    return tuple(dict.fromkeys(values))


def names(checkpoints: Sequence[tuple[str, int]]) -> list[str]:
    """A name for each directory and step in the report; it contains the step where a directory has two or more."""
    run_names: list[str] = []
    for checkpoint, step in checkpoints:
        path = Path(os.path.abspath(checkpoint))
        name = path.parent.name if path.name == "checkpoints" else path.name
        if any(other == checkpoint and at != step for other, at in checkpoints):
            name = f"{name}-{step}"
        candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        taken = ("", *RESERVED, *run_names)
        run_names.append(next(x for x in candidates if x not in taken and not x.endswith(ENDINGS)))
    return run_names


def models() -> list[tuple[str, int]]:
    """The absolute directory and the step of each checkpoint."""
    directories = [_absolute(path) for path in CHECKPOINT.value]
    steps = STEP.value or [None]
    if len(steps) > 1 and len(directories) > 1 and len(steps) != len(directories):
        raise ValueError(
            f"--step is given {len(steps)} times for {len(directories)} checkpoints; give one for all, or one for each"
        )
    number = max(len(directories), len(steps))
    pairs = zip(directories * (number // len(directories)), steps * (number // len(steps)), strict=True)
    return [(checkpoint, loading.step_of(loading.find(checkpoint), step)) for checkpoint, step in pairs]


def settings(trained: Sequence[int]) -> Settings:
    """The settings for all checkpoints, whose sequences of training had `trained` tokens."""
    evals = suite.names_of(SUITE.value)
    if TASKS.value and "harness" not in evals:
        raise ValueError(f"--tasks={','.join(TASKS.value)} is of --suite=harness or full, and this is --suite={SUITE.value}")
    if "harness" in evals and not TASKS.value and SUITE.value != "full":
        raise ValueError(f"--suite={SUITE.value} asks lm-evaluation-harness, and for no task; name some with --tasks")
    if TASKS.value:
        from hybrid_attn.evals import engine_lm  # an extra

        engine_lm.find_tasks(TASKS.value, TASK_PATH.value)
    for name in SPECIAL:
        flag, users = flags.FLAGS[name], [evaluation.name for evaluation in EVALS.values() if name in evaluation.flags]
        if flag.present and flag.value is not False and not {*users} & {*evals}:
            raise ValueError(f"--{name} is of --suite={' or '.join(users)}, and this is --suite={SUITE.value}")
    if TRUST.value and HELDOUT.value:
        raise ValueError("--trust_checkpoint_data opens the model's own sources, and --heldout replaces them; leave one out")
    check(bool(RULER_TASKS.value), "--ruler_tasks= names none; leave it out for all, or leave ruler out of --suite")
    for task in RULER_TASKS.value:
        check_known(task)
    if TASK_PATH.value and not TASKS.value:
        raise ValueError(f"--task_path={TASK_PATH.value} is where --tasks lie, and there are none; name some")
    check(COMPAT.value or not ENGLISH_WORDS.value, "--english_words is for RULER's own prompts; give --compat, too")
    seed = compat.SEED if COMPAT.value and not SEED.present else SEED.value
    sizes = {**lengths(trained), "samples": SAMPLES.value, "tokens": TOKENS.value, "depths": depths(), "seed": seed}
    sizes |= settings_of_answers(evals)
    tasks = {"tasks": tuple(TASKS.value), "task_path": TASK_PATH.value, "ruler_tasks": tuple(dict.fromkeys(RULER_TASKS.value))}
    chosen = Settings(evals, compat=COMPAT.value, **sizes, **tasks)
    limits.check_settings(chosen)
    return chosen


def settings_of_answers(evals: Sequence[str]) -> dict:
    """How answers that are judged are sampled: fields of the settings, checked if --suite names win_rate or files for it."""
    sampling = {"temperature": TEMPERATURE.value, "top_p": TOP_P.value if TEMPERATURE.value or TOP_P.present else None}
    if "win_rate" in evals and (SUITE.value != "full" or PROMPTS.value or JUDGE.value):
        named = bool(PROMPTS.value and JUDGE.value)
        check(named, f"--suite={SUITE.value} needs --prompts=FILE and --judge=CHECKPOINT")
        Sampling(**sampling)  # ValueError for wrong numbers
    useless = [f"--{name}" for name in OF_ANSWERS if flags.FLAGS[name].present and not PROMPTS.value]
    cure = "give --prompts=FILE and --judge=CHECKPOINT, or leave it out"
    check(not useless, f"{', '.join(useless)}: no answers are judged; {cure}")
    return {"max_new_tokens": MAX_NEW_TOKENS.value, **sampling}


def question_data() -> dict:
    """What the questions of all checkpoints are made from: fields of an EvalContext."""
    of_questions = {"qa_1": (SQUAD.value, qa.read_squad), "qa_2": (HOTPOT.value, qa.read_hotpot)}
    questions = {task: read(Path(path)) for task, (path, read) in of_questions.items() if path is not None}
    others = compat.read_others(Path(ENGLISH_WORDS.value)) if ENGLISH_WORDS.value else ()
    return {
        **{"haystack": haystack.of_files(tuple(TEXT.value)), "questions": questions},
        "lists": compat.wonderwords(others) if COMPAT.value else None,
        "essays": haystack.of_essays(tuple(TEXT.value)) if COMPAT.value and TEXT.value else "",
        "prompt_set": judged_prompts() if PROMPTS.value else None,
    }


def judged_prompts() -> prompt_set.PromptSet:
    return prompt_set.read(_absolute(PROMPTS.value), _absolute(JUDGE.value), engine_options())


def engine_options() -> EngineOptions:
    return EngineOptions(CHUNK.value, batch_size=BATCH_SIZE.value)


def data_flags() -> dict:
    """The flags that name what is read beside the checkpoints, in their absolute form, for the commands in a report."""
    heldout_files = [f"{name}={_absolute(path)}" for name, path in heldout.named(HELDOUT.value).items()]
    values = {"trust_checkpoint_data": TRUST.value, "heldout": heldout_files, "text": [*map(_absolute, TEXT.value)]}
    single = {"squad": SQUAD.value, "hotpot": HOTPOT.value, "english_words": ENGLISH_WORDS.value}
    single |= {"prompts": PROMPTS.value, "judge": JUDGE.value}
    return values | {name: None if path is None else _absolute(path) for name, path in single.items()}


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


class Checkpoint(NamedTuple):
    """A checkpoint, its step, and the tokens of a sequence of its training, with what says so."""

    directory: str
    step: int
    trained: int
    trained_from: str


def inspect(directory: str, step: int, evals: Sequence[str]) -> Checkpoint:
    """ValueError where measuring would open files or URLs that only the checkpoint names."""
    steps_in = loading.find(directory)
    if any(EVALS[name].reads_heldout for name in evals) and not (TRUST.value or HELDOUT.value):
        heldout.check_trusted(directory, loading.saved_of(steps_in, step).config)
    return Checkpoint(directory, step, *loading.trained_length_of(steps_in, step))


def plan(source: Checkpoint, settings: Settings, data: Mapping) -> tuple[EvalContext, Settings, dict]:
    """One model's context, without parameters, what is measured of it, and its provenance; draws the samples into --out."""
    directory, mesh = loading.find(source.directory), jax.sharding.get_mesh()
    c, tokenizer = loading.described(directory, source.step)
    eval_model = EvalModel(c.model, {}, execution_on(mesh.devices.flat[0].platform, c.model, c.train), mesh, tokenizer)
    limits.check_model(eval_model, settings, BATCH_SIZE.value or DEFAULT_BATCH_SIZE)
    held_out = heldout.HeldOut({}, {})
    if any(EVALS[name].reads_heldout for name in settings.evals):
        named = heldout.named(HELDOUT.value)
        held_out = heldout.of_files(named, tokenizer) if named else heldout.of_sources(c, tokenizer)
    stops = tuple(loading.stop_tokens(source.directory, tokenizer))
    own = {name: Task(x.task, x.pairs) for name, x in c.data.sources.items() if x.task in synthetic.TASKS and name in c.sources}
    own |= {name: x for name, x in held_out.documents.items() if isinstance(x, Task)}  # those that hide something in a text
    of_source = {"trained": source.trained, "tasks": with_own(own), "stops": stops, "pairs": held_out.pairs}
    judged = data["prompt_set"] and data["prompt_set"].of_model(directory, source.step)
    context = EvalContext(eval_model, None, held_out.documents, **of_source | data | {"prompt_set": judged})
    settings = suite.fitting(settings, context, Path(OUT.value) / "samples", lengths_are_fixed=False)
    suite.checked_units(settings, context)
    known = provenance(source.directory, source.step, c, checkpoints.read_config(directory, source.step), context)
    known |= {"data": data_flags(), "weights": loading.fingerprint(directory, source.step)}
    known["heldout"] = held_out.fingerprints()
    known |= judged.described() if judged else {}
    if data["essays"]:
        known["essays"] = hashlib.sha256(data["essays"].encode()).hexdigest()
    known["model"] |= {"seq_len": source.trained, "seq_len_from": source.trained_from}
    return context, settings, known


def evaluate(name: str, source: Checkpoint, context: EvalContext, settings: Settings, known: dict) -> None:
    """Measures one model into --out, on the mesh in force; shows each finished unit in a bar on a terminal, else in a line."""
    print(f"{name}  trained at {source.trained:,} tokens ({source.trained_from})", flush=True)
    for x in settings.absent:
        print(f"{name}  absent  {Unit(*x[:3]).name}  {x.reason}", flush=True)
    c, params, _ = loading.load(source.directory, source.step)
    engine = Engine(params, c, engine_options())
    context = context._replace(eval_model=context.eval_model._replace(params=params), engine=engine)
    units, out = suite.units(settings, context), Path(OUT.value)
    tokens = [EVALS[unit.eval].sequences(settings, unit.length) * unit.length for unit in units]  # their time grows with them

    def done(unit: Unit, number: int, of: int) -> None:
        bar.update(tokens[number - 1])
        bar.set_postfix_str(f"{number}/{of} {unit.name}")
        if bar.disable:
            share = sum(tokens[:number]) / sum(tokens)
            print(f"{name}  {number}/{of}  {share:.0%} of tokens  {unit.name}", flush=True)

    shown = {"unit": "tok", "unit_scale": True, "dynamic_ncols": True}
    with tqdm.tqdm(desc=name, total=sum(tokens), disable=not sys.stderr.isatty(), **shown) as bar:
        suite.measure_units(context, settings, known, out / name, out / "samples", done)


def check_ours(out: Path) -> None:
    """ValueError where `out` is in the workdir of a training, has links, or has files but not the marker of an evaluation.

    Runs below it are no sign, for they may have been copied to beside files of the user that a report would replace.
    """
    check(not out.is_file(), f"--out={out} is a file; name a directory, which need not be there")
    around = out.resolve().parents[:2]  # a training writes to WORKDIR/evals/STEP
    trained = any(path.name.isdigit() for folder in around for path in (folder / "checkpoints").glob("*"))
    check(not trained, f"--out={out} is in the workdir of a training, which writes there itself; name a directory elsewhere")
    links = sorted(path.name for path in out.iterdir() if path.is_symlink()) if out.is_dir() else []
    check(not links, f"--out={out} has links ({', '.join(links[:5])}), which lead to files elsewhere; remove them")
    names = sorted(path.name for path in out.iterdir() if path.name != files.LOCK) if out.is_dir() else []
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    check(
        not names or MARKER in names,
        f"--out={out} has files that no evaluation wrote ({shown}), and a report would replace pictures/, tables/ and "
        "report.*; name a new or an empty directory",
    )


def evaluate_all() -> None:
    """Measures every checkpoint and writes the report.

    An error in the config, the tokenizer or the data of any checkpoint comes before the first is measured; parameters are
    loaded when it is their turn.
    """
    compiled.keep()
    for flag, value in [*(("checkpoint", path) for path in CHECKPOINT.value), ("out", OUT.value)]:
        files.check_named(flag, value, "a directory")
    directories, evals = models(), suite.names_of(SUITE.value)
    heldout.named(HELDOUT.value)
    sources = [inspect(*model, evals) for model in directories]
    chosen = settings([x.trained for x in sources])
    run_names = names(directories)
    mesh = mesh_over_first(**programs.pairs(f"--mesh={MESH.value}", MESH.value, dict.fromkeys(AXES, int)))
    with jax.set_mesh(mesh):
        data = question_data()
    out = Path(OUT.value)
    check_ours(out)
    with files.lock(out):
        files.write_atomically(out / MARKER, MARKED)
        with jax.set_mesh(mesh):
            plans = [plan(source, chosen, data) for source in sources]
            for name, source, planned in zip(run_names, sources, plans, strict=True):
                evaluate(name, source, *planned)
        summary = report.write(out, [report.read(out / name) for name in run_names])
    print(f"\n{summary}\nreport  {out / 'report.html'}")


def main(argv):
    memory_for = "what is measured; use shorter --lengths or a smaller --batch_size"
    programs.run(evaluate_all, argv, memory_for, "interrupted; the same command goes on with what is not done")


start = functools.partial(programs.start, main, __name__)  # the console script
