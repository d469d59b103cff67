"""What a run measures of its own model: the suite, with the parameters as they are at a step."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from hybrid_attn import config, files
from hybrid_attn.data import corpora
from hybrid_attn.data.corpora import Corpus
from hybrid_attn.evals import Spec, Subject, bigram, report, suite, texts
from hybrid_attn.evals.provenance import provenance
from hybrid_attn.evals.report import contents
from hybrid_attn.infer.engine import ROWS_AT_ONCE, TOKENS_AT_ONCE, Engine
from hybrid_attn.model import Run
from hybrid_attn.parallel.mesh import BATCH, broadcast_from_first
from hybrid_attn.train.metrics import Metrics
from hybrid_attn.train.overview import evaluation_tables
from hybrid_attn.trees import check

MACHINE = ("mesh", "device", "jax")  # where it was measured: what is all measured there is not measured again elsewhere
PASSING = ("checkpoint", "config", "data")  # what may change of a run that goes on, and makes no number another
SEGMENTS = tuple(contents.SEGMENTS.values())
PER_TOKEN = (*(f"{segment}_per_token" for segment in SEGMENTS), "sink_rate")
SCORES = {  # of a unit's score: its group in TensorBoard, which has the unit, and how a line says it
    "position": ("position_loss_nats", "loss {:.3f} nats"),
    "key_tokens": ("key_tokens_loss_nats", "loss {:.3f} nats"),
    "recall": ("recall_accuracy_share", "{:.1%} right"),
    "needle": ("needle_found_share", "{:.1%} found"),
    "ruler": ("ruler_score_percent", "score {:.1f}"),
    "attention_mass": ("attention_needle_lift_ratio", "needle's lift {:.2f}"),
}
MEANS = (*SEGMENTS, "entropy_bits", "needle_lift", *PER_TOKEN, "retrieval")  # told of the heads of a kind


class Evaluations:
    """What `c.evals` names: files in evals/STEP of the workdir, scores and pictures to the metrics of the run.

    Every process of a run makes the same calls; the first one writes.
    """

    def __init__(
        self, c: config.Config, run: Run, mesh: Mesh, tokenizer, loaded: Mapping[str, Corpus], workdir: str, start: int
    ):
        """`loaded` are the corpora by source, `start` is the step that the run goes on from. Call `prepare` before the rest."""
        self.folder = Path(workdir) / "evals"
        lengths = tuple(dict.fromkeys(round(multiple * c.stages[-1].seq_len) for multiple in c.evals.lengths))
        self.settings = suite.Settings(c.evals.names, lengths, c.evals.samples, c.evals.tokens, suite.DEPTHS, suite.SEED)
        self.wanted, asks = bool(c.evals.names and lengths), not set(suite.DRAWS).isdisjoint(c.evals.names)
        of_last = {name: loaded[name] for name in sorted(c.weights(-1))}
        self.texts = {name: x for name, x in of_last.items() if c.data.sources[name].task is None}
        heldout, haystack = {name: x.heldout for name, x in of_last.items()}, ""
        if asks:
            documents = [x.heldout for x in self.texts.values()]
            haystack = texts.of_documents(documents, tokenizer) if documents else texts.of_files(())
        tasks = {name: x for name, x in heldout.items() if name not in self.texts}
        self.reader = suite.Reader(
            Subject(c.model, {}, run, mesh, tokenizer), None, heldout, haystack, {}, c.stages[-1].seq_len, tasks=tasks
        )
        self.engine = functools.partial(Engine, config=c, programs={}, **_sizes(c, mesh, lengths)) if asks else lambda _: None
        self.about = provenance(str(workdir), start, c, config.to_dict(c), tokenizer, haystack, run, mesh)
        trust = bool(corpora.locations(c.data, c.sources))
        self.about["data"] = {"trust_checkpoint_data": trust, "text": None}  # no flag names the text that hides needles
        self.about["heldout"] = {name: x.fingerprint() for name, x in heldout.items()}

    def prepare(self) -> None:
        """Writes all questions to evals/samples of the workdir.

        ValueError where a question does not fit its length, and where there is nothing to measure.
        """
        if not self.wanted:
            return
        sources = ", ".join(self.about["heldout"])
        check(
            bool(suite.units(self.settings, self.reader)),
            f"evals.names={self.settings.evals} measures nothing of the last stage's {sources}: position, key_tokens and "
            "attention_mass are of documents, recall is of tasks, needle and ruler are of every model",
        )
        self.settings = suite.fitting(self.settings, self.reader, self.folder / "samples", named=True)

    def left_out(self) -> list[str]:
        """A line for each part of what `c.evals` names that is not measured."""
        return list(dict.fromkeys(f"evals        without {x.eval} of {x.part}: {x.reason}" for x in self.settings.absent))

    def report_of(self, step: int) -> Path | None:
        """The page of the evaluation of a step, if there is one."""
        path = self.folder / str(step) / "report.html"
        return path if path.exists() else None

    def is_done(self, step: int) -> bool:
        """Whether all is measured and drawn of `step`, as the settings want it, on whatever machine.

        In every process what process 0 says.
        """
        if not self.wanted:
            return True
        described = self._described(self.folder / str(step), self.about | {"step": step}, (*PASSING, *MACHINE))
        return broadcast_from_first(described is not None and self.report_of(step) is not None)

    def measure(self, params: dict, metrics: Metrics, asked_to_stop: Callable[[], bool]) -> bool:
        """Measures what this step has no files of, and tells all that it has; False if it was asked to stop before the end."""
        if not self.wanted:
            return True
        folder, about = self.folder / str(metrics.step), self.about | {"step": metrics.step}
        metrics.forget()
        if jax.process_index() == 0:
            if (described := self._to_go_on_with(folder, about)) is None:
                kept = files.set_aside(folder)
                metrics.say(f"{folder} cannot be continued (other settings, or a damaged run.json); measuring again")
                metrics.say(f"kept         the old one as {kept}")
            about = described or about
        reader = self.reader._replace(subject=self.reader.subject._replace(params=params), engine=self.engine(params))

        def done(unit: suite.Unit, number: int, of: int) -> bool:
            if jax.process_index() == 0:
                _tell(metrics, unit, suite.measured_of(folder, unit).records)
            return broadcast_from_first(asked_to_stop()) and number < of

        try:
            whole = suite.run(reader, self.settings, about, folder, self.folder / "samples", done)
        except FloatingPointError as error:  # on every process; the steps to come are worth more than these numbers
            metrics.say(f"evaluation of step {metrics.step} failed: {error}; training is not affected")
            return True
        if whole and jax.process_index() == 0:
            try:
                self._compare(metrics, folder)
            except Exception as error:  # what was measured is written, and no picture is worth the steps to come
                metrics.say(f"evaluation of step {metrics.step} is not all drawn: {type(error).__name__}: {error}")
        return whole

    def _to_go_on_with(self, folder: Path, about: dict) -> dict | None:
        """`about`, as it was said of what the folder of a step has; None where that was measured otherwise."""
        described = self._described(folder, about)
        return about if described is None and not folder.exists() else described

    def _described(self, folder: Path, about: dict, passing: Sequence[str] = PASSING) -> dict | None:
        """`about`, as run.json of `folder` says it, if that is of an evaluation with these settings of the same run.

        What is named in `passing` may differ.
        """
        try:
            there = suite.read_about(folder / "run.json")
        except (OSError, ValueError):  # none, or one that a crash of the machine left
            return None
        passed = {name: there[name] for name in passing if name in there}
        same = there == suite.described(self.settings, about | passed) | {"revision": there.get("revision")}
        return about | passed if same else None

    def _compare(self, metrics: Metrics, folder: Path) -> None:
        """What is known when all units are: means over tasks, the bigram model beside the losses, the report."""
        run = report.read(folder)._replace(name=f"{self.folder.resolve().parent.name}, step {folder.name}")
        for length, mean in contents.ruler_means(run, lambda length: True).items():
            metrics.score(f"{SCORES['ruler'][0]}/mean/{length}", mean)
            metrics.report("ruler", [{"task": "mean", "length": length, "score": mean}])
        baseline = self._bigram if run.of("position") else []
        metrics.report("bigram", baseline)
        vocab_size = self.reader.subject.tokenizer.vocab_size
        for line in evaluation_tables(run.records, baseline, vocab_size, self.reader.trained):
            metrics.say(line)
        run = run._replace(records=(*run.records, *({"eval": "bigram", **record} for record in baseline)))
        report.write(folder, [run])
        _show(metrics, folder / "pictures")

    @functools.cached_property
    def _bigram(self) -> list[dict]:
        """What a bigram model of each source's training documents scores on its held-out ones, if the vocabulary is small."""
        tokenizer, length = self.reader.subject.tokenizer, self.about["model"]["seq_len"]
        if tokenizer.vocab_size > bigram.MOST_WORDS:
            return []
        found = []
        for source, corpus in self.texts.items():
            log_probs = bigram.log_probabilities(corpus.training, tokenizer.vocab_size)
            bits = bigram.score(log_probs, Spec(corpus.heldout, length, self.settings.tokens), tokenizer.byte_lengths)
            found.append({"source": source, "length": length, "bits_per_byte": bits})
        return found


