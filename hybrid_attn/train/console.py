"""What a run prints: its description, the line of a step, the tables of an evaluation, and its last lines."""

import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import jax
from jax.sharding import Mesh

from hybrid_attn.config import Config, LayerType, StageConfig, reach
from hybrid_attn.config_model import convolution
from hybrid_attn.data.pipeline import MixedSequences
from hybrid_attn.data.synthetic import SyntheticSequences
from hybrid_attn.evals.evaluation import Baselines
from hybrid_attn.evals.records import grouped
from hybrid_attn.evals.table import EVALS
from hybrid_attn.model import Execution, flops
from hybrid_attn.train import cost

GB = 10**9
UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))
HEADINGS = ("", "of", "score", "±", "bits/byte", "number")


def description(
    c: Config, execution: Execution, mesh: Mesh, peak: str, sequences: Sequence[MixedSequences], workdir: str, start: int
) -> list[str]:
    """Parameters, layout, mesh, kernel, data, the sources of each stage, tokens and FLOPs per step, peak and workdir.

    `sequences` are those of each stage; tokens and FLOPs are those of the step that comes next.
    """
    stage = c.at(c.next_stage(start))
    total, active = flops.parameters(stage.model), flops.active_parameters(stage.model)
    tokens = c.batch_at(min(start, c.total_steps - 1)) * stage.seq_len
    embedding = c.model.vocab_size * c.model.d_model * (1 if c.model.tie_embeddings else 2)
    per_token = cost.flops_per_token(stage)
    model = stage.model
    layer_types = "; ".join(f"{letter} = {describe(model.kinds[letter])}" for letter in sorted(set(model.layers)))
    device = jax.devices()[0]
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    schemes = {letter: f"{scheme}{', zigzag' if execution.zigzag else ''}" for letter, scheme in execution.context.items()}
    remat = by_layer_type(execution.remat)
    context = f"; sequences are split by {by_layer_type(schemes)}" if mesh.shape["context"] > 1 else ""
    many_stages = len(c.stages) > 1
    of = f", in stage {named_stage(stage)}" if many_stages else ""
    stages = ", ".join(f"{n:,} steps of {size} x {s.seq_len:,}" for s in c.stages for n, size in s.spans(s.steps))
    return [
        f"parameters   {total:,} ({total - embedding:,} outside the embeddings)"
        f"{'' if active == total else f', of which a token uses {active:,}'}",
        f"layout       {model.layers}: {layer_types}{of}",
        *adapter(c),
        f"mesh         {axes}: {mesh.size} {device.device_kind} device{'s' if mesh.size > 1 else ''}{context}",
        f"kernel       {execution.kernel} on {device.platform}; "
        f"activations {execution.dtype}, parameters float32, remat {remat}",
        f"data         tokenizer {c.data.tokenizer}, packing {stage.data.packing}; {stages}",
        *(
            line
            for s, of_config, of_stage in zip(c.each_stage, c.stages, sequences, strict=True)
            for line in sources(of_stage, of_config.sequences(s.steps), f"stage {named_stage(s)}, " if many_stages else "")
        ),
        f"step         {tokens:,} tokens, {per_token * tokens:.4g} FLOPs{of}",
        f"token        {per_token:.4g} FLOPs{of}: {cost.described(stage)}, windows and causality counted, recomputation not",
        f"peak         {peak}",
        f"workdir      {workdir}",
    ]


def adapter(c: Config) -> Iterator[str]:
    """A line for an adapter: what it stands beside."""
    if (type := c.model.adapter.type) is not None:
        path, untrained = c.init_from.path, "initial values, which do not train: name a model with init_from.path"
        yield f"adapter      {type} beside {', '.join(c.model.adapter.targets)}, of {path or untrained}"


def sources(sequences: MixedSequences, number: int, stage: str) -> Iterator[str]:
    """A line for each source of a `stage` of so many sequences: its size, how it is packed, and how much of it is seen."""
    for name, epochs in sequences.epochs(number).items():
        source = sequences.sources[name]
        if isinstance(source, SyntheticSequences):
            task, lengths = source.task.fingerprint(), f"{source.shortest:,} to {source.seq_len:,}"
            yield f"source       {stage}{name}: {task}, sequences of {lengths} tokens, new in every step"
            continue
        n = source.counts()
        padding, cut = n["padding"] / (n["tokens"] + n["padding"]), n["cut_documents"] / n["documents"]
        packed = "packed sequences of pairs" if source.paired else "packed sequences"
        yield (
            f"source       {stage}{name}: {n['documents']:,} training documents, {n['tokens']:,} tokens in {n['sequences']:,} "
            f"{packed}; {padding:.2%} padding, {cut:.1%} of the documents cut; {epochs:.3g} epochs"
        )


def by_layer_type(choices: Mapping[str, str]) -> str:
    """The choice of all layer types if they have the same, or the choice of each."""
    values = set(choices.values())
    return values.pop() if len(values) == 1 else ", ".join(f"{letter} {choice}" for letter, choice in choices.items())


def describe(layer: LayerType) -> str:
    """A layer type in a few words: its mask, its positions, its norms."""
    positions = "NoPE" if layer.rope_theta is None else f"RoPE {layer.rope_theta:,.0f}"
    norm = "" if layer.qk_norm == "none" else f", QK-norm {layer.qk_norm}"
    experts = f", {layer.mlp.top_k} of {layer.mlp.experts} experts" if layer.mlp.type == "moe" else ""
    return f"{reach(layer) or 'full causal'}, {positions}{convolution(layer)}{norm}{experts}"


