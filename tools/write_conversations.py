"""Writes conversations and preferences that every machine can make: python tools/write_conversations.py --out=runs/texts

chats.jsonl and preferences.jsonl have a question about each public name of a function, class or module in the standard library
of this Python, once, if the first sentence of its documentation string has 40 to 200 bytes: that is the answer. The rejected
completion of a preference is the same sentence with its words in reverse order, so that its length tells nothing. Half of the
questions are chats and half are preferences. tools/prepare_data.py makes stores of both, and configs/end_to_end.py trains on
them.
"""

import json
import sysconfig
import zlib
from pathlib import Path

from absl import app, flags

from hybrid_attn import files, programs
from hybrid_attn.data import sources
from hybrid_attn.data.docstrings import docstrings_of

OUT = flags.DEFINE_string("out", "runs/texts", "Directory of the two files.")
SENTENCE = 40, 200  # bytes of an answer


def answers(root: Path) -> dict[str, str]:
    """The first sentence about each name below `root` that has one of this length; a sentence belongs to one name."""
    of_names, names = {}, {}
    for path in sorted(root.glob("**/*.py")):
        if sources.NOT_SOURCES.isdisjoint(path.relative_to(root).parts):
            for name, text in docstrings_of(path):
                of_names.setdefault(name, first_sentence(text))
    for name, sentence in of_names.items():
        if not name.startswith("_") and SENTENCE[0] <= len(sentence.encode()) <= SENTENCE[1]:
            names.setdefault(sentence, name)
    return {name: sentence for sentence, name in names.items()}


def first_sentence(text: str) -> str:
    """The first paragraph on one line, up to its first full stop."""
    line = " ".join(text.split("\n\n")[0].split())
    return line.split(". ")[0].rstrip(".") + "."


def is_chat(sentence: str) -> bool:
    return zlib.crc32(sentence.encode()) % 2 == 0


def question(name: str) -> dict:
    return {"role": "user", "content": f"What is {name}?"}


def chat(name: str, sentence: str) -> dict:
    return {"messages": [question(name), {"role": "assistant", "content": sentence}]}


def preference(name: str, sentence: str) -> dict:
    return {"prompt": [question(name)], "chosen": sentence, "rejected": " ".join(reversed(sentence.split()))}


def write_conversations() -> None:
    files.check_named("out", OUT.value, "a directory")
    of_names = answers(Path(sysconfig.get_path("stdlib")))
    records = {
        "chats": [chat(*item) for item in of_names.items() if is_chat(item[1])],
        "preferences": [preference(*item) for item in of_names.items() if not is_chat(item[1])],
    }
    for file, of_file in records.items():
        files.write_atomically(Path(OUT.value) / f"{file}.jsonl", "".join(json.dumps(x) + "\n" for x in of_file))
        print(f"{OUT.value}/{file}.jsonl: {len(of_file):,} records")


def main(argv):
    programs.run(write_conversations, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
