"""Pieces of text add up to what a tokenizer makes of all ids, however these are cut, and end where a stop begins."""

import random

import numpy as np
import pytest
from test_tokenizer import TEXT, byte_level, load, sentence_piece

from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.infer.sampling import Sampling
from hybrid_attn.infer.text import AnswerOptions, TextStream, answers


def metaspace():
    """Pieces that write a space as ▁, and a decoder that drops the one before the first word."""
    tokenizers = pytest.importorskip("tokenizers")
    t = sentence_piece()
    decoders = tokenizers.decoders
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return t


def tokenizer_named(name, tmp_path):
    if name == "bytes":
        return load_tokenizer("bytes")
    return load({"byte_level": byte_level, "sentence_piece": sentence_piece, "metaspace": metaspace}[name](), tmp_path)


def cuts(ids, number=20):
    """`ids` in pieces, each time others: one by one first, then all at once."""
    yield [[i] for i in ids]
    yield [list(ids)]
    rng = random.Random(0)
    for _ in range(number):
        at = sorted(rng.sample(range(len(ids) + 1), rng.randrange(1, min(8, len(ids)))))
        yield [list(ids[a:b]) for a, b in zip([0, *at], [*at, len(ids)], strict=True)]


def read(stream, pieces):
    return "".join(stream.add(piece) for piece in pieces) + stream.finish()


