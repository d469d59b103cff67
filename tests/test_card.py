"""A model card has the stages that were trained and the tables of its evaluation, and no other model's."""

import pytest
from conftest import tiny
from evaluated import TRAINED, everything, store

from hybrid_attn.evals.report import card
from hybrid_attn.model import flops

STAGE = {"microbatches": 1, "mixture": {}}
CHANGES = {"stages": [STAGE | {"steps": 5, "seq_len": 48, "batch": 8}, STAGE | {"steps": 7, "seq_len": 96, "batch": 4}]}


@pytest.fixture(scope="module")
def config():
    return tiny(CHANGES)


@pytest.fixture(scope="module")
def run(tmp_path_factory, config):
    model = {"seq_len": TRAINED, "layers": "LG", "parameters": flops.parameters(config.model)}
    return store(tmp_path_factory.mktemp("card") / "run", *everything(0.75), step=9, model=model)


def test_a_card_has_the_stages_until_its_step_and_every_section_of_its_evaluation(config, run):
    text = card.card("mine", run, config, 9)
    assert text.startswith("---\nlibrary_name: transformers\n") and "\n# mine\n" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(("| 1 ", "| 2 "))]
    assert [row[1:5] for row in rows[:2]] == [["5", "48", "8", "next_token"], ["4", "96", "4", "next_token"]]
    assert f"{flops.parameters(config.model):,} parameters" in text and "4K tokens in a sequence" in text
    for title in ("RULER", "Needle", "Loss"):
        assert title in text
    assert "<script>" not in text and "Provenance" not in text


def test_a_card_names_what_the_training_began_with_and_its_head_the_id_on_the_hub(config, run):
    for hub_id in ("meta-llama/Llama-3.1-8B", None):
        origin = card.Origin("llama from Llama-3.1-8B", hub_id)
        lines = [line for line in card.fields(origin).splitlines() if "base_model" in line]
        assert lines == [f"base_model: {hub_id}"] * (hub_id is not None)
        assert "- initial parameters: llama from Llama-3.1-8B" in card.facts(run, config, origin)
        assert ("names no base_model" in str(card.limits(origin))) == (hub_id is None)


def test_an_imported_model_has_no_table_of_stages(config, run):
    text = card.card("mine", run, config, 0)
    assert "## Training" not in text and "base_model" not in text


def test_an_evaluation_of_another_step_or_model_is_refused(config, run):
    card.check_is_of(run, config, 9, "--evaluation=x")
    with pytest.raises(ValueError, match="--evaluation=x is of step 9, and the export of step 8"):
        card.check_is_of(run, config, 8, "--evaluation=x")
    with pytest.raises(ValueError, match="parameters, and the export has"):
        card.check_is_of(run, tiny(CHANGES | {"model.d_ff": 64}), 9, "--evaluation=x")
