"""The model that judges answers by its log-probabilities, and the tokens of prompts for a checkpoint."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.evals.samples import TooLongError
from hybrid_attn.infer import loading, prompts
from hybrid_attn.infer.engine import Engine, EngineOptions
from hybrid_attn.infer.text import encoded


class TokenizedPrompts(NamedTuple):
    """Prompts for a checkpoint: their ids, the ids that stop an answer, and the one that ends it in text.

    `template_hash` identifies the chat template; None where no prompt has messages.
    """

    ids: Sequence[list[int]]
    stops: Sequence[int]
    end: int
    template_hash: str | None = None

    def longest(self, names: Sequence[str]) -> tuple[str, int]:
        """The name and the number of tokens of the longest prompt."""
        return max(zip(names, map(len, self.ids), strict=True), key=lambda x: x[1])


def tokenized(records: Mapping[str, Mapping], directory: str, step: int) -> TokenizedPrompts:
    """The records for a checkpoint, with its own template; ValueError with the name of one that cannot read them."""
    tokenizer = loading.described(directory, step).tokenizer
    has_messages = any(prompts.MESSAGES in x for x in records.values())
    template = loading.chat_template(directory, step) if has_messages else None
    try:
        of_chat = prompts.Requests(tokenizer, template)
        ids, ends = encoded(tokenizer, "prompt", of_chat.prompts(records), [tokenizer.bos]), of_chat.ends()
    except ValueError as cause:
        raise ValueError(f"{loading.name_of(directory, step)} does not read the prompts: {cause}") from cause
    stops = sorted({*loading.stop_tokens(directory, tokenizer), *ends})
    return TokenizedPrompts(ids, stops, [*ends, tokenizer.eos][0], None if template is None else _sha(template))


class Judge:
    """Scores answers to `records` by the checkpoint at `path`, with an engine of `options`, on the mesh in force.

    Its parameters are read at the first use.
    """

    def __init__(self, path: str, records: Mapping[str, Mapping], options: EngineOptions):
        name, step = loading.split_step(path)
        self.directory = loading.find(name)
        self.step = loading.step_of(self.directory, step)
        self.weights = loading.fingerprint(self.directory, self.step)
        self.tokenizer = loading.described(self.directory, self.step).tokenizer
        self.trained, _ = loading.trained_length_of(self.directory, self.step)
        self._prompts, self._names, self._options = tokenized(records, self.directory, self.step), [*records], options

    @functools.cached_property
    def _engine(self) -> Engine:
        c, params, _ = loading.load(self.directory, self.step)
        return Engine(params, c, self._options)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The texts in the judge's tokens."""
        return [ids.tolist() for ids in self.tokenizer.encode_batch([text.encode() for text in texts])]

    def check_fits(self, max_new_tokens: int) -> None:
        """TooLongError where the longest prompt with so many tokens of an answer is longer than a sequence of its training."""
        where, size = self._prompts.longest(self._names)
        self._check_trained(where, size, max_new_tokens)

    def log_probs(self, answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """The mean log-probability of a token of each answer after its prompt, in nats.

        For an answer that `ended`, its end token counts, too; an answer without a token has its end alone. TooLongError for an
        answer that has too many of the judge's tokens.
        """
        ids = self.encode(answers)
        ids = [[*x, self._prompts.end] if has_end or not x else x for x, has_end in zip(ids, ended, strict=True)]
        for where, prompt, answer in zip(self._names, self._prompts.ids, ids, strict=True):
            self._check_trained(where, len(prompt), len(answer))
        return [float(np.mean(x, dtype=np.float64)) for x in self._engine.score(self._prompts.ids, ids)]

    def _check_trained(self, where: str, prompt: int, answer: int) -> None:
        if prompt + answer > self.trained:
            sizes = f"{prompt:,} tokens of {where} and {answer:,} of an answer do not fit into the {self.trained:,} tokens"
            cure = "use a smaller --max_new_tokens, or a judge that was trained on longer sequences"
            raise TooLongError(f"{sizes} of a sequence of the judge's training; {cure}")

    def described(self) -> dict:
        """What run.json says of the judge."""
        about = {"weights": self.weights, "tokenizer": self.tokenizer.hash, "chat_template": self._prompts.template_hash}
        return {"checkpoint": self.directory, "step": self.step, **about}

    @property
    def hash(self) -> str:
        """Identifies what determines its log-probabilities: the same wherever its checkpoint lies."""
        return _sha(json.dumps([self.weights, self.tokenizer.hash, self._prompts.template_hash]))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
