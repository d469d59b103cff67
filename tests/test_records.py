"""The studies of the repository, and the rules of records."""

import re
import shutil
from pathlib import Path

import pytest

from hybrid_attn.studies import page, runs, study
from hybrid_attn.studies.results import Results, current, read
from studies.window import pairs_seen

STUDIES = sorted((Path(__file__).parents[1] / "studies").glob("*/study.py"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_a_study_of_the_repository_builds_and_its_recorded_lines_are_of_its_configs(path, monkeypatch):
    monkeypatch.chdir(path.parents[2])
    folder = path.parent.relative_to(Path.cwd())
    chosen, lines = study.load(folder), read(folder)
    seeds = max([chosen.seeds, *(line["seed"] + 1 for line in lines)])
    hashes = {(x.cell, x.seed): x.hash for x in runs.runs_of(chosen, folder, Path("runs"), list(chosen.cells), seeds)}
    counted, others = current(chosen, lines, hashes)
    assert not others and len(set(hashes.values())) == len(hashes)
    if lines:
        assert (folder / page.PLOT).exists()
        assert page.table(counted) in (folder / chosen.page).read_text()


def test_the_shares_of_pairs_that_a_window_shows_are_those_of_the_page():
    text = (STUDIES[0].parents[1] / "window" / "README.md").read_text()
    near, far = map(pairs_seen.shares, pairs_seen.LENGTHS)
    assert f"{near[48]:.2f} stand within 48 tokens before the question in sequences of 64 tokens, and {far[48]:.2f} in" in text
    assert f"A window of 16 shows {near[16]:.2f} of the pairs at 64 tokens" in text


ROW = """
from studies.layouts import config
from hybrid_attn.configs import base
def get_config():
    c = config.get_config()
    {}
    return c
"""
BROKEN = {
    "c.stages[0].seq_len = 128": "mine.py trains on sequences of 128 tokens, and at most 64 are allowed",
    "c.stages[0].seq_len = 60": "mine.py changes what all rows share (the baseline's -> its own): stages[-1].seq_len: 64 -> 60",
    "c.evals.tokens = 1024": "evals.tokens: 65536 -> 1024",
    "c.init_from.path = 'runs/other'": "init_from.path: None -> runs/other",
    "c.data.sources.probe.pairs = 2": "data.sources.probe.pairs: 4 -> 2",
    "c.data.sources['text'] = base.source()": "mine.py reads documents in data.sources.text; give each source a task",
    "c.stages[0].mixture.probe = 0.0": "mine.py has no source probe in its last stage, whose sources are evaluated",
}


@pytest.fixture
def records(tmp_path, monkeypatch):
    """A copy of the folder of records."""
    monkeypatch.chdir(Path(__file__).parents[1])
    shutil.copytree("studies/records", tmp_path / "records", ignore=shutil.ignore_patterns("results.jsonl"))
    return tmp_path / "records"


def test_a_record_may_not_have_longer_sequences_or_more_information(records):
    (records / "mine.py").write_text(ROW.format("c.optim.lr = 0.01"))
    assert "mine" in study.load(records).cells
    for line, said in BROKEN.items():
        (records / "mine.py").write_text(ROW.format(line))
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            study.load(records)
        assert "\n" not in str(caught.value)
    (records / "mine.py").rename(records / "rnope_swa.py")
    with pytest.raises(ValueError, match=r"rnope_swa\.py has the name of the baseline"):
        study.load(records)


def test_a_record_is_compared_with_the_best_row_that_learned_in_all_seeds(records):
    for name in ("guess", "half", "short", "mine"):
        (records / f"{name}.py").write_text(ROW.format("c.optim.lr = 0.01"))
    chosen, merit = study.load(records), "recall per CPU-minute"
    values = {
        "rnope_swa": [0.4, 0.41, 0.42],
        "guess": [9, 9, 9],
        "half": [2, 2.1, 2.2],
        "short": [3, 3],
        "mine": [0.8, 0.83, 0.86],
    }
    right = {"guess": [0.1] * 3, "half": [1, 1, 0.5]}
    lines = [
        {"cell": cell, "seed": seed, "metrics": {"recall at 1,024": right.get(cell, [1] * 3)[seed], merit: x}}
        for cell, by_seed in values.items()
        for seed, x in enumerate(by_seed)
    ]
    said = page.verdicts(Results(chosen, lines))
    assert len(said) == 1 and re.match(r"shown \(p = 0\.00\d+, n = 3 seeds\): mine beats rnope_swa\. recall per CPU", said[0])
