"""A model card in Markdown, with fields for a hub: what a model is, how it was trained, and what an evaluation measured."""

from collections.abc import Sequence
from typing import NamedTuple

from hybrid_attn.config import CheckpointConfig, Config
from hybrid_attn.evals.report import escape, sections, verdict
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.tables import Column, Table, markdown, tokens
from hybrid_attn.model import flops
from hybrid_attn.trees import check

FIELDS = "library_name: transformers\npipeline_tag: text-generation\ntags:\n- long-context\n- hybrid-attention"
LEFT_OUT = {"overview", "absent", "provenance"}  # sections of a report that a card has in another form
LIMITS = (
    "Intervals are over documents or questions, not over seeds of training.",
    "A loss is no measure of retrieval, and the retrieval of one sentence is no measure of reading.",
    "Lengths beyond the last stage were not trained.",
    "Nothing here was measured about safety, bias or facts. The card names no license: add one.",
)


class Origin(NamedTuple):
    """What the training began with, in words, and its id on the Hugging Face Hub, if that is known."""

    name: str
    hub_id: str | None


def fields(origin: Origin | None) -> str:
    """The metadata at the head of the card, in YAML, with the keys of the Hub; `base_model` must be the id of a model there."""
    base = f"\nbase_model: {origin.hub_id}" if origin and origin.hub_id else ""
    return f"---\n{FIELDS}{base}\n---\n"


def limits(origin: Origin | None) -> list[str]:
    """What the card and its numbers do not say."""
    unknown = origin is not None and origin.hub_id is None
    return [
        *LIMITS,
        *["The head of the card names no base_model, the id on the Hub of what the training began with."] * unknown,
    ]


def check_is_of(run: Run, c: Config | CheckpointConfig, step: int, flag: str) -> None:
    """ValueError where an evaluation is of another step or of a model of another size than the checkpoint."""
    sizes = run.provenance["model"].get("parameters"), flops.parameters(c.model)
    check(run.provenance.get("step") == step, f"{flag} is of step {run.provenance.get('step')}, and the export of step {step}")
    check(sizes[0] in (None, sizes[1]), f"{flag} is of a model of {sizes[0]:,} parameters, and the export has {sizes[1]:,}")


def stages(c: Config | CheckpointConfig, step: int) -> Table:
    """The stages until `step`, of which the last may have been left early."""
    rows, before = [], 0
    for i, stage in enumerate(c.stages):
        done = min(max(step - before, 0), stage.steps)
        if done:
            mixture = ", ".join(f"{name} {weight:g}" for name, weight in c.weights(i).items())
            rows.append([stage.name or str(i + 1), done, stage.seq_len, stage.batch, stage.objective, mixture])
        before += stage.steps
    columns = [Column("stage"), *(Column(name, ",") for name in ("steps", "tokens", "sequences in a step"))]
    return Table("stages", "Stages", [*columns, Column("objective"), Column("sources")], rows)


def facts(run: Run, c: Config | CheckpointConfig, origin: Origin | None) -> list[str]:
    """What the model is, in lines of a list."""
    kinds = "; ".join(f"{letter}: {name}" for letter, name in run.layer_types.items())
    return [
        f"- {flops.parameters(c.model):,} parameters, {c.model.num_layers} layers {c.model.pattern}{kinds and f' ({kinds})'}",
        f"- {tokens(run.trained)} tokens in a sequence of the last stage",
        f"- a vocabulary of {c.model.vocab_size:,}, of the tokenizer {escape.markdown(str(c.data.tokenizer))}",
        *([f"- initial parameters: {escape.markdown(origin.name)}"] if origin else []),
        f"- evaluated with revision {run.provenance.get('revision')} of the code",
    ]


def card(name: str, run: Run, c: Config | CheckpointConfig, step: int, origin: Origin | None = None) -> str:
    """The card of the checkpoint of `step`, whose evaluation is `run`; no `origin` means random initial parameters."""
    measured = [part for part in sections.sections([run]) if part.name not in LEFT_OUT]
    lines = [fields(origin), f"# {escape.markdown(name)}", "", *facts(run, c, origin), ""]
    trained = stages(c, step)
    if trained.rows:
        lines += ["## Training", "", markdown(trained), ""]
    lines += ["## Evaluation", "", *paragraphs(verdict.sentences([run])), *paragraphs(verdict.warnings([run]))]
    for part in measured:
        lines += [f"### {part.title}", "", *paragraphs(part.paragraphs)]
        lines += [text for table in part.tables if not table.is_folded for text in (markdown(table), "")]
    return "\n".join([*lines, "## Limits", "", *(f"- {limit}" for limit in limits(origin))]) + "\n"


def paragraphs(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in (escape.markdown(text), "")]
