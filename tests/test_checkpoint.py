"""Checkpoints come back as they were, on any mesh and in any precision, and broken ones are reported and skipped."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_attn import checkpoint, config, stored
from hybrid_attn.checkpoint import Checkpoints

LAYER_TYPE = {"mixer": "attention", "mlp": "gated", "window": 4}
CONFIG = config.completed({"seed": 3, "model": {"d_model": 16, "pattern": "LLLG", "kinds": {"L": LAYER_TYPE}}})
DATA = {"stage": 0, "rows": [7, 11]}


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: optax.OptState


def _sharding(rows: int, columns: int, *spec: str | None) -> NamedSharding:
    devices = np.array(jax.devices()[: rows * columns]).reshape(rows, columns)
    return NamedSharding(jax.sharding.Mesh(devices, ("data", "tensor")), PartitionSpec(*spec))


def _state(step: int = 0, width: int = 16) -> State:
    """Other numbers at every step; bfloat16 and float32, sharded and replicated arrays, an optimiser's named tuples."""
    rng = np.random.default_rng(step)
    replicated, split = _sharding(8, 1), _sharding(8, 1, None, "data")
    params = {
        "embed": jax.device_put(rng.normal(size=(24, width)).astype(np.float32), split),
        "periods": {"L0": {"q": jax.device_put(jnp.asarray(rng.normal(size=(2, width, 5)), jnp.bfloat16), replicated)}},
    }
    opt_state = jax.jit(optax.adamw(1e-3).init)(params)
    return State(jax.device_put(jnp.int32(step), replicated), params, opt_state)


def _abstract(tree, sharding=None, dtype=None):
    def like(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape, dtype if dtype and floating else x.dtype, sharding=sharding or x.sharding)

    return jax.tree.map(like, tree)


def _assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _write(directory, *steps: int, keep: int = 9) -> None:
    checkpoints = Checkpoints(directory, keep=keep, every=1)
    for step in steps:
        checkpoints.save(step, _state(step), {**DATA, "step": step}, CONFIG)
    checkpoints.close()


def _reopen(directory) -> Checkpoints:
    return Checkpoints(directory, keep=9, every=10)


def _break(directory, step: int) -> None:
    """Cuts every array file of a checkpoint in half."""
    for path in (pathlib.Path(directory) / str(step) / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_arrays_step_data_and_config_come_back_as_they_were_saved(tmp_path):
    _write(tmp_path, 5)
    step, state, data = _reopen(tmp_path).restore(_abstract(_state()))
    assert (step, data) == (5, {**DATA, "step": 5})
    assert checkpoint.read_config(tmp_path) == CONFIG
    _assert_equal(state, _state(5))
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, state, _state(5)))


def test_a_checkpoint_is_restored_on_another_mesh_and_in_another_precision(tmp_path):
    _write(tmp_path, 5)
    sharding = _sharding(2, 4, *())
    abstract = _abstract(_state(), sharding, jnp.bfloat16)
    embed = jax.ShapeDtypeStruct((24, 16), jnp.bfloat16, sharding=_sharding(2, 4, "tensor", "data"))
    abstract = abstract._replace(params={**abstract.params, "embed": embed})
    _, state, _ = _reopen(tmp_path).restore(abstract)
    expected = jax.tree.map(lambda x, y: x.astype(y.dtype), _state(5), abstract)
    _assert_equal(state, expected)
    assert state.params["embed"].sharding == embed.sharding
    assert state.params["embed"].addressable_shards[0].data.shape == (6, 8)


def test_a_state_may_be_donated_and_its_data_changed_as_soon_as_save_returns(tmp_path):
    big = {"w": jax.device_put(np.random.default_rng(0).normal(size=(1024, 2048)).astype(np.float32), _sharding(8, 1))}
    expected, data = np.array(big["w"]), {"rows": [1]}
    checkpoints = _reopen(tmp_path)
    abstract = _abstract(big)
    checkpoints.save(1, big, data, CONFIG)
    data["rows"].append(2)
    jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(big["w"]))
    assert big["w"].is_deleted()
    _, state, saved = checkpoints.restore(abstract)
    np.testing.assert_array_equal(np.asarray(state["w"]), expected)
    assert saved == {"rows": [1]}