def step_line(values: Mapping[str, float]) -> str:
    """Loss, learning rate, speed and remaining time of a step; means since the last line where the values have them."""
    loss, bits = (values.get(f"{name}_mean", values[name]) for name in ("loss", "bits_per_byte"))
    parts = [*stage_of(values), f"loss {loss:.3f}", f"bpb {bits:.3f}", f"lr {values['lr']:.3g}"]
    parts += [f"grad {values['grad_norm']:.2f}"]
    if "pair_accuracy" in values:
        parts.append(f"pairs {values['log_ratio']:+.2f}, {values['pair_accuracy']:.0%} right")
    if math.isfinite(values["tokens_per_s"]):
        parts += [f"{values['tokens_per_s']:,.0f} tok/s", f"{100 * values['mfu']:.0f}% MFU"]
        parts.append(f"data {100 * values['data_wait'] / values['step_time']:.1f}%")
    else:
        parts.append(f"{values['step_time']:.1f} s with compilation")
    if "tokens_seen" in values:
        parts.append(f"{short_count(values['tokens_seen'])} tokens")
    if "peak_memory_bytes" in values:
        parts.append(f"peak {values['peak_memory_bytes'] / GB:.1f} GB")
    if 0 < values.get("seconds_left", math.nan) < math.inf:
        parts.append(f"{duration(values['seconds_left'])} left")
    return "  ".join(parts)


def stage_of(values: Mapping[str, float | str]) -> list[str]:
    """The stage of a step, and its sequence length where `values` have it; nothing for an only stage without a name."""
    number, stages = values.get("stage", 1), values.get("stages", 1)
    name = values.get("stage_name", str(number))
    named = "" if name == str(number) else f" {name}"
    of = f" of {values['seq_len']:,}" if "seq_len" in values else ""
    return [f"stage {number}/{stages}{named}{of}"] if named or stages > 1 else []


def named_stage(stage: StageConfig) -> str:
    """The number of a stage from 1, and its name if it has one."""
    number = str(stage.index + 1)
    return number if stage.name == number else f"{number} {stage.name}"


def short_count(number: int) -> str:
    """2,457,600 as 2.46M."""
    for unit, name in UNITS:
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def duration(seconds: float) -> str:
    """Seconds as 3d 04h, 2h 05m, 5m 12s or 8s."""
    total = round(seconds)
    for large, small, names in ((86_400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if total >= large:
            return f"{total // large}{names[0]} {total % large // small:02d}{names[1]}"
    return f"{total}s"


def evaluation_tables(records: Sequence[Mapping], baselines: Baselines, trained: int) -> list[str]:
    """A table for each length of the records: the lines of every evaluation, totals before their parts."""
    lines = []
    for length, of_length in sorted(grouped(records, itemgetter("length")).items()):
        by_name = grouped(of_length, itemgetter("eval"))
        table = [line for name, x in EVALS.items() if name in by_name for line in x.table_lines(by_name[name], baselines)]
        note = " (the length of training)" if length == trained else ""
        lines += ["", f"at {length:,} tokens{note}", *aligned([HEADINGS, *table])]
    return lines


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; columns without a cell below the heading are left out, and the first two are aligned to the left."""
    columns = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in columns}
    return ["  ".join(f"{row[i]:{'<' if i < 2 else '>'}{widths[i]}}" for i in columns).rstrip() for row in rows]


def experts(values: Mapping[str, float]) -> list[str]:
    """A line with the metrics of experts among the values of a step, if a layer has some."""
    formats = {
        "expert_load": "largest load {:.2f} x mean",
        "router_entropy_bits": "entropy of routers {:.2f} bits",
        "router_z": "router z {:.3g}",
        "dropped_copies": "{:.0f} copies dropped",
        "gate_entropy_bits": "entropy of attention gates {:.2f} bits",
    }
    parts = [text.format(values[name]) for name, text in formats.items() if name in values]
    return ["", f"experts      {', '.join(parts)}: means over layers, of the last line"] if parts else []


def ending(workdir: str, step: int, report: Path | None, own_files: bool, chats: bool) -> list[str]:
    """Lines with the files of a finished run and with further commands.

    `own_files`: it was trained on files or URLs; `chats`: on conversations that a chat template wrote. The
    commands are the console scripts of an installed package where one of these trains, else those of the repository.
    """
    installed = Path(sys.argv[0]).name.startswith("hybrid-")
    first, prompt = ("chat", "") if chats else ("generate", " --prompt='def main('")
    answer, evaluate = (f"hybrid-{x}" if installed else f"python tools/{x}.py" for x in (first, "evaluate"))
    path = shlex.quote(str(workdir))
    trust = " --trust_checkpoint_data" if own_files else ""
    name = shlex.quote(f"evals/{Path(workdir).name}")
    return [
        "",
        *([f"report       {report}"] if report is not None else []),
        f"metrics      {workdir}/metrics.jsonl, evals.jsonl; tensorboard --logdir={path}",
        f"checkpoint   {workdir}/checkpoints/{step}",
        f"next         {answer} --checkpoint={path}{prompt}",
        f"             {evaluate} --checkpoint={path} --suite=quick --out={name}{trust}",
        *([] if installed else [f"             python tools/plot_runs.py --workdir={path} --out=loss.png"]),
    ]
