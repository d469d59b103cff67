"""The domains that tools/write_domains.py writes: documentation strings, and a language of known entropy."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import tool


def test_a_document_has_the_documentation_strings_of_a_file_below_a_folder(tmp_path):
    sources = {
        "package/a.py": '"""Of a module."""\nx = "none"\nclass A:\n    """Of a class."""\n    def f(self):\n        "Of f."\n',
        "package/older/b.py": "print 'it does not parse'\n",
        "package/older/c.py": "x = 1\n",
        "encodings/d.py": '"""Of another domain."""\n',
        "site-packages/e.py": '"""Of nobody."""\n',
        "module.py": '"""Of a top-level module."""\n',
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with tool("write_domains") as program:
        assert list(program.documentation(tmp_path)) == ["Of a module.\n\nOf a class.\n\nOf f.\n"]


def test_a_word_of_the_language_has_its_entropy_and_all_words_are_as_frequent():
    with tool("write_domains") as program:
        chains = [text.split() for text in program.language(200)]
        vocabulary = set(program.vocabulary())
        assert {word for chain in chains for word in chain} == vocabulary and len(vocabulary) == program.WORDS
        pairs = Counter(pair for chain in chains for pair in zip(chain, chain[1:], strict=False))
        number, firsts = sum(pairs.values()), Counter()
        for (first, _), count in pairs.items():
            firsts[first] += count
        bits = -sum(count * np.log2(count / firsts[first]) for (first, _), count in pairs.items()) / number
        assert bits == pytest.approx(program.BITS, abs=0.01) and len(pairs) == 4 * program.WORDS
        assert min(firsts.values()) > 0.8 * number / program.WORDS


@pytest.mark.slow  # it parses the standard library twice
def test_the_same_files_are_written_again(tmp_path, capsys):
    with tool("write_domains") as program:
        for _ in range(2):
            program.flags.FLAGS(["write_domains", f"--out={tmp_path}"])
            program.write_domains()
            written = {path.name: path.read_text() for path in tmp_path.iterdir()}
            assert set(written) == {"documentation.jsonl", "language.jsonl"}
    assert all(json.loads(line)["text"] for text in written.values() for line in text.splitlines())
    first, second = np.array_split(capsys.readouterr().out.splitlines(), 2)
    assert first.tolist() == second.tolist() and len(first) == 3
