"""The evaluations of a training: the suite, on the parameters of a step."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from hybrid_attn import config, files
from hybrid_attn.data import corpora
from hybrid_attn.data.corpora import Corpus
from hybrid_attn.evals import EvalModel, haystack, heldout, report, suite
from hybrid_attn.evals.evaluation import Baselines, part_of
from hybrid_attn.evals.provenance import provenance
from hybrid_attn.evals.table import EVALS
from hybrid_attn.evals.types import EvalContext, Settings, Unit
from hybrid_attn.infer.engine import DEFAULT_BATCH_SIZE, DEFAULT_CHUNK, Engine, EngineOptions
from hybrid_attn.model import Execution
from hybrid_attn.parallel.mesh import batch_shards, broadcast_from_first, on_mesh
from hybrid_attn.train import turn
from hybrid_attn.train.console import evaluation_tables, stage_of
from hybrid_attn.train.metrics import Metrics
from hybrid_attn.trees import check, choice

MACHINE = ("mesh", "device", "jax")  # where it was measured; a complete evaluation is not measured again elsewhere
PASSING = ("checkpoint", "config", "data")  # what may change in a run that goes on, without a change of numbers


def check_names(names: Sequence[str]) -> None:
    """ValueError for a name in `evals.names` that is no evaluation of a training, with the nearest one."""
    known = {name: evaluation for name, evaluation in EVALS.items() if evaluation.in_training}
    for index, name in enumerate(names):
        choice(f"evals.names[{index}]", name, known)


def is_enabled(c: config.Config) -> bool:
    """Whether a run of this config evaluates its checkpoints."""
    return bool(c.evals.names and c.evals.lengths)


def folder_of(workdir: str | Path) -> Path:
    """The folder of the evaluations of a run: a folder for each step, and the questions."""
    return Path(workdir) / "evals"


def report_in(workdir: str | Path, step: int) -> Path:
    """The page of the evaluation of a step, which is written when all is measured."""
    return folder_of(workdir) / str(step) / "report.html"


class Evaluations:
    """Runs the evaluations of `c.evals` into evals/STEP of the workdir and the metrics; every process makes the same calls."""

    def __init__(
        self,
        c: config.Config,
        executions: Sequence[Execution],
        meshes: Sequence[Mesh],
        tokenizer,
        loaded: Mapping[str, Corpus],
        workdir: str,
    ):
        """`executions` and `meshes` are those of each stage, `loaded` the corpora by source. Call `draw_questions` first."""
        self.config, self.executions, self.meshes = c, executions, meshes
        self.workdir, self.folder = str(workdir), folder_of(workdir)
        lengths = tuple(dict.fromkeys(round(multiple * c.at(-1).seq_len) for multiple in c.evals.lengths))
        self.settings = Settings(c.evals.names, lengths, c.evals.samples, c.evals.tokens, suite.DEPTHS, suite.SEED)
        self.enabled = is_enabled(c)
        uses_engine = any(EVALS[name].uses_engine for name in c.evals.names)
        of_last = {name: loaded[name] for name in sorted(c.at(-1).mixture)}
        texts = {name: x for name, x in of_last.items() if c.data.sources[name].task is None}
        held_out, haystack_text = heldout.of_corpora(of_last), ""
        if uses_engine:
            documents = [x.heldout for x in texts.values()]
            haystack_text = haystack.of_documents(documents, tokenizer) if documents else haystack.of_files(())
        tasks = {name: x for name, x in held_out.documents.items() if name not in texts}
        self.context = EvalContext(
            EvalModel(c.at(-1).model, {}, executions[-1], meshes[-1], tokenizer),
            *(None, held_out.documents, haystack_text, {}, c.at(-1).seq_len),
            tasks=tasks,
            pairs=held_out.pairs,
            training={name: x.training for name, x in texts.items()},
        )
        self.uses_engine, self.programs = uses_engine, [{} for _ in c.stages]
        trust = bool(corpora.locations(c.data, c.sources))
        self.about_data = {
            "data": {"trust_checkpoint_data": trust, "text": None},  # no flag names the text that hides needles
            "heldout": held_out.fingerprints(),
        }

    def context_of(self, step: int) -> EvalContext:
        """What is evaluated at a step: the model of the stage that trained it, on its mesh, still without parameters."""
        index, tokenizer = self.config.last_stage(step), self.context.eval_model.tokenizer
        stage = self.config.at(index)
        of_stage = EvalModel(stage.model, {}, self.executions[index], self.meshes[index], tokenizer)
        return self.context._replace(eval_model=of_stage, trained=stage.seq_len)

    def about(self, step: int) -> dict:
        """What run.json says of the evaluation of a step."""
        c, context = self.config, self.context_of(step)
        of_stage = c.of_stage(c.last_stage(step))
        return provenance(self.workdir, step, of_stage, config.to_dict(c), context) | self.about_data

    def with_params(self, step: int, params: dict) -> EvalContext:
        """`context_of` a step with its parameters and an engine, on the mesh in force."""
        index, context = self.config.last_stage(step), self.context_of(step)
        model = context.eval_model
        params, engine = on_mesh(params, model.mesh), None
        if self.uses_engine:
            options = _engine_options(self.config, model.mesh, self.settings.lengths)
            engine = Engine(params, self.config.of_stage(index), options, self.programs[index], model.execution)
        return context._replace(eval_model=model._replace(params=params), engine=engine)

    def draw_questions(self) -> None:
        """Draws all questions into the workdir; ValueError where one does not fit its length, or nothing is measured."""
        if not self.enabled:
            return
        sources = ", ".join(self.context.heldout)
        reasons = {name: EVALS[name].empty(self.context) for name in self.settings.evals if EVALS[name].empty}
        missing = "; ".join(f"{name} needs {part}, and {why}" for name, (part, why) in reasons.items())
        check(
            bool(suite.units(self.settings, self.context)),
            f"evals.names={self.settings.evals} measures nothing of the last stage's {sources}: {missing}",
        )
        self.settings = suite.fitting(self.settings, self.context, self.folder / "samples", lengths_are_fixed=True)

    def left_out(self) -> list[str]:
        """A line for each part of an evaluation in `c.evals.names` that is not measured."""
        return list(dict.fromkeys(f"evals        without {x.eval} of {x.part}: {x.reason}" for x in self.settings.absent))

    def report_of(self, step: int) -> Path | None:
        """The page of the evaluation of a step, if there is one."""
        path = report_in(self.workdir, step)
        return path if path.exists() else None

    def is_done(self, step: int) -> bool:
        """Whether the evaluation of `step`, with these settings, is complete and has a report; process 0 decides for all."""
        if not self.enabled:
            return True
        described = self._described(self.folder / str(step), self.about(step), (*PASSING, *MACHINE))
        return broadcast_from_first(described is not None and self.report_of(step) is not None)

    def is_over(self, step: int) -> bool:
        """Whether the run ends after the evaluation of `step`, as `turn` says; process 0 decides for all."""
        is_first = jax.process_index() == 0
        return broadcast_from_first(is_first and turn.ended(self.config, Path(self.workdir), step) is not None)

    def measure(self, params: dict, metrics: Metrics, asked_to_stop: Callable[[], bool]) -> bool:
        """Measures the units that this step has no files of, and logs all units; False if it was stopped before the end."""
        if not self.enabled:
            return True
        folder, about = self.folder / str(metrics.step), self.about(metrics.step)
        metrics.forget()
        if jax.process_index() == 0:
            described = self._described(folder, about) if folder.exists() else about
            if described is None:
                new_name = files.set_aside(folder)
                metrics.say(f"{folder} cannot be continued (other settings, or a damaged run.json); measuring again")
                metrics.say(f"kept         the old one as {new_name}")
            about = described or about

        def done(unit: Unit, number: int, of: int) -> bool:
            if jax.process_index() == 0:
                _log(metrics, unit, suite.measured_of(folder, unit).records)
            return broadcast_from_first(asked_to_stop()) and number < of

        try:
            with jax.set_mesh(self.meshes[self.config.last_stage(metrics.step)]):
                context = self.with_params(metrics.step, params)
                complete = suite.measure_units(context, self.settings, about, folder, self.folder / "samples", done)
        except FloatingPointError as error:  # on every process; the steps to come are worth more than these numbers
            metrics.say(f"evaluation of step {metrics.step} failed: {error}; training is not affected")
            return True
        if complete and jax.process_index() == 0:
            try:
                self._compare(metrics, folder)
                metrics.say(*turn.lines(self.config, Path(self.workdir), metrics.step))
            except Exception as error:  # what was measured is written, and no picture is worth the steps to come
                metrics.say(f"evaluation of step {metrics.step} is not all drawn: {type(error).__name__}: {error}")
        return complete

    def _described(self, folder: Path, about: dict, passing: Sequence[str] = PASSING) -> dict | None:
        """`about`, with the values of run.json in `folder` for the keys in `passing`; None where other keys differ."""
        try:
            recorded = suite.read_about(folder / "run.json")
        except (OSError, ValueError):  # no file, or one that a crash of the machine damaged
            return None
        passed = {name: recorded[name] for name in passing if name in recorded}
        same = recorded == suite.described(self.settings, about | passed) | {"revision": recorded.get("revision")}
        return about | passed if same else None

    def _compare(self, metrics: Metrics, folder: Path) -> None:
        """What needs all units: totals, the baselines, the report. Its pictures go to TensorBoard, too."""
        from matplotlib.image import imread  # takes a second

        run = report.read(folder)._replace(name=f"{self.folder.resolve().parent.name}, step {folder.name}")
        for evaluation in (EVALS[name] for name in self.settings.evals):
            for total in evaluation.totals(run.of(evaluation.name)):
                tag = f"{evaluation.headline.tag}/{part_of(total)}/{total['length']}"
                metrics.score(tag, evaluation.headline.value([total]))
                metrics.report(evaluation.name, [total])
        for record in self._baselines:
            metrics.report(record["eval"], [record])
        baselines = Baselines(self._baselines, self.context.eval_model.tokenizer.vocab_size)
        metrics.say(*evaluation_tables(run.records, baselines, self.context_of(metrics.step).trained))
        report.write(folder, [run._replace(records=(*run.records, *self._baselines))])
        for path in sorted((folder / "pictures").glob("*.png")):
            metrics.picture(path.stem, imread(path)[..., :3])

    @functools.cached_property
    def _baselines(self) -> list[dict]:
        """Records of the baselines of all evaluations, which are the same at every step."""
        models = [EVALS[name].baseline for name in self.settings.evals if EVALS[name].baseline]
        return [record for model in models for record in model.records(self.context, self.settings)]


def _engine_options(c: config.Config, mesh: Mesh, lengths: Sequence[int]) -> EngineOptions:
    """The chunk, and a batch whose caches have no more tokens than a training step if the mesh allows it."""
    context, shards = mesh.shape["context"], batch_shards(mesh)
    tokens = c.at(-1).batch * c.at(-1).seq_len
    per_shard = min(-(-DEFAULT_BATCH_SIZE // shards), tokens // (shards * max(lengths, default=1)))
    return EngineOptions(max(DEFAULT_CHUNK // context, 1) * context, batch_size=max(per_shard, 1) * shards)


def _log(metrics: Metrics, unit: Unit, records: Sequence[Mapping]) -> None:
    """The headline number of a unit to TensorBoard and the log, and its records to evals.jsonl."""
    evaluation = EVALS[unit.eval]
    value = evaluation.headline.value(records)
    if value is not None:
        metrics.score(f"{evaluation.headline.tag}/{unit.part}/{unit.length}", value)
    shown = "no score" if value is None else evaluation.headline.form.format(value)
    at_step = ", ".join([f"step {metrics.step}", *stage_of(metrics.position(metrics.step))])
    metrics.say(f"evals        {at_step}: {unit.eval} of {unit.part} at {unit.length:,}: {shown}")
    lines = evaluation.summary(records)
    metrics.report(unit.eval, [{name: x for name, x in line.items() if name not in ("eval", "by_row")} for line in lines])
