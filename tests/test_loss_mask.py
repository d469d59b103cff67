"""A loss mask says which tokens are targets: from the pieces of a record through a store to the weights of a step."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import BLOCKED, assert_close, mesh_of, on_mesh, tool
from prepared import BYTES, content, run
from test_pipeline import assert_same, make_config, one_device
from test_pipeline import run as run_pipeline
from test_step import BATCH, config_of, stepped
from test_tokenizer import byte_level, load, metaspace, sentence_piece

from configs import base
from hybrid_attn import config
from hybrid_attn.data import corpora, documents, parts, pipeline, store
from hybrid_attn.data.documents import LossMask
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.sources import Fields
from hybrid_attn.evals import heldout
from hybrid_attn.parallel import mesh as meshes
from hybrid_attn.programs import parse
from hybrid_attn.train.step import init_state, make_step

FIELDS = Fields("text", "source", "loss")
TEXT = "the tool é was there 東京 🙂🙂 and the  token the the"


def piece(text, loss):
    return {"text": text, "loss": loss, "role": "ignored"}


def random_pieces(rng, text=TEXT):
    """Pieces of the text, cut at random characters; some are empty."""
    cuts = np.sort(rng.integers(0, len(text) + 1, rng.integers(1, 6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [piece(part, bool(rng.integers(2))) for part in parts]


def write_records(tmp_path, records, name="raw"):
    (tmp_path / name).mkdir(exist_ok=True)
    lines = [json.dumps({"text": text, "source": "a"}) + "\n" for text in records]
    for i in range(0, len(lines), 7):
        (tmp_path / name / f"{i:03}.jsonl").write_text("".join(lines[i : i + 7]))


def masks_of(path, tokenizer=BYTES):
    """Tokens and masks of the documents of a store."""
    corpus = store.load(str(path), tokenizer)
    spans = [(i, 0, n) for i, n in enumerate(corpus.lengths)]
    return corpus.read(spans), corpus.read_loss_mask(spans)


@pytest.fixture
def prepared(tmp_path):
    rng = np.random.default_rng(0)
    records = [random_pieces(rng) for _ in range(25)] + ["all of it"]
    write_records(tmp_path, records)
    summary, _ = run(tmp_path, fields=FIELDS)
    return tmp_path, records, summary


def test_the_mask_of_bytes_is_that_of_their_pieces(prepared):
    tmp_path, records, summary = prepared
    tokens, masks = masks_of(tmp_path / "out")
    assert len(store.read_manifest(str(tmp_path / "out")).shards) > 2
    for record, ids, mask in zip(records, tokens, masks, strict=True):
        pieces = [x for x in (record if isinstance(record, list) else [piece(record, True)]) if x["text"]]
        expected = np.concatenate([[x["loss"]] * len(x["text"].encode()) for x in pieces])
        assert BYTES.decode(ids) == "".join(x["text"] for x in pieces)
        assert mask.tolist() == [pieces[0]["loss"], *expected, pieces[-1]["loss"]]
    assert summary["trained_tokens"] == sum(int(mask.sum()) for mask in masks) < summary["tokens"]
    assert list(store.verify(str(tmp_path / "out"), BYTES))


@pytest.mark.parametrize("make", [byte_level, sentence_piece, metaspace])
@pytest.mark.parametrize("trims", [False, True])
def test_a_token_belongs_to_the_piece_in_which_it_begins(tmp_path, make, trims):
    library = make()
    if trims:  # published tokenizers have this post-processor, whose offsets leave out the space before a word
        library.post_processor = pytest.importorskip("tokenizers").processors.ByteLevel(trim_offsets=True)
    tokenizer = load(library, tmp_path)
    rng = np.random.default_rng(1)
    text = TEXT if make is not metaspace else "~é 東🙂~ ~~ é"
    records = [random_pieces(rng, text) for _ in range(20)]
    write_records(tmp_path, records)
    run(tmp_path, fields=FIELDS, tokenizer=str(tmp_path / "tokenizer.json"))
    tokens, masks = masks_of(tmp_path / "out", tokenizer)
    for record, ids, mask in zip(records, tokens, masks, strict=True):
        assert ids[1:-1].tolist() == tokenizer.encode(text.encode()).tolist()
        character = np.concatenate([[x["loss"]] * len(x["text"]) for x in record])
        of_byte = np.repeat(character, [len(c.encode()) for c in text])
        begins = np.cumsum(tokenizer.byte_lengths[ids[1:-1]]) - tokenizer.byte_lengths[ids[1:-1]]
        if make is metaspace:
            begins = np.maximum(begins - 1, 0)  # the space that it puts before a text is none of it
        assert mask[1:-1].tolist() == of_byte[begins].tolist()


def test_tokens_cross_borders_both_ways(tmp_path):
    tokenizer = load(byte_level(), tmp_path)
    ((ids, starts),) = tokenizer.encode_with_starts([TEXT.encode()])
    wide = int(np.flatnonzero(np.diff(starts) > 1)[0])
    inside = int(starts[wide]) + 1  # a border inside a token
    for flags in ((True, False), (False, True)):
        mask = parts.loss_mask(starts, ((inside, flags[0]), (len(TEXT.encode()) - inside, flags[1])))
        assert mask[1:-1].tolist() == [flags[0]] * (wide + 1) + [flags[1]] * (len(ids) - wide - 1)


@pytest.mark.parametrize(("text", "message"), [
    ([piece("a", True), {"text": "b"}], "piece 2 of the field 'text': there is no field 'loss'"),
    ([piece("a", 1)], "piece 1 of the field 'text': its 'loss' is of type int, not true or false"),
    ([piece(None, True)], "piece 1 of the field 'text': its 'text' is of type NoneType, not text"),
    (["a"], "piece 1 of the field 'text': there is no field 'text': the record that should hold 'text' is not a record"),
    (piece("a", True), "the field 'text' is of type dict, not text"),
    ([piece("\ud83d", True), piece("\ude42", True)], "it has half of a surrogate pair"),
])  # fmt: skip
def test_wrong_pieces_are_refused_by_file_and_line(tmp_path, text, message):
    write_records(tmp_path, ["good", text])
    with pytest.raises(ValueError, match=f"000.jsonl, line 2: {message}"):
        run(tmp_path, fields=FIELDS)


@pytest.mark.parametrize(("name", "record"), [
    ("loss", {"text": "x", "loss": False}),
    ("loss", {"text": [piece("a", False), piece("b", True)], "loss": True}),
    ("meta.loss", {"text": "ab", "meta": {"loss": False}}),
])  # fmt: skip
def test_a_flag_outside_a_piece_is_refused(tmp_path, name, record):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text(json.dumps(record | {"source": "a"}) + "\n")
    with pytest.raises(ValueError, match=f"line 1: the record has the field '{name}', which belongs to the pieces of a text"):
        run(tmp_path, fields=dataclasses.replace(FIELDS, loss=name))


@pytest.mark.parametrize("name", ["loss", "meta.loss"])
def test_a_flag_outside_the_pieces_of_a_table_is_refused(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "raw").mkdir()
    record = {"text": "ab", "source": "a", "loss": False, "meta": {"loss": False}}
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "raw" / "a.parquet")
    with pytest.raises(ValueError, match=f"row 1: the record has the field '{name}', which belongs to the pieces of a text"):
        run(tmp_path, inputs="raw", fields=dataclasses.replace(FIELDS, loss=name))


@pytest.mark.parametrize(
    ("name", "problem"), [("", "is empty"), (" ", "is empty"), ("body", "holds text"), ("text", "holds text")]
)
def test_the_program_refuses_a_loss_field_that_cannot_be_a_flag(tmp_path, capsys, name, problem):
    flags = [f"--input={tmp_path}", f"--out={tmp_path}/out", "--text_field=body", f"--loss_field={name}", "--workers=1"]
    with tool("prepare_data") as module, flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        module.main(parse(["prepare_data.py", *flags]))
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(
        f"--loss_field={name} {problem}; name the field of a piece that says whether it is trained on\n"
    )


def test_pieces_without_a_loss_field_are_refused(tmp_path):
    write_records(tmp_path, [[piece("a", True)]], "pieces")
    with pytest.raises(ValueError, match="line 1: the field 'text' is of type list, not text"):
        run(tmp_path, "other", "pieces/*.jsonl")


def test_a_store_in_which_nothing_is_trained_on_is_refused(tmp_path):
    write_records(tmp_path, [[piece("a", False)], [piece("b", False), piece("c", False)]])
    with pytest.raises(
        ValueError, match="no piece has 'loss': true, so nothing would be trained on; name another --loss_field"
    ):
        run(tmp_path, fields=FIELDS)
    assert not (tmp_path / "out" / store.MANIFEST).exists()


def test_a_source_in_which_nothing_is_trained_on_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "SPAN", 5)
    monkeypatch.setattr(documents, "SPANS", 2)
    silent = [{"text": [piece(f"only read, number {i}", False)], "source": "silent"} for i in range(20)]
    late = {"text": [piece("a long prompt of many tokens ", False), piece("!", True)], "source": "late"}
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*silent, late]))
    run(tmp_path, fields=FIELDS)
    corpus = store.load(str(tmp_path / "out"), BYTES)
    for i, label in enumerate(corpus.label_names):
        assert corpus.select(corpus.labels == i).has_trained_tokens() == (label == "late")
    assert corpus.has_trained_tokens() and corpus.without_loss_mask().has_trained_tokens()
    c = base.get_config()
    c.data.sources = {"chats": base.source(store=str(tmp_path / "out"), label="silent")}
    c.data.holdout = 0.5
    with pytest.raises(ValueError, match=r"data.sources.chats: the loss masks of the \d+ documents of the training split"):
        corpora.load(config.build(c).data, ["chats"], BYTES)


def test_neither_workers_nor_dropped_copies_nor_a_second_start_change_a_mask(prepared):
    tmp_path, records, _ = prepared
    run(tmp_path, "parallel", workers=2, fields=FIELDS)
    assert content(tmp_path / "parallel") == content(tmp_path / "out")
    assert run(tmp_path, "parallel", fields=FIELDS)[1] == [f"{tmp_path}/parallel is complete"]
    with pytest.raises(ValueError, match="was begun with fields=.*'loss': 'loss'.*, and now it is"):
        run(tmp_path, "parallel")
    run(tmp_path, "unique", drop_duplicates=True, fields=FIELDS)
    _, unique = masks_of(tmp_path / "unique")  # all but one are copies of a text, and the first mask stays
    _, masks = masks_of(tmp_path / "out")
    assert [x.tolist() for x in unique] == [masks[0].tolist(), masks[-1].tolist()]


def test_a_store_without_masks_has_neither_their_files_nor_their_names(tmp_path):
    write_records(tmp_path, ["one", "two"])
    run(tmp_path)
    folder = tmp_path / "out"
    assert not list(folder.glob("*loss_mask*"))
    assert not any("loss" in (folder / name).read_text() or "trained" in (folder / name).read_text() for name in
                   ("manifest.json", "plan.json"))  # fmt: skip
    assert store.load(str(folder)).loss_mask is None


def damage(folder, change, checksum):
    """Changes the mask of the first shard, and its checksum too where `checksum` says so."""
    path = folder / store.file_name(0, "loss_mask")
    mask = change(bytearray(path.read_bytes()))
    path.write_bytes(mask)
    if checksum:
        manifest = json.loads((folder / store.MANIFEST).read_text())
        manifest["shards"][0]["loss_mask_sha256"] = hashlib.sha256(mask).hexdigest()
        (folder / store.MANIFEST).write_text(json.dumps(manifest))


def test_a_damaged_mask_is_refused(prepared):
    folder = prepared[0] / "out"
    original = (folder / store.file_name(0, "loss_mask")).read_bytes()
    for change, message in ((lambda x: x[:-1], "shorter than the manifest says"), (lambda x: x + b"\0", "has more than its")):
        damage(folder, change, checksum=True)
        with pytest.raises(ValueError, match=f"shard-00000.loss_mask (is )?{message}"):
            store.load(str(folder))
        (folder / store.file_name(0, "loss_mask")).write_bytes(original)
    damage(folder, lambda x: x[:3] + bytes([1 - x[3]]) + x[4:], checksum=False)
    with pytest.raises(ValueError, match="the checksum of shard-00000.loss_mask differs"):
        list(store.verify(str(folder)))
    damage(folder, lambda x: x[:3] + b"\7" + x[4:], checksum=True)
    message = "token 3 has the value 7 in the loss mask, and 0 and 1 are the only ones; copy the file again"
    with pytest.raises(ValueError, match=f"shard-00000.loss_mask: {message}"):
        list(store.verify(str(folder)))
    with pytest.raises(ValueError, match=f"shard-00000.loss_mask, document 0: {message}"):
        store.load(str(folder)).read_loss_mask([(0, 2, 9)])
    manifest = json.loads((folder / store.MANIFEST).read_text())
    del manifest["shards"][1]["loss_mask_sha256"]
    (folder / store.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="some of its shards have a loss mask and others have none"):
        store.load(str(folder))


def masked(lengths, seed=0, flag=None):
    """Documents whose tokens say whether they are trained on: an odd token is, or all are as `flag` says."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, 256, n).astype(np.uint16) for n in lengths]
    masks = [(x % 2 if flag is None else np.full(len(x), flag)).astype(np.uint8) for x in tokens]
    plain = documents.in_memory(tokens, range(len(tokens)))
    mask = LossMask(lambda spans: [masks[i][a:b] for i, a, b in spans], f"{seed}")
    return plain, dataclasses.replace(plain, loss_mask=mask)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_the_mask_with_its_tokens(packing, seed):
    rng = np.random.default_rng(seed)
    plain, with_mask = masked(rng.integers(2, 70, 40), seed)
    chosen = rng.integers(2, size=40) > 0
    plain, with_mask = plain.select(chosen), with_mask.select(chosen)
    seq_len = int(rng.integers(3, 40))
    without, sequences = (PackedSequences(x, seq_len, seed, BYTES.byte_lengths, packing) for x in (plain, with_mask))
    for index in range(2 * len(sequences)):
        a, b = sorted(rng.integers(0, seq_len + 1, 2))
        read = sequences.read([(index, 0, seq_len), (index, a, b)])
        expected = without[index]
        odd = expected["targets"] % 2 == 1
        expected |= {name: expected[name] * odd for name in ("weights", "bytes")}
        for name, values in expected.items():
            np.testing.assert_array_equal(read[0][name], values, err_msg=name)
            np.testing.assert_array_equal(read[1][name], values[a:b], err_msg=name)
            assert read[0][name].dtype == values.dtype