def _sizes(c: config.Config, mesh: Mesh, lengths: Sequence[int]) -> dict[str, int]:
    """The engine's chunk, and rows whose caches have no more tokens than a training step, where the mesh lets them."""
    context, shards = mesh.shape["context"], math.prod(mesh.shape[axis] for axis in BATCH)
    tokens = c.stages[-1].batch * c.stages[-1].seq_len
    rows = min(-(-ROWS_AT_ONCE // shards), tokens // (shards * max(lengths, default=1)))
    return {"chunk": max(TOKENS_AT_ONCE // context, 1) * context, "rows": max(rows, 1) * shards}


def _tell(metrics: Metrics, unit: suite.Unit, records: Sequence[Mapping]) -> None:
    value, (group, words) = score(unit.eval, records), SCORES[unit.eval]
    if value is not None:
        metrics.score(f"{group}/{unit.part}/{unit.length}", value)
    shown_score = "no score" if value is None else words.format(value)
    metrics.say(f"evals        {unit.eval} of {unit.part} at {unit.length:,}: {shown_score}")
    shown = _by_kind(records) if unit.eval == "attention_mass" else records
    metrics.report(unit.eval, [{name: x for name, x in record.items() if name not in ("eval", "by_row")} for record in shown])


def _show(metrics: Metrics, folder: Path) -> None:
    """The pictures of a report to TensorBoard."""
    from matplotlib.image import imread  # takes a second

    for path in sorted(folder.glob("*.png")):
        metrics.picture(path.stem, imread(path)[..., :3])


def score(evaluation: str, records: Sequence[Mapping]) -> float | None:
    """The one number of a unit: loss in nats, share of right answers, RULER's score, or how far the needle stands out."""
    if evaluation == "needle":
        return contents.needles_found(records)
    if evaluation == "attention_mass":
        return contents.mean_of([r for r in records if r["reach"]], "needle_lift")
    field = {"position": "loss", "key_tokens": "loss", "recall": "accuracy", "ruler": "score"}[evaluation]
    return next((r[field] for r in records if contents.is_total(r)), None)


def _by_kind(heads: Sequence[Mapping]) -> Iterator[dict]:
    """Means over the heads of each kind of layer."""
    for kind in sorted({head["kind"] for head in heads}):
        several = [head for head in heads if head["kind"] == kind]
        names = {name: several[0][name] for name in ("source", "length", "kind")}
        yield names | {name: contents.mean_of(several, name) for name in MEANS}
