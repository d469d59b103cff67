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
from hybrid_attn.parallel.identity import references_identity
from hybrid_attn.programs import parse
from hybrid_attn.train import cost, loop, resume
from hybrid_attn.train.references import check_model, check_stages, read
from hybrid_attn.train.step import extras_at

SFT = {"steps": 2, "seq_len": 64, "batch": 8, "microbatches": 1, "mixture": {}, "objective": "sft"}
RUN = {"model.pattern": "L", "model.num_layers": 1, "evals.names": (), "train.log_every": 1, "optim.lr": 3e-3}


def config_of(path, stages=(SFT,), **changes):
    sources = {"data.sources": {"pairs": base.source(store=path)}, "data.holdout": 0.2}
    return tiny(RUN | sources | {"stages": list(stages)} | changes)


def of_pairs(path, begin, reference, **changes):
    dpo = SFT | {"steps": 3, "objective": "dpo", "preference": base.preference(beta=0.3, reference=reference)}
    return config_of(path, [dpo], **{"init_from.path": str(begin)} | changes)


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
    function = resume.function_of(config_of(path).model)
    made = references.References(values, "f" * 64, "runs/sft/checkpoints step 2", function)
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


BEGAN = {"path": "runs/sft", "step": 2, "fingerprint": "f" * 64, "new": []}


def loaded_of(c):
    return corpora.load(c.data, ["pairs"], load_tokenizer("bytes"))


def test_references_that_are_missing_damaged_or_of_another_store_are_refused_until_their_stage_is_over(tmp_path):
    path, values = written(tmp_path)
    c = of_pairs(path, "runs/sft", "store")
    assert read(c, loaded_of(c), 2)["pairs"].fingerprint == "f" * 64
    about, file = tmp_path / "store" / references.ABOUT, tmp_path / "store" / references.VALUES
    text = about.read_text()
    for change, message in (
        (lambda: file.write_bytes(bytes(values.nbytes)), r"references\.f32 was changed; make them with"),
        (
            lambda: about.write_text(text.replace('"fingerprint"', '"x"')),
            r"references\.json does not say its fingerprint; make",
        ),
        (lambda: about.write_text(text.replace('"store": "', '"store": "x')), "is of another store than the one beside it"),
        (about.unlink, r"has no log-probabilities of a reference; make them with tools/prepare_references\.py --store="),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            read(c, loaded_of(c), 2)
    assert read(c, loaded_of(c), 3) == {} == read(of_pairs(path, "runs/sft", "frozen"), loaded_of(c), 0)


LORA = {"model.adapter.type": "lora", "model.adapter.targets": ("*/q",)}
ADDED = [f"periods/L0/attention/q_adapter/{name}" for name in "ab"]


@pytest.mark.parametrize("changes, began", [({}, {}), ({"model.init_std": 0.1}, {}), (LORA, {"new": ADDED})])
def test_references_of_the_model_that_the_stage_begins_with_are_read(changes, began, tmp_path):
    c = of_pairs(written(tmp_path)[0], "runs/sft", "store", **changes)
    check_model(c, read(c, loaded_of(c), 0), {"init_from": BEGAN | began})


@pytest.mark.parametrize(
    "changes, began, message",
    [
        ({}, {"fingerprint": "e" * 64}, "fingerprint ffffffffffff, and the run began with runs/sft step 2, fingerprint eeee"),
        ({}, {"new": ["final_norm/weight"]}, r"and final_norm/weight are new here; use reference='frozen'"),
        ({"model.low_rank.rank_fraction": 0.5}, {}, "the first stage has another config of the model than that checkpoint"),
        ({"model.kinds.L.window": 9}, {}, "the first stage has another config of the model than that checkpoint"),
        (LORA, {}, "the first stage has another config of the model than that checkpoint"),
        ({}, None, r"this workdir began with no init_from\.path; start the run in another --workdir"),
    ],
)
def test_references_of_another_model_than_the_stage_begins_with_are_refused(changes, began, message, tmp_path):
    c = of_pairs(written(tmp_path)[0], "runs/sft", "store", **changes)
    with pytest.raises(ValueError, match=message):
        check_model(c, read(c, loaded_of(c), 0), {} if began is None else {"init_from": BEGAN | began})


def test_sources_without_pairs_and_stores_on_another_machine_are_refused(corpus):
    c = of_pairs("a", "b", "store", **{"data.sources": {"text": base.source(paths=(corpus,))}})
    with pytest.raises(ValueError, match="needs pairs, and these data.sources hold none: text; make stores of pairs"):
        loop.load_data(c)
    with pytest.raises(ValueError, match="--store=gs://a/b is no directory; mount the bucket, and name the directory there"):
        prepared("gs://a/b", "runs/sft")


def test_processes_compare_the_references_that_they_read(tmp_path):
    c = of_pairs(written(tmp_path)[0], "runs/sft", "store")
    made = read(c, loaded_of(c), 0)
    other = {"pairs": made["pairs"]._replace(log_probs=made["pairs"].log_probs + 1)}
    different = dict(references_identity(made).items() - references_identity(other).items())
    assert [*different] == ["log-probabilities of the references of pairs"] and references_identity({}) == {}


def test_a_stage_that_does_not_begin_with_a_checkpoint_is_refused():
    check_stages(of_pairs("a", "b", "store"))
    dpo = SFT | {"objective": "dpo", "preference": base.preference(reference="store")}
    for stages, index in (([dpo], 0), ([SFT, dpo], 1)):
        begins = r"reference='store' is the model of a checkpoint, and the stage does not begin with one; give the stage"
        with pytest.raises(ValueError, match=rf"stages\[{index}\]\.preference\.{begins}"):
            check_stages(config_of("a", stages))
    with pytest.raises(ValueError, match="the stage begins with another model; use reference='frozen'"):
        check_stages(of_pairs("a", "b", "store", **{"init_from.rename": ("a -> b",)}))