def mixed_corpora(with_mask):
    """The documents of two sources; those of "text" may have a mask."""
    lengths = np.random.default_rng(3).integers(3, 60, 30)
    return {"text": masked(lengths)[with_mask], "plain": masked(lengths, seed=1)[0]}


def mixed_config():
    c = base.get_config()
    c.data.sources = {name: base.source() for name in ("text", "plain")}
    mixture = {"text": 0.5, "plain": 0.5}
    sizes = {"batch": 8, "microbatches": 1, "mixture": mixture}
    c.stages = [{"steps": 5, "seq_len": 16} | sizes, {"steps": 4, "seq_len": 32} | sizes]
    return config.build(c)


def mixed_batches(start=0, mesh=None, with_mask=True):
    c = mixed_config()
    stages = pipeline.stage_sequences(c, mixed_corpora(with_mask), BYTES)
    meshes = [mesh or one_device()] * len(c.stages)
    return [(step, jax.tree.map(np.asarray, x)) for step, x in pipeline.batches(c, stages, meshes, start)]


def test_the_sequences_of_a_source_with_a_mask_have_its_weights_and_those_of_others_all_their_targets():
    c = mixed_config()
    mixtures = [stage.mixture for stage in pipeline.stage_sequences(c, mixed_corpora(True), BYTES)]
    for (step, batch), (_, plain) in zip(mixed_batches(), mixed_batches(with_mask=False), strict=True):
        index, step_of_stage = c.stage_at(step)
        names = [mixtures[index].source_of(8 * step_of_stage + b)[0] for b in range(8)]
        assert sorted(names) == ["plain"] * 4 + ["text"] * 4
        trained = (np.array(names) == "plain")[:, None] | (batch["targets"] % 2 == 1)
        for name, values in plain.items():
            expected = values * trained if name in ("weights", "bytes") else values
            np.testing.assert_array_equal(batch[name], expected, err_msg=name)


