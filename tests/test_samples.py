"""Samples come back as they were written, and what cannot be asked is refused."""

import dataclasses
import hashlib
import json

import pytest

from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import samples
from hybrid_attn.evals.samples import Sample

ONE = Sample("needle", 64, 0, "The ✨ key is 7.\u2028What is it?", ("7", "sept"), 8, "50", {"depth": 50.0})


def test_what_is_read_is_what_was_written_with_the_hash_of_its_bytes(tmp_path):
    path = tmp_path / "needle.jsonl"
    several = [dataclasses.replace(ONE, index=i) for i in range(3)]
    digest = samples.write(path, several)
    assert samples.read(path) == (several, digest)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest != samples.write(path, several[:2]) and sorted(x.name for x in tmp_path.iterdir()) == [
        "needle.jsonl",
        "needle.sha256",
    ]


def test_samples_that_were_changed_are_refused(tmp_path):
    path = tmp_path / "needle.jsonl"
    samples.write(path, [ONE])
    path.write_text(path.read_text().replace("sept", "huit"))
    with pytest.raises(ValueError, match=r"needle.jsonl was changed after it was written: its hash is \w{12} and was \w{12};"):
        samples.read(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "sample 0 of needle at 64 tokens has an empty prompt"),
        ({"answers": ()}, "has an empty answer, or none"),
        ({"answers": ("7", "")}, "has an empty answer, or none"),
        ({"max_new_tokens": 64}, "max_new_tokens=64 leaves no prompt"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(ONE, **changes)


LIKE_ONE = json.dumps(dataclasses.asdict(ONE))
LINES = ["{}", "[]", "5", "null", "no json", '{"task": "a", "answers": ["b"], "colour": 1}', "[" * 100_000, "\udcff"]
LINES += [LIKE_ONE.replace("64", '"../64"'), LIKE_ONE.replace('"needle"', "5"), LIKE_ONE.replace('["7", "sept"]', "[7]")]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_line_that_is_no_sample_is_named(tmp_path, line):
    path = tmp_path / "some.jsonl"
    samples.write(path, [ONE])
    path.write_bytes(path.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(ValueError, match="some.jsonl, line 2 is no sample: "):
        samples.read(path)


def test_the_mark_that_begins_a_document_and_the_answer_count():
    fits = dataclasses.replace(ONE, prompt="x" * 55)
    samples.check_lengths([fits, fits], ByteTokenizer())
    longer = dataclasses.replace(ONE, prompt="x" * 56, index=4)
    with pytest.raises(ValueError, match="sample 4 of needle does not fit into 64 tokens"):
        samples.check_lengths([fits, longer], ByteTokenizer())
