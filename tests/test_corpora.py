"""Sources are files or stores, selected by label and length, and an error names its source."""

import dataclasses
import json

import numpy as np
import pytest

from configs import base
from hybrid_attn import config
from hybrid_attn.data import corpora, documents, prepare
from hybrid_attn.data.conversations import Chat
from hybrid_attn.data.sources import Fields
from hybrid_attn.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def data_of(holdout=0.3, **sources):
    c = base.get_config()
    c.data.holdout = holdout
    c.data.sources = {name: base.source(**changes) for name, changes in sources.items()}
    c.stages[0].mixture = dict.fromkeys(sources, 1.0)
    return config.build(c).data


@pytest.fixture
def folder(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text("x" * i + f" {i}")
    return str(tmp_path / "*.txt")


def lengths(corpus):
    return sorted([*corpus.training.lengths.tolist(), *corpus.heldout.lengths.tolist()])


def test_only_the_named_sources_are_read_and_each_is_split_by_content(folder):
    data = data_of(text={"paths": (folder,)}, missing={"paths": ("/nowhere/*",)})
    loaded = corpora.load(data, ["text"], BYTES)
    assert list(loaded) == ["text"] and lengths(loaded["text"]) == sorted(i + len(f" {i}") + 2 for i in range(60))
    limit = 0.3 * 2**64
    assert (loaded["text"].heldout.hashes < limit).all() and (loaded["text"].training.hashes >= limit).all()
    assert len(loaded["text"].heldout) > 5


def test_a_source_of_long_documents_has_no_other(folder):
    data = data_of(text={"paths": (folder,)}, long={"paths": (folder,), "min_length": 40})
    loaded = corpora.load(data, data.sources, BYTES)
    assert lengths(loaded["long"]) == [n for n in lengths(loaded["text"]) if n >= 40]


def test_a_store_of_files_is_the_corpus_of_those_files(folder, tmp_path):
    options = prepare.Options("bytes", Fields("text", "label"), None, "text", False, "stop", 500)
    prepare.prepare([folder], str(tmp_path / "store"), options, 1)
    data = data_of(files={"paths": (folder,)}, stored={"store": str(tmp_path / "store")})
    loaded = corpora.load(data, data.sources, BYTES)

    def texts(documents):
        return sorted(ids.tolist() for ids in documents.read((i, 0, n) for i, n in enumerate(documents.lengths)))

    for files, stored in zip(loaded["files"][:2], loaded["stored"][:2], strict=True):
        assert texts(files) == texts(stored) and sorted(files.hashes.tolist()) == sorted(stored.hashes.tolist())


def test_a_store_is_loaded_for_the_runs_tokenizer_and_chosen_by_label(monkeypatch):
    tokens = [np.full(3 + i, i, np.uint16) for i in range(40)]
    stored = documents.in_memory(tokens, [i * 2**58 for i in range(40)])
    stored = dataclasses.replace(stored, labels=np.arange(40, dtype=np.uint16) % 2, label_names=("books", "code"))
    calls = []
    monkeypatch.setattr(corpora.store, "load", lambda *args: calls.append(args) or stored)
    data = data_of(books={"store": "gs://b/s", "label": "books"}, code={"store": "gs://b/s", "label": "codes"})
    assert lengths(corpora.load(data, ["books"], BYTES)["books"]) == list(range(3, 43, 2))
    assert calls == [("gs://b/s", BYTES)]
    with pytest.raises(
        ValueError, match="data.sources.code: label='codes' is not one of 'books', 'code'; did you mean 'code'?"
    ):
        corpora.load(data, ["code"], BYTES)


@pytest.mark.parametrize(
    "holdout, changes, message",
    [
        (0.3, {"min_length": 1000}, "none of the 60 documents has min_length=1,000 tokens; the longest of all has 64"),
        (1e-9, {}, "leaves none of the 60 documents to the held-out split; raise data.holdout"),
        (1 - 1e-9, {}, "leaves none of the 60 documents to the training split; lower data.holdout"),
        (0.3, {"paths": ("/nowhere/*.txt",)}, r"'/nowhere/\*.txt' matches no file"),
        (0.3, {"paths": (), "store": "/nowhere"}, "/nowhere is not a token store"),
    ],
)
def test_a_source_without_documents_is_an_error_with_its_name(folder, holdout, changes, message):
    with pytest.raises(ValueError, match=f"^data.sources.text: .*{message}"):
        corpora.load(data_of(holdout, text={"paths": (folder,), **changes}), ["text"], BYTES)


def test_locations_are_the_files_that_a_config_opens(folder):
    data = data_of(text={"paths": (folder,)}, library={}, stored={"store": "gs://b/s"}, drawn={"task": "copy"})
    assert corpora.locations(data, data.sources) == {"text": (folder,), "stored": ("gs://b/s",)}
    assert corpora.locations(data, ["library"]) == {}


def test_a_mixture_that_names_an_unknown_source_is_refused(folder):
    data = data_of(text={"paths": (folder,)})
    for read in (corpora.locations, lambda *arguments: corpora.load(*arguments, BYTES)):
        with pytest.raises(ValueError, match="names nowhere, which is not in its data.sources"):
            read(data, ["text", "nowhere"])


def test_the_chat_template_of_a_step_is_that_of_the_newest_stage_with_conversations(tmp_path):
    talks = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "x" * (i + 1)}] for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": x}) + "\n" for x in talks))
    for name in ("old", "new"):
        template = f"{name}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
        of_chat = Chat("chat", template, ("user", "assistant"))
        options = prepare.Options("bytes", Fields("text", None), "jsonl", "none", False, "stop", None, chat=of_chat)
        prepare.prepare([str(tmp_path / "chats.jsonl")], str(tmp_path / name), options, 1, lambda _: None)
    c = base.get_config()
    c.data.holdout = 0.3
    stores = {name: base.source(store=str(tmp_path / name)) for name in ("old", "new")}
    c.data.sources = {"text": base.source(task="recall", pairs=4), **stores}
    mixtures = {"text": 1.0}, {"old": 0.7, "new": 0.3}, {"new": 1.0}, {"text": 1.0}
    c.stages = [base.stage(steps=2, seq_len=64, mixture=mixture) for mixture in mixtures]
    built = config.build(c)
    loaded = corpora.load(built.data, built.sources, BYTES)
    assert [(corpora.chat_template(built, loaded, step) or "")[:3] for step in range(9)] == [""] * 3 + ["old"] * 2 + ["new"] * 4
