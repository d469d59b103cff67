"""The description of a run in ten lines, printed before it starts."""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from hybrid_attn.config import Config, LayerType, reach
from hybrid_attn.data.pipeline import MixedSequences
from hybrid_attn.data.synthetic import SyntheticSequences
from hybrid_attn.model import Execution, flops


def summary(
    c: Config, execution: Execution, mesh: Mesh, peak: str, sequences: Sequence[MixedSequences], workdir: str, start: int
) -> list[str]:
    """Parameters, layout, mesh, kernel, data, the sources of each stage, tokens and FLOPs per step, peak and workdir.

    `sequences` are those of each stage; tokens and FLOPs are those of the stage that comes next.
    """
    stage = c.at(c.stage_at(min(start, c.total_steps - 1))[0])
    total, tokens = flops.parameters(stage.model), stage.batch * stage.seq_len
    embedding = c.model.vocab_size * c.model.d_model * (1 if c.model.tie_embeddings else 2)
    per_token = flops.train_flops_per_token(stage.model, stage.seq_len)
    layer_types = "; ".join(f"{letter} = {describe(c.model.kinds[letter])}" for letter in sorted(set(c.model.layers)))
    device = jax.devices()[0]
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    schemes = {letter: f"{scheme}{', zigzag' if execution.zigzag else ''}" for letter, scheme in execution.context.items()}
    remat = by_layer_type(execution.remat)
    context = f"; sequences are split by {by_layer_type(schemes)}" if mesh.shape["context"] > 1 else ""
    many_stages = len(c.stages) > 1
    of = f", in stage {stage.index + 1}" if many_stages else ""
    stages = ", ".join(f"{s.steps:,} steps of {s.batch} x {s.seq_len:,}" for s in c.each_stage)
    return [
        f"parameters   {total:,} ({total - embedding:,} outside the embeddings)",
        f"layout       {c.model.layers}: {layer_types}",
        f"mesh         {axes}: {mesh.size} {device.device_kind} device{'s' if mesh.size > 1 else ''}{context}",
        f"kernel       {execution.kernel} on {device.platform}; "
        f"activations {execution.dtype}, parameters float32, remat {remat}",
        f"data         tokenizer {c.data.tokenizer}, packing {c.data.packing}; {stages}",
        *(
            line
            for s, of_stage in zip(c.each_stage, sequences, strict=True)
            for line in sources(of_stage, s.steps * s.batch, f"stage {s.index + 1}, " if many_stages else "")
        ),
        f"step         {tokens:,} tokens, {per_token * tokens:.4g} FLOPs{of}",
        f"token        {per_token:.4g} FLOPs{of}: 3 x forward, windows and causality counted, recomputation not",
        f"peak         {peak}",
        f"workdir      {workdir}",
    ]


def sources(sequences: MixedSequences, number: int, stage: str) -> list[str]:
    """A line for each source of a `stage` of so many sequences: its size, how it is packed, and how much of it is seen."""
    lines = []
    for name, epochs in sequences.epochs(number).items():
        source = sequences.sources[name]
        if isinstance(source, SyntheticSequences):
            task, lengths = source.task.fingerprint(), f"{source.shortest:,} to {source.seq_len:,}"
            lines.append(f"source       {stage}{name}: {task}, sequences of {lengths} tokens, new in every step")
            continue
        n = source.counts()
        padding, cut = n["padding"] / (n["tokens"] + n["padding"]), n["cut_documents"] / n["documents"]
        lines.append(
            f"source       {stage}{name}: {n['documents']:,} training documents, {n['tokens']:,} tokens in {n['sequences']:,} "
            f"packed sequences; {padding:.2%} padding, {cut:.1%} of the documents cut; {epochs:.3g} epochs"
        )
    return lines


def by_layer_type(choices: Mapping[str, str]) -> str:
    """The choice of all layer types if they have the same, or the choice of each."""
    values = set(choices.values())
    return values.pop() if len(values) == 1 else ", ".join(f"{letter} {choice}" for letter, choice in choices.items())


def describe(layer: LayerType) -> str:
    """A layer type in a few words: its mask, its positions, its norms."""
    positions = "NoPE" if layer.rope_theta is None else f"RoPE {layer.rope_theta:,.0f}"
    norm = "" if layer.qk_norm == "none" else f", QK-norm {layer.qk_norm}"
    return f"{reach(layer) or 'full causal'}, {positions}{norm}"
