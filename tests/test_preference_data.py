"""Pairs of completions: two neighbouring documents of a store, which no step from a record to a batch separates or cuts."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from prepared import BYTES, content, run
from test_pipeline import assert_same, one_device

from configs import base
from hybrid_attn import config
from hybrid_attn.data import chat, corpora, documents, pipeline, store
from hybrid_attn.data.conversations import Chat, Reader
from hybrid_attn.data.documents import LossMask, in_memory
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.records import Fields
from hybrid_attn.parallel import mesh as meshes
from hybrid_attn.train import console

PLAIN = chat.load_template(None, "bytes")
PAIRS = Chat("preference", PLAIN, ("assistant",))
OPTIONS = {"form": "jsonl", "fields": Fields("text", "from"), "inputs": "raw"}


def says(role, content):
    return {"role": role, "content": content}


def read(record, **changes):
    return Reader(dataclasses.replace(PAIRS, **changes), None, BYTES).document(record).documents


def write_pairs(tmp_path, number=40):
    """Files of pairs of many lengths, of which every seventh is a copy."""
    rng = np.random.default_rng(0)
    (tmp_path / "raw").mkdir()
    pairs = []
    for i in range(number):
        sizes = rng.integers(1, 30, 3)
        texts = [letter * int(n) for letter, n in zip("pcr", sizes, strict=True)]
        pairs.append({"prompt": f"{i} {texts[0]}", "chosen": texts[1], "rejected": texts[2], "from": "ab"[i % 2]})
    for i in range(7, number, 7):
        pairs[i] = pairs[i - 3]
    for i in range(0, number, 9):
        (tmp_path / f"raw/{i:02}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in pairs[i : i + 9]))
    return pairs


@pytest.fixture
def prepared(tmp_path):
    pairs = write_pairs(tmp_path)
    run(tmp_path, chat=PAIRS, **OPTIONS)
    return tmp_path, pairs


def texts_of(corpus):
    return [BYTES.decode(x) for x in corpus.read([(i, 0, n) for i, n in enumerate(corpus.lengths)])]


def of_pairs(pairs):
    return [x["prompt"] + x[name] for x in pairs for name in ("chosen", "rejected")]


@pytest.mark.parametrize("prompt", ["hi", [says("user", "hi")], [says("system", "s"), says("user", "hi")]])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: says("assistant", x), lambda x: [says("assistant", x)]])
def test_a_record_is_two_documents_that_train_on_their_completions(prompt, form):
    chosen, rejected = read({"prompt": prompt, "chosen": form("yes"), "rejected": form("no")})
    for document, completion in ((chosen, b"yes"), (rejected, b"no")):
        end = int(document.mask.sum()) - 1
        assert document.tokens[document.mask == 1].tolist() == [*completion, BYTES.eos] and end == len(completion)
        assert document.mask[-end - 1 :].all() and document.tokens[0] == BYTES.bos
    shared = len(chosen.tokens) - 4
    assert chosen.tokens[:shared].tolist() == rejected.tokens[: len(rejected.tokens) - 3].tolist()


def test_halves_of_different_forms_have_the_same_prompt():
    chosen, rejected = read({"prompt": "hi", "chosen": "yes", "rejected": [says("assistant", "no")]})
    assert (chosen.text, rejected.text) == tuple(f"user:\nhi\n\nassistant:\n{x}<|eos|>".encode() for x in ("yes", "no"))


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": "p", "chosen": "same", "rejected": "same"}, "its chosen and its rejected completion are equal"),
    ({"prompt": "p", "chosen": "same", "rejected": says("assistant", "")}, "its 'rejected' is empty"),
    ({"prompt": "p", "chosen": "", "rejected": "x"}, "its 'chosen' is empty"),
    ({"prompt": [says("user", "p")], "chosen": [says("user", "p")], "rejected": "x"}, "its 'chosen' is empty"),
    ({"prompt": "p", "chosen": "c" * 20, "rejected": "r" * 20}, "the pair has 46 tokens, and --max_tokens=40 is the limit"),
    ({"prompt": "p", "chosen": "x"}, "there is no field 'rejected'"),
    ({"chosen": "x", "rejected": "y"}, "there is no field 'prompt'"),
    ({"prompt": [says("wizard", "p")], "chosen": "x", "rejected": "y"}, "the chat template fails: the role wizard is none of"),
    ({"prompt": "p", "chosen": [says("user", "x")], "rejected": "y"}, "no token is trained on: the roles are user"),
])  # fmt: skip
def test_a_wrong_pair_is_refused_by_file_and_line_or_skipped_as_one(tmp_path, record, message):
    good = [{"prompt": "a", "chosen": "b", "rejected": x, "from": "a"} for x in ("c", "d")]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.jsonl").write_text("".join(json.dumps(x | {"from": "a"}) + "\n" for x in (good[0], record, good[1])))
    form = dataclasses.replace(PAIRS, max_tokens=40)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {message}") as refused:
        run(tmp_path, chat=form, **OPTIONS)
    assert "\n" not in str(refused.value) and not (tmp_path / "out" / store.MANIFEST).exists()
    summary, said = run(tmp_path, chat=form, on_error="skip", **OPTIONS)
    assert summary["skipped"]["broken"] == 1 and "line 2: " in said[0]
    assert texts_of(store.load(str(tmp_path / "out"), BYTES)) == of_pairs(good)


def test_a_store_of_pairs_has_chosen_before_rejected_whoever_made_it(prepared):
    tmp_path, pairs = prepared
    manifest, corpus = store.read_manifest(str(tmp_path / "out")), store.load(str(tmp_path / "out"), BYTES)
    assert manifest.pairs and corpus.paired and json.loads((tmp_path / "out/manifest.json").read_text())["pairs"] is True
    assert len(manifest.shards) > 2 and all(x.documents % 2 == 0 for x in manifest.shards)
    assert texts_of(corpus) == of_pairs(pairs)
    assert (corpus.hashes[::2] == corpus.hashes[1::2]).all() and len(set(corpus.hashes.tolist())) == len(pairs) - 5
    run(tmp_path, "parallel", workers=2, chat=PAIRS, **OPTIONS)
    assert content(tmp_path / "parallel") == content(tmp_path / "out")
    assert len(list(store.verify(str(tmp_path / "out"), BYTES))) == len(manifest.shards)


def test_copies_of_pairs_are_dropped_as_pairs(tmp_path):
    pairs = write_pairs(tmp_path)
    pairs[1] = pairs[0] | {"rejected": "another"}  # its chosen half is a copy, the pair is none
    (tmp_path / "raw/00.jsonl").write_text("".join(json.dumps(x) + "\n" for x in pairs[:9]))
    summary, _ = run(tmp_path, drop_duplicates=True, chat=PAIRS, **OPTIONS)
    unique = list({json.dumps(x): x for x in pairs}.values())
    assert texts_of(store.load(str(tmp_path / "out"), BYTES)) == of_pairs(unique)
    assert summary["skipped"]["duplicates"] == 2 * (len(pairs) - len(unique)) == 10


def test_splits_labels_and_least_lengths_select_pairs(prepared):
    tmp_path, pairs = prepared
    corpus = store.load(str(tmp_path / "out"), BYTES)
    for heldout in (True, False):
        part = corpus.split(0.4, heldout)
        assert 0 < len(part) < len(corpus) and (part.hashes[::2] == part.hashes[1::2]).all()
    lengths = [len(x["prompt"] + x["chosen"]) + len(x["prompt"] + x["rejected"]) + 4 for x in pairs]
    assert corpus.joint_lengths().tolist() == np.repeat(lengths, 2).tolist()
    c = base.get_config()
    c.data.sources = {"prefs": base.source(store=str(tmp_path / "out"), label="a", min_length=70)}
    c.data.holdout = 0.5
    loaded = corpora.load(config.build(c).data, ["prefs"], BYTES)["prefs"]
    expected = sorted(of_pairs([x for x, n in zip(pairs, lengths, strict=True) if n >= 70 and x["from"] == "a"]))
    assert sorted(texts_of(loaded.training) + texts_of(loaded.heldout_pairs)) == expected
    assert loaded.training.paired and loaded.heldout_pairs.paired and loaded.heldout_pairs.loss_mask is not None
    assert (
        not loaded.heldout.paired
        and loaded.heldout.loss_mask is None
        and texts_of(loaded.heldout) == texts_of(loaded.heldout_pairs)
    )


def test_a_manifest_or_an_index_that_separates_pairs_is_damaged(prepared):
    tmp_path, _ = prepared
    values = json.loads((tmp_path / "out/manifest.json").read_text())
    shards = [x | {} for x in values["shards"]]
    shards[0]["documents"] -= 1
    plain = [{name: x for name, x in shard.items() if name != "loss_mask_sha256"} for shard in values["shards"]]
    for wrong, message in (
        ({"shards": shards}, "shard 0 has [0-9]+ documents, which are no pairs"),
        ({"shards": plain}, "it has pairs without a"),
    ):
        (tmp_path / "out/manifest.json").write_text(json.dumps(values | wrong))
        with pytest.raises(ValueError, match=f"manifest.json is damaged: {message}"):
            store.load(str(tmp_path / "out"))
    run(tmp_path, "texts", shard_bytes=10**6, **OPTIONS | {"fields": Fields("prompt", "from", "no")})
    (tmp_path / "texts/manifest.json").write_text((tmp_path / "texts/manifest.json").read_text()[:-2] + ', "pairs": true}')
    with pytest.raises(
        ValueError, match="its index has other hashes or labels for chosen than for rejected documents; copy the"
    ):
        store.load(str(tmp_path / "texts"))


def pairs_of(number, seed=0, most=20):
    """Pairs of documents of tokens that differ, and their loss masks."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, most, 2 * number)
    begins = np.cumsum(lengths) - lengths
    tokens = [np.arange(a, a + n).astype(np.uint16) for a, n in zip(begins, lengths, strict=True)]
    masks = [rng.integers(0, 2, n).astype(np.uint8) for n in lengths]
    plain = in_memory(tokens, np.repeat(np.arange(number), 2))
    mask = LossMask(lambda spans: [masks[i][a:b] for i, a, b in spans], f"{seed}")
    return dataclasses.replace(plain, paired=True, loss_mask=mask), tokens, masks