def before_first_stop(text, stops):
    """By the definition: the stop that is complete first, and of those the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.parametrize("name", ["bytes", "byte_level", "sentence_piece", "metaspace"])
@pytest.mark.parametrize(
    "stops",
    [
        (),
        ("東",),
        ("naïve",),
        (":  ret", "x)"),
        ("\n\t", "🙂\n\tdef"),
        ("not there",),
        ("bc", "abcd"),
        (" x<",),
        ("<tool é>", "ool"),
    ],
)
def test_the_text_is_the_tokenizers_up_to_the_first_stop_for_any_cut(name, stops, tmp_path):
    t = tokenizer_named(name, tmp_path)
    ids = [*t.encode((TEXT + " abcd x</s> de 🙂🙂東東 de").encode()).tolist(), t.eos]
    expected = before_first_stop(t.decode(ids), stops)
    assert {read(TextStream(t, stops), pieces) for pieces in cuts(ids)} == {expected}


def test_random_ids_give_one_text_for_any_cut(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("bytes", "byte_level", "sentence_piece", "metaspace"):
        t = tokenizer_named(name, tmp_path)
        for _ in range(5):
            ids = rng.integers(0, t.vocab_size + 9, 60).tolist()
            texts = {read(TextStream(t, ("e", "\x7f")), pieces) for pieces in cuts(ids, 5)}
            assert len(texts) == 1
            if name in ("bytes", "byte_level"):  # whose invalid bytes are replaced from left to right
                assert texts == {before_first_stop(t.decode(ids), ("e", "\x7f"))}


@pytest.mark.parametrize("name", ["bytes", "byte_level", "sentence_piece", "metaspace"])
def test_pieces_come_as_soon_as_they_are_certain_and_hold_no_half_character(name, tmp_path):
    t = tokenizer_named(name, tmp_path)
    text = "é def 🙂🙂 <tool é> de"
    ids = t.encode(text.encode()).tolist()
    stream, out = TextStream(t), ""
    for n, i in enumerate(ids):
        out += stream.add([i])
        text = t.decode(ids[: n + 1])
        if not text.endswith("\ufffd"):
            assert out == text
        assert "\ufffd" not in out


def test_what_may_become_a_stop_is_held_until_it_does_not(tmp_path):
    t = load_tokenizer("bytes")
    stream = TextStream(t, ("<end>", "dx"))
    pieces = [stream.add([byte]) for byte in b"a<e<en<endy<end>zzz"]
    assert pieces == ["a", *[""] * 2, "<e", *[""] * 2, "<en", *[""] * 3, "<endy", *[""] * 8]
    assert stream.stopped and stream.finish() == ""
    stream = TextStream(t, ("<end>",))
    assert stream.add(b"a<en") == "a" and not stream.stopped and stream.finish() == "<en"


def test_bytes_that_are_never_a_character_come_at_the_end():
    stream = TextStream(load_tokenizer("bytes"), ("\ufffd!",))
    assert stream.add([0x61, 0xF0, 0x9F]) == "a" and stream.finish() == "\ufffd"
    stream = TextStream(load_tokenizer("bytes"), ("\ufffd!",))
    assert stream.add([0x61, 0xFF]) == "a" and stream.add([0x21]) == "" and stream.stopped


def test_an_answer_keeps_the_space_that_joins_it_to_the_prompt(tmp_path):
    t = tokenizer_named("metaspace", tmp_path)
    for prompt in ("de", "🙂東東東", "f 東東"):
        before, ids = t.encode(prompt.encode()), t.encode(" de 東🙂 f".encode())
        assert {read(TextStream(t, (), before), pieces) for pieces in cuts(ids.tolist())} == {" de 東🙂 f"}
        after = t.encode("🙂 de".encode()).tolist()
        assert read(TextStream(t, (), before), [after]) == "🙂 de"
    assert read(TextStream(t, (), t.encode(("\ufffd" * 9).encode())), [t.encode(b" de").tolist()]) == " de"
    assert read(TextStream(t), [t.encode(b" de").tolist()]) == "de"
    assert read(TextStream(t), [[*t.encode(b"f"), t.eos, t.eos, *t.encode(b" de")]]) == "f de"


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match=r"an empty string is no stop: \['a', ''\]; leave it out"):
        TextStream(load_tokenizer("bytes"), ["a", ""])


class Echo:
    """Answers each prompt with fixed ids, two at a time, all requests in turn."""

    def __init__(self, *replies):
        self.replies = [list(reply) for reply in replies]

    def generate(self, prompts, max_new_tokens, **options):
        self.prompts, self.options = prompts, options
        active, out = set(range(len(prompts))), [[] for _ in prompts]
        for at in range(0, max_new_tokens, 2):
            for i in sorted(active):
                new = self.replies[i][at : at + 2]
                out[i] += new
                if options["on_tokens"](i, new) or not new:
                    active.discard(i)
        return [type("Generated", (), {"tokens": np.array(x), "logprobs": np.zeros(len(x))}) for x in out]


def test_answers_are_streamed_cut_at_stops_and_end_their_requests():
    t, heard = load_tokenizer("bytes"), []
    engine = Echo("née.Q: b".encode(), b"abcdefghij", b"Q")
    replies = answers(
        engine, t, ["x", "yé", "z"], 8, AnswerOptions(GenerateOptions(Sampling(0.5), (257,)), stops=("Q:",), seeds=[1, 2, 3]),
        on_text=lambda index, piece: heard.append((index, piece)),
    )  # fmt: skip
    assert [x.text for x in replies] == ["née.", "abcdefgh", "Q"]
    assert [bytes(x.tokens.tolist()) for x in replies] == ["née.Q:".encode(), b"abcdefgh", b"Q"]
    assert [len(x.logprobs) for x in replies] == [7, 8, 1]
    assert ["".join(piece for index, piece in heard if index == i) for i in range(3)] == [x.text for x in replies]
    assert heard[:2] == [(0, "n"), (1, "ab")]
    assert engine.prompts == [[256, *b"x"], [256, *"yé".encode()], [256, *b"z"]]
    expected = {"seeds": [1, 2, 3], "options": GenerateOptions(Sampling(0.5), (257,)), "questions": None}
    assert {name: engine.options[name] for name in expected} == expected


def test_questions_are_encoded_apart_and_bos_can_be_left_out():
    engine, options = Echo(b"a", b"b"), AnswerOptions(questions=["?", "??"], bos=False)
    replies = answers(engine, load_tokenizer("bytes"), ["x", "y"], 4, options)
    assert [x.text for x in replies] == ["a", "b"]
    assert (engine.prompts, engine.options["questions"]) == ([[*b"x"], [*b"y"]], [[*b"?"], [*b"??"]])


def test_empty_prompts_and_questions_are_refused_with_their_number():
    with pytest.raises(ValueError, match="prompt 2 of 2 is empty; give it at least one character"):
        answers(Echo(), load_tokenizer("bytes"), ["a", ""], 4)
    with pytest.raises(ValueError, match="question 1 of 1 is empty; give it at least one character"):
        answers(Echo(), load_tokenizer("bytes"), ["a"], 4, AnswerOptions(questions=[""]))
