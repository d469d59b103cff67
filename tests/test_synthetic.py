"""Synthetic sequences: every answer follows from the sequence and not from less, and a sequence is a function of its number."""

import re

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny

from configs import base
from hybrid_attn import config, trees
from hybrid_attn.data import corpora, documents, pipeline
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.synthetic import TASKS, SyntheticSequences, Task
from hybrid_attn.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
COUNT = 300


def sequences_of(name, pairs=4, seq_len=64, seed=7, count=COUNT):
    return SyntheticSequences(Task(name, pairs), seq_len, seed).read([(i, 0, seq_len) for i in range(count)])


def content(sequence):
    """Tokens, targets and weights before the padding, after checks that hold for every sequence."""
    n = int(sequence["segments"].sum())
    assert sequence["tokens"][0] == BYTES.bos
    np.testing.assert_array_equal(sequence["segments"], np.arange(len(sequence["segments"])) < n)
    np.testing.assert_array_equal(sequence["positions"][:n], np.arange(n))
    np.testing.assert_array_equal(sequence["bytes"], sequence["weights"])
    assert set(sequence["weights"]) <= {0.0, 1.0} and not sequence["weights"][n:].any()
    assert not sequence["targets"][sequence["weights"] == 0].any()
    return sequence["tokens"][:n], sequence["targets"][:n], sequence["weights"][:n] > 0


@pytest.mark.parametrize("seed", [7, None])
@pytest.mark.parametrize("pairs", [1, 4, 7])
def test_recall_hides_pairs_in_noise_and_queries_them_with_replacement(pairs, seed):
    positions, distinct = set(), []
    for sequence in sequences_of("recall", pairs, seed=seed):
        tokens, targets, counts = content(sequence)
        text = bytes(tokens[1:].tolist()).decode()
        body, queries = re.fullmatch(r"([^?]*)((?:\?[A-Z][a-z]){5}\?[A-Z])", text).groups()
        value_of = dict(re.findall("([A-Z])([a-z])", body))
        assert len(value_of) == len(set(value_of.values())) == pairs and sum(map(str.isalpha, body)) == 2 * pairs
        assert all(match.start() % 2 == 0 for match in re.finditer("[A-Z]", body))
        positions |= {match.start() for match in re.finditer("[A-Z]", body)}
        keys = re.findall(r"\?([A-Z])", queries)
        expected = [i for i, key in enumerate(keys) if seed or key not in keys[:i]]  # an answer follows its query
        np.testing.assert_array_equal(np.flatnonzero(counts), len(body) + 2 + 3 * np.array(expected))
        assert [chr(x) for x in targets[counts]] == [value_of[keys[i]] for i in expected]
        assert [chr(x) for x in tokens[len(body) + 3 :: 3]] == [value_of[key] for key in keys[:5]]
        distinct.append(len(set(keys)))
    assert set(range(0, 36, 2)) <= positions <= set(range(0, 46, 2))  # a sequence for training may be shorter
    assert np.mean(distinct) == pytest.approx(pairs * (1 - (1 - 1 / pairs) ** 6), rel=0.05)


def test_mqar_has_the_value_as_target_where_its_key_comes_again_and_never_as_a_token():
    for sequence in sequences_of("mqar", 3):
        tokens, targets, counts = content(sequence)
        keys, values = tokens[1:7:2], tokens[2:8:2]
        assert len(set(keys)) == len(set(values)) == 3 and (0 < keys).all() and (keys < 128).all()
        assert (values >= 128).all() and (values < 256).all() and (tokens[1:] < 256).all()
        assert sorted(tokens[counts]) == sorted(keys)
        assert (np.flatnonzero(counts) % 2 == 1).all() and np.flatnonzero(counts)[0] >= 7
        assert {*zip(tokens[counts], targets[counts], strict=True)} == {*zip(keys, values, strict=True)}