LENGTHS = np.ones(2**16)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize(("seq_len", "seed"), [(38, 0), (64, 1), (200, None)])
def test_a_sequence_has_pairs_alone_and_both_halves_of_each_as_neighbours(packing, seq_len, seed):
    corpus, tokens, masks = pairs_of(50)
    sequences = PackedSequences(corpus, seq_len, seed, LENGTHS, packing)
    begins = {int(x[0]): i for i, x in enumerate(tokens)}
    for epoch in range(2):
        seen = []
        for sequence in map(sequences.__getitem__, range(epoch * len(sequences), (epoch + 1) * len(sequences))):
            segments = sequence["segments"]
            assert segments.max() % 2 == 0 and not segments[np.count_nonzero(segments) :].any()
            for pair in range(1, segments.max() // 2 + 1):
                halves = [segments == 2 * pair - 1, segments == 2 * pair]
                i, j = (begins[int(sequence["tokens"][half][0])] for half in halves)
                assert (i % 2, j) == (0, i + 1)
                seen.append(i)
                for half, document in zip(halves, (i, j), strict=True):
                    assert sequence["tokens"][half].tolist() == tokens[document].tolist()
                    assert sequence["weights"][half].tolist() == [*masks[document][1:], 0]
        assert sorted(seen) == list(range(0, 100, 2))
    counts = sequences.counts()
    assert (counts["cuts"], counts["cut_documents"]) == (0, 0)
    assert counts["padding"] == len(sequences) * seq_len - sum(map(len, tokens))
    assert len(sequences) >= sum(map(len, tokens)) / seq_len


def test_a_slice_of_a_sequence_of_pairs_equals_that_part_of_it():
    corpus, *_ = pairs_of(30)
    sequences = PackedSequences(corpus, 64, 3, LENGTHS)
    for i, a, b in [(0, 0, 20), (1, 7, 64), (len(sequences) + 1, 30, 31)]:
        (part,) = sequences.read([(i, a, b)])
        for name, values in sequences[i].items():
            np.testing.assert_array_equal(part[name], values[a:b], err_msg=name)


def mixed(seq_len=64):
    """A config of a stage of text and one of pairs and text, and their documents."""
    c = base.get_config()
    c.data.sources = {name: base.source() for name in ("text", "prefs")}
    sizes = {"batch": 4, "microbatches": 1, "seq_len": seq_len}
    mixtures = ({"text": 1.0}, {"text": 0.25, "prefs": 0.75})
    c.stages = [{"steps": steps, "mixture": mixture} | sizes for steps, mixture in zip((2, 6), mixtures, strict=True)]
    text = in_memory([np.full(n, n, np.uint16) for n in range(2, 60)], range(58))
    return config.build(c), {"text": text, "prefs": pairs_of(40)[0]}


def batches_of(start=0, mesh=None):
    c, corpus = mixed()
    tokenizer = dataclasses.make_dataclass("Tokenizer", ["byte_lengths"])(LENGTHS)
    read = pipeline.batches(c, pipeline.stage_sequences(c, corpus, tokenizer), [mesh or one_device()] * 2, start)
    return [(step, jax.tree.map(np.asarray, x)) for step, x in read]


def test_resumed_and_sharded_batches_of_pairs_are_those_of_the_straight_run_in_exact_shares():
    straight = batches_of()
    for start in (1, 2, 5):
        assert_same(batches_of(start), straight[start:])
    assert_same(batches_of(mesh=meshes.make_mesh(config.Mesh(1, 1, 2, 1, 2, 2))), straight)
    c, corpus = mixed()
    sequences = pipeline.stage_sequences(c, corpus, dataclasses.make_dataclass("Tokenizer", ["byte_lengths"])(LENGTHS))[1]
    assert sequences.mixture.counts(24) == {"text": 6, "prefs": 18}
    of_pairs, of_text = console.sources(sequences, 24, "")
    assert " packed sequences of pairs; " in of_pairs and " packed sequences; " in of_text
    for number in range(24):
        source, index = sequences.mixture.source_of(number)
        step, row = divmod(number, 4)
        expected = sequences.sources[source][index]
        np.testing.assert_array_equal(straight[2 + step][1]["segments"][row], expected["segments"])


def test_pairs_longer_than_the_sequences_of_a_stage_are_refused_by_source_and_stage():
    c, corpus = mixed(seq_len=32)
    longest = corpus["prefs"].joint_lengths().max()
    with pytest.raises(ValueError, match=(
        rf"data\.sources\.prefs with stages\[1\]\.seq_len=32: the longest pair has {longest} tokens, and a sequence 32; "
        "raise seq_len, or prepare the pairs again with --max_tokens=32"
    )):  # fmt: skip
        pipeline.stage_sequences(c, corpus, BYTES)


def test_the_same_documents_as_pairs_are_another_training():
    corpus, *_ = pairs_of(5)
    plain = dataclasses.replace(corpus, paired=False)
    assert corpus.fingerprint() != plain.fingerprint() == dataclasses.replace(plain).fingerprint()
    assert not corpus.without_loss_mask().paired and documents.content_hash(b"a\0b") != documents.content_hash(b"ab")
