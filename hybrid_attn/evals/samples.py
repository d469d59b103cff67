"""Questions with known answers, written once and the same for every model: a line of JSON each, and a hash of all of them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from hybrid_attn import trees
from hybrid_attn.files import object_of, write_atomically

TYPES = {"task": str, "length": int, "index": int, "prompt": str, "max_new_tokens": int, "group": str, "meta": dict}


class TooLongError(ValueError):
    """A question whose smallest prompt does not fit its length."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question of a task.

    `prompt` is all the text that a model goes on from; it, BOS and `max_new_tokens` fit into
    `length` tokens. `group` tells cells of a task apart, as a depth does, and `meta` holds plain values to look at.
    """

    task: str
    length: int
    index: int
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    group: str
    meta: dict

    def __post_init__(self):
        wrong = [name for name, kind in TYPES.items() if not isinstance(getattr(self, name), kind)]
        wrong += ["answers"] if not all(isinstance(answer, str) for answer in self.answers) else []
        trees.check(not wrong, f"{', '.join(wrong)} of another type")
        where = f"sample {self.index} of {self.task} at {self.length:,} tokens"
        trees.check(bool(self.prompt), f"{where} has an empty prompt")
        trees.check(all(self.answers) and bool(self.answers), f"{where} has an empty answer, or none")
        trees.check(0 < self.max_new_tokens < self.length, f"{where}: max_new_tokens={self.max_new_tokens} leaves no prompt")


def write(path: Path, samples: Iterable[Sample]) -> str:
    """Writes them, and beside them the hash that it returns; an interrupted write leaves nothing under the name."""
    lines = [json.dumps(dataclasses.asdict(sample), ensure_ascii=False) + "\n" for sample in samples]
    content = "".join(lines).encode()
    digest = hashlib.sha256(content).hexdigest()
    write_atomically(_hash_of(path), f"{digest}  {path.name}\n")
    write_atomically(path, content)
    return digest


def read(path: Path) -> tuple[list[Sample], str]:
    """The samples of a file, and the SHA-256 of its bytes; ValueError names a line that is none, or says what was changed."""
    content = path.read_bytes()
    samples = []
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        try:
            values = object_of(line, "it")
            samples.append(Sample(**values | {"answers": tuple(values["answers"])}))
        except (KeyError, TypeError, ValueError) as cause:
            raise ValueError(f"{path}, line {number} is no sample: {cause}") from cause
    trees.check(_hash_of(path).is_file(), f"{path} has lost the hash beside it; remove the file, and the same is drawn again")
    digest, written = hashlib.sha256(content).hexdigest(), _hash_of(path).read_text(errors="replace").partition(" ")[0]
    trees.check(
        digest == written,
        f"{path} was changed after it was written: its hash is {digest[:12]} and was {written[:12]}; models asked before and "
        "after do not compare, so use another directory",
    )
    return samples, digest


def _hash_of(path: Path) -> Path:
    """The file beside samples that `sha256sum --check` reads."""
    return path.with_suffix(".sha256")


def spent(prompt_tokens: int, max_new_tokens: int) -> int:
    """The tokens of a question: BOS, the prompt and the answer."""
    return 1 + prompt_tokens + max_new_tokens


def check_lengths(samples: Sequence[Sample], tokenizer, spare: int = 0) -> None:
    """ValueError for the first whose BOS, prompt and answer do not fit its length and `spare` tokens."""
    prompts = tokenizer.encode_batch([sample.prompt.encode() for sample in samples])
    for x, ids in zip(samples, prompts, strict=True):
        fits = spent(len(ids), x.max_new_tokens) <= x.length + spare
        trees.check(fits, f"sample {x.index} of {x.task} does not fit into {x.length:,} tokens; its file was changed")
