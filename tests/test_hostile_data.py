"""However the files of a store, a tokenizer or a dataset are changed, reading gives the old content or an error of one line."""

import copy
import hashlib
import json
import random
import shutil

import pytest
from test_sources import lines, write_arrow, write_gz, write_parquet, write_zst
from test_store import write
from test_tokenizer import TEXT, byte_level, sentence_piece

from hybrid_attn.data import documents, sources, store
from hybrid_attn.data.chat import load_template
from hybrid_attn.data.conversations import Chat, Reader
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.sources import Fields
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.programs import INPUT_ERRORS, message

BYTES = load_tokenizer("bytes")
ODD = [None, [], {}, "", 0, -1, 2**31, 2**32 - 1, 2**63, 10**30, 1e300, float("nan"), True, "a" * 99, "../x", [[]], {"a": 1}]
CASES = 60


def leaves(value, path=()):
    """The path of each value within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def mutated_json(value, rng: random.Random):
    """The value with one value in it replaced, dropped or added."""
    value = {"value": copy.deepcopy(value)}
    *groups, last = rng.choice(list(leaves(value))[1:])
    within = value
    for key in groups:
        within = within[key]
    if rng.random() < 0.2 and groups:
        del within[last]
    else:
        within[last] = rng.choice(ODD)
    return value["value"]


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content with bytes altered, cut out, added or cut off."""
    content = bytearray(content)
    at = rng.randrange(len(content))
    kind = rng.choice(["alter", "number", "cut out", "add", "cut off"])
    if kind == "alter":
        content[at] ^= rng.randrange(1, 256)
    elif kind == "number":
        content[at : at + 8] = rng.choice([0, 2**32 - 1, 2**63 - 1, 2**64 - 1]).to_bytes(8, "little")
    elif kind == "cut out":
        del content[at : at + rng.choice([1, 8, 100])]
    elif kind == "add":
        content += rng.randbytes(9)
    else:
        del content[at:]
    return bytes(content)


def mutate(path, rng: random.Random) -> None:
    if path.suffix == ".json" and rng.random() < 0.8:
        path.write_text(json.dumps(mutated_json(json.loads(path.read_text()), rng)))
    else:
        path.write_bytes(mutated_bytes(path.read_bytes(), rng))


def refusals(good, tmp_path, use, damage) -> int:
    """How many of the damaged copies of a directory are refused; any other error than a line for the user is raised."""
    refused, bad = 0, tmp_path / "bad"
    for seed in range(CASES):
        shutil.copytree(good, bad)
        damage(bad, random.Random(seed))
        try:
            use(bad)
        except INPUT_ERRORS as error:
            refused += 1
            assert message(error).strip() and "\n" not in message(error), error
        shutil.rmtree(bad)
    return refused


def test_a_store(tmp_path):
    write(tmp_path / "good")

    def damage(folder, rng):
        name = rng.choice(["manifest.json", "shard-00000.tokens", "shard-00002.index"])
        mutate(folder / name, rng)
        if name != "manifest.json":  # with the checksum of what it is now
            manifest = json.loads((folder / "manifest.json").read_text())
            key = name.partition(".")[2] + "_sha256"
            manifest["shards"][int(name[6:11])][key] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            (folder / "manifest.json").write_text(json.dumps(manifest))

    def use(folder):
        list(store.verify(str(folder)))
        rows = PackedSequences(store.load(str(folder), BYTES), 16, 0, BYTES.byte_lengths, "best_fit")
        assert all(row["tokens"].max() < BYTES.vocab_size and row["tokens"].min() >= 0 for row in rows)

    assert refusals(tmp_path / "good", tmp_path, use, damage) > CASES / 2


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_a_tokenizer(tmp_path, make):
    (tmp_path / "good").mkdir()
    make().save(str(tmp_path / "good/tokenizer.json"))

    def use(folder):
        tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
        ids = tokenizer.encode(TEXT.encode())
        assert ids.tolist() == tokenizer.encode(TEXT.encode()).tolist() and len(tokenizer.byte_lengths[ids]) == len(ids)
        tokenizer.decode(ids)

    def damage(folder, rng):
        mutate(folder / "tokenizer.json", rng)

    assert refusals(tmp_path / "good", tmp_path, use, damage) > CASES / 3


def test_files_of_text(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("zstandard")
    good = tmp_path / "good"
    good.mkdir()
    (good / "dataset_info.json").write_text("{}")
    (good / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": None}))
    writers = {"a.arrow": write_arrow, "b.parquet": write_parquet, "c.jsonl.gz": write_gz, "d.jsonl.zst": write_zst}
    for name, writer in writers.items():
        writer(good / name)
    (good / "e.jsonl").write_bytes(lines())

    def use(folder):
        for path in [*sources.find([str(folder)]), *map(str, folder.glob("*"))]:
            assert str(folder) in path
            for fields in (Fields("text", "meta.from"), Fields("meta.from", None)):
                results = list(sources.read(path, None, fields, max_bytes=1000))
                assert not [x for x in results if isinstance(x, sources.Broken) and "\n" in x.reason]
        documents.load((str(folder / "[!s]*"),), BYTES)

    def damage(folder, rng):
        mutate(folder / rng.choice(["state.json", *writers, "e.jsonl"]), rng)

    assert refusals(good, tmp_path, use, damage) > CASES / 3


def test_records_of_conversations_and_pairs():
    says = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "é"), ("assistant", "yes\n"))]
    text, prompt = {"prompt": "p", "completion": "c", "chosen": "c", "rejected": "r"}, {"prompt": says[:2]}
    records = {
        "chat": [{"messages": says, "tools": [{"name": "f"}]}, prompt | {"completion": says[2]}, text],
        "preference": [prompt | {"chosen": says[2], "rejected": [says[2] | {"content": "no"}]}, text],
    }
    read = refused = 0
    for form, good in records.items():
        reader = Reader(Chat(form, load_template(None, "bytes"), ("assistant",), 99), "label", BYTES)
        for seed in range(10 * CASES):
            rng = random.Random(seed)
            record = mutated_json(rng.choice(good) | {"label": "a"}, rng)
            try:
                documents_of = reader.document(record).documents
            except ValueError as error:
                refused += 1
                assert str(error).strip() and "\n" not in str(error), error
                continue
            read += 1
            for x in documents_of:
                assert len(x.tokens) == len(x.mask) and x.mask.any() and x.tokens[[0, -1]].tolist() == [BYTES.bos, BYTES.eos]
    assert min(read, refused) > CASES
