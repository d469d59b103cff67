"""The turn of an indicator of over-optimisation, and runs that end after it."""

import dataclasses
import json
import os
import signal

import pytest
from conftest import tiny
from prepared import pairs_store
from trained import losses, train_until

from configs import base
from hybrid_attn import checkpoint
from hybrid_attn.evals import preferences
from hybrid_attn.train import loop, turn

STAGE = {"seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}
DPO = STAGE | {"steps": 12, "objective": "dpo", "preference": base.preference(), "turn_patience": 2}
SFT = STAGE | {"steps": 4, "objective": "sft"}
ALONE = DPO | {"turn_patience": None, "turn_indicator": "mass"}
RULE = {
    "model.pattern": "L",
    "model.num_layers": 1,
    "evals.names": ("preferences",),
    "evals.every": 2,
    "evals.lengths": (1.0,),
    "train.checkpoint_every": 2,
    "train.keep": 4,
    "train.log_every": 1,
}


def config_of(stages=(DPO,), **changes):
    return tiny(RULE | {"stages": list(stages)} | changes)


def write(folder, values, name="entropy_bits", eval="preferences"):
    """Evaluations of two sources at steps 2, 4 and so on; their means are the `values`."""
    rows = [{"eval": eval, "step": 2 * i, name: x + part} for i, x in enumerate(values, 1) for part in (-0.5, 0.5)]
    with open(folder / "evals.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_turn_is_the_highest_evaluation_once_enough_that_follow_are_below(tmp_path):
    c = config_of()
    assert turn.newest(c, tmp_path, 6) is None and turn.ended(c, tmp_path, 6) is None
    write(tmp_path, [1.0, 3.0, 2.0, 2.9, 2.5])
    write(tmp_path, [9.0, 8.0, 7.0], name="mass")
    over = [turn.ended(c, tmp_path, step) is not None for step in (2, 4, 6, 8, 10)]
    assert over == [False, False, False, True, True]
    assert turn.newest(c, tmp_path, 6) == turn.Turn("entropy_bits", 2.0, 3.0, 4, 1, True)
    assert turn.lines(c, tmp_path, 6) == ["turn         entropy_bits 2, highest 3, near it until step 4"]
    assert turn.lines(c, tmp_path, 8)[0].endswith("2.9, highest 3, near it until step 4: it turned 2 evaluations ago")
    assert turn.ending(c, tmp_path, 6) == []
    assert turn.ending(c, tmp_path, 8)[0].endswith(
        "no checkpoint is left: that of step 4, from before the turn of entropy_bits, was deleted"
    )
    for step, of in (
        (3, "the newest one left: that of step 4, from before the turn of entropy_bits, was deleted"),
        (4, "from before the turn of entropy_bits"),
    ):
        (tmp_path / f"checkpoints/{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/{step + 5}").mkdir()
        assert turn.ending(c, tmp_path, 8)[0].endswith(f"ended after step 8 of 12; use {tmp_path}/checkpoints/{step}, {of}")
    goes_on = dataclasses.replace(c, stages=(dataclasses.replace(c.stages[0], turn_patience=None),))
    assert turn.ended(goes_on, tmp_path, 8) is None and turn.lines(goes_on, tmp_path, 8) == turn.lines(c, tmp_path, 8)


def test_a_plateau_is_no_turn_and_an_entropy_must_have_risen():
    assert turn.turn_of("mass", {2: 1.0, 4: 0.995, 6: 0.991, 8: 0.5})[3:] == (6, 1, True)
    falls = {8: 0.6, 2: 1.0, 4: 0.9, 6: 0.8}
    assert turn.turn_of("mass", falls)[1:] == (0.6, 1.0, 2, 3, True)
    assert not turn.turn_of("entropy_bits", falls).has_come(2)
    assert turn.turn_of("entropy_bits", falls | {0: 0.9}).has_come(3)
    assert not turn.turn_of("entropy_bits", falls | {0: 0.995}).has_come(3)


def test_hinge_has_the_mass_and_a_stage_may_name_another_indicator(tmp_path):
    write(tmp_path, [1.0, 2.0, 1.0, 0.5])
    assert turn.newest(config_of(), tmp_path, 8)[3:] == (4, 2, True)
    hinge = DPO | {"objective": "hinge", "preference": base.preference(beta=None, margin=1.0, alpha=1.0)}
    assert turn.newest(config_of([hinge]), tmp_path, 8) is None
    write(tmp_path, [0.9, 0.8, 0.7], name="mass")
    assert turn.newest(config_of([hinge]), tmp_path, 6) == turn.Turn("mass", pytest.approx(0.7), pytest.approx(0.9), 2, 2, True)
    assert turn.newest(config_of([DPO | {"turn_indicator": "mass"}]), tmp_path, 6).indicator == "mass"


def test_evaluations_before_the_stage_and_of_other_objectives_do_not_count(tmp_path):
    c = config_of([SFT, DPO])
    write(tmp_path, [9.0, 2.0, 3.0, 1.0, 1.0])
    write(tmp_path, [0.0] * 5, eval="position")
    assert turn.lines(c, tmp_path, 4) == []
    assert turn.newest(c, tmp_path, 6) == turn.Turn("entropy_bits", 3.0, 3.0, 6, 0, True)  # that of step 4 is where it begins
    assert turn.ended(c, tmp_path, 10) is not None


@pytest.mark.parametrize(
    "stages, changes, message",
    [
        ([SFT | {"turn_patience": 2}], {}, "is of the objectives dpo, ipo, hinge, trl_ipo, trl_hinge, and"),
        ([DPO, SFT], {}, r"stages\[0\]\.turn_patience=2 ends the run, and stages follow; give them a run"),
        ([SFT | {"turn_indicator": "mass"}], {}, r"stages\[0\]\.turn_indicator='mass' is of the objectives dpo, ipo, hinge"),
        (
            [DPO],
            {"evals.every": None},
            "turn_patience=2 counts evaluations, and evals.every is None; give it a number of steps",
        ),
        ([DPO], {"evals.names": ("position",)}, r"needs 'preferences' in evals\.names, and they are \('position',\)"),
        ([ALONE], {"evals.names": ()}, r"turn_indicator='mass' needs 'preferences' in evals\.names, and they are \(\)"),
        ([DPO], {"train.checkpoint_every": 3}, r"train\.checkpoint_every=3 does not divide evals\.every=2; use 2"),
        ([DPO], {"train.keep": 3}, r"train\.keep=3 deletes the checkpoint before the turn; use 4 or more"),
        ([DPO], {"train.checkpoint_every": 1}, r"train\.keep=4 deletes the checkpoint before the turn; use 6 or more"),
    ],
)
def test_a_rule_that_would_not_see_the_turn_or_keep_its_checkpoint_is_refused(stages, changes, message):
    turn.check_rule(config_of())
    turn.check_rule(config_of([ALONE, SFT], **{"evals.every": None}))
    with pytest.raises(ValueError, match=message):
        turn.check_rule(config_of(stages, **changes))


def of_run(folder, monkeypatch, entropies, **changes):
    """A config whose evaluations find these entropies, one by one; and an iterator over those that are left."""
    left, record_of = iter(entropies), preferences.record_of
    monkeypatch.setattr(preferences, "record_of", lambda *args: record_of(*args) | {"entropy_bits": next(left)})
    sources = {"pairs": base.source(store=pairs_store(folder))}
    return config_of(**{"data.sources": sources, "data.holdout": 0.2} | changes), left


@pytest.mark.slow
@pytest.mark.usefixtures("known_peak_and_no_pictures")
def test_a_run_ends_after_the_turn_keeps_the_checkpoint_before_it_and_decides_the_same_when_resumed(
    tmp_path, capsys, monkeypatch
):
    c, left = of_run(tmp_path, monkeypatch, [1.0, 2.0, 1.9, 1.8])
    train_until(4, c, tmp_path / "run")
    for _ in range(2):
        assert loop.train(c, tmp_path / "run")
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith(
            f"ended after step 8 of 12; use {tmp_path}/run/checkpoints/4, from before the turn of entropy_bits"
        )
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [2, 4, 6, 8]
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6, 7, 8] and next(left, None) is None


@pytest.mark.slow
@pytest.mark.usefixtures("known_peak_and_no_pictures")
def test_a_stop_between_two_units_of_an_evaluation_is_no_turn(tmp_path, capsys, monkeypatch):
    def entropies():
        yield from (1.0, 1.0, 2.0, 2.0, 1.9, 1.9)
        os.kill(os.getpid(), signal.SIGTERM)
        yield from (1.8, 2.4, 1.5, 1.5)

    c, left = of_run(tmp_path, monkeypatch, entropies(), **{"evals.lengths": (1.0, 2.0), "stages": [DPO | {"steps": 9}]})
    assert not loop.train(c, tmp_path / "run")
    assert "stopped after step 8, which is saved" in capsys.readouterr().out
    assert turn.ended(c, tmp_path / "run", 8).newer == 2  # by the one unit
    assert loop.train(c, tmp_path / "run")
    assert list(losses(tmp_path / "run")) == [*range(1, 10)] and next(left, None) is None
