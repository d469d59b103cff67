"""Text of token ids that come a few at a time, and answers to prompts of text."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.infer.sampling import GREEDY, Sampling

UNFINISHED = "\ufffd"  # what a tokenizer makes of a part of a character, or of bytes that are none
CONTEXT = 5  # ids before the answer that are decoded with it: some tokenizers drop the space before a first word
CHARACTER = 4  # ids that one character may take
UNREADABLE = 16  # ids without a character after which all but the last `CHARACTER` of them are given out


class Answer(NamedTuple):
    """The text up to a stop, and the ids that it took, those of the stop included, with their log-probabilities."""

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray


def answers(
    engine, tokenizer, prompts: Sequence[str], max_new_tokens: int, *, sampling: Sampling = GREEDY, seeds=None,
    stops: Sequence[str] = (), stop_tokens: Sequence[int] = (), compression=None, questions: Sequence[str] | None = None,
    bos: bool = True, on_text: Callable[[int, str], None] | None = None,
) -> list[Answer]:  # fmt: skip
    """Answers of an `Engine` to prompts, and to `questions` asked after the prompts' caches are compressed.

    `bos` puts the mark that begins a document before each prompt. `on_text(row, piece)` gets the pieces as they come.
    ValueError for what is empty.
    """
    for name, texts in (("prompt", prompts), ("question", questions or ())):
        for row, text in enumerate(texts):
            if not text:
                raise ValueError(f"{name} {row + 1} of {len(texts)} is empty; give it at least one character")
    ids = [[tokenizer.bos] * bos + x.tolist() for x in tokenizer.encode_batch([text.encode() for text in prompts])]
    asked = questions and [x.tolist() for x in tokenizer.encode_batch([text.encode() for text in questions])]
    streams = [TextStream(tokenizer, stops, before) for before in asked or ids]
    pieces = [[] for _ in prompts]

    def take(row: int, piece: str) -> None:
        if piece:
            pieces[row].append(piece)
            if on_text:
                on_text(row, piece)

    def on_tokens(row: int, new: list[int]) -> bool:
        take(row, streams[row].add(new))
        return streams[row].stopped

    generated = engine.generate(
        ids, max_new_tokens, sampling=sampling, seeds=seeds, stop_tokens=stop_tokens, compression=compression,
        questions=asked, on_tokens=on_tokens,
    )  # fmt: skip
    for row, stream in enumerate(streams):
        take(row, stream.finish())
    return [
        Answer("".join(texts), x.tokens[: stream.taken], x.logprobs[: stream.taken])
        for texts, stream, x in zip(pieces, streams, generated, strict=True)
    ]


class TextStream:
    """The text of one answer in pieces, up to the first of `stops` to be complete; `after` are the ids before the answer.

    No piece ends within a character, nor within what may become a stop. The text does not depend on how the ids are cut; it is
    that of `tokenizer.decode`, but for bytes that are not UTF-8, of which some tokenizers make more or fewer U+FFFD.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = (), after: Sequence[int] = ()):
        if not all(stops):
            raise ValueError(f"an empty string is no stop: {list(stops)!r}; leave it out")
        self._tokenizer, self._stops, self.stopped = tokenizer, tuple(stops), False
        self._ids = self._tail(after)  # from one at which a character begins, with text that is given out already
        self._given, self._start = len(self._decoded()), len(self._ids)
        self._held = ""  # whole characters that may begin a stop
        self.taken = 0  # ids, up to the one that completed a stop

    def add(self, ids: Iterable[int]) -> str:
        """What is certain of the text now and was not before."""
        return "".join(self._add(int(i)) for i in ids)

    def finish(self) -> str:
        """The rest, when no more ids come."""
        if self.stopped:
            return ""
        piece = self._release(self._decoded()[self._given :])
        rest, self._held = self._held, ""
        return piece + rest

    def _add(self, token: int) -> str:
        if self.stopped:
            return ""
        self.taken += 1
        self._ids.append(token)
        text = self._decoded()
        certain = text.rstrip(UNFINISHED)
        if len(self._ids) - self._start > UNREADABLE and len(certain) <= self._given:
            certain = self._tokenizer.decode(self._ids[:-CHARACTER])
            piece, self._ids = certain[self._given :], self._ids[-CHARACTER:]
            self._given = self._start = 0
            return self._release(piece)
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        if piece and certain == text:
            del self._ids[: self._start]
            self._given, self._start = len(self._decoded()), len(self._ids)
        return self._release(piece)

    def _tail(self, after: Sequence[int]) -> list[int]:
        """The last ids of `after`, from the beginning of a character where there is one near."""
        tails = [[int(i) for i in after[-n:]] for n in range(CONTEXT, CONTEXT + CHARACTER)]
        return next((x for x in tails if not self._tokenizer.decode(x).startswith(UNFINISHED)), tails[0])

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._ids)

    def _release(self, piece: str) -> str:
        """What is held and `piece`, less an end that may become a stop; or up to the stop."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        held = next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
