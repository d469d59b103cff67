"""Safetensors files: export and import in shards, wrong and broken files, and the memory that they need."""

import dataclasses
import json
import os
import shutil
import types
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import assert_close, mesh_of, random_params
from converted import GOLDEN, HYBRID, assert_same, edit, edit_tensors, read, shapes_of, write

from hybrid_attn.convert import families, hf
from hybrid_attn.model import abstract_params
from hybrid_attn.model.transformer import unstacked


@pytest.fixture
def exported(tmp_path, one_device):
    """A directory of HYBRID as cohere2."""
    return write(tmp_path / "exported", HYBRID, random_params(HYBRID))


@pytest.mark.parametrize("case", GOLDEN)
def test_export_then_import_is_the_identity_in_shards_of_any_size(case, tmp_path, one_device):
    model_type = hf.read_config(GOLDEN[case])["model_type"]
    model, params = read(GOLDEN[case])
    directory = write(tmp_path / "out", model, params, model_type, shard_bytes=20_000)
    assert (directory / "model.safetensors.index.json").exists() and len(list(directory.glob("*.safetensors"))) > 1
    assert all(path.stat().st_size < 24_000 for path in directory.glob("*.safetensors"))
    again, same = read(directory)
    assert again == model
    assert_same(same, params)
    one_file = write(tmp_path / "one", model, params, model_type)
    assert [path.name for path in one_file.glob("*safetensors*")] == ["model.safetensors"]
    assert_same(read(one_file)[1], params)


@pytest.mark.parametrize(
    "prefix, pattern, layout", [("L", "LLG", ("L", "LLG")), ("GL", "LGL", ("", "GLL")), ("GG", "L", ("GG", "L"))]
)
def test_the_first_layers_may_have_a_prefix(prefix, pattern, layout, tmp_path, one_device):
    model = dataclasses.replace(HYBRID, prefix=prefix, pattern=pattern, num_layers=10)
    params = random_params(model)
    again, same = read(write(tmp_path / "out", model, params))
    assert (again.prefix, again.pattern) == layout and again.layers == model.layers
    assert_close(unstacked(again, same, "float32"), unstacked(model, params, "float32"), 0)


def test_bfloat16_is_the_nearest_and_survives_a_round_trip(tmp_path, one_device):
    params = random_params(HYBRID)
    model, half = read(write(tmp_path / "half", HYBRID, params, dtype="bfloat16"))
    assert_same(half, jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params))
    again = read(write(tmp_path / "again", model, half, dtype="bfloat16"), dtype="bfloat16")[1]
    assert all(x.dtype == "bfloat16" for x in jax.tree.leaves(again))
    assert_same(again, half)


def test_parameters_are_read_onto_any_mesh(exported):
    expected = jax.device_get(random_params(HYBRID))
    with jax.set_mesh(mesh_of(1, 2, 1, 2)):
        params = read(exported)[1]
        shardings = [x.sharding.spec for x in jax.tree.leaves(abstract_params(HYBRID))]
        assert [x.sharding.spec for x in jax.tree.leaves(params)] == shardings
        assert_same(params, expected)


