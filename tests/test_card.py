"""A model card has the stages that were trained and the tables of its evaluation, and no other model's."""

import pytest
from conftest import tiny
from evaluated import TRAINED, everything, store

from hybrid_attn.evals.report import card
from hybrid_attn.model import flops

STAGE = {"microbatches": 1, "mixture": {}}
CHANGES = {"stages": [STAGE | {"steps": 5, "seq_len": 48, "batch": 8}, STAGE | {"steps": 7, "seq_len": 96, "batch": 4}]}


@pytest.fixture
def config():
    return tiny(CHANGES)


@pytest.fixture
def run(tmp_path, config):
    model = {"seq_len": TRAINED, "layers": "LG", "parameters": flops.parameters(config.model)}
    return store(tmp_path / "run", *everything(0.75), step=9, model=model)


def test_a_card_has_the_stages_until_its_step_and_every_section_of_its_evaluation(config, run):
    text = card.card("mine", run, config, 9)
    assert text.startswith("---\nlibrary_name: transformers\n") and "\n# mine\n" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(("| 1 ", "| 2 "))]
    assert [row[1:5] for row in rows[:2]] == [["5", "48", "8", "next_token"], ["4", "96", "4", "next_token"]]
    assert f"{flops.parameters(config.model):,} parameters" in text and "4K tokens in a sequence" in text
    for title in ("RULER", "Needle", "Loss"):
        assert title in text
    assert "<script>" not in text and "Provenance" not in text


def test_an_imported_model_has_no_table_of_stages(config, run):
    assert "## Training" not in card.card("mine", run, config, 0)


def test_an_evaluation_of_another_step_or_model_is_refused(config, run):
    card.check_is_of(run, config, 9, "--evaluation=x")
    with pytest.raises(ValueError, match="--evaluation=x is of step 9, and the export of step 8"):
        card.check_is_of(run, config, 8, "--evaluation=x")
    with pytest.raises(ValueError, match="parameters, and the export has"):
        card.check_is_of(run, tiny(CHANGES | {"model.d_ff": 64}), 9, "--evaluation=x")