def test_resumed_and_sharded_batches_have_the_weights_of_the_straight_run():
    straight = mixed_batches()
    for start in (2, 5, 7):
        assert_same(mixed_batches(start), straight[start:])
    assert_same(mixed_batches(mesh=meshes.make_mesh(config.Mesh(1, 1, 2, 1, 2, 2))), straight)


def test_a_mask_of_ones_changes_no_batch():
    plain, ones = masked([30] * 10, flag=1)
    assert_same(run_pipeline(make_config(), plain), run_pipeline(make_config(), ones))


def test_a_store_with_another_mask_is_other_data(tmp_path):
    """The documents of the three stores are equal."""
    text = "a question and an answer"
    stores = {"plain": text, "answer": [piece(text[:14], False), piece(text[14:], True)], "all": [piece(text, True)]}
    loaded = {}
    for name, record in stores.items():
        write_records(tmp_path, [record], name)
        run(tmp_path, f"{name}_store", f"{name}/*.jsonl", fields=FIELDS if name != "plain" else Fields("text", "source"))
        loaded[name] = store.load(str(tmp_path / f"{name}_store"))
    assert len({x.fingerprint() for x in loaded.values()}) == 3
    assert len({x.without_loss_mask().fingerprint() for x in loaded.values()}) == 1