def test_every_tensor_that_does_not_fit_is_named_at_once(exported):
    def change(arrays):
        del arrays["model.norm.weight"]
        arrays["model.layers.3.mlp.up_proj.weight"] = np.zeros((7, 32), np.float32)
        arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)

    edit_tensors(exported, change)
    with pytest.raises(ValueError) as error:
        read(exported)
    assert str(error.value).split("\n")[1:] == [
        "  model.norm.weight: missing -> [32]",
        "  model.layers.3.mlp.up_proj.weight: [7, 32] -> [48, 32]",
        "  model.layers.0.self_attn.q_proj.bias: [32] -> not expected",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 1}, r"k_proj.weight: \[16, 32\] -> \[8, 32\]"),
        ({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, r"model.layers.4.*-> not expected"),
        ({"vocab_size": 41}, r"embed_tokens.weight: \[40, 32\] -> \[41, 32\]"),
        ({"tie_word_embeddings": False}, r"lm_head.weight: missing -> \[40, 32\]"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(exported, fields, message):
    edit(exported, **fields)
    with pytest.raises(ValueError, match=f"not those of its config.json(.|\n)*{message}"):
        read(exported)


def test_a_tied_table_may_be_stored_twice_but_not_differ_and_old_buffers_are_ignored(exported):
    expected = read(exported)[1]

    def twice(arrays):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    edit_tensors(exported, twice)
    assert_same(read(exported)[1], expected)
    edit_tensors(exported, lambda arrays: arrays["lm_head.weight"].__setitem__((39, 31), 5.0))
    with pytest.raises(ValueError, match="lm_head.weight.*not expected"):
        read(exported)


def test_broken_files_are_named(exported, tmp_path):
    file = exported / "model.safetensors"
    content = file.read_bytes()
    for broken in (content[:-3], content[:5], b"", b"\xff" * 64):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
            read(exported)
    file.unlink()
    with pytest.raises(ValueError, match="has no model.safetensors, and no model.safetensors.index.json"):
        read(exported)
    (exported / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(ValueError, match="has no model-2.safetensors, which model.safetensors.index.json names"):
        read(exported)
    for text, message in (
        ("[]", "index.json must hold an object"),
        ("{}", "has no weight_map of tensors to files"),
        ('{"weight_map": ["model.safetensors"]}', "has no weight_map of tensors to files"),
        ('{"weight_map": {"a": null}}', "has a in None, which must be the name of a .safetensors file beside it"),
        ('{"weight_map": {"a": "b.safetensors", "c": 3}}', "has c in 3, which must be"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "has a in '../b.safetensors', which must be"),
        ('{"weight_map": {"a": "sub"}}', "has a in 'sub', which must be"),
    ):
        (exported / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read(exported)
    (exported / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json is nested too deeply"):
        read(exported)
    (exported / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        read(exported)
    with pytest.raises(ValueError, match="has no config.json"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "float8_e4m3fn", "float8_e5m2"])
def test_tensors_that_are_not_plain_floats_are_named_with_the_others(exported, dtype):
    def change(arrays):
        del arrays["model.norm.weight"]
        for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"):
            arrays[name] = arrays[name].astype(dtype)
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].astype(dtype)

    edit_tensors(exported, change)
    stored = {"int8": "I8", "uint8": "U8", "int32": "I32", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    why = f"of type {stored[dtype]}, where only F64, F32, F16, BF16 are supported"
    with pytest.raises(ValueError) as error:
        read(exported)
    assert sorted(str(error.value).split("\n")[1:]) == [
        f"  lm_head.weight: [40, 32] {why} -> not expected",
        f"  model.layers.1.mlp.up_proj.weight: [48, 32] {why} -> [48, 32]",
        f"  model.layers.3.mlp.up_proj.weight: [48, 32] {why} -> [48, 32]",
        "  model.norm.weight: missing -> [32]",
    ]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_plain_floats_are_read(exported, dtype):
    expected = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype("float32"), read(exported)[1])
    edit_tensors(exported, lambda arrays: arrays.update({name: x.astype(dtype) for name, x in arrays.items()}))
    assert_same(read(exported)[1], expected)


def test_every_tensor_is_taken_from_the_file_that_the_index_names(exported):
    expected = read(exported)[1]
    arrays = safetensors.numpy.load_file(exported / "model.safetensors")
    norm, embed = "model.norm.weight", "model.embed_tokens.weight"
    files = dict.fromkeys(arrays, "a.safetensors") | {norm: "b.safetensors"}

    def save(a, b, files):
        safetensors.numpy.save_file(a, exported / "a.safetensors")
        safetensors.numpy.save_file(b, exported / "b.safetensors")
        (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    save(arrays | {norm: arrays[norm] + 1}, {norm: arrays[norm], embed: arrays[embed] + 1}, files)
    assert_same(read(exported)[1], expected)
    bias = "model.layers.0.self_attn.q_proj.bias"
    save(arrays | {bias: np.zeros(32, np.float32)}, {"x": arrays[norm]}, files | {"y": "a.safetensors"})
    with pytest.raises(ValueError) as error:
        read(exported)
    assert str(error.value).split("\n")[1:] == [
        "  model.norm.weight: missing in b.safetensors, where the index has it -> [32]",
        "  model.layers.0.self_attn.q_proj.bias: in a.safetensors, not in the index -> not expected",
        "  x: in b.safetensors, not in the index -> not expected",
        "  y: missing in a.safetensors, where the index has it -> not expected",
    ]


class Alive:
    """The bytes of all watched arrays that still exist, `now` and at `most`."""

    def __init__(self):
        self.now = self.most = 0

    def watch(self, x: np.ndarray) -> np.ndarray:
        self.now += x.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(x, self._gone, x.nbytes)
        return x

    def _gone(self, nbytes):
        self.now -= nbytes


@pytest.mark.parametrize(("case", "most"), [("cohere2", 40 * 24), ("cohere2_moe", 40 * 24), ("granitemoe_swa", 56 * 24)])
def test_one_tensor_is_read_at_a_time_and_of_a_tensor_of_experts_one_expert(case, most, monkeypatch):
    alive, largest, open_file = Alive(), [], safetensors.safe_open

    def watched(x):
        largest.append(x.nbytes)
        return alive.watch(x)

    class CountedSlice:
        def __init__(self, stored):
            self.stored = stored

        def __getitem__(self, index):
            return watched(self.stored[index])

        def __getattr__(self, name):
            return getattr(self.stored, name)

    class Counted:
        def __init__(self, *args, **kwargs):
            self.file = open_file(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_tensor(self, name):
            x = self.file.get_tensor(name)
            return watched(x)

        def get_slice(self, name):
            return CountedSlice(self.file.get_slice(name))

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(safetensors, "safe_open", Counted)
    with jax.set_mesh(mesh_of(1, 2, 1, 2)):
        read(GOLDEN[case], dtype="bfloat16")
    assert len(largest) > 4 * 8
    assert alive.most == max(largest) == 2 * most  # in bfloat16: the largest that is no mixture, and no more


def test_one_shard_and_one_period_are_held_when_writing(tmp_path, one_device, monkeypatch):
    params, alive, saved, save_file = random_params(HYBRID), Alive(), [], safetensors.numpy.save_file

    def watched(x):
        assert alive.now == 0
        return alive.watch(x)

    def save(arrays, *args, **kwargs):
        saved.append(sum(x.nbytes for x in arrays.values()))
        assert all(x.base is None for x in arrays.values())  # a view would keep its period
        save_file(arrays, *args, **kwargs)

    monkeypatch.setattr(safetensors.numpy, "save_file", save)
    described = families.config_json(HYBRID, "cohere2", 64)
    read = hf.by_period(params)
    hf.write(
        tmp_path, HYBRID, described, shapes_of(HYBRID), lambda path: (watched(x.copy()) for x in read(path)), "float32", 30_000
    )
    assert len(saved) > 3 and max(saved) <= 30_000 < sum(saved)


def test_a_disk_that_is_full_is_a_line_and_nothing_is_left(tmp_path, one_device, monkeypatch):
    params, described = random_params(HYBRID), families.config_json(HYBRID, "cohere2", 64)

    def export():
        with hf.new_directory(tmp_path / "out") as directory:
            hf.write(directory, HYBRID, described, shapes_of(HYBRID), hf.by_period(params), "float32", 30_000)

    def full(arrays, path, **_):
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        with pytest.raises(OSError, match="[0-9,]{6,} bytes of tensors do not fit: 1,000 are free at .*; free some space"):
            export()
    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="model-00001-of-0000..safetensors could not be written: .*No space left on device"):
        export()
    assert list(tmp_path.iterdir()) == []


def test_only_regular_files_of_a_plausible_size_are_opened(exported):
    """A pipe would block, and a file of any size would be read into memory."""
    (exported / "model.safetensors").unlink()
    os.mkfifo(exported / "model.safetensors")
    with pytest.raises(ValueError, match="has no model.safetensors"):
        read(exported)
    os.truncate(exported / "config.json", 10**11)
    with pytest.raises(ValueError, match="config.json is not JSON: it has 100,000,000,000 bytes"):
        read(exported)
    (exported / "config.json").unlink()
    os.mkfifo(exported / "config.json")
    with pytest.raises(ValueError, match="config.json is not JSON: it is no file"):
        read(exported)


def test_an_error_about_many_tensors_names_a_few(exported):
    edit_tensors(exported, lambda arrays: arrays.update({f"x.{i}": np.zeros(1, np.float32) for i in range(5000)}))
    with pytest.raises(ValueError, match="  and 4,980 more$"):
        read(exported)
