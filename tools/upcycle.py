"""Makes a mixture of experts of dense runs: python tools/upcycle.py --method=btx --dense=runs/math,runs/code --out=mixture

Each of --dense is a workdir or directory of checkpoints, or DIR/STEP, all with the same shapes. --out becomes a directory of
checkpoints with step 0 and without an optimiser state: train it with --config.init_from.path and a config of the same layers,
such as those of configs/upcycle. It records the recipe.

    sparse   --experts copies of the feed-forward of one model
    btx      an expert of each model; all else is their mean
    bam      as btx, and the attention of each model becomes an attention expert
    nexus    the first model is the seed, whose feed-forward computes every token; each other one is an expert. The router is
             projected from domain embeddings: the mean token embedding of the seed over --domain_tokens tokens of the data
             that an expert was trained on, or the rows of --domains, a .npy file with a row for each expert. With
             --router=linear the router is a matrix, as in the others

--method=nexus --dense=MIXTURE,SEED --add_expert=DIR adds an expert: the router gives the others what it gave them. With
--domains, whose only row is that of the new expert, the seed is not needed. Nor is it where the router is a matrix, which gets
a column of new numbers: there --dense names the mixture alone, of nexus or btx.

Each layer is made by itself; one tensor of every model is in memory at a time, and the result. Exit codes: 2 for a wrong flag
or input, and then nothing is written.
"""

import contextlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags
from flax.traverse_util import flatten_dict, unflatten_dict

from hybrid_attn import checkpoint, config, files, programs, trees, upcycle
from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.convert import hf
from hybrid_attn.data import corpora, pipeline
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.infer import loading
from hybrid_attn.model import abstract_params, specs
from hybrid_attn.stored import first_eight
from hybrid_attn.trees import check
from hybrid_attn.upcycle import COLUMN, DOMAINS, NEW, Origin

METHOD = flags.DEFINE_enum("method", None, list(upcycle.METHODS), "How the mixture is made.", required=True)
DENSE = flags.DEFINE_list("dense", None, "Dense models, with commas between them.", required=True)
OUT = flags.DEFINE_string("out", None, "New directory of checkpoints.", required=True)
EXPERTS = flags.DEFINE_integer("experts", 8, "sparse: copies.", 1)
TOP_K = flags.DEFINE_integer("top_k", None, "Experts that compute a token; by default those of the method's paper.", 1)
ROUTER = flags.DEFINE_enum("router", "projected", ["projected", "linear"], "nexus: from domain embeddings, or a matrix.")
ADD_EXPERT = flags.DEFINE_string("add_expert", None, "nexus, btx: a dense model that is added to the mixture --dense.")
DOMAIN_FILE = flags.DEFINE_string("domains", None, "nexus: a .npy file of domain embeddings, a row for each expert.")
DOMAIN_TOKENS = flags.DEFINE_integer("domain_tokens", 262_144, "nexus: tokens of a domain whose embeddings are averaged.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Of the new parameters.", 0)
OF_DOMAINS = DOMAIN_FILE, DOMAIN_TOKENS
OPTIONS = {"sparse": (EXPERTS,), "btx": (ADD_EXPERT,), "bam": (), "nexus": (ROUTER, ADD_EXPERT, *OF_DOMAINS)}


class Model(NamedTuple):
    """A checkpoint that becomes a part of the mixture."""

    directory: str
    step: int
    saved: loading.Saved
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        return f"{self.directory}/{self.step}"

    @property
    def values(self) -> dict:
        return checkpoint.read_config(self.directory, self.step)

    def read(self, name: str) -> Iterator[np.ndarray]:
        """The periods of a stacked parameter, or all of another one."""
        return checkpoint.read_slices(self.directory, name, self.shapes[name], self.step)


def model_at(path: str) -> Model:
    """The checkpoint at a path, which may end with its step; ValueError where there is none that can be read."""
    directory, step = loading.split_step(path)
    directory = loading.find(directory)
    step = loading.step_of(directory, step)
    try:
        return Model(directory, step, loading.saved_of(directory, step), checkpoint.read_shapes(directory, step))
    except checkpoint.UnreadableError as cause:
        raise ValueError(f"{loading.name_of(directory, step)} cannot be read: {cause}; copy it again") from cause


def check_flags() -> None:
    """ValueError for flags of another method."""
    allowed = {flag.name for flag in OPTIONS[METHOD.value]}
    for flag in (flag for options in OPTIONS.values() for flag in options):
        check(flag.name in allowed or not flag.present, f"--{flag.name} does not belong to --method={METHOD.value}")
    for flag in (TOP_K, ROUTER) if ADD_EXPERT.present else ():
        check(not flag.present, f"--{flag.name} is of a new mixture, and does not belong to --add_expert")