@pytest.mark.slow
def test_parts_and_meshes_give_the_gradient_of_one_device_and_one_part():
    """Microbatches of one step have different weights: half of the sequences have a mask."""
    _, batch = mixed_batches()[-1]
    sums = batch["weights"].reshape(2, 4, 32).sum((1, 2))
    assert sums[0] != sums[1]
    metrics, mean, _ = stepped(mesh_of(), 1, batch)
    for sizes, microbatches in (({}, 2), ({"fsdp": 2, "context": 2}, 2)):
        other_metrics, other_mean, _ = stepped(mesh_of(**sizes), microbatches, batch)
        assert_close(other_metrics, metrics, 1e-5)
        assert_close(other_mean, mean, 1e-5)


@pytest.mark.parametrize("microbatches", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_batch_without_weight_has_no_loss_and_no_gradient_and_the_state_stays_finite(microbatches):
    c, empty = config_of(microbatches), BATCH | {name: np.zeros_like(BATCH[name]) for name in ("weights", "bytes")}
    with jax.set_mesh(mesh_of()):
        state, step = jax.jit(init_state, static_argnums=0)(c), make_step(c.at(0), BLOCKED)
        state, metrics = jax.device_get(step(state, on_mesh(empty)))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["bits_per_byte"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state)) and state.step == 1


def test_held_out_documents_have_no_mask(tmp_path):
    write_records(tmp_path, [[piece(f"{i}" * 9, False), piece(f"{i} is it", True)] for i in range(30)])
    run(tmp_path, fields=FIELDS)
    c = base.get_config()
    c.data.sources = {"text": base.source(store=str(tmp_path / "out"))}
    c.data.holdout = 0.5
    c = config.build(c)
    corpus = corpora.load(c.data, ["text"], BYTES)["text"]
    assert corpus.training.loss_mask is not None and corpus.heldout.loss_mask is None
    read = [PackedSequences(x, 32, None, BYTES.byte_lengths)[0] for x in (corpus.training, corpus.heldout)]
    trained = [(x["weights"] > 0).mean() for x in read]
    assert 0.2 < trained[0] < 0.6 < 0.8 < trained[1]


def test_the_held_out_files_of_a_flag_have_no_mask(prepared):
    folder = str(prepared[0] / "out")
    assert heldout.of_files({"chats": folder}, BYTES).documents["chats"].loss_mask is None
