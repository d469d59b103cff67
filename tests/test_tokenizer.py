import functools
import json
import sys

import numpy as np
import pytest

from hybrid_attn.data.tokenizer import check_vocab, load_tokenizer

TEXT = "naïve — 東京 🙂\n\tdef f(x):  return  x</s> <tool é>"


def byte_level():
    """A byte-level BPE with merges, an added token that is text and two that are not."""
    tokenizers = pytest.importorskip("tokenizers")
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    t.train_from_iterator([TEXT] * 3, trainer)
    t.add_tokens([tokenizers.AddedToken("<tool é>", special=False, normalized=False)])
    return t


def sentence_piece():
    """A BPE whose pieces write a space as ▁ and fall back to bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "d", "e", "f", "ï", "de", "▁de"]
    merges = [("d", "e"), ("▁", "de")]
    model = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    t = tokenizers.Tokenizer(model)
    t.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    decoders = tokenizers.decoders
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    t.add_special_tokens(["<s>", "</s>", "<unk>"])
    return t


def metaspace():
    """A BPE without a normalizer, whose pre-tokenizer writes a space as ▁."""
    tokenizers = pytest.importorskip("tokenizers")
    t = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(["<s>", "</s>", "▁", *"~é東🙂"])}, []))
    t.pre_tokenizer, t.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    return t


def load(t, tmp_path):
    path = str(tmp_path / "tokenizer.json")
    t.save(path)
    return load_tokenizer(path)


def test_bytes_give_every_byte_back():
    t = load_tokenizer("bytes")
    ids = t.encode(bytes(range(256)))
    assert ids.tolist() == list(range(256)) and ids.dtype == np.int32
    assert t.decode([t.bos, *t.encode(TEXT.encode()), t.eos, 300]) == TEXT
    assert t.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert (t.vocab_size, t.bos, t.eos) == (258, 256, 257)
    assert t.byte_lengths.tolist() == [1] * 256 + [0, 0]


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_json_pieces_stand_for_every_byte_of_the_text(make, tmp_path):
    t = load(make(), tmp_path)
    ids = t.encode(TEXT.encode())
    assert len(ids) < len(TEXT.encode()), "no piece is longer than a byte, so the lengths are not tested"
    assert t.byte_lengths[ids].sum() == len(TEXT.encode())
    assert t.byte_lengths.shape == (t.vocab_size,)
    assert t.byte_lengths[[t.bos, t.eos]].tolist() == [0, 0]
    assert t.decode([t.bos, *ids, t.eos]) == TEXT


def test_each_byte_level_piece_has_the_length_of_its_bytes(tmp_path):
    t = load(byte_level(), tmp_path)
    for text in ("e", "ï", "東", "🙂", "<tool é>"):
        ids = t.encode(text.encode())
        assert t.byte_lengths[ids].sum() == len(text.encode()), text
    unseen = t.encode("€".encode())  # no merge knows it, so it is three pieces and the first is not UTF-8
    assert len(unseen) == 3 and t.decode(unseen[:1]) == "\ufffd"


def test_special_tokens_spelled_in_a_text_are_text(tmp_path):
    t = load(byte_level(), tmp_path)
    assert not {t.bos, t.eos} & set(t.encode(b"a</s>b<s>").tolist())
    assert t.decode(t.encode(b"a</s>b<s>")) == "a</s>b<s>"


def test_truncation_and_padding_of_the_file_do_not_touch_documents(tmp_path):
    plain = byte_level()
    expected = plain.encode("e f " * 50).ids
    plain.enable_truncation(7)
    plain.enable_padding(length=300)
    assert load(plain, tmp_path).encode(b"e f " * 50).tolist() == expected


def test_a_batch_is_encoded_as_its_texts_alone(tmp_path):
    texts = [b"e f", TEXT.encode(), b"", b"def def"]
    for t in (load_tokenizer("bytes"), load(byte_level(), tmp_path)):
        assert [x.tolist() for x in t.encode_batch(texts)] == [t.encode(text).tolist() for text in texts]


def test_hashes_distinguish_tokenizers_and_not_their_files(tmp_path):
    plain = byte_level()
    expected = load(plain, tmp_path).hash
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(plain.to_str()), indent=7))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).hash == expected
    plain.enable_truncation(7)
    assert load(plain, tmp_path).hash == expected
    plain.add_tokens(["another"])
    assert len({expected, load(plain, tmp_path).hash, load(sentence_piece(), tmp_path).hash, load_tokenizer("bytes").hash}) == 4


def test_one_token_can_begin_and_end_documents_and_ids_can_have_holes(tmp_path):
    t = sentence_piece()
    state = json.loads(t.to_str())
    state["added_tokens"] = []
    vocab = state["model"]["vocab"]
    del vocab["<s>"], vocab["</s>"]
    vocab["<|endoftext|>"] = 400
    path = tmp_path / "holes.json"
    path.write_text(json.dumps(state))
    loaded = load_tokenizer(str(path))
    assert (loaded.bos, loaded.eos, loaded.vocab_size) == (400, 400, 401)
    assert loaded.byte_lengths[[0, 399, 400]].tolist() == [0, 0, 0]
    assert loaded.decode([400, *loaded.encode(b"de"), 400]) == "de"


def test_a_json_without_bos_or_eos_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="has no BOS token; add one of <s> "):
        load(tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])), tmp_path)


def changed(t, tmp_path, **values):
    """The file of a tokenizer whose JSON has other values: model__dropout is state["model"]["dropout"]."""
    state = json.loads(t.to_str())
    for name, value in values.items():
        *groups, last = name.split("__")
        functools.reduce(dict.__getitem__, groups, state)[last] = value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(state))
    return str(path)


def test_a_json_with_dropout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json has dropout=0.1, so it encodes a text in many ways; set its"):
        load_tokenizer(changed(byte_level(), tmp_path, model__dropout=0.1))
    for value in (0.0, None):
        load_tokenizer(changed(byte_level(), tmp_path, model__dropout=value))


def test_a_json_without_a_decoder_is_refused(tmp_path):
    path = changed(byte_level(), tmp_path, decoder=None)
    with pytest.raises(ValueError, match="tokenizer.json has no decoder, so its ids cannot be decoded; add the decoder of its"):
        load_tokenizer(path)
    state = json.loads(byte_level().to_str())
    del state["decoder"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="tokenizer.json has no decoder"):
        load_tokenizer(path)


def test_a_json_that_drops_characters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json drops the character '~', or bytes of it, without a token"):
        load_tokenizer(changed(sentence_piece(), tmp_path, model__unk_token=None, model__byte_fallback=False))
    few = json.loads(byte_level().to_str())["model"]["vocab"]
    del few["Ł"]  # a byte of every character of four
    with pytest.raises(ValueError, match="drops the character '🙂', or bytes of it"):
        load_tokenizer(changed(byte_level(), tmp_path, model__vocab=few, model__merges=[]))
    load_tokenizer(changed(sentence_piece(), tmp_path, model__byte_fallback=False))  # what it lacks is <unk>


@pytest.mark.parametrize(("make", "decoder", "message"), [
    (byte_level, {"type": "WordPiece", "prefix": "##", "cleanup": True}, "ids of 'é' to 'Ã©'; use the decoder of its"),
    (byte_level, {"type": "Fuse"}, "ids of 'é' to 'Ã©'; use the decoder of its type, such as ByteLevel"),
    (metaspace, {"type": "Fuse"}, "ids of '~ ~' to '▁~▁~'; use the decoder"),
])  # fmt: skip
def test_a_json_with_the_decoder_of_another_type_is_refused(tmp_path, make, decoder, message):
    load(make(), tmp_path)
    with pytest.raises(ValueError, match=f"tokenizer.json decodes its {message}"):
        load_tokenizer(changed(make(), tmp_path, decoder=decoder))


def test_a_json_of_huge_ids_is_refused_before_tables_of_them_are_made(tmp_path):
    vocab = json.loads(byte_level().to_str())["model"]["vocab"]
    with pytest.raises(ValueError, match="tokenizer.json has the id 4294967295, and 16777215 is the largest that is supported"):
        load_tokenizer(changed(byte_level(), tmp_path, model__vocab=vocab | {"huge": 2**32 - 1}))


def test_a_post_processor_adds_no_tokens(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    t = byte_level()
    expected = load(t, tmp_path).encode(b"def f").tolist()
    t.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    assert t.encode("def f").ids[0] == 0 and load(t, tmp_path).encode(b"def f").tolist() == expected


@pytest.mark.parametrize("ids", [[2**32 - 1], [2**32], [-1], [10_000]])
def test_ids_that_no_token_has_are_no_text(tmp_path, ids):
    for t in (load_tokenizer("bytes"), load(byte_level(), tmp_path)):
        assert t.decode([*t.encode(b"a"), *ids, *t.encode(b"b")]) == "ab"


@pytest.mark.parametrize("content", ["", "[]", "null", "5", "{}", '{"model": null}', "[" * 10**5, '"a"', "\udc80", "\0"])
def test_a_file_that_is_not_a_tokenizer_json_is_an_error_of_one_line(tmp_path, content):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match="tokenizer.json' is not a tokenizer.json: .") as error:
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(error.value)


def test_a_json_at_which_the_library_panics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json' is not a tokenizer.json: range end index"):
        load_tokenizer(changed(byte_level(), tmp_path, model__continuing_subword_prefix="a" * 99))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(UnicodeDecodeError):
        load(byte_level(), tmp_path).encode(b"ab\xff")


def test_unknown_names_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer 'byte' is not a file; use 'bytes' or the path"):
        load_tokenizer("byte")
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer.json: "):
        load_tokenizer(str(path))


def test_a_missing_library_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ImportError, match=r"pip install 'hybrid_attn\[hf\]'"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("size", [258, 384, 398])
def test_a_vocabulary_with_little_padding_is_accepted(size):
    check_vocab(load_tokenizer("bytes"), size, "bytes")


@pytest.mark.parametrize(("size", "problem"), [(257, "is below the 258 ids"), (399, "wastes memory on the 258 ids")])
def test_a_vocabulary_of_another_size_is_refused_and_the_cure_works(size, problem):
    t = load_tokenizer("bytes")
    message = rf"model.vocab_size={size} {problem} of data.tokenizer='bytes'.*set model.vocab_size=384"
    with pytest.raises(ValueError, match=message):
        check_vocab(t, size, "bytes")
    check_vocab(t, 384, "bytes")
