"""The sources of a config as documents: text files or a token store, chosen by label and length, split in two; or a task."""

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from hybrid_attn import config
from hybrid_attn.data import documents, store
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.synthetic import Task


class Corpus(NamedTuple):
    """The documents of one source; exact copies of a document are on the same side. Or a task, twice."""

    training: Documents | Task
    heldout: Documents | Task


def load(data: config.Data, names: Iterable[str], tokenizer) -> dict[str, Corpus]:
    """The named sources; ValueError says which of them is not there or does not fit, and why."""
    corpora = {}
    open_once = functools.cache(lambda path: store.load(path, tokenizer))  # several sources may share a store
    for name, source in _named(data, names).items():
        try:
            corpora[name] = _load(source, data.holdout, tokenizer, open_once)
        except ValueError as error:
            raise ValueError(f"data.sources.{name}: {error}") from error
    return corpora


def locations(data: config.Data, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What `load` opens for each of the named sources: patterns of files and directories, or a store, which may be a URL.

    A config that came with a checkpoint may name any file, so ask before loading. Sources that open no file are left out.
    """
    named = _named(data, names)
    opened = {name: source.paths if source.store is None else (source.store,) for name, source in named.items()}
    return {name: paths for name, paths in opened.items() if paths}


def _named(data: config.Data, names: Iterable[str]) -> dict[str, config.Source]:
    """The sources of these names; ValueError for a name that a mixture has and data.sources, of a doctored config, has not."""
    names = list(names)
    unknown = sorted(set(names) - set(data.sources))
    if unknown:
        raise ValueError(f"a mixture of the config names {', '.join(unknown)}, which is not in its data.sources")
    return {name: data.sources[name] for name in names}


def _load(source: config.Source, holdout: float, tokenizer, open_store: Callable[[str], Documents]) -> Corpus:
    if source.task is not None:
        return Corpus(*[Task(source.task, source.pairs)] * 2)
    found = documents.load(source.paths, tokenizer) if source.store is None else open_store(source.store)
    chosen = found.select(found.lengths >= source.min_length)
    if source.label is not None:
        chosen = chosen.select(chosen.labels == _label(source.label, found.label_names))
    if not len(chosen):
        labelled = "" if source.label is None else f" with the label {source.label!r}"
        longest = max(found.lengths, default=0)
        raise ValueError(
            f"none of the {len(found):,} documents{labelled} has min_length={source.min_length:,} tokens; "
            f"the longest of all has {longest:,}"
        )
    corpus = Corpus(chosen.split(holdout, False), chosen.split(holdout, True))
    for split, part, cure in (("training", corpus.training, "lower"), ("held-out", corpus.heldout, "raise")):
        if not len(part):
            raise ValueError(
                f"data.holdout={holdout} leaves none of the {len(chosen):,} documents to the {split} split; "
                f"{cure} data.holdout, or cut the text into more documents"
            )
    return corpus


def _label(label: str, names: tuple[str, ...]) -> int:
    """The place of `label` in `names`."""
    if label not in names:
        near = difflib.get_close_matches(label, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, names))}"
        raise ValueError(f"no document has the label {label!r}; {hint}")
    return names.index(label)
