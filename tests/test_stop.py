"""What a run refuses before it begins, and how it ends before its last step."""

import errno
import os
import signal

import jax.numpy as jnp
import pytest
from trained import config_of, stage

from configs import base
from hybrid_attn import checkpoint
from hybrid_attn.train import loop, optim
from hybrid_attn.train import step as step_module

pytestmark = pytest.mark.usefixtures("known_peak_and_no_pictures")


def test_parameters_that_are_not_finite_are_not_saved_where_loss_and_gradient_are(corpus, tmp_path, monkeypatch):
    def rate(*_):
        return lambda step: jnp.where(step == 3, jnp.nan, 1e-3)

    monkeypatch.setattr(step_module, "schedule", rate)
    monkeypatch.setattr(optim, "schedule", rate)
    with pytest.raises(FloatingPointError, match="step 4: lr is nan and param_norm is nan; .* step 2 is"):
        loop.train(config_of(corpus, **{"optim.lr": 1e-3}), tmp_path)  # a config of no other test, for steps are kept
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]


def test_a_second_run_in_a_workdir_is_refused_and_touches_nothing(corpus, tmp_path):
    with loop.hold(tmp_path):
        with pytest.raises(BlockingIOError, match=f"{tmp_path} is in use by process {os.getpid()} "):
            loop.train(config_of(corpus), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with pytest.raises(ValueError, match="gs://bucket/run is no directory; mount the bucket"):
        loop.train(config_of(corpus), "gs://bucket/run")


def test_data_that_cannot_be_read_any_more_ends_the_run_with_its_state_saved(corpus, tmp_path, monkeypatch):
    batches = loop.pipeline.batches

    def unplugged(*args):
        for step, batch in batches(*args):
            if step == 3:
                raise OSError(errno.EIO, "Input/output error", "/data/shard-7")
            yield step, batch

    monkeypatch.setattr(loop.pipeline, "batches", unplugged)
    with pytest.raises(OSError, match="^/data/shard-7: Input/output error; step 3 is saved; "):
        loop.train(config_of(corpus), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 3]


def test_a_second_ctrl_c_does_not_wait_for_the_checkpoint_that_is_being_written(corpus, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        monkeypatch.setattr(loop.Checkpoints, "wait", lambda _: pytest.fail("waits"))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config_of(corpus), tmp_path)


@pytest.fixture
def ctrl_c():
    """Python's own handler of SIGINT, which it lacks where the tests were started in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("place", ["opened_metrics", "make_steps"])
def test_ctrl_c_before_the_first_step_is_compiled_ends_the_run_at_once(corpus, tmp_path, monkeypatch, ctrl_c, place):
    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("goes on")

    monkeypatch.setattr(loop, place, lambda *_, **__: [interrupt] if place == "make_steps" else interrupt())
    with pytest.raises(KeyboardInterrupt):
        loop.train(config_of(corpus), tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_ends_the_run_before_anything_is_written(corpus, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match="step 2 could not be written to .* do not fit: 0.0 MiB are free; there is no other"):
        loop.train(config_of(corpus), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def test_a_workdir_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"^--workdir={tmp_path}/file is not a directory$"):
        loop.train(config_of(corpus), tmp_path / "file")
    with pytest.raises(OSError, match="file") as error:
        loop.train(config_of(corpus), tmp_path / "file/run")
    assert error.value.errno in (errno.ENOTDIR, errno.EEXIST)
    with pytest.raises(ValueError, match=r"a\[b\]: its name has \["):
        loop.train(config_of(corpus), tmp_path / "new/a[b]")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh.context": 4, "mesh.fsdp": 1, "mesh.data": 2, "stages": [stage(1, 46, 8)]},
         r"seq_len 46 does not split over 4 context shards of 2 parts each; use 40 or 48, or mesh.context=1"),
        ({"stages": [stage(1, 48, 12)]}, r"batch 12 does not split over 8 .* use 8 or 16"),
        ({"model.vocab_size": 100}, r"100.*258"),
        ({"data.sources": {"text": base.source(paths=("/nowhere/*.txt",))}}, r"text: .*/nowhere/\*\.txt.* matches no file"),
        ({"data.sources": {"text": base.source(store="/nowhere")}}, "data.sources.text: /nowhere is not a token store"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_training(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(config_of(corpus, **changes), tmp_path)
