"""From a directory of checkpoints to a model that answers: its config, its parameters and the tokenizer of its vocabulary."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding

from hybrid_attn import checkpoint, config
from hybrid_attn.data.tokenizer import ByteTokenizer, JsonTokenizer, check_vocab, load_tokenizer
from hybrid_attn.files import read_object
from hybrid_attn.model import flops
from hybrid_attn.parallel import fit
from hybrid_attn.trees import check


class Saved(NamedTuple):
    """What a checkpoint says beside its arrays: its config, the hash of the tokenizer, and the steps done of each stage."""

    config: config.CheckpointConfig
    tokenizer_hash: str | None
    stage_steps: list[int]


class Loaded(NamedTuple):
    config: config.CheckpointConfig
    params: dict
    tokenizer: ByteTokenizer | JsonTokenizer


def load(directory: str | os.PathLike, step: int | None = None) -> Loaded:
    """The newest checkpoint, or that of `step`, with its parameters on the mesh in force.

    `directory` holds the numbered checkpoints, or is the workdir of a run. ValueError where there is none, where its config
    cannot be read, and where the tokenizer that the config names is not the one that the model was trained with. A key that
    is not known, or not there, is an error in what the model computes and has read, and not looked at elsewhere.
    """
    directory = find(directory)
    step = step_of(directory, step)
    where, mesh = f"the checkpoint of step {step} in {directory}", jax.sharding.get_mesh()
    c, tokenizer = described(directory, step)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)), flops.shapes(c.model)
    )
    try:
        return Loaded(c, checkpoint.read_params(directory, placed, step), tokenizer)
    except checkpoint.UnreadableError as cause:
        raise ValueError(f"{where} cannot be read: {cause}; use another --step, or copy it again") from cause


def described(directory: str | os.PathLike, step: int) -> tuple[config.CheckpointConfig, ByteTokenizer | JsonTokenizer]:
    """Config and tokenizer of the checkpoint of `step` in `directory`, without its parameters: ValueError as `load` has it."""
    c, trained_with, _ = saved_of(directory, step)
    fit.check_model(c.model, jax.sharding.get_mesh().shape)
    return c, _tokenizer(c, os.fspath(directory), f"the checkpoint of step {step} in {directory}", trained_with)


def saved_of(directory: str | os.PathLike, step: int) -> Saved:
    """What the checkpoint of `step` in `directory` says of itself; ValueError where it cannot be read."""
    where = f"the checkpoint of step {step} in {directory}"
    try:
        values, data = checkpoint.read_config(directory, step), checkpoint.read_data(directory, step)
    except checkpoint.UnreadableError as cause:
        raise ValueError(f"{where} has no config that can be read: {cause}; use another --step, or copy it again") from cause
    try:
        c = config.build_checkpoint_config(values)
    except ValueError as cause:
        raise ValueError(f"{where} has a config that this version cannot read: {cause}; use the one that wrote it") from cause
    return Saved(c, *_typed(data, where))


def _typed(data: dict, where: str) -> tuple[str | None, list[int]]:
    """The tokenizer's hash and the steps of each stage, of the data item of a checkpoint; an import has neither."""
    stage, steps = data.get("stage", {}), data.get("stage_steps", [])
    check(isinstance(stage, dict), f"{where} has stage={str(stage)[:50]}, which must be an object")
    hashed = stage.get("tokenizer")
    check(hashed is None or isinstance(hashed, str), f"{where} has stage.tokenizer={str(hashed)[:50]}, which must be a hash")
    ok = isinstance(steps, list) and all(type(x) is int and x >= 0 for x in steps)
    check(ok, f"{where} has stage_steps={str(steps)[:50]}, which must be a list of numbers of steps")
    return hashed, steps


def step_of(directory: str | os.PathLike, step: int | None) -> int:
    """`step`, or the newest of the checkpoints in `directory`; ValueError where it is not there."""
    there = checkpoint.steps(directory)
    if step is not None and step not in there:
        raise ValueError(f"{directory} has no complete checkpoint of step {step}; it has {', '.join(map(str, there))}")
    return there[-1] if step is None else step


def find(directory: str | os.PathLike) -> str:
    """The directory of the numbered checkpoints: `directory` itself, or `checkpoints` in it."""
    directory = os.fspath(directory)
    for place in (directory, os.path.join(directory, "checkpoints")):
        if checkpoint.steps(place):
            return place
    if "://" not in directory and not os.path.isdir(directory):
        raise ValueError(f"{directory} is no directory; name a run's workdir, or the folder of its checkpoints")
    if os.path.isfile(os.path.join(directory, "config.json")):
        raise ValueError(
            f"{directory} is a Hugging Face model; make a checkpoint of it: tools/import_hf.py --model={directory} --out=DIR"
        )
    raise ValueError(f"{directory} has no complete checkpoint; name a run's workdir, or the folder of its checkpoints")


def stop_tokens(directory: str | os.PathLike, tokenizer: ByteTokenizer | JsonTokenizer) -> list[int]:
    """Ids that end an answer: the end of a document, and what an imported model's own files say.

    ValueError, with the file, for an `eos_token_id` that is neither an id nor a list of them.
    """
    ids = {tokenizer.eos}
    for name in ("generation_config.json", "config.json"):
        path = Path(find(directory)) / "companions" / name
        if path.is_file():
            ids |= _ids(path, read_object(path).get("eos_token_id"))
    return sorted(ids)


def _ids(path: Path, value) -> set[int]:
    """The ids of an `eos_token_id`: null, one id, or a list."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    wrong = [x for x in ids if type(x) is not int or not 0 <= x < 2**31]
    if wrong:
        raise ValueError(f"{path} has eos_token_id={str(value)[:50]}, which must be an id, a list of ids, or null; correct it")
    return set(ids)


def _tokenizer(
    c: config.CheckpointConfig, directory: str, where: str, trained_hash: str | None
) -> ByteTokenizer | JsonTokenizer:
    """The tokenizer of the config, or the copy that an import left beside the checkpoint; ValueError if it is another."""
    copy = os.path.join(directory, "companions", "tokenizer.json")
    name = copy if os.path.isfile(copy) else c.data.tokenizer
    cure = f"put the tokenizer.json that it was trained with at {copy}"
    if name != "bytes" and not os.path.isfile(name):
        raise ValueError(f"{where} was trained with the tokenizer {name}, and there is no such file; {cure}")
    tokenizer = load_tokenizer(name)
    if trained_hash not in (None, tokenizer.hash):
        raise ValueError(
            f"{where} was trained with a tokenizer of hash {trained_hash[:12]}, and {name} has {tokenizer.hash[:12]}; {cure}"
        )
    try:
        check_vocab(tokenizer, c.model.vocab_size, name)
    except ValueError as cause:
        raise ValueError(
            f"{where} has a vocabulary of {c.model.vocab_size}, and the tokenizer {name} has {tokenizer.vocab_size} ids; {cure}"
        ) from cause
    return tokenizer
