"""The study of over-optimisation: the true quality of a completion, its table, and a short run of it."""

import json

import numpy as np
import pytest
from conftest import tool

from hybrid_attn.programs import parse


@pytest.fixture
def study(tmp_path):
    with tool("over_optimisation") as module:
        parse(["over_optimisation", f"--out={tmp_path}", "--seeds=1", "--steps=4", "--every=2", "--samples=8"])
        yield module


def test_the_quality_is_the_share_of_transitions_of_the_chain(study):
    chain = [0]
    for _ in range(study.LENGTH):
        chain.append(int(study.followers(chain[-1])[len(chain) % 2]))
    assert study.quality(chain[0], chain[1:]) == 1
    wrong = next(x for x in range(24) if x not in study.followers(chain[-2]))
    assert study.quality(chain[0], [*chain[1:-1], wrong]) == 1 - 1 / study.LENGTH
    assert study.quality(chain[0], chain[1:7]) == 6 / study.LENGTH  # a completion that ends early
    assert study.quality(chain[0], [ord("?")] * study.LENGTH) == 0
    assert [study.first_letters(x) for x in ([], [1, 2, 160, 1], [-1], [7, 24])] == [0, 2, 0, 1]
    rng = np.random.default_rng(1)
    shares = [study.quality(0, study.sampled_letters(rng, 0, study.LENGTH)) for _ in range(1000)]
    assert np.mean(shares) == pytest.approx(1 / 2 + 1 / 2 * 2 / 24, abs=0.02)


def test_a_row_has_the_qualities_at_start_peak_and_end_and_at_the_turns(study):
    columns = {
        "quality": (0.5, 0.9, 0.6, 0.2),
        "margin": (1.0, 2.0, 3.0, 4.0),
        "letters": (12,) * 4,
        "chosen": (-1, -2, -3, -4),
    }
    columns |= {"entropy_bits": (1.0, 1.5, 1.2, 1.1), "mass": (1.0, 0.9, 0.895, 0.8)}  # step 0 is not evaluated in a run
    columns = {name: (*x, x[-1]) for name, x in columns.items()}
    records = {20 * i: {name: x[i] for name, x in columns.items()} for i in range(5)}
    assert study.row_of(records) == [
        "20", "0.50, 0.90, 0.20", "12.0, 12.0, 12.0", "1.0, 2.0, 4.0", "-1.0, -2.0, -4.0", "no turn", "40 (0.60)"
    ]  # fmt: skip


@pytest.mark.parametrize("flag", ["--letters=8", "--steps=6", "--every=1", "--samples=4"])
def test_a_study_does_not_read_what_another_one_measured(flag, study, tmp_path, monkeypatch):
    path = study.workdir_of(tmp_path, "dpo", 0) / "quality_8.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"2": {"quality": 0.5}}')
    assert study.measurements(tmp_path, "dpo", 0, {}) == {2: {"quality": 0.5}}
    monkeypatch.setattr(study, "run_of", lambda workdir, *_: pytest.fail(f"{workdir} is not measured"))
    parse(["over_optimisation", f"--out={tmp_path}", "--steps=4", "--every=2", "--samples=8", flag])
    with pytest.raises(pytest.fail.Exception, match="is not measured"):
        study.measurements(tmp_path, "dpo", 0, {})


@pytest.mark.slow
def test_a_short_study_makes_a_table_and_is_not_repeated(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "NUMBERS", {"texts": 64, "pairs": 48})
    monkeypatch.setattr(study, "TEXT_STEPS", 2)
    monkeypatch.setattr(study, "OBJECTIVES", {"dpo": study.OBJECTIVES["dpo"]})
    monkeypatch.setattr(study.compiled, "keep", lambda _: None)
    study.show()
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[2].split()[:4] == ["|", "dpo", "|", "0"]
    (path,) = tmp_path.glob("letters24_seed0/dpo_4_2/quality_*.json")
    assert list(json.loads(path.read_text())) == ["0", "2", "4"]
    monkeypatch.setattr(study, "run_of", lambda *_: pytest.fail("trained again"))
    study.show()
    assert capsys.readouterr().out.splitlines()[-4:] == table