def domain_counts(model: Model) -> np.ndarray:
    """How often each token occurs in the first sequences that the last stage of a run was trained on, [V]."""
    c = config.build(model.values)
    tokenizer = load_tokenizer(c.data.tokenizer)
    stage, loaded = c.at(-1), corpora.load(c.data, c.sources, tokenizer)
    sequences = pipeline.stage_sequences(c, {name: x.training for name, x in loaded.items()}, tokenizer)[-1]
    number = -(-DOMAIN_TOKENS.value // stage.seq_len)
    read = sequences.read([(i, 0, stage.seq_len) for i in range(number)])
    return sum(np.bincount(x["tokens"][x["segments"] > 0], minlength=c.model.vocab_size) for x in read)


def domains_in_file() -> np.ndarray | None:
    """The rows of --domains; None without it."""
    if DOMAIN_FILE.value is None:
        return None
    try:
        return np.load(DOMAIN_FILE.value, allow_pickle=False)
    except (OSError, ValueError, EOFError) as cause:
        raise ValueError(f"--domains={DOMAIN_FILE.value} is no .npy file that can be read: {cause}") from cause


def mean_embeddings(seed: Model, experts: Sequence[Model]) -> np.ndarray:
    """The mean token embedding of the seed over the data of each expert, [experts, D]."""
    (embed_VD,) = seed.read("embed")
    return np.stack([upcycle.domain_embedding(domain_counts(model), embed_VD) for model in experts])


def check_sources(models: Sequence[Model], origins: Mapping[str, Origin], model: config.Model) -> None:
    """ValueError unless every source of every parameter is there, with the shape that it must have."""
    names, problems = flatten_dict(specs(model), sep="/"), []
    repetitions = {group: (number,) for group, _, number in model.groups if group == "periods"}
    for name, origin in origins.items():
        for i, (number, source) in enumerate(origin.sources):
            expected = repetitions.get(name.split("/")[0], ()) + origin.shape_of(i, names[name].shape)
            actual = models[number].shapes.get(source)
            if actual != expected:
                problems.append(f"{source} has {actual or 'no array'} in {models[number].name}, and {expected} is needed")
    check(not problems, f"the models do not fit together: {first_eight(list(dict.fromkeys(problems)))}")
    hashes = {x.saved.tokenizer_hash for x in models} - {None}
    check(len(hashes) < 2, f"{' and '.join(x.name for x in models)} were trained with different tokenizers")


def parameter(models: Sequence[Model], name: str, origin: Origin, spec, repetitions: int, domains_Em) -> np.ndarray:
    """A parameter of the mixture, its periods stacked if it has some."""
    layers = []
    sources = zip(*(models[number].read(source) for number, source in origin.sources), strict=True)
    for index in range(repetitions):
        tensors = next(sources, ())
        if origin.join in (NEW, COLUMN):
            shape = spec.shape if origin.join == NEW else (*spec.shape[:-1], 1)
            rng = np.random.default_rng([SEED.value, zlib.crc32(name.encode()), index])
            new = (spec.std * rng.standard_normal(shape)).astype(np.float32)
            layers.append(np.concatenate([*tensors, new], -1))
        elif origin.join == DOMAINS:
            layers.append(np.concatenate([*tensors, domains_Em]))
        else:
            layers.append(upcycle.joined(origin, tensors))
    return np.stack(layers) if name.startswith("periods/") else layers[0]


def write(
    models: Sequence[Model], values: dict, origins: Mapping[str, Origin], domains: Callable[[], np.ndarray | None]
) -> None:
    """Writes the mixture; nothing is there if it fails. `domains` makes the embeddings of new experts, [experts, m]."""
    model = config.build_model(values["model"])
    check_sources(models, origins, model)
    of_name, numbers = flatten_dict(specs(model), sep="/"), {name: number for name, _, number in model.groups}
    first = models[0]
    data = {"stage_steps": first.saved.stage_steps, "stage": {"tokenizer": first.saved.tokenizer_hash}}
    data |= {checkpoint.CHAT_TEMPLATE: template} if (template := first.saved.chat_template) is not None else {}
    data |= {"imported": f"a {METHOD.value} mixture of {len(models)} checkpoints", "upcycle": recorded(models)}
    with hf.new_directory(OUT.value) as directory:
        params, domains_Em = {}, domains()
        for name, origin in origins.items():
            repetitions = numbers.get(name.split("/")[0], 1)
            params[name] = jax.device_put(parameter(models, name, origin, of_name[name], repetitions, domains_Em))
        with contextlib.closing(Checkpoints(directory, keep=1, every=1)) as checkpoints:
            checkpoints.save(0, {"params": unflatten_dict(params, sep="/")}, data, values, wait=True)
        companions = Path(first.directory) / files.IMPORTED_FILES
        if companions.is_dir():
            shutil.copytree(companions, directory / files.IMPORTED_FILES)
    show(models, model, origins)


def recorded(models: Sequence[Model]) -> dict:
    """What the data item of the mixture says about its making."""

    def source(model: Model) -> dict:
        fingerprint = checkpoint.fingerprint(model.directory, model.step)
        return {"path": model.directory, "step": model.step, "fingerprint": fingerprint}

    settings = {"method": METHOD.value, "seed": SEED.value, "domains": DOMAIN_FILE.value}
    return settings | {"domain_tokens": DOMAIN_TOKENS.value, "models": [source(x) for x in models]}


def show(models: Sequence[Model], model: config.Model, origins: Mapping[str, Origin]) -> None:
    first, *others = (config.to_dict(x.saved.config.model) for x in models)
    for x, other in zip(models[1:], others, strict=True) if ADD_EXPERT.value is None else ():
        for line in trees.differences(first, other, "model."):
            print(f"{models[0].name} -> {x.name}: {line}")
    labels, mlp = {NEW: "", COLUMN: "a column of "}, model.kinds[model.layers[0]].mlp
    new = [labels[origin.join] + name for name, origin in origins.items() if origin.join in labels]
    print(f"{OUT.value}: {METHOD.value}, {mlp.experts} experts, top_k={mlp.top_k}; new: {first_eight(new) or 'none'}")


def make() -> None:
    """The mixture of dense models."""
    models = [model_at(path) for path in DENSE.value]
    for x in models:
        upcycle.check_dense(x.saved.config.model, x.name)
    recipe, rows = upcycle.METHODS[METHOD.value](len(models), EXPERTS.value), domains_in_file()
    is_projected = METHOD.value == "nexus" and ROUTER.value == "projected"
    check_domain_flags(is_projected, "--router=linear")
    changes = {} if TOP_K.value is None else {"top_k": TOP_K.value}
    if rows is not None:
        upcycle.check_domains(rows, len(recipe.experts), None, DOMAIN_FILE.value)
    if is_projected:
        changes |= {"domain_dim": models[0].saved.config.model.d_model if rows is None else rows.shape[1]}
    values = upcycle.mixture(models[0].values, recipe, changes)
    names = flatten_dict(abstract_params(config.build_model(values["model"])), sep="/")
    origins = {name: upcycle.origin(recipe, name) for name in names}
    is_computed = is_projected and rows is None
    write(models, values, origins, lambda: mean_embeddings(models[0], models[1:]) if is_computed else rows)


def check_domain_flags(is_projected: bool, router: str) -> None:
    """ValueError for flags of domain embeddings beside a router that is a matrix."""
    for flag in OF_DOMAINS:
        check(is_projected or not flag.present, f"--{flag.name} is of a projected router, and does not belong to {router}")


def add_expert() -> None:
    """A mixture of nexus or btx with one more expert."""
    mixture, added = (model_at(path) for path in (DENSE.value[0], ADD_EXPERT.value))
    rows = domains_in_file()
    upcycle.check_dense(added.saved.config.model, added.name)
    experts, domain_dim = upcycle.experts_of(mixture.saved.config.model, METHOD.value, mixture.name)
    check_domain_flags(domain_dim is not None, f"the matrix of {mixture.name}")
    number = 2 if domain_dim is not None and rows is None else 1
    form = "MIXTURE" if domain_dim is None else "MIXTURE,SEED, or --dense=MIXTURE and --domains"
    check(len(DENSE.value) == number, f"--add_expert needs --dense={form} for {mixture.name}, not {len(DENSE.value)} models")
    origins = {name: upcycle.origin_of_added(name, experts) for name in mixture.shapes}

    def domains() -> np.ndarray | None:
        if domain_dim is None:
            return None
        new = mean_embeddings(model_at(DENSE.value[1]), [added]) if rows is None else rows
        upcycle.check_domains(new, 1, domain_dim, DOMAIN_FILE.value or f"the embedding table of {DENSE.value[1]}")
        return new

    values = upcycle.with_sources(upcycle.extended(mixture.values), added.values, experts + 1)
    write([mixture, added], values, origins, domains)


def upcycle_models() -> None:
    check_flags()
    make() if ADD_EXPERT.value is None else add_expert()


def main(argv):
    programs.run(upcycle_models, argv, "the mixture")


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
