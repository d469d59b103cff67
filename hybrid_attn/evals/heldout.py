"""Held-out documents to measure losses on: those of a checkpoint's own sources, or of files that the user names."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hybrid_attn import config
from hybrid_attn.data import corpora, documents, store
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.synthetic import Task
from hybrid_attn.trees import check

NAME = re.compile(r"[\w.-]+")


def check_trusted(checkpoint: str, c: config.CheckpointConfig) -> None:
    """ValueError where reading the sources of a checkpoint would open files or URLs, which it lists."""
    listed = "; ".join(f"{name}: {', '.join(files)}" for name, files in corpora.locations(c.data, c.sources).items())
    check(
        not listed,
        f"{checkpoint} names the data of its held-out documents, and a checkpoint of others may name anything ({listed}); "
        "add --trust_checkpoint_data to read it, or name other data with --heldout=NAME=FILES, or choose evaluations "
        "without it, as --suite=recall,needle,ruler",
    )


class HeldOut(NamedTuple):
    """The held-out documents or the task of each source; of those that hold pairs of completions, these with loss masks too."""

    documents: dict[str, Documents | Task]
    pairs: dict[str, Documents]

    def fingerprints(self) -> dict[str, str]:
        """What identifies the data of each source."""
        return {name: x.fingerprint() for name, x in (self.documents | self.pairs).items()}


def of_corpora(loaded: Mapping[str, corpora.Corpus]) -> HeldOut:
    """Those of sources that are loaded."""
    pairs = {name: corpus.heldout_pairs for name, corpus in loaded.items() if corpus.heldout_pairs is not None}
    return HeldOut({name: corpus.heldout for name, corpus in loaded.items()}, pairs)


def of_sources(c: config.CheckpointConfig, tokenizer) -> HeldOut:
    """Those of the sources that took part in training."""
    return of_corpora(corpora.load(c.data, c.sources, tokenizer))


def named(flags: Sequence[str]) -> dict[str, str]:
    """The files of each "NAME=FILES"; ValueError where one has another form."""
    files_by_name = {}
    for flag in flags:
        name, equals, files = flag.partition("=")
        ok = bool(NAME.fullmatch(name) and equals and files)
        check(ok, f"--heldout={flag} has not the form NAME=FILES, as text=data/*.txt")
        check(name not in files_by_name, f"--heldout names {name!r} twice; give each text a name of its own")
        files_by_name[name] = files
    return files_by_name


def of_files(files: Mapping[str, str], tokenizer) -> HeldOut:
    """All documents of each: of a token store (a directory or URL), or of the files of text that a pattern matches."""
    loaded, pairs = {}, {}
    for name, where in files.items():
        try:
            is_store = "://" in where or os.path.exists(os.path.join(os.path.expanduser(where), store.MANIFEST))
            available = store.load(where, tokenizer) if is_store else documents.load((where,), tokenizer)
        except ValueError as cause:
            raise ValueError(f"--heldout={name}={where}: {cause}") from cause
        loaded[name] = available.without_loss_mask()
        pairs |= {name: available} if available.paired else {}
    return HeldOut(loaded, pairs)
