"""Requests of an engine: their options and checks, and how they are sorted into batches and chunks.

Letters: B requests, T tokens of a chunk.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.config import Model
from hybrid_attn.infer.cache import Compression, power_of_two
from hybrid_attn.infer.sampling import GREEDY, Sampling
from hybrid_attn.trees import check

# Called with a request's number and its new tokens; True ends the request.
OnTokens = Callable[[int, list[int]], bool | None]


def _check_range(name: str, values: Sequence[int], end: int) -> None:
    for x in values:
        check(0 <= x < end, f"{name} {x} is not one of 0 to {end - 1}")


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """What the requests of a call have in common; `stop_tokens` end a completion."""

    sampling: Sampling = GREEDY
    stop_tokens: Sequence[int] = ()
    compression: Compression | None = None

    def __post_init__(self):
        _check_range("stop token", self.stop_tokens, 2**31)

    @property
    def window(self) -> int:
        """Tokens of the observation window."""
        return self.compression.window if self.compression else 0


class Request(NamedTuple):
    """A prompt, and the question that is read after the prompt's cache is compressed (empty where there is none)."""

    prompt: np.ndarray
    question: np.ndarray
    seed: int


class Call(NamedTuple):
    """One call of `Engine.generate`."""

    requests: list[Request]
    max_new_tokens: int
    options: GenerateOptions
    on_tokens: OnTokens | None

    @property
    def room(self) -> int:
        """The most tokens that follow a prompt."""
        return self.max_new_tokens + max(len(request.question) for request in self.requests)


class Limits(NamedTuple):
    """What a prompt must satisfy: ids of the vocabulary, and with its completion no more tokens than the capacity."""

    model: Model
    capacity: int | None

    def call(
        self, texts: tuple[Sequence, Sequence | None], seeds: Sequence[int] | None, max_new_tokens: int,
        options: GenerateOptions, on_tokens: OnTokens | None,
    ) -> Call:  # fmt: skip
        """The checked call for (prompts, questions). Without a compression each question is a part of its prompt."""
        prompts, questions = texts
        seeds = range(len(prompts)) if seeds is None else seeds
        check(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
        for name, values in {"seeds": seeds, "questions": questions}.items():
            if values is not None and len(values) != len(prompts):
                raise ValueError(f"{len(values)} {name} do not match {len(prompts)} prompts; use one for each prompt")
        _check_range("seed", seeds, 2**32)
        joined = prompts if questions is None else [[*pair[0], *pair[1]] for pair in zip(prompts, questions, strict=True)]
        joined = self.checked(joined, max_new_tokens)
        split = questions is not None and options.compression is not None
        lengths = map(len, self.checked(prompts, 0) if split else joined)
        parts = zip(joined, lengths, seeds, strict=True)
        return Call([Request(x[:length], x[length:], seed) for x, length, seed in parts], max_new_tokens, options, on_tokens)

    def checked(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[np.ndarray]:
        """The prompts as int32 arrays; ValueError for one that is empty, has a wrong id, or does not fit."""
        return [self._checked(i, np.asarray(prompt).reshape(-1), new_tokens) for i, prompt in enumerate(prompts)]

    def _checked(self, i: int, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
        vocab_size, total = self.model.vocab_size, len(prompt) + new_tokens
        check(len(prompt) > 0, f"prompt {i} is empty; give it at least one token, such as BOS")
        are_ids = np.issubdtype(prompt.dtype, np.integer)
        check(are_ids, f"prompt {i} must hold token ids, which are integers: {prompt[:3].tolist()}...")
        wrong = prompt[(prompt < 0) | (prompt >= vocab_size)]
        if len(wrong):
            raise ValueError(f"prompt {i}: token {wrong[0]} is not in the vocabulary of {vocab_size}")
        completion = f" and {new_tokens} new tokens" if new_tokens else ""
        check(
            self.capacity is None or total <= self.capacity,
            f"prompt {i}: {len(prompt)} tokens{completion} do not fit the capacity of {self.capacity}; shorten it, or make "
            f"the engine with capacity={power_of_two(total)}",
        )
        return prompt.astype(np.int32)


def check_finite(index: int, first: int, logprobs: np.ndarray) -> None:
    """FloatingPointError if a log-probability of request `index`, whose tokens are numbered from `first`, is not finite."""
    bad = np.flatnonzero(~np.isfinite(logprobs))
    if len(bad):
        raise FloatingPointError(
            f"prompt {index}: the log-probability of token {first + int(bad[0])} is {logprobs[bad[0]]}: the parameters contain "
            "NaN, or activations overflow; use a checkpoint of an earlier step"
        )


def common_prefix(prompts: list[np.ndarray]) -> int:
    """How many tokens all prompts begin with; less than the shortest prompt."""
    length = min(map(len, prompts)) - 1
    same_T = np.all([prompt[:length] == prompts[0][:length] for prompt in prompts], axis=0)
    return length if same_T.all() else int(np.argmin(same_T))


def batches(sequences: list[np.ndarray], batch_size: int) -> list[list[int]]:
    """Numbers of sequences of similar length, longest first."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