def test_mqar_queries_at_gaps_sampled_from_a_power_law_without_replacement():
    synthetic = np.array(
        [(np.flatnonzero(sequence["weights"]) - 7) // 2 for sequence in sequences_of("mqar", 3, seed=None, count=2000)]
    )
    rng, p = np.random.default_rng(0), np.arange(1, 29) ** -0.99
    expected = np.array([rng.choice(28, 3, replace=False, p=p / p.sum()) for _ in range(4000)])
    assert synthetic.min() == 0 and synthetic.max() == 27
    for least in (1, 4, 12):
        assert np.mean(synthetic < least) == pytest.approx(np.mean(expected < least), abs=0.02)


def test_the_targets_of_copy_are_the_letters_again_in_order():
    lengths = set()
    for sequence in sequences_of("copy"):
        tokens, targets, counts = content(sequence)
        letters, again = bytes(tokens[1:].tolist()).decode().split("?")
        assert set(letters) <= set("ABCDEFGHabcdefgh") and again == letters[:-1]
        assert bytes(targets[counts].tolist()).decode() == letters and counts[-len(letters) :].all()
        lengths.add(len(letters))
    assert lengths == set(range(15, 32))


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_tracking_hides_chains_of_assignments_and_its_targets_are_the_variables_of_a_value_in_order(pairs):
    where, turns = set(), set()
    for sequence in sequences_of("tracking", pairs, seq_len=128):
        tokens, targets, counts = content(sequence)
        text = bytes(tokens[1:].tolist()).decode()
        body, value, first_three = re.fullmatch(r"([^?]*)\?([a-h])([A-P]{3})", text).groups()
        assert sum(map(str.isalpha, body)) == 2 * 4 * pairs and body.count("=") == 4 * pairs
        holders, chain_of = {}, {}
        for match in re.finditer("([A-P])=([A-Pa-h])", body):
            assert match.start() % 3 == 0 and match[1] not in chain_of
            chain_of[match[1]] = chain_of.get(match[2], match[2])  # in reading order: what a chain goes on from stands before
            holders.setdefault(chain_of[match[1]], []).append(match[1])
            where.add(match.start() // 3)
        turns.add(tuple(chain_of.values()))
        assert set(map(len, holders.values())) == {4} and len(holders) == pairs and "".join(holders).islower()
        assert [chr(x) for x in targets[counts]] == holders[value] and "".join(holders[value][:3]) == first_three
        np.testing.assert_array_equal(np.flatnonzero(counts), len(body) + 2 + np.arange(4))
    assert set(range(35)) <= where <= set(range(40)) and len(turns) > (7 if pairs == 1 else 200)


@pytest.mark.parametrize("name", TASKS)
def test_sequences_for_training_have_all_lengths_from_half_on_and_held_out_ones_are_full(name):
    lengths = [int(sequence["segments"].sum()) for sequence in sequences_of(name, 2)]
    short = name == "copy"  # an even number of tokens holds no more letters than the one below
    assert min(lengths) == 32 - short and max(lengths) == 64 - short
    assert np.mean(lengths) == pytest.approx(48, abs=1.5)
    assert {int(sequence["segments"].sum()) for sequence in sequences_of(name, 2, seed=None)} == {64 - short}


@pytest.mark.parametrize("name", TASKS)
def test_a_sequence_follows_from_its_number_and_no_two_are_the_same(name):
    seeds = (0, 7, 64, None)  # the first is the default of a config, the third is the length of a sequence
    contents = [sequence["tokens"].tobytes() for seed in seeds for sequence in sequences_of(name, 2, seed=seed)]
    assert len(set(contents)) == 4 * COUNT
    sequences = SyntheticSequences(Task(name, 2), 64, 7)
    (full,) = sequences.read([(123, 0, 64)])
    for part, (start, stop) in zip(sequences.read([(123, 9, 40), (123, 40, 64)]), ((9, 40), (40, 64)), strict=True):
        assert {key: value.dtype for key, value in part.items()} == {key: value.dtype for key, value in full.items()}
        for key, values in part.items():
            np.testing.assert_array_equal(values, full[key][start:stop])


def test_sequences_are_the_same_under_every_version_of_numpy():
    tokens, _, _ = content(SyntheticSequences(Task("recall", 4), 64, 5).read([(0, 0, 64)])[0])
    assert BYTES.decode(tokens) == r'Fd")=([.{%:+Gh\,Bf%)]^\,,&Cb^=+.^{|?Cb?Gh?Bf?Gh?Cb?G'
    tokens, targets, counts = content(SyntheticSequences(Task("mqar", 4), 64, 5).read([(0, 0, 64)])[0])
    assert targets[counts].tolist() == [138, 151, 159, 213]
    tokens, targets, counts = content(SyntheticSequences(Task("tracking", 2), 64, 5).read([(1, 0, 64)])[0])
    assert BYTES.decode(tokens) == " `/K=cO=eG=KA=OH=AD=H%^|N=GJ=N?eOAH" and bytes(targets[counts].tolist()) == b"OAHD"


def mixed_config():
    sources = {"text": base.source(), "probe": base.source(task="recall", pairs=3)}
    stages = [
        {"steps": 3, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {"text": 0.5, "probe": 0.5}},
        {"steps": 2, "seq_len": 64, "batch": 4, "microbatches": 1, "mixture": {"probe": 1.0}},
    ]
    return tiny({"data.sources": sources, "stages": stages})


def test_a_stage_mixes_tasks_with_documents_and_resumes_anywhere_on_any_mesh():
    c = mixed_config()
    text = documents.in_memory([np.arange(200, dtype=np.uint16)], [1])
    probe = corpora.load(c.data, ["probe"], BYTES)["probe"].training
    stages = pipeline.stage_sequences(c, {"text": text, "probe": probe}, BYTES)
    straight = dict(jax.device_get(list(pipeline.batches(c, stages, [mesh_of()] * 2, 0))))
    again = pipeline.stage_sequences(c, {"text": text, "probe": probe}, BYTES)
    resumed = dict(jax.device_get(list(pipeline.batches(c, again, [mesh_of(data=2, context=2)] * 2, 2))))
    assert list(straight) == [0, 1, 2, 3, 4] and list(resumed) == [2, 3, 4]
    for step, batch in resumed.items():
        for name, values in batch.items():
            np.testing.assert_array_equal(values, straight[step][name], err_msg=f"{name} of step {step}")
    assert [int((batch["tokens"][:, 0] == BYTES.bos).sum()) for batch in straight.values()] == [4, 4, 4, 4, 4]
    contents = {sequence.tobytes() for batch in straight.values() for sequence in batch["tokens"] if sequence[0] == BYTES.bos}
    assert len(contents) == 20


def test_the_identity_of_a_stage_has_the_task_and_its_pairs():
    c = mixed_config()
    changed = config.to_dict(c)
    changed["data"]["sources"]["probe"]["pairs"] = 2
    text = documents.in_memory([np.arange(200, dtype=np.uint16)], [1])
    old, new = (
        pipeline.identities(x, {"text": text, "probe": corpora.load(x.data, ["probe"], BYTES)["probe"].training}, BYTES)[1]
        for x in (c, config.build(changed))
    )
    assert trees.differences(old, new) == ["documents.probe: recall of 3 pairs -> recall of 2 pairs"]


@pytest.mark.parametrize("name", TASKS)
def test_the_shortest_sequences_that_a_config_may_have_can_be_generated_and_shorter_ones_are_refused(name):
    c = config.build(base.get_config())
    source = config.build(config.to_dict(c) | {"data": config.to_dict(c)["data"] | {"sources": {"x": base.source(task=name)}}})
    least = config.shortest_sequence(name, source.data.sources["x"].pairs)
    for sequence in sequences_of(name, seq_len=2 * least):
        content(sequence)
    changes = {"data.sources": {"x": base.source(task=name)}, "evals.lengths": (0.5,)}
    stage = {"steps": 1, "batch": 8, "microbatches": 1, "mixture": {}}
    assert tiny(changes | {"stages": [stage | {"seq_len": 2 * least}]})
    message = (
        f"stages.0..seq_len {2 * least - 1} is too short for data.sources.x: .*from half of that on, needs {2 * least} tokens"
    )
    with pytest.raises(ValueError, match=message):
        tiny(changes | {"stages": [stage | {"seq_len": 2 * least - 1}]})
    with pytest.raises(ValueError, match=f"evals.lengths: 0.4 .* is too short for data.sources.x: .* needs {least} tokens"):
        tiny(changes | {"stages": [stage | {"seq_len": 2 * least}], "evals.lengths": (0.4,)})


def test_documents_and_tasks_have_sequences_of_the_same_arrays():
    text = documents.in_memory([np.arange(200, dtype=np.uint16)], [1])
    (sequence,) = PackedSequences(text, 64, None, BYTES.byte_lengths).read([(0, 0, 64)])
    (synthetic,) = sequences_of("recall", count=1)
    assert {name: (x.dtype, x.shape) for name, x in sequence.items()} == {
        name: (x.dtype, x.shape) for name, x in synthetic.items()
    }
