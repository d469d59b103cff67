"""What a resumed run tells of its config, which learning rates it refuses, and which steps it skips."""

import dataclasses

import pytest
from conftest import tiny

from hybrid_attn import trees
from hybrid_attn.config import to_dict
from hybrid_attn.configs import base
from hybrid_attn.train import metrics, resume


def config_of(steps=100, **optim):
    stage = {"steps": steps, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}
    changes = {"optim.lr": 1e-3, "optim.warmup_steps": 10} | {f"optim.{name}": value for name, value in optim.items()}
    return tiny({"stages": [stage]} | changes)


def test_each_field_that_changed_is_a_line_whether_it_is_of_a_group_or_of_a_stage():
    old = to_dict(config_of(b2=0.95))
    new = dataclasses.replace(config_of(steps=120, b2=0.9), seed=1)
    lines = ["optim.b2: 0.95 -> 0.9", "seed: 0 -> 1", "stages[0].steps: 100 -> 120"]
    assert trees.differences(old, to_dict(new)) == lines
    assert trees.differences(old, to_dict(config_of(b2=0.95))) == []


def test_differences_name_every_leaf_that_changed_and_no_other():
    old = to_dict(tiny())
    new = to_dict(tiny({"optim.lr": 1.0, "mesh.tensor": 2}, L={"window": 9, "rope_theta": 100.0}))
    assert trees.differences(old, old) == []
    assert trees.differences(old, new) == [
        "mesh.tensor: 1 -> 2",
        "model.kinds.L.window: 5 -> 9",
        f"optim.lr: {old['optim']['lr']} -> 1.0",
    ]
    assert trees.differences({"a": 1}, {"b": {"c": 2}}) == ["a: 1 -> None", "b: None -> {'c': 2}"]


@pytest.mark.parametrize(
    "old, new, start, jumps",
    [
        ({}, {"steps": 200}, 100, True),  # a finished cosine, from a tenth of the peak to half of it
        ({}, {"steps": 200}, 50, True),
        ({}, {"steps": 101}, 50, False),
        ({}, {"lr": 2e-3}, 50, True),
        ({}, {"lr": 5e-4}, 50, True),
        ({}, {"lr": 1.05e-3}, 50, False),
        ({}, {"b1": 0.5, "weight_decay": 0.0}, 50, False),
        ({"schedule": "wsd"}, {"schedule": "wsd", "steps": 200}, 50, False),
        ({"schedule": "wsd"}, {"schedule": "wsd", "steps": 200}, 100, True),
        ({"schedule": "wsd"}, {"schedule": "cosine"}, 90, True),
        ({"final_lr_ratio": 0.0}, {"final_lr_ratio": 0.0, "steps": 200}, 100, True),
    ],
)
def test_a_rate_that_is_a_tenth_off_its_old_schedule_is_refused_unless_it_is_allowed(old, new, start, jumps):
    saved, c = to_dict(config_of(**old)), config_of(**new)
    if not jumps:
        assert resume.check_rate(saved, c, start, False) == []
        return
    with pytest.raises(ValueError, match=f"would jump from .* at step {start + 1}"):
        resume.check_rate(saved, c, start, False)
    (line,) = resume.check_rate(saved, c, start, True)
    assert f"at step {start + 1}, as --allow_lr_jump allows" in line


def test_a_stage_with_a_schedule_of_its_own_begins_at_the_rate_that_it_names():
    def config_with(*schedules):
        stage = {"steps": 10, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}
        return tiny({"stages": [stage | {"lr_schedule": base.lr_schedule(**x)} for x in schedules]})

    first, warm = {"start": 1e-3, "end": 1e-4}, {"shape": "constant", "start": 5e-3, "warmup_steps": 2}
    saved = to_dict(config_with(first))
    assert resume.check_rate(saved, config_with(first, warm), 10, False) == []
    with pytest.raises(ValueError, match="would jump from 0.0005 to 0.005") as error:
        resume.check_rate(saved, config_with({"start": 1e-2, "end": 1e-3}), 5, False)
    assert "--allow_lr_jump" in str(error.value) and "optim.lr" not in str(error.value)


@pytest.mark.parametrize("start, steps", [(100, 101), (100, 105), (100, 200), (40, 90)])
def test_the_flags_that_a_refusal_names_hold_the_rate(start, steps):
    saved, c = to_dict(config_of()), config_of(steps=steps, lr=7e-3)
    (old, _) = resume.rate_jump(saved, c, start)
    held = dict(flag.removeprefix("--config.optim.").split("=") for flag in resume.held_rate(c, start, old))
    kinds = {"lr": float, "warmup_steps": int, "decay_fraction": float, "schedule": str}
    c = config_of(steps=steps, **{name: kinds[name](value) for name, value in held.items()})
    assert resume.check_rate(saved, c, start, False) == []


def test_a_checkpoint_of_a_version_with_fewer_and_other_keys_has_a_schedule():
    saved = to_dict(config_of())
    del saved["optim"]["z_loss"], saved["optim"]["final_lr_ratio"]
    saved["optim"]["gone"] = 1
    assert resume.rate_jump(saved, config_of(), 50) is None
    assert "optim.gone: 1 -> None" in trees.differences(saved, to_dict(config_of()))


def test_skipped_steps_are_read_as_they_are_written_and_joined_with_those_of_the_checkpoint():
    assert resume.parse_steps("40:42,50") == [(40, 42), (50, 50)]
    merged = resume.merge_skipped(resume.parse_steps("8:9,5"), [[4, 4], [10, 12]], start=4, total=20)
    assert merged == [(4, 5), (8, 12)] and resume.text_of(merged) == "4:5,8:12"
    assert [step for step in range(1, 21) if resume.is_skipped(step, merged)] == [4, 5, 8, 9, 10, 11, 12]
    assert resume.merge_skipped([(4, 6)], [[4, 6]], start=20, total=20) == [(4, 6)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("x", "--skip_steps=x: 'x' is no range of steps; write 40, or 40:42"),
        ("", "'' is no range of steps"),
        ("3:", None),
        ("1:2:3", "'1:2:3' is no range of steps"),
        ("9:8", "--skip_steps=9:8 must be a range of the steps 1 to 20"),
        ("0", "--skip_steps=0:0 must be a range of the steps 1 to 20"),
        ("21", "--skip_steps=21:21 must be a range of the steps 1 to 20"),
        ("2:7", "--skip_steps=2:7: the checkpoint of step 6 was trained on steps 2 to 6; skip steps after 6"),
    ],
)
def test_steps_that_cannot_be_skipped_are_refused(text, message):
    if message is None:
        message = f"--skip_steps={text}"
    with pytest.raises(ValueError, match=message):
        resume.merge_skipped(resume.parse_steps(text), [[4, 4]], start=6, total=20)


def test_only_evaluations_of_later_steps_are_set_aside(tmp_path):
    for name in ("2", "4", "\u00b2", "samples"):
        (tmp_path / "evals" / name).mkdir(parents=True)
    assert metrics.set_aside(tmp_path, 3, 4) == [f"kept         the old evaluation of step 4 as {tmp_path}/evals/4.old"]
    assert {path.name for path in (tmp_path / "evals").iterdir()} == {"2", "4.old", "\u00b2", "samples"}
