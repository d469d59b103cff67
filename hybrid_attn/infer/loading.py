"""Loads a model from a directory of checkpoints: its config, its parameters and its tokenizer."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding

from hybrid_attn import checkpoint, config
from hybrid_attn.data import chat
from hybrid_attn.data.tokenizer import ByteTokenizer, JsonTokenizer, check_vocab, load_tokenizer
from hybrid_attn.files import IMPORTED_FILES, object_of, read_object
from hybrid_attn.model import abstract_params
from hybrid_attn.parallel import fit
from hybrid_attn.trees import check

Tokenizer = ByteTokenizer | JsonTokenizer


class Saved(NamedTuple):
    """What a checkpoint holds besides its arrays: its config, the tokenizer's hash, and the completed steps of each stage.

    The config is that of the stage that the checkpoint was saved in. `chat_template` wrote the conversations of the training.
    """

    config: config.CheckpointConfig
    tokenizer_hash: str | None
    stage_steps: list[int]
    chat_template: str | None


class Loaded(NamedTuple):
    config: config.CheckpointConfig
    params: dict
    tokenizer: Tokenizer


def load(directory: str | os.PathLike, step: int | None = None) -> Loaded:
    """The newest checkpoint, or that of `step`, with its parameters on the mesh in force.

    `directory` holds the numbered checkpoints, or is the workdir of a run. ValueError if there is no checkpoint, if its config
    cannot be read, or if the model was trained with another tokenizer than the one that the config names. An unknown or missing
    key is an error in the groups `model` and `data`, and ignored in other groups.
    """
    directory = find(directory)
    step, mesh = step_of(directory, step), jax.sharding.get_mesh()
    c, tokenizer = described(directory, step)

    def on_mesh(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))

    try:
        params = checkpoint.read_params(directory, jax.tree.map(on_mesh, abstract_params(c.model)), step)
    except checkpoint.UnreadableError as cause:
        name = name_of(directory, step)
        raise ValueError(f"{name} cannot be read: {cause}; use another --step, or copy it again") from cause
    return Loaded(c, params, tokenizer)


def name_of(directory: str | os.PathLike, step: int) -> str:
    """How messages name a checkpoint."""
    return f"the checkpoint of step {step} in {directory}"


class Described(NamedTuple):
    config: config.CheckpointConfig
    tokenizer: Tokenizer


def described(directory: str | os.PathLike, step: int) -> Described:
    """Config and tokenizer of the checkpoint of `step` in `directory`, without its parameters: ValueError as `load` has it."""
    c, trained_hash, *_ = saved_of(directory, step)
    fit.check_model(c.model, jax.sharding.get_mesh().shape)
    return Described(c, _tokenizer(c, os.fspath(directory), name_of(directory, step), trained_hash))


def saved_of(directory: str | os.PathLike, step: int) -> Saved:
    """What the checkpoint of `step` in `directory` holds besides its arrays; ValueError if it cannot be read."""
    name = name_of(directory, step)
    try:
        values, data = checkpoint.read_config(directory, step), checkpoint.read_data(directory, step)
    except checkpoint.UnreadableError as cause:
        raise ValueError(f"{name} has no config that can be read: {cause}; use another --step, or copy it again") from cause
    try:
        c = config.build_checkpoint_config(values)
    except ValueError as cause:
        raise ValueError(f"{name} has a config that this version cannot read: {cause}; use the one that wrote it") from cause
    stage, steps = data.get("stage", {}), data.get("stage_steps", [])  # an imported checkpoint has neither
    check(isinstance(stage, dict), f"{name} has stage={str(stage)[:50]}, which must be an object")
    tokenizer_hash = stage.get("tokenizer")
    is_hash = tokenizer_hash is None or isinstance(tokenizer_hash, str)
    check(is_hash, f"{name} has stage.tokenizer={str(tokenizer_hash)[:50]}, which must be a hash")
    are_counts = isinstance(steps, list) and all(type(x) is int and x >= 0 for x in steps)
    check(are_counts, f"{name} has stage_steps={str(steps)[:50]}, which must be a list of numbers of steps")
    check(len(steps) <= len(c.stages), f"{name} has stage_steps={steps}, and its config has {len(c.stages)} stages")
    return Saved(c.of_stage(max(len(steps) - 1, 0)), tokenizer_hash, steps, checkpoint.chat_template(data))


def fingerprint(directory: str | os.PathLike, step: int) -> str:
    """What identifies the parameters of a checkpoint; ValueError if it cannot be read."""
    try:
        return checkpoint.fingerprint(directory, step)
    except checkpoint.UnreadableError as cause:
        raise ValueError(f"{name_of(directory, step)} cannot be read: {cause}; copy it again") from cause


def chat_template(directory: str | os.PathLike, step: int, file: str | None = None) -> str | None:
    """The chat template of `file`, or that of the checkpoint's conversations, or else the tokenizer's own, if there is one."""
    saved = saved_of(directory, step)
    if file is None and saved.chat_template is not None:
        return saved.chat_template
    return chat.load_template(file, _tokenizer_path(saved.config, os.fspath(directory)))


def step_of(directory: str | os.PathLike, step: int | None) -> int:
    """`step`, or the step of the newest checkpoint in `directory`; ValueError if `directory` has no such checkpoint."""
    steps = checkpoint.steps(directory)
    shown = ", ".join(map(str, steps))
    check(step is None or step in steps, f"{directory} has no complete checkpoint of step {step}; it has {shown}")
    return steps[-1] if step is None else step


def split_step(path: str | os.PathLike) -> tuple[str, int | None]:
    """The directory and the step of the path of one checkpoint, such as runs/a/checkpoints/300; else it and None."""
    parent, last = os.path.split(os.fspath(path).rstrip("/"))
    if last.isdecimal() and int(last) in checkpoint.steps(parent or "."):
        return parent or ".", int(last)
    return os.fspath(path), None


def find(directory: str | os.PathLike) -> str:
    """The directory of the numbered checkpoints: `directory` itself, or `checkpoints` in it."""
    directory = os.fspath(directory)
    for candidate in (directory, os.path.join(directory, "checkpoints")):
        if checkpoint.steps(candidate):
            return candidate
    cure = "name a run's workdir, or the folder of its checkpoints"
    check("://" in directory or os.path.isdir(directory), f"{directory} is no directory; {cure}")
    imports = f"make a checkpoint of it: tools/import_hf.py --model={directory} --out=DIR"
    is_model = os.path.isfile(os.path.join(directory, "config.json"))
    check(not is_model, f"{directory} is a Hugging Face model; {imports}")
    raise ValueError(f"{directory} has no complete checkpoint; {cure}")


def trained_length(c: config.CheckpointConfig, checkpoints: Path, steps: int) -> tuple[int, str]:
    """The tokens of a sequence in training, and what says so, of a checkpoint after so many `steps` of ours.

    A model without any was imported, and its own config.json, beside the `checkpoints`, knows better than ours.
    """
    path = checkpoints / IMPORTED_FILES / "config.json"
    if steps == 0 and path.is_file():
        values = object_of(path.read_bytes(), str(path), "; copy it again from the model")
        length = config.longest_text(values, path)
        if length is not None:
            return length, f"max_position_embeddings of {IMPORTED_FILES}/config.json"
    return c.stages[c.last_stage(steps)].seq_len, "seq_len of the checkpoint's stage"


def trained_length_of(directory: str | os.PathLike, step: int) -> tuple[int, str]:
    """The same of the checkpoint of `step` in `directory`."""
    saved = saved_of(directory, step)
    return trained_length(saved.config, Path(directory), sum(saved.stage_steps) if saved.stage_steps else step)


def stop_tokens(directory: str | os.PathLike, tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer: EOS, and every `eos_token_id` in the config files of an imported model.

    ValueError, with the file, for an `eos_token_id` that is neither an id nor a list of ids.
    """
    stops = {tokenizer.eos}
    for name in ("generation_config.json", "config.json"):
        path = Path(find(directory)) / IMPORTED_FILES / name
        value = read_object(path).get("eos_token_id") if path.is_file() else None
        ids = [] if value is None else value if isinstance(value, list) else [value]
        are_ids = all(type(x) is int and 0 <= x < 2**31 for x in ids)
        check(are_ids, f"{path} has eos_token_id={str(value)[:50]}, which must be an id, a list of ids, or null; correct it")
        stops |= set(ids)
    return sorted(stops)


