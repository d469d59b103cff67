"""Writes two domains of text that every machine can make: python tools/write_domains.py --out=runs/domains

documentation.jsonl has the documentation strings of the standard library of this Python, a document for each file in a folder
of it but those of LEFT_OUT. language.jsonl has a synthetic language whose entropy is known exactly: each of WORDS words is
followed by one of four, with probabilities 1/2, 1/4, 1/8 and 1/8, so that a word after the first has 1.75 bits. The same
Python makes the same files. configs/upcycle/dense.py reads them in runs/domains.
"""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags

from hybrid_attn import files, programs
from hybrid_attn.data import sources
from hybrid_attn.data.docstrings import docstrings_of

OUT = flags.DEFINE_string("out", "runs/domains", "Directory of the two files.")
LEFT_OUT = sources.NOT_SOURCES | {"encodings", "test"}  # encodings is a domain of its own, as top-level modules are
SYLLABLES = [consonant + vowel for consonant in "bdgklmnprst" for vowel in "aeiou"]
WORDS, DOCUMENTS, WORDS_A_DOCUMENT = 64, 1024, 256
STEPS = np.array([1, 1, 1, 1, 5, 5, 18, 41])  # to the next word, of which each is equally likely
BITS = 1.75  # of a word


def documentation(root: Path) -> Iterator[str]:
    """The documentation strings of each file that is at least one folder below `root`; files that do not parse have none."""
    for path in sorted(root.glob("*/**/*.py")):
        if path.relative_to(root).parts[0] not in LEFT_OUT and (docstrings := docstrings_of(path)):
            yield "\n\n".join(text for _, text in docstrings) + "\n"


def vocabulary() -> list[str]:
    """The different words of the language, of two to four syllables."""
    raw, chosen = np.random.Philox(np.random.SeedSequence(0)).random_raw, {}
    while len(chosen) < WORDS:
        syllables = raw(2 + int(raw(1)[0] % 3)) % len(SYLLABLES)
        chosen["".join(SYLLABLES[i] for i in syllables)] = None
    return list(chosen)


def language(number: int) -> Iterator[str]:
    """Documents of the Markov chain, whose first word, and so every word, is uniformly distributed."""
    words, raw = vocabulary(), np.random.Philox(np.random.SeedSequence(1)).random_raw
    for _ in range(number):
        first, *rest = raw(WORDS_A_DOCUMENT)
        chain = np.cumsum([int(first % WORDS), *STEPS[np.array(rest) % len(STEPS)]]) % WORDS
        yield " ".join(words[i] for i in chain) + "\n"


def write_domains() -> None:
    files.check_named("out", OUT.value, "a directory")
    texts = {"documentation": documentation(Path(sysconfig.get_path("stdlib"))), "language": language(DOCUMENTS)}
    for name, of_domain in texts.items():
        lines = [json.dumps({"text": text}) + "\n" for text in of_domain]
        files.write_atomically(Path(OUT.value) / f"{name}.jsonl", "".join(lines))
        print(f"{OUT.value}/{name}.jsonl: {len(lines):,} documents, {sum(map(len, lines)):,} bytes")
    mean = sum(map(len, vocabulary())) / WORDS + 1
    print(f"the language has {BITS} bits a word, {BITS / mean:.4f} bits a byte")


def main(argv):
    programs.run(write_domains, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
