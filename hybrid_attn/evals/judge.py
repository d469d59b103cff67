"""Prompts for a comparison of models by their answers, and the model that judges them by its log-probabilities."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_attn.data.conversations import texts_of
from hybrid_attn.infer import loading, prompts
from hybrid_attn.infer.engine import Engine
from hybrid_attn.infer.text import encoded


class Requests(NamedTuple):
    """What a checkpoint is asked: the tokens of each prompt, the ids that stop an answer, and the one that ends it in text."""

    prompts: Sequence[list[int]]
    stops: Sequence[int]
    end: int


def requests_of(records: Mapping[str, Mapping], directory: str, step: int) -> Requests:
    """The records for a checkpoint, with its own template."""
    tokenizer = loading.described(directory, step).tokenizer
    has_messages = any(prompts.MESSAGES in x for x in records.values())
    of_chat = prompts.Requests(tokenizer, loading.chat_template(directory, step) if has_messages else None)
    ids, ends = encoded(tokenizer, "prompt", of_chat.prompts(records), [tokenizer.bos]), of_chat.ends()
    return Requests(ids, sorted({*loading.stop_tokens(directory, tokenizer), *ends}), [*ends, tokenizer.eos][0])


class Judge:
    """Scores answers by the checkpoint at `path`, whose parameters are read when it is first asked, on the mesh in force."""

    def __init__(self, path: str, records: Mapping[str, Mapping]):
        name, step = loading.split_step(path)
        self.directory = loading.find(name)
        self.step = loading.step_of(self.directory, step)
        self.weights = loading.fingerprint(self.directory, self.step)
        self.tokenizer = loading.described(self.directory, self.step).tokenizer
        self._requests = requests_of(records, self.directory, self.step)

    @functools.cached_property
    def _engine(self) -> Engine:
        c, params, _ = loading.load(self.directory, self.step)
        return Engine(params, c)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The texts in the judge's tokens."""
        return [ids.tolist() for ids in self.tokenizer.encode_batch([text.encode() for text in texts])]

    def log_probs(self, answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """The mean log-probability of a token of each answer after its prompt, in nats; the end of one that `ended` is a token.

        An answer without a token has its end alone.
        """
        ids = self.encode(answers)
        ids = [[*x, self._requests.end] if has_end or not x else x for x, has_end in zip(ids, ended, strict=True)]
        return [float(np.mean(x, dtype=np.float64)) for x in self._engine.score(self._requests.prompts, ids)]

    def described(self) -> dict:
        """What run.json says of the judge."""
        return {"checkpoint": self.directory, "step": self.step, "weights": self.weights}


class PromptSet(NamedTuple):
    """The records of a file of prompts, the judge of the answers, and what one model is asked."""

    name: str
    records: Mapping[str, Mapping]
    judge: Judge
    requests: Requests | None = None

    def of_model(self, directory: str, step: int) -> "PromptSet":
        return self._replace(requests=requests_of(self.records, directory, step))

    @property
    def hash(self) -> str:
        """Identifies the records."""
        return hashlib.sha256(json.dumps([*self.records.values()], sort_keys=True).encode()).hexdigest()

    @property
    def texts(self) -> list[str]:
        """What each record asks: its prompt, or the texts of its last message."""
        last = [x[prompts.PROMPT] if prompts.PROMPT in x else x[prompts.MESSAGES][-1] for x in self.records.values()]
        return [x if isinstance(x, str) else " ".join(texts_of(x)) for x in last]


def prompt_set(file: str, judge: str) -> PromptSet:
    """The prompts of a file, and the judge at a path, without its parameters."""
    records = prompts.read(file)
    return PromptSet(Path(file).stem, records, Judge(judge, records))
