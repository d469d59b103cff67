"""A store returns what was written, span by span, and names a file that is damaged."""

import dataclasses
import hashlib
import json
import time
import tracemalloc

import numpy as np
import pytest

from hybrid_attn.data import store
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.tokenizer import ByteTokenizer

SHARDS = [[5, 1, 9], [], [2, 30], [7]]


def write(path, shards=SHARDS, dtype="<u2", names=("code", "prose"), tokenizer_hash=ByteTokenizer.hash):
    """Writes a store whose tokens, hashes and labels all differ, and returns the tokens of its documents."""
    path.mkdir()
    count, made, written = 0, [], []
    for i, lengths in enumerate(shards):
        documents = [np.arange(count + sum(lengths[:k]), count + sum(lengths[: k + 1])) for k in range(len(lengths))]
        count += sum(lengths)
        numbers = np.arange(len(made), len(made) + len(lengths))
        tokens = np.concatenate([np.zeros(0), *documents]).astype(dtype).tobytes()
        index = store.index_bytes(np.array(lengths), 2**63 + 7 * numbers.astype(np.uint64), numbers % len(names))
        (path / store.file_name(i, "tokens")).write_bytes(tokens)
        (path / store.file_name(i, "index")).write_bytes(index)
        checksums = [hashlib.sha256(content).hexdigest() for content in (tokens, index)]
        written.append(store.Shard(len(lengths), sum(lengths), *checksums))
        made += documents
    manifest = store.Manifest(store.FORMAT, "bytes", tokenizer_hash, dtype, names, tuple(written), {"documents": len(made)})
    (path / store.MANIFEST).write_text(manifest.to_json())
    return made


@pytest.mark.parametrize(("dtype", "width"), [("<u2", 2), ("<u4", 4)])
def test_any_span_of_any_document_is_read(tmp_path, dtype, width):
    made = write(tmp_path / "s", dtype=dtype)
    corpus = store.load(str(tmp_path / "s"))
    assert corpus.dtype == np.dtype(dtype) and corpus.dtype.itemsize == width
    assert corpus.lengths.tolist() == [5, 1, 9, 2, 30, 7] and corpus.lengths.dtype == np.int64
    assert corpus.hashes.tolist() == [2**63 + 7 * i for i in range(6)]
    assert corpus.labels.tolist() == [0, 1, 0, 1, 0, 1] and corpus.label_names == ("code", "prose")
    spans = [(i, a, b) for i, x in enumerate(made) for a in range(len(x) + 1) for b in range(a, len(x) + 1)]
    np.random.default_rng(0).shuffle(spans)
    for read, (i, a, b) in zip(corpus.read(spans), spans, strict=True):
        assert read.tolist() == made[i][a:b].tolist() and read.dtype == np.dtype(dtype)


def test_selections_and_splits_read_their_own_documents(tmp_path):
    made = write(tmp_path / "s")
    corpus = store.load(f"file://{tmp_path}/s/")
    long = corpus.select(corpus.lengths >= 5)
    assert [x.tolist() for x in long.read([(2, 0, 30), (3, 6, 7)])] == [made[4].tolist(), made[5][6:].tolist()]
    assert len(corpus.split(0.5, heldout=True)) == 0 and len(corpus.split(0.5, heldout=False)) == 6
    assert corpus.split(0.5 + 2**-50, heldout=True).lengths.tolist() == corpus.lengths.tolist()


def test_a_read_of_a_span_reads_nothing_else(tmp_path):
    made = write(tmp_path / "s")
    corpus = store.load(str(tmp_path / "s"))
    path = tmp_path / "s" / store.file_name(2, "tokens")
    path.write_bytes(path.read_bytes()[: 2 * (2 + 10)])
    assert corpus.read([(4, 3, 10)])[0].tolist() == made[4][3:10].tolist()
    with pytest.raises(ValueError, match="shard-00002.tokens is shorter than the manifest says; copy the file again"):
        corpus.read([(0, 0, 5), (4, 3, 11)])
    path.unlink()
    with pytest.raises(ValueError, match="shard-00002.tokens is missing"):
        corpus.read([(4, 3, 4)])


