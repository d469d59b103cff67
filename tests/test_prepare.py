"""A store has every document once, in order, for any number of workers and any size of shard."""

import gzip
import hashlib
import json
from pathlib import Path

import conftest
import numpy as np
import pytest
from absl.testing import flagsaver
from prepared import BYTES, content, run, texts, write
from test_tokenizer import byte_level

from hybrid_attn.data import prepare, store
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.programs import parse


def test_a_store_holds_every_document_in_order(tmp_path):
    made = [x for x in write(tmp_path / "raw") if x["text"]]
    run(tmp_path)
    corpus = store.load(str(tmp_path / "out"), BYTES)
    assert texts(tmp_path / "out") == [x["text"] for x in made]
    assert corpus.lengths.tolist() == [len(x["text"].encode()) + 2 for x in made]
    assert [corpus.label_names[i] for i in corpus.labels] == [x["source"] for x in made]
    assert corpus.hashes.tolist() == [int(hashlib.sha256(x["text"].encode()).hexdigest()[:16], 16) for x in made]
    for i, n in enumerate(corpus.lengths):
        first, last = corpus.read([(i, 0, 1), (i, n - 1, n)])
        assert (first.tolist(), last.tolist()) == ([BYTES.bos], [BYTES.eos])
    shards = store.read_manifest(str(tmp_path / "out")).shards
    assert len(shards) > 2 and list(store.verify(str(tmp_path / "out"))) == list(range(len(shards)))


def test_the_summary_counts_the_documents_and_tokens_of_the_store(tmp_path):
    made = write(tmp_path / "raw")
    (tmp_path / "raw/7.jsonl").write_text('{"text": "unlabelled", "source": null}\n')
    summary, _ = run(tmp_path, inputs="raw", drop_duplicates=True)
    assert store.read_manifest(str(tmp_path / "out")).summary == summary
    corpus = store.load(str(tmp_path / "out"))
    assert summary["documents"] == len(corpus) and summary["tokens"] == corpus.lengths.sum()
    assert summary["bytes"] == corpus.lengths.sum() - 2 * len(corpus)
    empty = sum(not x["text"] for x in made)
    assert summary["skipped"] == {"broken": 0, "empty": empty, "binary": 0, "duplicates": 91 - empty - len(corpus)}
    assert empty > 0 and summary["skipped"]["duplicates"] > 9
    assert {int(k): n for k, n in summary["lengths"].items()} == {
        2**k: n for k in range(12) if (n := int(np.sum((corpus.lengths >= 2**k) & (corpus.lengths < 2 ** (k + 1)))))
    }
    assert set(summary["labels"]) == {"a", "b", "c", "none"}
    for i, name in enumerate(corpus.label_names):
        lengths = corpus.lengths[corpus.labels == i]
        expected = {"documents": len(lengths), "tokens": lengths.sum(), "bytes": lengths.sum() - 2 * len(lengths)}
        assert summary["labels"][name] == expected
    lines = list(prepare.summary_lines(summary))
    assert any(line.startswith("label        none: 1 documents, 12 tokens") for line in lines)


@pytest.mark.parametrize("drop", [False, True])
def test_the_store_is_the_same_for_any_number_of_workers(tmp_path, drop):
    write(tmp_path / "raw")
    (tmp_path / "raw/2.jsonl").write_text("broken\n" + '{"text": "東京 東京 ", "source": "z"}\n')
    changes = {"drop_duplicates": drop, "on_error": "skip"}
    one = run(tmp_path, "one", **changes)
    three = run(tmp_path, "three", workers=3, **changes)
    assert one == three and content(tmp_path / "one") == content(tmp_path / "three")


def test_shards_of_any_size_hold_the_same_documents(tmp_path):
    made = [x["text"] for x in write(tmp_path / "raw") if x["text"]]
    numbers = []
    for shard_bytes in (300, 1500, 4000, 10**6, None):
        run(tmp_path, str(shard_bytes), shard_bytes=shard_bytes)
        assert texts(tmp_path / str(shard_bytes)) == made
        numbers.append(len(store.read_manifest(str(tmp_path / str(shard_bytes))).shards))
    assert numbers == sorted(numbers, reverse=True) and numbers[0] > 29 and 2 < numbers[2] < 6 and numbers[3:] == [1, 1]