def _own_tokenizer(directory: str) -> str:
    """Where an imported checkpoint has a copy of its tokenizer."""
    return os.path.join(directory, IMPORTED_FILES, "tokenizer.json")


def _tokenizer_path(c: config.CheckpointConfig, directory: str) -> str:
    copy = _own_tokenizer(directory)
    return copy if os.path.isfile(copy) else c.data.tokenizer


def _tokenizer(c: config.CheckpointConfig, directory: str, name: str, trained_hash: str | None) -> Tokenizer:
    """The tokenizer of the config, or an imported checkpoint's own copy; ValueError if it is not the one of the training."""
    copy, path = _own_tokenizer(directory), _tokenizer_path(c, directory)
    cure = f"put the tokenizer.json that it was trained with at {copy}"
    exists = path == "bytes" or os.path.isfile(path)
    check(exists, f"{name} was trained with the tokenizer {path}, and there is no such file; {cure}")
    tokenizer = load_tokenizer(path)
    if trained_hash not in (None, tokenizer.hash):
        hashes = f"a tokenizer of hash {trained_hash[:12]}, and {path} has {tokenizer.hash[:12]}"
        raise ValueError(f"{name} was trained with {hashes}; {cure}")
    try:
        check_vocab(tokenizer, c.model.vocab_size, path)
    except ValueError as cause:
        sizes = f"a vocabulary of {c.model.vocab_size}, and the tokenizer {path} has {tokenizer.vocab_size} ids"
        raise ValueError(f"{name} has {sizes}; {cure}") from cause
    return tokenizer
