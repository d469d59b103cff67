"""Loads the sources of a config (text files, token stores or synthetic tasks) and splits off held-out documents."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from hybrid_attn import config, trees
from hybrid_attn.data import documents, store
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.synthetic import Task


class Corpus(NamedTuple):
    """The training and the held-out split of one source; copies of a document are in the same split. A task without a text has
    no split.

    Evaluations measure every token of `heldout`, without loss masks. `heldout_pairs` are the same documents as pairs, with
    their loss masks, if the source holds pairs.
    """

    training: Documents | Task
    heldout: Documents | Task
    heldout_pairs: Documents | None = None


def load(data: config.Data, names: Iterable[str], tokenizer) -> dict[str, Corpus]:
    """The sources of these names; ValueError names the source that is missing or does not fit, and the reason."""
    corpora = {}
    open_once = functools.cache(lambda path: store.load(path, tokenizer))  # several sources may share a store
    for name, source in _named(data, names).items():
        try:
            corpora[name] = _load(source, data.holdout, tokenizer, open_once)
        except ValueError as error:
            raise ValueError(f"data.sources.{name}: {error}") from error
    return corpora


def chat_template(c: config.Config, corpora: Mapping[str, Corpus], step: int) -> str | None:
    """The chat template that wrote conversations: that of the newest stage after `step` steps that has any.

    Where the sources of a stage have several, it is that of the largest weight.
    """
    for index in range(c.last_stage(step), -1, -1):
        weights = c.weights(index)
        for name in sorted(weights, key=weights.get, reverse=True):
            if text := getattr(corpora[name].training, "chat_template", None):  # a task has none
                return text
    return None


def locations(data: config.Data, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The patterns, directories or stores (perhaps URLs) that `load` opens for each source; sources without any are left out.

    A config that came with a checkpoint may name any file, so its user should agree to these before they are loaded.
    """
    sources = _named(data, names)
    opened = {name: source.paths if source.store is None else (source.store,) for name, source in sources.items()}
    return {name: paths for name, paths in opened.items() if paths}


def _named(data: config.Data, names: Iterable[str]) -> dict[str, config.Source]:
    """The sources of these names; ValueError for a name that data.sources lacks, as an edited config may."""
    names = list(names)
    unknown = sorted(set(names) - set(data.sources))
    trees.check(not unknown, f"a mixture of the config names {', '.join(unknown)}, which is not in its data.sources")
    return {name: data.sources[name] for name in names}


def _load(source: config.Source, holdout: float, tokenizer, open_store: Callable[[str], Documents]) -> Corpus:
    if source.task is None:
        return _split(source, holdout, tokenizer, open_store)
    if not config.TASKS[source.task].text:
        return Corpus(*[Task(source.task, source.pairs)] * 2)
    text = _split(source, holdout, tokenizer, open_store)
    return Corpus(*(Task(source.task, source.pairs, x) for x in (text.training, text.heldout)))


def _split(source: config.Source, holdout: float, tokenizer, open_store: Callable[[str], Documents]) -> Corpus:
    """The documents of a source in their two splits."""
    available = documents.load(source.paths, tokenizer) if source.store is None else open_store(source.store)
    selected = available.select(available.joint_lengths() >= source.min_length)
    labelled = ""
    if source.label is not None:
        number = trees.choice("label", source.label, {name: i for i, name in enumerate(available.label_names)})
        selected, labelled = selected.select(selected.labels == number), f" with the label {source.label!r}"
    too_short = f"none of the {len(available):,} documents{labelled} has min_length={source.min_length:,} tokens"
    trees.check(len(selected) > 0, f"{too_short}; the longest of all has {available.joint_lengths().max(initial=0):,}")
    heldout = selected.split(holdout, True)
    corpus = Corpus(selected.split(holdout, False), heldout.without_loss_mask(), heldout if heldout.paired else None)
    for name, split, cure in (("training", corpus.training, "lower"), ("held-out", corpus.heldout, "raise")):
        none_left = f"data.holdout={holdout} leaves none of the {len(selected):,} documents to the {name} split"
        trees.check(len(split) > 0, f"{none_left}; {cure} data.holdout, or cut the text into more documents")
    masked = f"the loss masks of the {len(corpus.training):,} documents of the training split leave no token to train on"
    cure = "select other documents, or prepare the text again with another --loss_field"
    trees.check(corpus.training.has_trained_tokens(), f"{masked}; {cure}")
    return corpus