def test_the_first_of_equal_documents_is_kept_across_shards(tmp_path):
    made = [x for x in write(tmp_path / "raw") if x["text"]]
    run(tmp_path, drop_duplicates=True)
    assert texts(tmp_path / "out") == list(dict.fromkeys(x["text"] for x in made))
    list(store.verify(str(tmp_path / "out")))


def test_a_shard_of_nothing_but_copies_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "COPIED", 3)
    (tmp_path / "raw").mkdir()
    for i, lines in enumerate((["ab", "cdefghi", "ab", "j"], ["j", "ab"], ["k"])):
        text = "".join(json.dumps({"text": x, "source": "s"}) + "\n" for x in lines)
        (tmp_path / f"raw/{i}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    summary, _ = run(tmp_path, inputs="raw", drop_duplicates=True, shard_bytes=1)
    assert texts(tmp_path / "out") == ["ab", "cdefghi", "j", "k"] and summary["skipped"]["duplicates"] == 3
    assert [x.documents for x in store.read_manifest(str(tmp_path / "out")).shards] == [3, 0, 1]
    list(store.verify(str(tmp_path / "out")))


def test_a_store_without_a_name_is_refused_and_not_written_to_the_current_directory(tmp_path, monkeypatch, capsys):
    write(tmp_path / "raw", files=1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with conftest.tool("prepare_data") as module, flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        module.main(parse(["prepare_data.py", f"--input={tmp_path}/raw", "--out=", "--workers=1"]))
    assert (ended.value.code, capsys.readouterr().err) == (2, "error: --out= is empty; name the directory of the store\n")
    assert not any(Path().iterdir())


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    write(tmp_path / "raw")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine is not empty and has no unfinished store; name another --out"):
        run(tmp_path, "mine")
    assert content(tmp_path / "mine") == {"notes.txt": b"mine"}


def test_an_input_that_cannot_be_opened_is_a_wrong_input(tmp_path, monkeypatch):
    write(tmp_path / "raw")
    with monkeypatch.context() as patch:
        patch.setattr(prepare.sources, "read", lambda *_: open(tmp_path / "gone"))
        with pytest.raises(FileNotFoundError, match="No such file or directory: .*gone'; 0 of [0-9]+ shards are done and kept"):
            run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        run(tmp_path, "file")


def test_a_label_that_only_copies_had_is_summed_up(tmp_path):
    (tmp_path / "raw").mkdir()
    lines = [{"text": "same", "source": "a"}, {"text": "same", "source": "b"}]
    (tmp_path / "raw/0.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    summary, _ = run(tmp_path, drop_duplicates=True)
    assert "label        b: 0 documents, 0 tokens (0.0%), 0.000 bytes each" in prepare.summary_lines(summary)


def test_a_tokenizer_json_is_used_and_its_change_is_refused(tmp_path):
    made = [x["text"] for x in write(tmp_path / "raw") if x["text"]]
    tokenizer = byte_level()
    path = str(tmp_path / "tokenizer.json")
    tokenizer.save(path)
    summary, _ = run(tmp_path, workers=2, tokenizer=path)
    loaded = load_tokenizer(path)
    assert texts(tmp_path / "out", loaded) == made and summary["bytes"] > summary["tokens"]
    corpus = store.load(str(tmp_path / "out"), loaded)
    assert corpus.lengths.tolist() == [len(loaded.encode(x.encode())) + 2 for x in made]
    with pytest.raises(ValueError, match="was made by the tokenizer .*tokenizer.json' of hash"):
        store.load(str(tmp_path / "out"), BYTES)
    tokenizer.add_tokens(["new"])
    tokenizer.save(path)
    with pytest.raises(ValueError, match="tokenizer.json' has changed since .*/out was begun"):
        run(tmp_path, tokenizer=path)


def test_input_without_any_text_is_refused(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/0.jsonl").write_text('{"text": "", "source": "a"}\n')
    message = "the 1 input files have no text; skipped: .*'empty': 1}; name another --text_field, .*another --out"
    with pytest.raises(ValueError, match=message):
        run(tmp_path)


def test_more_labels_than_a_store_holds_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "raw")
    monkeypatch.setattr(prepare, "MAX_LABELS", 2)
    with pytest.raises(ValueError, match="the label field has 3 values, and a store has at most 2; name a coarser one"):
        run(tmp_path)
