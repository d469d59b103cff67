"""Prompts of a file, for a comparison of models by their answers."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hybrid_attn.data.conversations import texts_of
from hybrid_attn.evals.judge import Judge, TokenizedPrompts, tokenized
from hybrid_attn.infer import prompts
from hybrid_attn.infer.engine import EngineOptions


class PromptSet(NamedTuple):
    """The records of a file of prompts, the judge of the answers, and the prompts in the tokens of one model."""

    name: str
    records: Mapping[str, Mapping]
    judge: Judge
    tokenized: TokenizedPrompts | None = None

    def of_model(self, directory: str, step: int) -> "PromptSet":
        return self._replace(tokenized=tokenized(self.records, directory, step))

    def described(self) -> dict:
        """What run.json says of the prompts, of the chat template that the model reads them with, and of the judge."""
        return {"prompts": self.hash, "chat_template": self.tokenized.template_hash, "judge": self.judge.described()}

    @property
    def hash(self) -> str:
        """Identifies the records."""
        return hashlib.sha256(json.dumps([*self.records.values()], sort_keys=True).encode()).hexdigest()

    @property
    def texts(self) -> list[str]:
        """What each record asks: its prompt, or the texts of its last message."""
        last = [x[prompts.PROMPT] if prompts.PROMPT in x else x[prompts.MESSAGES][-1] for x in self.records.values()]
        return [x if isinstance(x, str) else " ".join(texts_of(x)) for x in last]


def read(file: str, judge: str, options: EngineOptions) -> PromptSet:
    """The prompts of a file, and the judge at a path, without its parameters, whose engine has `options`."""
    records = prompts.read(file)
    return PromptSet(Path(file).stem, records, Judge(judge, records, options))
