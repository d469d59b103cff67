"""Log-probabilities of a reference beside a token store: the loss is that of a reference in the program."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import tiny, tool
from prepared import pairs_store

from configs import base
from hybrid_attn.data import corpora, references, store
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.programs import parse
from hybrid_attn.train import cost, loop
from hybrid_attn.train.references import check_fingerprints, check_stages
from hybrid_attn.train.step import extras_at

SFT = {"steps": 2, "seq_len": 64, "batch": 8, "microbatches": 1, "mixture": {}, "objective": "sft"}
RUN = {"model.pattern": "L", "model.num_layers": 1, "evals.names": (), "train.log_every": 1, "optim.lr": 3e-3}


def config_of(path, stages=(SFT,), **changes):
    sources = {"data.sources": {"pairs": base.source(store=path)}, "data.holdout": 0.2}
    return tiny(RUN | sources | {"stages": list(stages)} | changes)


def of_pairs(path, begin, reference, **stage):
    dpo = SFT | {"steps": 3, "objective": "dpo", "preference": base.preference(beta=0.3, reference=reference)} | stage
    return config_of(path, [dpo], **{"init_from.path": str(begin)})


def prepared(path, checkpoint):
    with tool("prepare_references") as module:
        parse(["prepare_references", f"--store={path}", f"--checkpoint={checkpoint}", "--batch_size=1"])
        module.prepare()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A store with references, and the workdir of the run that they are of."""
    folder = tmp_path_factory.mktemp("references")
    path = pairs_store(folder)
    assert loop.train(config_of(path), folder / "sft")
    prepared(path, folder / "sft")
    return path, folder / "sft"


@pytest.mark.slow
@pytest.mark.usefixtures("known_peak_and_no_pictures")
@pytest.mark.parametrize("means", [False, True])
def test_losses_are_those_of_a_reference_in_the_program(means, begun, tmp_path):
    losses = []
    for reference in ("frozen", "store"):
        c = of_pairs(*begun, reference)
        changed = dataclasses.replace(c.stages[0].preference, mean_log_probs=means)
        c = dataclasses.replace(c, stages=(dataclasses.replace(c.stages[0], preference=changed),))
        assert loop.train(c, tmp_path / reference)
        lines = [json.loads(line) for line in (tmp_path / reference / "metrics.jsonl").read_text().splitlines()]
        losses.append([[line[name] for name in ("loss", "log_ratio", "grad_norm")] for line in lines])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    assert losses[0][-1] != losses[0][0] and np.isclose(losses[1][0][0], np.log(2), atol=1e-4)


def written(folder):
    """A store with made-up references, and these."""
    path = pairs_store(folder)
    values = np.random.default_rng(0).normal(size=len(store.load(path))).astype(np.float32)
    made = references.References(values, "f" * 64, "runs/sft/checkpoints step 2")
    references.write(folder / "store", made, store.read_manifest(path).identity)
    return path, values


def test_a_sequence_has_the_log_probability_of_a_document_at_its_first_token(tmp_path):
    path, values = written(tmp_path)
    documents = store.load(path).split(0.5, False)
    sequences = PackedSequences(documents, 64, 3, load_tokenizer("bytes").byte_lengths, references=True)
    for index in range(len(sequences)):
        complete, *parts = sequences.read([(index, 0, 64), (index, 0, 17), (index, 17, 64)])
        np.testing.assert_array_equal(np.concatenate([part["references"] for part in parts]), complete["references"])
        at = np.flatnonzero(complete["references"])
        np.testing.assert_array_equal(at, np.flatnonzero((complete["positions"] == 0) & (complete["segments"] > 0)))
        expected = values[documents.numbers[sequences.documents_of(index)]]
        np.testing.assert_array_equal(complete["references"][at], expected)


def test_a_stage_with_stored_references_has_no_reference_in_the_state_and_no_forward_pass_of_it(tmp_path):
    frozen, stored = (of_pairs("a", "b", reference) for reference in ("frozen", "store"))
    assert set(extras_at(frozen, 0)) == {"reference"} and extras_at(stored, 0) == {}
    assert cost.flops_per_token(frozen.at(0)) == pytest.approx(4 / 3 * cost.flops_per_token(stored.at(0)))


def test_references_that_are_missing_changed_or_of_another_store_or_model_are_refused(tmp_path):
    path, values = written(tmp_path)
    c = of_pairs(path, "runs/sft", "store")
    loaded = corpora.load(c.data, ["pairs"], load_tokenizer("bytes"))
    began = {"init_from": {"path": "runs/sft", "step": 2, "fingerprint": "f" * 64}}
    check_fingerprints(c, loaded, began)
    began["init_from"]["fingerprint"] = "e" * 64
    with pytest.raises(ValueError, match=r"fingerprint ffffffffffff, and the run began with runs/sft step 2, fingerprint eeee"):
        check_fingerprints(c, loaded, began)
    about, file = tmp_path / "store" / references.ABOUT, tmp_path / "store" / references.VALUES
    text = about.read_text()
    for change, message in (
        (lambda: file.write_bytes(bytes(values.nbytes)), r"references\.f32 was changed; make them with"),
        (lambda: about.write_text(text.replace('"store": "', '"store": "x')), "is of another store than the one beside it"),
        (about.unlink, r"has no log-probabilities of a reference; make them with tools/prepare_references\.py --store="),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            loop.load_data(c)


def test_a_stage_that_does_not_begin_with_a_checkpoint_is_refused():
    check_stages(of_pairs("a", "b", "store"))
    dpo = SFT | {"objective": "dpo", "preference": base.preference(reference="store")}
    for stages, index in (([dpo], 0), ([SFT, dpo], 1)):
        begins = r"reference='store' is the model of a checkpoint, and the stage does not begin with one; give the stage"
        with pytest.raises(ValueError, match=rf"stages\[{index}\]\.preference\.{begins}"):
            check_stages(config_of("a", stages))
