"""Checks that a config divides over a mesh, before anything is built; a message has the axis, the numbers and a cure."""

import math
from collections.abc import Mapping

from hybrid_attn import config, trees
from hybrid_attn.config_model import attention_heads
from hybrid_attn.parallel.mesh import AXES, BATCH, axis_sizes


def check(c: config.Config, num_devices: int) -> None:
    """ValueError where the batches, sequences or parameters of a stage of `c` do not split over its mesh of so many devices."""
    lengths = {f"evals.lengths: {x} of {c.at(-1).seq_len} tokens,": round(x * c.at(-1).seq_len) for x in c.evals.lengths}
    for stage in c.each_stage:
        try:
            sizes = dict(zip(AXES, axis_sizes(stage.mesh, num_devices), strict=True))
        except ValueError as error:
            raise ValueError(f"{f'stages[{stage.index}].override: ' * ('mesh' in stage.override)}{error}") from None
        is_evaluated = c.evals.every is not None or stage.index == len(c.stages) - 1
        check_stage(stage, sizes, lengths if is_evaluated else {})


def check_stage(stage: config.StageConfig, sizes: Mapping[str, int], lengths: Mapping[str, int]) -> None:
    """`check` of one stage over axes of `sizes` (a mesh's `shape`); `lengths` are those of evaluations, by what they are."""
    name = f"stages[{stage.index}]"
    check_splits(f"{name}: batch", stage.batch, sizes, BATCH, stage.microbatches, "microbatches")
    check_ramp(stage, sizes)
    for of, length in {f"{name}: seq_len": stage.seq_len, **lengths}.items():
        check_length(of, length, sizes, stage.train.zigzag)
    check_model(stage.model, sizes)
    check_schemes(stage.model, config.context(stage.model, stage.train), sizes)


def check_ramp(stage: config.StageConfig, sizes: Mapping[str, int]) -> None:
    """ValueError where a batch of a ramp does not split into its microbatches and those over the shards of the batch."""
    shards, microbatch = math.prod(sizes[axis] for axis in BATCH), stage.batch // stage.microbatches
    for batch in stage.batch_ramp:
        number = stage.microbatches_of(batch)
        unit = shards if number == 1 else microbatch  # all multiples of it split
        below, above = batch // unit * unit, -(-batch // unit) * unit
        trees.check(
            batch % (shards * number) == 0,
            f"stages[{stage.index}]: batch_ramp has {batch}, which does not split over {shards} {' * '.join(BATCH)} shards"
            f"{f' of {number} microbatches each' if number > 1 else ''}; use {f'{below} or {above}' if below else above}",
        )


def check_model(model: config.Model, sizes: Mapping[str, int]) -> None:
    """ValueError where the parameters of `model` do not split over axes of `sizes`."""
    for name in ("num_heads", "num_kv_heads", "d_ff", "vocab_size"):
        check_splits(f"model.{name}", getattr(model, name), sizes, ("tensor",))
    for letter in sorted(set(model.layers)):
        mlp, name = model.kinds[letter].mlp, f"model.kinds.{letter}.mlp"
        for key, width in {"d_ff": mlp.d_ff, "shared_d_ff": mlp.shared_d_ff}.items():
            if width is not None:
                check_splits(f"{name}.{key}", width, sizes, ("tensor",))
        if mlp.type == "moe":
            check_splits(f"{name}.experts", mlp.experts, sizes, ("expert",))
    check_splits("model.d_model", model.d_model, sizes, ("fsdp",))


def check_length(name: str, length: int, sizes: Mapping[str, int], zigzag: bool) -> None:
    """ValueError where a sequence of `length` tokens does not split over context shards; `zigzag` gives each two parts."""
    check_splits(name, length, sizes, ("context",), 2 if zigzag and sizes["context"] > 1 else 1, "parts")


def check_splits(
    name: str, size: int, sizes: Mapping[str, int], axes: tuple[str, ...], pieces: int = 1, unit: str = ""
) -> None:
    """ValueError where `size` does not divide by the shards along `axes` times `pieces`."""
    shards = math.prod(sizes[axis] for axis in axes)
    least = shards * pieces
    if size and size % least == 0:
        return
    below, above = size // least * least, max(-(-size // least), 1) * least
    cure = f"{below} or {above}" if below else f"{above}"
    if len(axes) == 1 and size and size % pieces == 0:
        cure += f", or mesh.{axes[0]}={math.gcd(size // pieces, shards)}"
    elif unit == "microbatches" and size and size % shards == 0:
        cure += f", or {unit}={math.gcd(size // shards, pieces)}"
    each = f" of {pieces} {unit} each" if pieces > 1 else ""
    raise ValueError(f"{name} {size} does not split over {shards} {' * '.join(axes)} shards{each}; use {cure}")


def check_schemes(model: config.Model, schemes: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """ValueError where the key/value heads of a layer type that uses Ulysses do not divide; `schemes` are by layer type."""
    tensor, context = sizes["tensor"], sizes["context"]
    letters = [letter for letter, scheme in schemes.items() if scheme == "ulysses"]
    by_letter = {letter: attention_heads(model, model.kinds[letter])[1] // tensor for letter in letters}
    if heads := next((heads for heads in by_letter.values() if heads % context), None):
        raise ValueError(
            f"train.context: {','.join(letters)}=ulysses splits the {heads} key/value heads of a tensor shard over {context} "
            f"context shards; use mesh.context={math.gcd(heads, context)}, or a multiple of {tensor * context} for "
            f"model.num_kv_heads, or {','.join(f'{letter}=auto' for letter in letters)}"
        )