@pytest.mark.parametrize("name", ["shard-00002.tokens", "shard-00000.index"])
def test_files_of_another_size_are_named_when_a_store_is_opened(tmp_path, name):
    write(tmp_path / "s")
    path = tmp_path / "s" / name
    content = path.read_bytes()
    for damaged in (content[:-1], b"", content + b"1"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"s: {name} (is shorter than the manifest says|has more than its [0-9,]+ bytes)"):
            store.load(str(tmp_path / "s"))
    path.unlink()
    with pytest.raises(ValueError, match=f"s: {name} is missing; copy the file again, or prepare the store again"):
        store.load(str(tmp_path / "s"))


@pytest.mark.parametrize("name", ["shard-00002.tokens", "shard-00000.index", "manifest.json", "plan.json"])
def test_a_file_that_is_far_too_long_is_refused_and_not_read(tmp_path, name):
    write(tmp_path / "s")
    if name == store.PLAN:
        (tmp_path / "s" / store.MANIFEST).unlink()
    with open(tmp_path / "s" / name, "a") as file:
        file.truncate(10**8)
    tracemalloc.start()
    with pytest.raises(ValueError, match="has more than (its )?[0-9,]+ bytes; copy the file|is not finished"):
        store.load(str(tmp_path / "s"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**7


@pytest.mark.parametrize("name", ["shard-00002.tokens", "shard-00003.index"])
def test_changed_files_are_named_by_their_checksum_and_an_index_when_it_is_opened(tmp_path, monkeypatch, name):
    monkeypatch.setattr(store, "BLOCK", 7)
    write(tmp_path / "s")
    assert list(store.verify(str(tmp_path / "s"))) == [0, 1, 2, 3]
    path = tmp_path / "s" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    verified = []
    with pytest.raises(ValueError, match=f"the checksum of {name} differs from the manifest's"):
        verified += store.verify(str(tmp_path / "s"))
    if name.endswith(".index"):
        with pytest.raises(ValueError, match=f"the checksum of {name} differs from the manifest's"):
            store.load(str(tmp_path / "s"))
    else:
        assert len(store.load(str(tmp_path / "s"))) == 6


@pytest.mark.parametrize("name", ["a#b", "100%", "a%20b", "q?x", "p|z", "with space é"])
def test_a_folder_may_have_any_name(tmp_path, name):
    made = write(tmp_path / name)
    assert store.load(str(tmp_path / name)).read([(0, 0, 5)])[0].tolist() == made[0].tolist()


def test_another_tokenizer_than_the_stores_is_refused(tmp_path):
    write(tmp_path / "s", tokenizer_hash="0123456789abcdef")
    with pytest.raises(
        ValueError, match="by the tokenizer 'bytes' of hash 0123456789ab, and that of the run has hash bytes; set"
    ):
        store.load(str(tmp_path / "s"), ByteTokenizer())
    write(tmp_path / "t")
    assert len(store.load(str(tmp_path / "t"), ByteTokenizer())) == 6


def test_a_directory_that_is_not_a_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a token store: it has no manifest.json; make one with tools/prepare_data.py"):
        store.load(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="cannot be read as a token store: .*unsupported URL scheme"):
        store.load("nowhere://x")
    write(tmp_path / "s")
    path = tmp_path / "s" / store.MANIFEST
    values = json.loads(path.read_text())
    for changed, message in [
        (values | {"format": 99}, "it has format 99, and this code reads 1; .*prepare the store again"),
        (values | {"dtype": "<u9"}, "its ids have type '<u9', which must be <u2 or <u4"),
        (
            values | {"shards": [values["shards"][0] | {"tokens": "x"}]},
            "its counts of documents and tokens are not all whole numbers",
        ),
        ({"format": 1, "dtype": "<u2"}, "shards"),
    ]:
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"manifest.json is damaged: .*{message}"):
            store.load(str(tmp_path / "s"))
    path.write_text("{")
    with pytest.raises(ValueError, match="manifest.json is damaged: Expecting .*prepare the store again"):
        store.load(str(tmp_path / "s"))


def doctor(path, name, content):
    """Replaces a file of the first shard and its checksum."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / store.MANIFEST).read_text())
    manifest["shards"][0][name.partition(".")[2] + "_sha256"] = hashlib.sha256(content).hexdigest()
    (path / store.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(("lengths", "labels", "message"), [
    ([20, -14, 9], [0, 1, 0], "has a document of -14 tokens, and the shard has 15"),
    ([14, 0, 1], [0, 1, 0], "has a document of 0 tokens, and the shard has 15"),
    ([2**62, 2**62, 15], [0, 1, 0], "has a document of 4,611,686,018,427,387,904 tokens, and the shard has 15"),
    ([5, 1, 8], [0, 1, 0], "has 14 tokens, and the manifest 15"),
    ([5, 1, 9], [0, 1, 2], "has the label 2, and the manifest 2 labels from 0"),
])  # fmt: skip
def test_an_index_that_contradicts_the_manifest_is_refused(tmp_path, lengths, labels, message):
    write(tmp_path / "s")
    doctor(tmp_path / "s", store.file_name(0, "index"), store.index_bytes(np.array(lengths), np.arange(3), np.array(labels)))
    for use in (store.load, lambda path: list(store.verify(path))):
        with pytest.raises(ValueError, match=f"s: shard-00000.index {message}; copy the file again, or prepare"):
            use(str(tmp_path / "s"))


@pytest.mark.parametrize(("dtype", "wrong"), [("<u2", 258), ("<u2", 65_535), ("<u4", 2**31), ("<u4", 2**32 - 1)])
def test_an_id_that_the_tokenizer_lacks_is_named(tmp_path, dtype, wrong):
    write(tmp_path / "s", dtype=dtype)
    ids = np.arange(15).astype(dtype)
    ids[11] = wrong
    doctor(tmp_path / "s", store.file_name(0, "tokens"), ids.tobytes())
    corpus = store.load(str(tmp_path / "s"), ByteTokenizer())
    assert corpus.read([(2, 0, 5), (3, 0, 2)])[0].tolist() == [6, 7, 8, 9, 10]
    message = (
        f"s: shard-00000.tokens, document 2: token 5 has the id {wrong}, and the largest of the tokenizer is 257; copy the file"
    )
    with pytest.raises(ValueError, match=message):
        corpus.read([(0, 0, 5), (2, 4, 9)])
    with pytest.raises(ValueError, match=message):
        list(PackedSequences(corpus, 7, 0, ByteTokenizer().byte_lengths))
    with pytest.raises(
        ValueError, match=f"s: shard-00000.tokens: token 11 has the id {wrong}, and the largest of the tokenizer is 257"
    ):
        list(store.verify(str(tmp_path / "s"), ByteTokenizer()))
    assert list(store.verify(str(tmp_path / "s"))) == [0, 1, 2, 3]


def test_verification_finds_documents_without_bos_or_eos(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BLOCK", 6)
    lengths, tokens = [[5, 2, 9], [], [3]], [256, 1, 2, 3, 257, 256, 257, 256, *range(7), 257]
    write(tmp_path / "s", lengths)
    good = np.array(tokens, "<u2")
    doctor(tmp_path / "s", store.file_name(0, "tokens"), good.tobytes())
    with pytest.raises(ValueError, match="s: shard-00002.tokens: token 0 is 16, and by the index it is BOS .256."):
        list(store.verify(str(tmp_path / "s"), ByteTokenizer()))  # the first shard is right
    for position, boundary in ((0, "BOS"), (4, "EOS"), (5, "BOS"), (6, "EOS"), (7, "BOS"), (15, "EOS")):
        bad = good.copy()
        bad[position] = 9
        doctor(tmp_path / "s", store.file_name(0, "tokens"), bad.tobytes())
        with pytest.raises(ValueError, match=f"shard-00000.tokens: token {position} is 9, and by the index it is {boundary} "):
            list(store.verify(str(tmp_path / "s"), ByteTokenizer()))


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: [], ""), (lambda x: None, ""), (lambda x: "text", ""), (lambda x: 1, ""), (lambda x: {}, "'format'"),
    (lambda x: x | {"shards": []}, "it has no shards"),
    (lambda x: x | {"shards": None}, ""), (lambda x: x | {"shards": [[]]}, ""), (lambda x: x | {"shards": {"a": 1}}, ""),
    (lambda x: x | {"shards": [x["shards"][0] | {"documents": 10**18}]}, "shard 0 has 1,000,000,000,000,000,000 doc"),
    (lambda x: x | {"shards": [x["shards"][0] | {"tokens": 10**30}]}, "shard 0 has 3 documents of 1,000,000"),
    (lambda x: x | {"shards": [x["shards"][0] | {"documents": -1}]}, "shard 0 has -1 documents of 15 tokens"),
    (lambda x: x | {"shards": [x["shards"][0] | {"documents": True}]}, "documents and tokens are not all whole numbers"),
    (lambda x: x | {"shards": [x["shards"][0] | {"tokens_sha256": None}]}, "its names and checksums are not all strings"),
    (lambda x: x | {"tokenizer": None}, "its names and checksums are not all strings"),
    (lambda x: x | {"tokenizer_hash": 7}, "its names and checksums are not all strings"),
    (lambda x: x | {"label_names": "code"}, "its label_names are not a list"), (lambda x: x | {"label_names": [1, 2]}, "names"),
    (lambda x: x | {"label_names": None}, ""), (lambda x: x | {"summary": []}, "its summary is not an object"),
    (lambda x: x | {"dtype": ["<u2"]}, "its ids have type"), (lambda x: x | {"extra": 1}, "extra"),
])  # fmt: skip
def test_a_manifest_of_other_values_is_refused(tmp_path, change, message):
    write(tmp_path / "s")
    path = tmp_path / "s" / store.MANIFEST
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    for use in (store.load, store.read_manifest, lambda path: list(store.verify(path))):
        with pytest.raises(ValueError, match=f"manifest.json is damaged: .*{message}.*prepare the store again"):
            use(str(tmp_path / "s"))


def test_a_manifest_of_deep_json_is_refused(tmp_path):
    write(tmp_path / "s")
    (tmp_path / "s" / store.MANIFEST).write_text("[" * 10**5)
    with pytest.raises(ValueError, match="manifest.json is damaged: "):
        store.load(str(tmp_path / "s"))


def test_counts_that_no_file_has_take_no_memory(tmp_path):
    write(tmp_path / "s")
    path = tmp_path / "s" / store.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["shards"][0] |= {"documents": 2**40, "tokens": 2**47}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="shard-00000.(tokens|index) is shorter than the manifest says"):
        store.load(str(tmp_path / "s"))


def test_ten_million_documents_open_without_a_loop_over_them(tmp_path):
    n, shards = 500_000, 20
    (tmp_path / "s").mkdir()
    lengths = np.full(n, 1000)
    index = store.index_bytes(lengths, np.arange(n), np.zeros(n))
    for i in range(shards):
        (tmp_path / "s" / store.file_name(i, "index")).write_bytes(index)
        with open(tmp_path / "s" / store.file_name(i, "tokens"), "wb") as file:
            file.truncate(2 * 1000 * n)
    manifest = store.Manifest(
        1, "bytes", "bytes", "<u2", ("a",), (store.Shard(n, 1000 * n, "", hashlib.sha256(index).hexdigest()),) * shards, {}
    )
    (tmp_path / "s" / store.MANIFEST).write_text(manifest.to_json())
    took = []
    for _ in range(3):
        began = time.perf_counter()
        corpus = store.load(str(tmp_path / "s"))
        took.append(time.perf_counter() - began)
    assert min(took) < 5  # half a second on an idle core; a loop over the documents takes longer on any
    assert len(corpus) == n * shards and corpus.lengths.sum() == 10**10
    assert corpus.read([(n * shards - 1, 990, 1000)])[0].tolist() == [0] * 10


def test_a_store_is_identified_by_the_checksums_of_its_files_alone():
    shards = [store.Shard(1, 5, "a", "b"), store.Shard(1, 5, "a", "c"), store.Shard(1, 5, "a", "b", "d")]
    manifests = [store.Manifest(store.FORMAT, "bytes", "bytes", "<u2", ("a",), (shard,), {}) for shard in shards]
    assert len({x.identity for x in manifests}) == 3

    @dataclasses.dataclass(frozen=True)
    class Later(store.Shard):
        added: int = 0

    later = dataclasses.replace(manifests[0], shards=(Later(1, 5, "a", "b"),))
    assert later.identity == manifests[0].identity


def test_a_manifest_reads_back(tmp_path):
    write(tmp_path / "s")
    manifest = store.read_manifest(str(tmp_path / "s"))
    assert manifest.label_names == ("code", "prose") and manifest.summary == {"documents": 6}
    assert [dataclasses.astuple(shard)[:2] for shard in manifest.shards] == [(3, 15), (0, 0), (2, 32), (1, 7)]
