"""Text of token ids that come a few at a time, and completions of prompts of text."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.trees import check

INCOMPLETE = "\ufffd"  # how a tokenizer decodes a part of a character, or bytes that are not UTF-8
CONTEXT = 5  # ids before the completion that are decoded with it: some tokenizers drop the space before a first word
CHARACTER = 4  # ids that one character may take
MAX_INCOMPLETE = 16  # ids without a complete character after which all but the last `CHARACTER` of them are released


def check_stops(stops: Sequence[str]) -> None:
    check(all(stops), f"an empty string is no stop: {list(stops)!r}; leave it out")


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How prompts of text are answered.

    `stops` are texts, not empty, that end an answer and are no part of it. `seeds` are one for each prompt. `questions` are
    asked after the prompts' caches are compressed. `bos` puts BOS before each prompt.
    """

    generate: GenerateOptions = GenerateOptions()
    stops: Sequence[str] = ()
    seeds: Sequence[int] | None = None
    questions: Sequence[str] | None = None
    bos: bool = True

    def __post_init__(self):
        check_stops(self.stops)


class Answer(NamedTuple):
    """The text up to a stop, and its ids with their log-probabilities, those of the stop included."""

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray


def answers(
    engine, tokenizer, prompts: Sequence[str | list[int]], max_new_tokens: int,
    options: AnswerOptions = AnswerOptions(), on_text: Callable[[int, str], bool | None] | None = None,
) -> list[Answer]:  # fmt: skip
    """The answers of an `Engine` to prompts of text, or of token ids that need no BOS; ValueError for an empty text.

    `on_text(index, piece)` gets their pieces as they come, empty ones too; if it returns True, the answer ends.
    """
    prompt_ids = encoded(tokenizer, "prompt", prompts, [tokenizer.bos] * options.bos)
    question_ids = options.questions and encoded(tokenizer, "question", options.questions)
    streams = [TextStream(tokenizer, options.stops, ids) for ids in question_ids or prompt_ids]
    texts = ["" for _ in prompts]

    def add(index: int, piece: str) -> bool | None:
        texts[index] += piece
        return on_text(index, piece) if on_text else None

    def on_tokens(index: int, ids: list[int]) -> bool | None:
        return add(index, streams[index].add(ids)) or streams[index].stopped

    more = {"seeds": options.seeds, "questions": question_ids, "on_tokens": on_tokens}
    generated = engine.generate(prompt_ids, max_new_tokens, options=options.generate, **more)
    for index, stream in enumerate(streams):
        add(index, stream.finish())
    counts = [stream.num_tokens for stream in streams]
    return [Answer(text, x.tokens[:n], x.logprobs[:n]) for text, n, x in zip(texts, counts, generated, strict=True)]


def encoded(tokenizer, name: str, prompts: Sequence[str | list[int]], bos: Sequence[int] = ()) -> list[list[int]]:
    """The ids of each prompt, those of a text after `bos`."""
    for i, prompt in enumerate(prompts):
        check(prompt != "", f"{name} {i + 1} of {len(prompts)} is empty; give it at least one character")
    texts = [prompt.encode() for prompt in prompts if isinstance(prompt, str)]
    of_texts = iter(tokenizer.encode_batch(texts) if texts else ())
    return [[*bos, *next(of_texts).tolist()] if isinstance(prompt, str) else prompt for prompt in prompts]


class TextStream:
    """The text of one completion in pieces, up to the first of `stops` to be complete; `before` are the ids before it.

    No piece ends inside a character, or inside a text that may become a stop. The text does not depend on how the ids are cut;
    it equals `tokenizer.decode`, except for bytes that are not UTF-8, for which some tokenizers give more or fewer U+FFFD.

    `tokenizers.decoders.DecodeStream` does not do this: it raises an exception for ids that are not UTF-8, never releases an
    incomplete character at the end, and decodes only tokenizers of its own library.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = (), before: Sequence[int] = ()):
        check_stops(stops)
        self._tokenizer, self._stops, self.stopped = tokenizer, tuple(stops), False
        self._ids = self._context(before)  # starts at a character; includes text that has been released already
        self._num_released, self._start = len(self._decoded()), len(self._ids)
        self._held = ""  # complete characters that may begin a stop
        self.num_tokens = 0  # up to the one that completed a stop

    def add(self, ids: Iterable[int]) -> str:
        """The text that has become certain with these ids."""
        return "".join(self._add(int(i)) for i in ids)

    def finish(self) -> str:
        """The remaining text, when no more ids come."""
        if self.stopped:
            return ""
        piece = self._release(self._decoded()[self._num_released :])
        held, self._held = self._held, ""
        return piece + held

    def _add(self, token: int) -> str:
        if self.stopped:
            return ""
        self.num_tokens += 1
        self._ids.append(token)
        text = self._decoded()
        certain = text.rstrip(INCOMPLETE)
        if len(self._ids) - self._start > MAX_INCOMPLETE and len(certain) <= self._num_released:
            certain = self._tokenizer.decode(self._ids[:-CHARACTER])
            piece, self._ids = certain[self._num_released :], self._ids[-CHARACTER:]
            self._num_released = self._start = 0
            return self._release(piece)
        piece = certain[self._num_released :]
        self._num_released = max(self._num_released, len(certain))
        if piece and certain == text:
            del self._ids[: self._start]
            self._num_released, self._start = len(self._decoded()), len(self._ids)
        return self._release(piece)

    def _context(self, before: Sequence[int]) -> list[int]:
        """The last ids of `before`, from the start of a character if one is near."""
        tails = [[int(i) for i in before[-n:]] for n in range(CONTEXT, CONTEXT + CHARACTER)]
        return next((x for x in tails if not self._tokenizer.decode(x).startswith(INCOMPLETE)), tails[0])

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._ids)

    def _release(self, piece: str) -> str:
        """The held text and `piece`, without an end that may become a stop; or everything before a stop."""
        text = self._held + piece
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return text[: min(matches)[1]]
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        held = next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
