"""A damaged checkpoint is noticed and reported, and the one before it is restored."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from saved import CONFIG, DATA, abstract_of, assert_same_bits, reopen, state_of, truncate, write

from hybrid_attn import checkpoint, stored

# The library that reads leaves a task of its event loop behind when a read fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_a_truncated_newest_checkpoint_is_reported_and_the_previous_one_is_restored(tmp_path, caplog):
    write(tmp_path, 5, 6, 7)
    truncate(tmp_path, 7)
    (tmp_path / "6" / "data" / "metadata").write_text('{"stage": ')
    checkpoints = reopen(tmp_path)
    step, state, data = checkpoints.restore(abstract_of(state_of()))
    assert (step, data["step"]) == (5, 5)
    assert_same_bits(state, state_of(5))
    errors = "\n".join(record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert f"{tmp_path}/7 cannot be read" in errors and f"{tmp_path}/6 cannot be read" in errors
    assert checkpoints.steps() == [5]
    assert (tmp_path / "7.unreadable").is_dir(), "nothing is deleted"
    checkpoints.save(7, state_of(7), DATA, CONFIG, wait=True)
    assert reopen(tmp_path).restore(abstract_of(state_of()))[0] == 7


def test_the_arrays_of_a_step_may_depend_on_it(tmp_path):
    write(tmp_path, 5)
    checkpoints = reopen(tmp_path)
    checkpoints.save(6, state_of(6, width=32), DATA, CONFIG, wait=True)
    truncate(tmp_path, 6)
    step, state, _ = checkpoints.restore(lambda step: abstract_of(state_of(width={5: 16, 6: 32}[step])))
    assert step == 5
    assert_same_bits(state, state_of(5))


def test_one_flipped_bit_in_an_array_is_noticed(tmp_path):
    wide = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)}
    checkpoints = reopen(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, wide, DATA, CONFIG, wait=True)
    path = max((tmp_path / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksums differ: the bytes of w changed on disk"):
        checkpoints.restore(abstract_of(wide), step=2)
    assert checkpoints.restore(abstract_of(wide))[0] == 1


def test_a_changed_period_is_an_error_before_the_last_period_is_yielded(tmp_path, monkeypatch):
    write(tmp_path, 5)
    sums = stored.read_sums(tmp_path / "5")
    sums.arrays["params/periods/L0/q"] += 1
    monkeypatch.setattr(stored, "read_sums", lambda path: sums)
    periods = checkpoint.read_slices(tmp_path, "periods/L0/q", (2, 16, 5))
    next(periods)
    with pytest.raises(checkpoint.UnreadableError, match="checksums differ: the bytes of params/periods/L0/q changed"):
        next(periods)


def _with_one_digit_more(text: str) -> str:
    return text.replace("1", "2", 1)


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
DAMAGES = ("{}", "[1]", "null", "7", "", '{"stage": ', DEEP, b"\xff\xfe{}", _with_one_digit_more, None)


@pytest.mark.parametrize("item", ["checksums", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("config", "data"))])
def test_every_damage_to_a_json_item_is_noticed_and_the_previous_checkpoint_is_restored(tmp_path, item):
    write(tmp_path, 5, 6)
    path = tmp_path / "6" / item / "metadata"
    intact = path.read_text()
    for damage in DAMAGES:
        content = damage(intact) if callable(damage) else damage
        assert content != intact
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        for read in (checkpoint.read_config, checkpoint.read_data, checkpoint.fingerprint):
            if item in ("checksums", read.__name__.removeprefix("read_")):
                with pytest.raises(checkpoint.UnreadableError, match=f"^{item}: "):
                    read(tmp_path)
        checkpoints = reopen(tmp_path)
        assert checkpoints.newest_config() == (5 if item in ("config", "checksums") else 6, CONFIG)
        assert checkpoints.restore(abstract_of(state_of()))[0] == 5
        checkpoints.close()
        (tmp_path / "6.unreadable").rename(tmp_path / "6")
        path.write_text(intact)
    assert reopen(tmp_path).restore(abstract_of(state_of()))[0] == 6


def test_a_changed_description_of_the_arrays_is_damage_and_not_another_model(tmp_path):
    write(tmp_path, 5, 6)
    path = tmp_path / "6/state/_METADATA"
    path.write_text(path.read_text().replace("embed", "embes"))
    assert reopen(tmp_path).restore(abstract_of(state_of()))[0] == 5


def _as_an_older_version_wrote_it(directory) -> None:
    """Has the checksums of a checkpoint be one number an array, and nothing else."""
    path = pathlib.Path(directory) / "checksums" / "metadata"
    arrays = json.loads(path.read_text())["arrays"]
    path.write_text(json.dumps({name: x["sum"] for name, x in arrays.items()}))


def test_a_checkpoint_of_an_older_version_without_checksums_of_its_json_is_read(tmp_path):
    write(tmp_path, 5, 6)
    fingerprint = checkpoint.fingerprint(tmp_path)
    _as_an_older_version_wrote_it(tmp_path / "6")
    step, state, data = reopen(tmp_path).restore(abstract_of(state_of()))
    assert (step, data["step"]) == (6, 6)
    assert (checkpoint.read_config(tmp_path), checkpoint.fingerprint(tmp_path)) == (CONFIG, fingerprint)
    assert_same_bits(state, state_of(6))
    assert len(list(checkpoint.read_slices(tmp_path, "periods/L0/q", (2, 16, 5)))) == 2
    (tmp_path / "6/config/metadata").write_text("{}")
    assert reopen(tmp_path).restore(abstract_of(state_of()))[0] == 5


def test_if_no_checkpoint_can_be_read_the_error_names_each_and_none_is_renamed(tmp_path):
    write(tmp_path, 5, 6)
    truncate(tmp_path, 5)
    truncate(tmp_path, 6)
    with pytest.raises(ValueError, match=rf"can be read:\n  {tmp_path}/6: .*\n  {tmp_path}/5: "):
        reopen(tmp_path).restore(abstract_of(state_of()))
    assert checkpoint.steps(tmp_path) == [5, 6]
    with pytest.raises(ValueError, match="there is none"):
        reopen(tmp_path / "new").restore(abstract_of(state_of()))
