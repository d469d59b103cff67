"""After too many spikes a run goes back to an earlier checkpoint and passes over the batches; it never goes back in vain."""

import json
from pathlib import Path

import pytest
from conftest import tiny
from test_processes import ends, start_processes
from test_spikes import poisoned
from trained import losses, stage
from training_process import config_with_rollbacks

from hybrid_attn import checkpoint
from hybrid_attn.train import loop
from hybrid_attn.train.rollback import TooManySpikes, skipped_after

pytestmark = pytest.mark.usefixtures("known_peak_and_no_pictures")


def config_of(corpus, **changes):
    """Twenty steps, a checkpoint every two; two spikes in a row are passed over, and three lead to a rollback."""
    values = {"data.sources.text.paths": (corpus,), "evals.names": (), "stages": [stage(20, 48, 8)]}
    values |= {"optim.spike_factor": 3.0, "optim.max_consecutive_spikes": 2, "optim.rollback_steps": 2, "optim.warmup_steps": 2}
    return tiny(values | {"train.checkpoint_every": 2, "train.keep": 4, "train.log_every": 1} | changes)


def ended(workdir):
    """Parameters, optimiser state and data state of the newest checkpoint, and the lines of every step."""
    directory = workdir / "checkpoints"
    arrays = [checkpoint.fingerprint(directory, group=group) for group in ("params", "opt_state", "extras")]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return *arrays, checkpoint.read_data(directory)["skipped_steps"], [(x["step"], x.get("loss")) for x in lines]


@pytest.mark.slow
def test_a_rollback_is_a_run_from_that_checkpoint_with_the_same_skipped_steps(corpus, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {7, 8, 9})
    c = config_of(corpus)
    assert loop.train(c, tmp_path / "back")
    text = capsys.readouterr().out
    assert "  5 repeated and 8 skipped steps  " in text  # 5 to 9; three spikes, and these five passed over
    assert "steps 7 to 9 are spikes: the run goes back to the checkpoint of step 4, and passes over the batches up to" in text
    assert sorted(x.name for x in (tmp_path / "back/checkpoints").glob("*.*")) == ["6.rolled_back", "8.rolled_back"]
    assert checkpoint.read_data(tmp_path / "back/checkpoints")["rollbacks"] == [[4, 9]]
    assert list(losses(tmp_path / "back")) == [1, 2, 3, 4, *range(10, 21)]

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stop, "reached", lambda self, step: step == 4)
        assert not loop.train(c, tmp_path / "flag")
    assert loop.train(c, tmp_path / "flag", skip_steps=[(5, 9)])
    assert ended(tmp_path / "back") == ended(tmp_path / "flag")


@pytest.mark.slow
def test_a_kill_after_a_rollback_changes_nothing(corpus, tmp_path, monkeypatch):
    poisoned(monkeypatch, {7, 8, 9})
    c = config_of(corpus)
    assert loop.train(c, tmp_path / "back")
    with monkeypatch.context() as patch:
        calls, first_state = [], loop.first_state

        def killed(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return first_state(*arguments)

        patch.setattr(loop, "first_state", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.train(c, tmp_path / "killed")
    assert checkpoint.steps(tmp_path / "killed/checkpoints") == [2, 4]
    assert loop.train(c, tmp_path / "killed")
    assert ended(tmp_path / "killed") == ended(tmp_path / "back")


@pytest.mark.slow
def test_a_rollback_needs_a_checkpoint_trained_since_the_last_one_also_when_the_run_starts_again(corpus, tmp_path, monkeypatch):
    poisoned(monkeypatch, {7, 8, 9, 12, 13, 14, 16, 17, 18})
    c = config_of(corpus)
    message = "steps 16 to 18 .*--skip_steps=17:18; no checkpoint of this config, trained since the last rollback, is"
    for _ in range(2):
        with pytest.raises(TooManySpikes, match=message):
            loop.train(c, tmp_path)
    assert checkpoint.read_data(tmp_path / "checkpoints")["rollbacks"] == [[4, 9], [10, 14]]
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 10, 15]


@pytest.mark.slow
def test_two_processes_go_back_to_the_same_checkpoint_and_train_as_one(corpus, tmp_path, monkeypatch):
    (tmp_path / "corpus").symlink_to(Path(corpus).parent)
    with start_processes("roll_back", tmp_path) as started:
        (status0, output, error0), (status1, _, error1) = ends(started, 300)
    assert (status0, status1) == (0, 0), error0 + error1
    assert "the run goes back to the checkpoint of step 2, and passes over the batches up to step 5" in output
    poisoned(monkeypatch, {4, 5})
    assert loop.train(config_with_rollbacks(tmp_path), tmp_path / "alone")
    both, alone = losses(tmp_path / "back"), losses(tmp_path / "alone")
    assert list(both) == [1, 2, 6] and both == pytest.approx(alone, rel=1e-6)
    for name in ("back", "alone"):
        assert checkpoint.read_data(tmp_path / name / "checkpoints")["rollbacks"] == [[2, 5]]


@pytest.mark.slow
def test_checkpoints_of_another_config_are_not_gone_back_to(corpus, tmp_path, monkeypatch):
    poisoned(monkeypatch, {5, 6, 7})
    with monkeypatch.context() as patch:
        patch.setattr(loop.Stop, "reached", lambda self, step: step == 4)
        assert not loop.train(config_of(corpus), tmp_path)
    with pytest.raises(TooManySpikes, match="the checkpoint of step 6 is kept.* no checkpoint of this config"):
        loop.train(config_of(corpus, **{"train.keep": 5}), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 4, 6]


def test_steps_that_were_to_be_skipped_later_stay_so():
    assert skipped_after((4, 9), [(1, 2), (3, 6), (8, 8), (20, 30)]) == [(5, 9), (5, 6), (8, 8), (20, 30)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optim.spike_factor": None}, "optim.rollback_steps=2 needs an optim.spike_factor"),
        (
            {"train.keep": 2},
            "of the last 4 steps, and train.keep=2 of one every 2 steps are of 2; use train.keep=3",
        ),
    ],
    ids=str,
)
def test_a_config_whose_checkpoints_are_too_few_for_a_rollback_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("x", **changes)