def test_the_newest_are_kept_and_saving_a_step_twice_writes_it_once(tmp_path):
    _write(tmp_path, 1, 2, 3, 3, 4, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert _reopen(tmp_path).latest() == 4


def test_a_checkpoint_is_due_at_every_multiple_that_has_none_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every=5)
    assert [step for step in range(1, 16) if checkpoints.due(step)] == [5, 10, 15]
    checkpoints.save(10, _state(), DATA, CONFIG)
    assert [step for step in range(1, 16) if checkpoints.due(step)] == [15]
    checkpoints.close()


def test_parameters_and_config_are_read_alone(tmp_path):
    _write(tmp_path, 5, 6)
    saved = _state(6).params
    for path in (tmp_path / "6" / "data").iterdir():
        path.unlink()
    with jax.set_mesh(_sharding(4, 2).mesh):  # in force, and not the mesh of what is read
        params = checkpoint.read_params(tmp_path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved))
    _assert_equal(params, saved)
    assert params["embed"].devices() == {jax.devices()[0]}
    _assert_equal(checkpoint.read_params(tmp_path, _abstract(_state().params), step=5), _state(5).params)
    with pytest.raises(ValueError, match="no complete checkpoint of step 7; it has 5, 6"):
        checkpoint.read_params(tmp_path, _abstract(_state().params), step=7)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.read_config(tmp_path / "elsewhere")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_newest_checkpoint_is_reported_and_the_previous_one_is_restored(tmp_path, caplog):
    _write(tmp_path, 5, 6, 7)
    _break(tmp_path, 7)
    (tmp_path / "6" / "data" / "metadata").write_text('{"stage": ')
    checkpoints = _reopen(tmp_path)
    step, state, data = checkpoints.restore(_abstract(_state()))
    assert (step, data["step"]) == (5, 5)
    _assert_equal(state, _state(5))
    errors = "\n".join(record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert f"{tmp_path}/7 cannot be read" in errors and f"{tmp_path}/6 cannot be read" in errors
    assert checkpoints.steps() == [5]
    assert (tmp_path / "7.unreadable").is_dir(), "nothing is deleted"
    checkpoints.save(7, _state(7), DATA, CONFIG, wait=True)
    assert _reopen(tmp_path).restore(_abstract(_state()))[0] == 7


def test_one_flipped_bit_in_an_array_is_noticed(tmp_path):
    wide = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)}
    checkpoints = _reopen(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, wide, DATA, CONFIG, wait=True)
    path = max((tmp_path / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksums differ: the bytes of w changed on disk"):
        checkpoints.restore(_abstract(wide), step=2)
    assert checkpoints.restore(_abstract(wide))[0] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("by_period", [True, False])
def test_parameters_are_read_by_period_from_any_chunks_on_disk(tmp_path, monkeypatch, by_period):
    if not by_period:
        monkeypatch.setattr(checkpoint, "_chunks", lambda key, x: checkpoint.ocp.SaveArgs())
    _write(tmp_path, 5, 6)
    saved = _state(5).params
    (embed,) = checkpoint.read_slices(tmp_path, "embed", (24, 16), step=5)
    np.testing.assert_array_equal(embed, saved["embed"])
    periods = list(checkpoint.read_slices(tmp_path, "periods/L0/q", (2, 16, 5), step=5))
    assert [len(x.base) for x in periods] == ([1, 1] if by_period else [2, 2])  # how many are held at a time
    np.testing.assert_array_equal(np.stack(periods), saved["periods"]["L0"]["q"])
    with pytest.raises(ValueError, match=r"(?s)another model.*embed: \(24, 16\) -> \(24, 8\)"):
        list(checkpoint.read_slices(tmp_path, "embed", (24, 8)))
    with pytest.raises(checkpoint.UnreadableError, match="no array params/unembed"):
        list(checkpoint.read_slices(tmp_path, "unembed", (24, 16)))


def test_a_changed_period_is_an_error_before_the_last_period_is_yielded(tmp_path, monkeypatch):
    _write(tmp_path, 5)
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


@pytest.mark.parametrize("item", ["config", "data", "checksums"])
def test_every_damage_to_a_json_item_is_noticed_and_the_previous_checkpoint_is_restored(tmp_path, item):
    _write(tmp_path, 5, 6)
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
        checkpoints = _reopen(tmp_path)
        assert checkpoints.newest_config() == (5 if item in ("config", "checksums") else 6, CONFIG)
        assert checkpoints.restore(_abstract(_state()))[0] == 5
        checkpoints.close()
        (tmp_path / "6.unreadable").rename(tmp_path / "6")
        path.write_text(intact)
    assert _reopen(tmp_path).restore(_abstract(_state()))[0] == 6


def test_a_changed_description_of_the_arrays_is_damage_and_not_another_model(tmp_path):
    _write(tmp_path, 5, 6)
    path = tmp_path / "6/state/_METADATA"
    path.write_text(path.read_text().replace("embed", "embes"))
    assert _reopen(tmp_path).restore(_abstract(_state()))[0] == 5


def _as_an_older_version_wrote_it(directory) -> None:
    """Has the checksums of a checkpoint be one number an array, and nothing else."""
    path = pathlib.Path(directory) / "checksums" / "metadata"
    arrays = json.loads(path.read_text())["arrays"]
    path.write_text(json.dumps({name: x["sum"] for name, x in arrays.items()}))


def test_a_checkpoint_of_an_older_version_without_checksums_of_its_json_is_read(tmp_path):
    _write(tmp_path, 5, 6)
    fingerprint = checkpoint.fingerprint(tmp_path)
    _as_an_older_version_wrote_it(tmp_path / "6")
    step, state, data = _reopen(tmp_path).restore(_abstract(_state()))
    assert (step, data["step"]) == (6, 6)
    assert (checkpoint.read_config(tmp_path), checkpoint.fingerprint(tmp_path)) == (CONFIG, fingerprint)
    _assert_equal(state, _state(6))
    assert len(list(checkpoint.read_slices(tmp_path, "periods/L0/q", (2, 16, 5)))) == 2
    (tmp_path / "6/config/metadata").write_text("{}")
    assert _reopen(tmp_path).restore(_abstract(_state()))[0] == 5


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?b", "a\\b", "a\udcff"])
def test_a_directory_whose_name_orbax_reads_as_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="no checkpoint can be written to .*; rename it, or use another --workdir"):
        Checkpoints(tmp_path / name / "checkpoints", keep=1, every=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["a#b", "a%20b", "a b", "a%", "a|b", "a{1}", "a]", "\u00e9\u65e5", "~", "..a", "a:b", "x" * 200]
)
def test_a_directory_of_any_other_name_is_written_and_read(tmp_path, name):
    _write(tmp_path / name, 5)
    _write(tmp_path / name.partition("#")[0].replace("%20", " "), 6)  # that a URL of this name would be of
    assert _reopen(tmp_path / name).restore(_abstract(_state()), step=5)[0] == 5
    read = np.stack(list(checkpoint.read_slices(tmp_path / name, "periods/L0/q", (2, 16, 5), step=5)))
    np.testing.assert_array_equal(read, _state(5).params["periods"]["L0"]["q"])


@pytest.mark.parametrize("name", ["a?b", "a[1]", "a*b", "a#?b"])
def test_a_directory_that_was_renamed_to_a_pattern_is_read(tmp_path, name):
    for directory, step in ((name, 5), (name.replace("?", "X").replace("[1]", "1").replace("*", "XX").partition("#")[0], 6)):
        _write(tmp_path / "new", step)
        (tmp_path / "new").rename(tmp_path / directory)
    assert checkpoint.steps(tmp_path / name) == [5]
    assert checkpoint.read_config(tmp_path / name) == CONFIG
    expected = _state(5).params
    _assert_equal(checkpoint.read_params(tmp_path / name, _abstract(expected)), expected)
    read = np.stack(list(checkpoint.read_slices(tmp_path / name, "periods/L0/q", (2, 16, 5))))
    np.testing.assert_array_equal(read, expected["periods"]["L0"]["q"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lose", [lambda path: _break(path.parent, 1), lambda path: path.rename(path.parent / "gone")])
def test_a_first_checkpoint_that_is_lost_without_an_error_ends_the_run(tmp_path, monkeypatch, lose):
    checkpoints = _reopen(tmp_path)
    finish = checkpoints._manager.wait_until_finished

    def finish_and_lose():
        finish()
        if (tmp_path / "1").exists():
            lose(tmp_path / "1")

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", finish_and_lose)
    with pytest.raises(OSError, match="checkpoint of step 1 could not be written to .*; there is no other"):
        checkpoints.save(1, _state(1), DATA, CONFIG)


def test_if_no_checkpoint_can_be_read_the_error_names_each_and_none_is_renamed(tmp_path):
    _write(tmp_path, 5, 6)
    _break(tmp_path, 5)
    _break(tmp_path, 6)
    with pytest.raises(ValueError, match=rf"can be read:\n  {tmp_path}/6: .*\n  {tmp_path}/5: "):
        _reopen(tmp_path).restore(_abstract(_state()))
    assert checkpoint.steps(tmp_path) == [5, 6]
    with pytest.raises(ValueError, match="there is none"):
        _reopen(tmp_path / "new").restore(_abstract(_state()))


def test_other_arrays_are_an_error_that_names_them_and_no_reason_to_fall_back(tmp_path):
    _write(tmp_path, 5)
    checkpoints = _reopen(tmp_path)
    with pytest.raises(stored.AnotherModelError, match=r"params/embed: \(24, 16\) -> \(24, 32\)"):
        checkpoints.restore(_abstract(_state(width=32)))
    with pytest.raises(stored.AnotherModelError, match=r"opt_state/0/mu/embed: \(24, 16\) -> not expected"):
        checkpoints.restore(_abstract(_state())._replace(opt_state=()))
    with pytest.raises(stored.AnotherModelError, match=r"params/bias: not saved -> \(3,\)"):
        checkpoint.read_params(tmp_path, {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert checkpoints.steps() == [5]


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    _write(tmp_path, 5)
    checkpoints, before = _reopen(tmp_path), sorted(tmp_path.rglob("*"))
    usage = checkpoint.shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=f"step 6 could not be written to {tmp_path}: .*1.1 MiB do not fit: 1.0 MiB are free; "):
        checkpoints.save(6, _state(6), DATA, CONFIG)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_removed_directory_is_created_again_or_named_in_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", keep=1, every=1)
    checkpoints.save(5, _state(5), DATA, CONFIG, wait=True)
    shutil.rmtree(tmp_path / "run")
    checkpoints.save(6, _state(6), DATA, CONFIG, wait=True)
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [6]
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="step 7 could not be written to .*; there is no other; .*restore the directory") as error:
        checkpoints.save(7, _state(7), DATA, CONFIG)
    assert error.type is OSError


def test_a_file_instead_of_the_directory_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ValueError, match=f"^{tmp_path}/checkpoints is not a directory, and checkpoints go there; move it away"):
        Checkpoints(tmp_path / "checkpoints", keep=1, every=1)


def test_a_write_that_fails_in_the_background_is_an_error_and_the_previous_checkpoint_stays(tmp_path):
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)), jnp.float32)}
    checkpoints = Checkpoints(tmp_path, keep=1, every=1)
    checkpoints.save(1, state, DATA, CONFIG, wait=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # a write beyond 64 KiB of a file fails, as on a full disk
    try:
        with pytest.raises(OSError, match="step 2 could not be written to .*the last complete one is of step 1"):
            checkpoints.save(2, state, DATA, CONFIG)
            checkpoints.wait()
        with pytest.raises(OSError, match="step 3 could not be written to "):
            checkpoints.save(3, state, DATA, CONFIG)
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.steps() == [1]
    checkpoints = Checkpoints(tmp_path, keep=1, every=1)
    assert checkpoints.restore(_abstract(state))[0] == 1
    checkpoints.save(2, state, DATA, CONFIG)
    checkpoints.close()
    assert checkpoint.steps(tmp_path) == [2]


KILLED = """
import glob, os, signal, sys, time
import jax, numpy as np
from hybrid_attn.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2, every=1)
for step, rows in ((1, 8), (2, 8192)):
    state = {"w": jax.numpy.asarray(np.random.default_rng(0).normal(size=(rows, 2048)))}
    checkpoints.save(step, state, {}, {}, wait=step == 1)
while not glob.glob(sys.argv[1] + "/2*"):
    time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_checkpoint_that_was_being_written_at_a_kill_does_not_exist(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env, timeout=60, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("2")], "the write had begun"
    assert checkpoint.steps(tmp_path) == [1]
    checkpoints = _reopen(tmp_path)
    step, state, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((8, 2048), jnp.float32)})
    checkpoints.save(2, state, {}, {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"], "the remains are removed"
