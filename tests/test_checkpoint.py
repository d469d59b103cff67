"""Checkpoints come back as they were, on any mesh and in any precision, and no failure to write one is overlooked."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from saved import CONFIG, DATA, abstract_of, assert_same_bits, reopen, sharding_of, state_of, truncate, write

from hybrid_attn import checkpoint, stored
from hybrid_attn.checkpoint import Checkpoints


def test_arrays_step_data_and_config_come_back_as_they_were_saved(tmp_path):
    write(tmp_path, 5)
    step, state, data = reopen(tmp_path).restore(abstract_of(state_of()))
    assert (step, data) == (5, {**DATA, "step": 5})
    assert checkpoint.read_config(tmp_path) == CONFIG
    assert_same_bits(state, state_of(5))
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, state, state_of(5)))


def test_a_checkpoint_is_restored_on_another_mesh_and_in_another_precision(tmp_path):
    write(tmp_path, 5)
    sharding = sharding_of(2, 4, *())
    abstract = abstract_of(state_of(), sharding, jnp.bfloat16)
    embed = jax.ShapeDtypeStruct((24, 16), jnp.bfloat16, sharding=sharding_of(2, 4, "tensor", "data"))
    abstract = abstract._replace(params={**abstract.params, "embed": embed})
    _, state, _ = reopen(tmp_path).restore(abstract)
    expected = jax.tree.map(lambda x, y: x.astype(y.dtype), state_of(5), abstract)
    assert_same_bits(state, expected)
    assert state.params["embed"].sharding == embed.sharding
    assert state.params["embed"].addressable_shards[0].data.shape == (6, 8)


def test_replicated_arrays_that_every_device_writes_a_part_of_are_read_as_others(tmp_path, monkeypatch):
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    monkeypatch.setattr(handler, "_min_slice_bytes_for_replica_parallel", None)  # Orbax's default, which conftest.py changes
    write(tmp_path, 5)
    assert_same_bits(reopen(tmp_path).restore(abstract_of(state_of()))[1], state_of(5))
    stacked = state_of(5).params["periods"]["L0"]["q"]
    slices = [*checkpoint.read_slices(tmp_path, "periods/L0/q", stacked.shape)]
    np.testing.assert_array_equal(np.stack(slices).astype(np.float32), np.asarray(stacked).astype(np.float32))


def test_a_state_may_be_donated_and_its_data_changed_as_soon_as_save_returns(tmp_path):
    big = {"w": jax.device_put(np.random.default_rng(0).normal(size=(1024, 2048)).astype(np.float32), sharding_of(8, 1))}
    expected, data = np.array(big["w"]), {"rows": [1]}
    checkpoints = reopen(tmp_path)
    abstract = abstract_of(big)
    checkpoints.save(1, big, data, CONFIG)
    data["rows"].append(2)
    jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(big["w"]))
    assert big["w"].is_deleted()
    _, state, saved = checkpoints.restore(abstract)
    np.testing.assert_array_equal(np.asarray(state["w"]), expected)
    assert saved == {"rows": [1]}


def test_the_newest_are_kept_and_saving_a_step_twice_writes_it_once(tmp_path):
    write(tmp_path, 1, 2, 3, 3, 4, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert reopen(tmp_path).latest() == 4


def test_a_checkpoint_is_due_at_every_multiple_that_has_none_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every=5)
    assert [step for step in range(1, 16) if checkpoints.due(step)] == [5, 10, 15]
    checkpoints.save(10, state_of(), DATA, CONFIG)
    assert [step for step in range(1, 16) if checkpoints.due(step)] == [15]
    checkpoints.close()


def test_parameters_and_config_are_read_alone(tmp_path):
    write(tmp_path, 5, 6)
    saved = state_of(6).params
    for path in (tmp_path / "6" / "data").iterdir():
        path.unlink()
    with jax.set_mesh(sharding_of(4, 2).mesh):  # in force, and not the mesh of what is read
        params = checkpoint.read_params(tmp_path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved))
    assert_same_bits(params, saved)
    assert params["embed"].devices() == {jax.devices()[0]}
    assert_same_bits(checkpoint.read_params(tmp_path, abstract_of(state_of().params), step=5), state_of(5).params)
    with pytest.raises(ValueError, match="no complete checkpoint of step 7; it has 5, 6"):
        checkpoint.read_params(tmp_path, abstract_of(state_of().params), step=7)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.read_config(tmp_path / "elsewhere")


@pytest.mark.parametrize("by_period", [True, False])
def test_parameters_are_read_by_period_from_any_chunks_on_disk(tmp_path, monkeypatch, by_period):
    if not by_period:
        monkeypatch.setattr(checkpoint, "_chunks", lambda key, x: checkpoint.ocp.SaveArgs())
    write(tmp_path, 5, 6)
    saved = state_of(5).params
    (embed,) = checkpoint.read_slices(tmp_path, "embed", (24, 16), step=5)
    np.testing.assert_array_equal(embed, saved["embed"])
    periods = list(checkpoint.read_slices(tmp_path, "periods/L0/q", (2, 16, 5), step=5))
    assert [len(x.base) for x in periods] == ([1, 1] if by_period else [2, 2])  # how many are held at a time
    np.testing.assert_array_equal(np.stack(periods), saved["periods"]["L0"]["q"])
    with pytest.raises(ValueError, match=r"(?s)another model.*embed: \(24, 16\) -> \(24, 8\)"):
        list(checkpoint.read_slices(tmp_path, "embed", (24, 8)))
    with pytest.raises(checkpoint.UnreadableError, match="no array params/unembed"):
        list(checkpoint.read_slices(tmp_path, "unembed", (24, 16)))


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?b", "a\\b", "a\udcff"])
def test_a_directory_whose_name_orbax_reads_as_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="no checkpoint can be written to .*; rename it, or use another --workdir"):
        Checkpoints(tmp_path / name / "checkpoints", keep=1, every=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["a#b", "a%20b", "a b", "a%", "a|b", "a{1}", "a]", "\u00e9\u65e5", "~", "..a", "a:b", "x" * 200]
)
def test_a_directory_of_any_other_name_is_written_and_read(tmp_path, name):
    write(tmp_path / name, 5)
    write(tmp_path / name.partition("#")[0].replace("%20", " "), 6)  # that a URL of this name would be of
    assert reopen(tmp_path / name).restore(abstract_of(state_of()), step=5)[0] == 5
    read = np.stack(list(checkpoint.read_slices(tmp_path / name, "periods/L0/q", (2, 16, 5), step=5)))
    np.testing.assert_array_equal(read, state_of(5).params["periods"]["L0"]["q"])


@pytest.mark.parametrize("name", ["a?b", "a[1]", "a*b", "a#?b"])
def test_a_directory_that_was_renamed_to_a_pattern_is_read(tmp_path, name):
    for directory, step in ((name, 5), (name.replace("?", "X").replace("[1]", "1").replace("*", "XX").partition("#")[0], 6)):
        write(tmp_path / "new", step)
        (tmp_path / "new").rename(tmp_path / directory)
    assert checkpoint.steps(tmp_path / name) == [5]
    assert checkpoint.read_config(tmp_path / name) == CONFIG
    expected = state_of(5).params
    assert_same_bits(checkpoint.read_params(tmp_path / name, abstract_of(expected)), expected)
    read = np.stack(list(checkpoint.read_slices(tmp_path / name, "periods/L0/q", (2, 16, 5))))
    np.testing.assert_array_equal(read, expected["periods"]["L0"]["q"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lose", [lambda path: truncate(path.parent, 1), lambda path: path.rename(path.parent / "gone")])
def test_a_first_checkpoint_that_is_lost_without_an_error_ends_the_run(tmp_path, monkeypatch, lose):
    checkpoints = reopen(tmp_path)
    finish = checkpoints._manager.wait_until_finished

    def finish_and_lose():
        finish()
        if (tmp_path / "1").exists():
            lose(tmp_path / "1")

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", finish_and_lose)
    with pytest.raises(OSError, match="checkpoint of step 1 could not be written to .*; there is no other"):
        checkpoints.save(1, state_of(1), DATA, CONFIG)


def test_other_arrays_are_an_error_that_names_them_and_no_reason_to_fall_back(tmp_path):
    write(tmp_path, 5)
    checkpoints = reopen(tmp_path)
    with pytest.raises(stored.AnotherModelError, match=r"params/embed: \(24, 16\) -> \(24, 32\)"):
        checkpoints.restore(abstract_of(state_of(width=32)))
    with pytest.raises(stored.AnotherModelError, match=r"opt_state/0/mu/embed: \(24, 16\) -> not expected"):
        checkpoints.restore(abstract_of(state_of())._replace(opt_state=()))
    with pytest.raises(stored.AnotherModelError, match=r"params/bias: not saved -> \(3,\)"):
        checkpoint.read_params(tmp_path, {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert checkpoints.steps() == [5]


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path, 5)
    checkpoints, before = reopen(tmp_path), sorted(tmp_path.rglob("*"))
    usage = checkpoint.shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=f"step 6 could not be written to {tmp_path}: .*1.1 MiB do not fit: 1.0 MiB are free; "):
        checkpoints.save(6, state_of(6), DATA, CONFIG)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_removed_directory_is_created_again_or_named_in_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", keep=1, every=1)
    checkpoints.save(5, state_of(5), DATA, CONFIG, wait=True)
    shutil.rmtree(tmp_path / "run")
    checkpoints.save(6, state_of(6), DATA, CONFIG, wait=True)
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [6]
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="step 7 could not be written to .*; there is no other; .*restore the directory") as error:
        checkpoints.save(7, state_of(7), DATA, CONFIG)
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
    assert checkpoints.restore(abstract_of(state))[0] == 1
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
    checkpoints = reopen(tmp_path)
    step, state, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((8, 2048), jnp.float32)})
    checkpoints.save(2, state, {}, {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"], "the remains are removed"
