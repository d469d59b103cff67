"""Checkpoints of public families: the logits of their own implementations, export and import, and what is refused.

`golden/` holds tiny models with the logits that `tools/make_golden.py` took from the library that defines the families.
"""

import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from absl.testing import flagsaver
from conftest import RUN, mesh_of, on_mesh, random_params, tiny, tool

from hybrid_attn import checkpoint, config, programs
from hybrid_attn.convert import families, hf
from hybrid_attn.evals import provenance
from hybrid_attn.model import apply, flops, logits
from hybrid_attn.train import loop

ROOT = Path(__file__).parents[1]
GOLDEN = {path.name: path for path in sorted((ROOT / "tests" / "golden").iterdir())}
HYBRID = tiny(
    {"model.num_layers": 5, "model.pattern": "LLG", "model.vocab_size": 40, "model.logit_scale": 0.25},
    L={"window": 5, "rope_theta": 100.0},
).model  # a model of cohere2, with layers after the last period


@functools.cache
def abstract(model, mesh):
    """`flops.shapes` on the current mesh, cached because it would take most of the time of these tests."""
    return flops.shapes(model)


def shapes_of(model) -> dict:
    return {path: x.shape for path, x in hf.flat(abstract(model, jax.sharding.get_mesh())).items()}


def read(directory, dtype="float32"):
    """(model, parameters) of a directory, on the current mesh."""
    described = hf.read_config(directory)
    model = families.model_of(described)
    shapes = abstract(model, jax.sharding.get_mesh())
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), shapes)
    return model, hf.read_params(directory, model, described["model_type"], expected)


def write(directory, model, params, model_type=None, dtype="float32", shard_bytes=10**9):
    directory.mkdir()
    described = hf.describe(model, directory, 64, model_type)
    hf.write(directory, model, described, shapes_of(model), hf.by_period(params), dtype, shard_bytes)
    return directory


@pytest.fixture
def exported(tmp_path, one_device):
    """A directory of HYBRID as cohere2."""
    return write(tmp_path / "exported", HYBRID, random_params(HYBRID))


def edit(directory, **fields):
    """Changes config.json and removes fields that become None."""
    values = {**hf.read_config(directory), **fields}
    (directory / "config.json").write_text(json.dumps({key: x for key, x in values.items() if x is not None}))


def edit_tensors(directory, change):
    """Rewrites model.safetensors with `change(arrays)`."""
    path = directory / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path)


def assert_same(got, expected):
    got, expected = hf.flat(got), hf.flat(expected)
    assert got.keys() == expected.keys()
    for path, x in got.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(expected[path]), path)


@pytest.mark.parametrize("case", GOLDEN)
def test_logits_are_those_of_the_familys_own_implementation(case, one_device):
    golden = np.load(GOLDEN[case] / "golden.npz")
    model, params = read(GOLDEN[case])
    mask = golden["mask"]
    positions = np.tile(np.arange(mask.shape[1], dtype=np.int32), (len(mask), 1))
    batch = on_mesh({"tokens": golden["tokens"], "positions": positions, "segments": mask})

    @jax.jit
    def run(params, tokens, positions, segments):
        x_BTD = apply(model, params, tokens, positions, segments, RUN._replace(kernel="reference"))
        return logits(model, params, x_BTD)

    got = np.asarray(run(params, batch["tokens"], batch["positions"], batch["segments"]))
    assert np.abs(golden["logits"]).max() > 0.1
    np.testing.assert_allclose(got * mask[..., None], golden["logits"], atol=1e-4, rtol=0)


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
        shardings = [x.sharding.spec for x in jax.tree.leaves(flops.shapes(HYBRID))]
        assert [x.sharding.spec for x in jax.tree.leaves(params)] == shardings
        assert_same(params, expected)


def test_both_spellings_of_a_config_give_the_same_model():
    new = hf.read_config(GOLDEN["cohere2"])
    old = {key: x for key, x in new.items() if key not in ("layer_types", "rope_parameters")}
    old |= {"sliding_window_pattern": 4, "rope_theta": 50.0, "rope_scaling": None}
    assert families.model_of(old) == families.model_of(new)
    assert families.model_of(new).layers == "LLLG"


def test_an_exported_config_has_both_spellings(exported):
    described = hf.read_config(exported)
    assert described["rope_theta"] == described["rope_parameters"]["rope_theta"] == 100.0
    older = {key: x for key, x in described.items() if key != "rope_parameters"}
    assert families.model_of(older) == families.model_of(described)
    assert families.differences(HYBRID, families.model_of(described)) == []


def test_letters_and_periods_do_not_count_when_models_are_compared():
    spelled = dataclasses.replace(HYBRID, pattern="XXYXX", kinds=config.Table(X=HYBRID.kinds["L"], Y=HYBRID.kinds["G"]))
    assert families.differences(spelled, HYBRID) == []
    other = dataclasses.replace(HYBRID, num_layers=4)
    assert families.differences(HYBRID, other) == ["  model.num_layers: 5 -> 4"]


def with_layer_type(model, letter, **changes):
    kinds = {**model.kinds, letter: dataclasses.replace(model.kinds[letter], **changes)}
    return dataclasses.replace(model, kinds=config.Table(kinds))


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (with_layer_type(HYBRID, "G", qk_norm="rms"), "model.kinds.G.qk_norm: rms -> none"),
        (with_layer_type(HYBRID, "L", sink=True), "model.kinds.L.sink: True -> False"),
        (with_layer_type(HYBRID, "G", scale=1.0), r"model.kinds.G.scale: 1.0 -> 0.353553391"),
        (with_layer_type(HYBRID, "L", rope_fraction=0.5), "model.kinds.L.rope_fraction: 0.5 -> 1.0"),
        (dataclasses.replace(HYBRID, logit_softcap=3.0), "model.logit_softcap: 3.0 -> None"),
        (dataclasses.replace(HYBRID, rope_layout="half"), "model.rope_layout: half -> interleaved"),
        (dataclasses.replace(HYBRID, block="post"), "model.block: post -> parallel"),
    ],
)
def test_a_model_that_the_family_cannot_express_is_refused_with_the_field(model, field, tmp_path):
    with pytest.raises(ValueError, match=f"cohere2 cannot express this model.*\n  {field}"):
        families.config_json(model, "cohere2", 64)


def test_a_model_that_no_family_expresses_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no family expresses this model(.|\n)*cohere2 cannot express.*\n  model.kinds.L.sink"):
        families.expressing(with_layer_type(HYBRID, "L", sink=True))
    assert families.expressing(HYBRID) == "cohere2"


@pytest.mark.parametrize("length", ["x", True, 0, -5, 1, 2**31, 1.5, []])
def test_a_config_file_whose_length_is_not_a_number_is_named(tmp_path, length):
    path = tmp_path / "companions" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"max_position_embeddings": length}))
    message = re.escape(f"config.json has max_position_embeddings={length!r}; make it a number of tokens, from 2 to")
    for read in (lambda: hf.describe(HYBRID, path.parent, 64), lambda: provenance.trained_length(None, tmp_path, 0)):
        with pytest.raises(ValueError, match=message):
            read()


def test_an_ntk_stretch_is_written_as_the_theta_that_it_is():
    scaling = dataclasses.replace(HYBRID.kinds["L"].rope_scaling, type="ntk", factor=2.0)
    described = families.config_json(with_layer_type(HYBRID, "L", rope_scaling=scaling), "cohere2", 64)
    assert described["rope_parameters"]["rope_theta"] == pytest.approx(100.0 * 2 ** (8 / 6))


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("cohere2", {"model_type": "mamba"}, "model_type='mamba' of config.json is not one of 'afmoe', 'cohere', 'cohere2'"),
        ("cohere2", {"model_type": None}, "model_type=None of config.json is not one of"),
        ("cohere2", {"hidden_size": None, "vocab_size": None}, "config.json lacks vocab_size, hidden_size"),
        ("cohere2", {"hidden_size": "24"}, "hidden_size='24', which must be a whole number"),
        ("cohere2", {"layer_types": ["full_attention"] * 3}, "layer types for 3 layers and num_hidden_layers=4"),
        ("cohere2", {"layer_types": ["chunked_attention"] * 4}, "layer_types chunked_attention; known: sliding_attention"),
        ("cohere2", {"rope_parameters": {"full_attention": {}}}, "cohere2 has one RoPE"),
        ("cohere2", {"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'; known: default, linear"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "config.json lacks 'factor'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "lacks 'high_freq_factor'"),
        ("llama_yarn", {"rope_parameters": {"rope_type": "yarn"}, "max_position_embeddings": None}, "lacks original_max"),
        ("cohere2", {"sliding_window": "5"}, "value of the wrong type"),
        (
            "cohere2",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config; only plain floats are supported: use",
        ),
        ("cohere2", {"model_type": []}, r"model_type=\[\] of config.json is not one of"),
        ("cohere2", {"hidden_act": []}, r"activation \[\] of config.json is not one of 'silu'"),
        ("cohere2", {"hidden_size": True}, "hidden_size=True, which must be a whole number"),
        ("cohere2", {"layer_types": None, "sliding_window_pattern": ""}, "sliding_window_pattern='', which must be"),
        ("cohere2", {"layer_types": None, "sliding_window_pattern": 2.5}, "sliding_window_pattern=2.5, which must be"),
        ("cohere2", {"rope_parameters": "abc"}, "rope_parameters='abc', which must be an object"),
        ("olmo3", {"rope_parameters": {"sliding_attention": "abc"}}, "rope_parameters.sliding_attention='abc', which must be"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0.0, which must be a number above 0"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0, which must be"),
        ("afmoe", {"layer_types": None, "global_attn_every_n_layers": ""}, "global_attn_every_n_layers='', which must be"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "value of the wrong type or size"),
        ("llama", {"intermediate_size": 20.5}, "intermediate_size=20.5, which must be a whole number"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, which must be at most 1,024"),
        ("llama", {"num_hidden_layers": -1}, "num_hidden_layers=-1, which must be a whole number above 0"),
        ("llama", {"vocab_size": 10**30}, "vocab_size=10+, which must be at most 67,108,864"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads=0, which must be a whole number above 0"),
        ("llama", {"head_dim": "8"}, "head_dim='8', which must be a whole number above 0"),
        ("llama", {"rms_norm_eps": 10**400}, "must be a finite number"),
        ("llama", {"rms_norm_eps": [0] * 10**5}, r"^model.norm_eps=\[0, 0.{500,600}$"),
        (
            "olmo3",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "type='linear', which the library of olmo3 ignores",
        ),
        (
            "gemma3_text",
            {"rope_scaling": {"type": "yarn"}},
            "type='yarn', which the library of gemma3_text ignores; rename",
        ),
        ("cohere2", {"attention_bias": True}, "attention_bias=True; for cohere2, only attention_bias=False"),
        ("cohere2", {"hidden_act": "relu2"}, "activation 'relu2' of config.json is not one of 'silu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("olmo3", {"rope_parameters": {"rope_theta": 5.0}}, "olmo3 has one for each"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "only use_bidirectional_attention=False"),
        ("afmoe", {"num_dense_layers": 2}, "num_dense_layers=2 of 4 layers; mixture-of-experts"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 5}, "use_sliding_window=false"),
    ],
)
def test_a_config_that_is_not_ours_is_refused_with_its_field(case, fields, message):
    values = {**hf.read_config(GOLDEN[case]), **fields}
    with pytest.raises(ValueError, match=message):
        families.model_of({key: x for key, x in values.items() if x is not None})


def test_layers_of_olmo3_are_what_its_library_makes_of_a_pattern():
    """It ignores `sliding_window_pattern`: every fourth layer is full."""
    values = {key: x for key, x in hf.read_config(GOLDEN["olmo3"]).items() if key != "layer_types"}
    assert families.model_of(values | {"sliding_window_pattern": 2}) == families.model_of(values)


def test_key_value_heads_that_are_null_are_as_many_as_heads():
    """Without the field smollm3 has four; with null its library uses all heads."""
    values = hf.read_config(GOLDEN["smollm3"])
    assert families.model_of(values | {"num_key_value_heads": None}).num_kv_heads == values["num_attention_heads"]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_heads_that_do_not_divide_the_width_are_not_exported_to_a_library_that_requires_it(model_type):
    model = families.model_of(hf.read_config(GOLDEN[model_type]))
    model = dataclasses.replace(model, d_model=model.num_heads * 7 + 1, num_kv_heads=model.num_heads)
    if model.embed_scale != 1.0:
        model = dataclasses.replace(model, embed_scale=model.d_model**0.5)
    message = f"model.d_model: {model.d_model} must be a multiple of model.num_heads={model.num_heads} or transformers"
    with pytest.raises(ValueError, match=message):
        families.config_json(model, model_type, 64)


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


def test_one_tensor_is_read_at_a_time(exported, monkeypatch):
    alive, largest, open_file = Alive(), [], safetensors.safe_open

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
            largest.append(x.nbytes)
            return alive.watch(x)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(safetensors, "safe_open", Counted)
    with jax.set_mesh(mesh_of(1, 2, 1, 2)):
        read(exported, dtype="bfloat16")
    assert len(largest) > 5 * 8
    assert alive.most == max(largest)


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


def test_a_new_directory_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), hf.new_directory(tmp_path / "out") as directory:
        (directory / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with pytest.raises(KeyboardInterrupt), hf.new_directory(tmp_path / "kept" / "a" / "b" / "out") as directory:
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]
    (tmp_path / "kept").rmdir()
    (tmp_path / "out").mkdir()
    with hf.new_directory(tmp_path / "out") as directory:
        (directory / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="out exists and is not an empty directory"), hf.new_directory(tmp_path / "out"):
        pass


def test_an_empty_directory_a_link_and_a_mount_point_are_filled_where_they_are(tmp_path, monkeypatch):
    """Here no directory can be replaced by a rename, like a mount point. The files that make it a model come last."""
    rename, moved = Path.rename, []

    def busy(path, target):
        if Path(target).is_dir():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        moved.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    (tmp_path / "mount").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mount")
    with pytest.raises(KeyboardInterrupt), hf.new_directory(tmp_path / "mount") as directory:
        raise KeyboardInterrupt
    with hf.new_directory(tmp_path / "link") as directory:
        others = ["added_tokens.json", "chat_template.jinja", "companions", "model.safetensors", "tokenizer.json"]
        for name in ("config.json", *others):
            (directory / name).write_text("x")
        (directory / "0").mkdir()
    assert (tmp_path / "link").is_symlink()
    names = sorted(path.name for path in (tmp_path / "mount").iterdir())
    assert names == sorted(moved) == sorted([*others, "0", "config.json"])
    assert set(moved[-2:]) == {"0", "config.json"}
    (tmp_path / "nowhere").symlink_to(tmp_path / "later")
    with hf.new_directory(tmp_path / "nowhere") as directory:
        (directory / "x").write_text("x")
    assert (tmp_path / "later" / "x").is_file()
    with pytest.raises(ValueError, match="--out= is empty"), hf.new_directory(""):
        pass


def test_content_that_cannot_be_moved_is_kept_and_named(tmp_path):
    with pytest.raises(OSError, match=r"out could not be created .*; its content is in (\S+)") as error:
        with hf.new_directory(tmp_path / "out") as directory:
            (directory / "work").write_text("x")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "taken").write_text("x")
    kept = Path(str(error.value).rpartition(" ")[2])
    assert kept == directory and (kept / "work").read_text() == "x"


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


def test_an_error_names_only_some_of_many_tensors(exported):
    edit_tensors(exported, lambda arrays: arrays.update({f"x.{i}": np.zeros(1, np.float32) for i in range(5000)}))
    with pytest.raises(ValueError, match="  and 4,980 more$"):
        read(exported)


@pytest.fixture
def tools(capsys):
    """Runs a program of tools/ in this process and returns its exit status, stdout and stderr."""

    def call(name, *arguments):
        status = 0
        with tool(name) as module, flagsaver.flagsaver():
            try:
                module.main(programs.parse([f"{name}.py", *arguments]))
            except SystemExit as end:
                status = end.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def save_run(workdir, seed):
    """Writes a run of HYBRID like training does, and returns its parameters."""
    params = random_params(HYBRID, seed)
    c = config.to_dict(tiny()) | {"model": config.to_dict(HYBRID)}
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=1, every=1)
    checkpoints.save(3, {"params": params}, {"stage_steps": [3], "stage": {"tokenizer": "bytes"}}, c, wait=True)
    checkpoints.close()
    return params


def test_a_workdir_of_any_name_is_exported_to_a_directory_of_any_name(tools, tmp_path, one_device):
    """Beside it is a run whose name would be the URL-decoded one."""
    save_run(tmp_path / "a b", seed=1)
    workdir, out = tmp_path / "a%20b", tmp_path / "out#1?%20"
    params = save_run(workdir, seed=2)
    for directory in (workdir, workdir / "checkpoints"):
        status, said, err = tools("export_hf", f"--checkpoint={directory}", f"--out={out}")
        assert status == 0 and said.startswith(f"{out}: Cohere2ForCausalLM"), err
        assert_same(read(out)[1], params)
        shutil.rmtree(out)
    workdir.rename(tmp_path / "a#b?é")
    workdir = tmp_path / "a#b?é"
    assert tools("export_hf", f"--checkpoint={workdir}", f"--out={out}")[0] == 0
    assert_same(read(out)[1], params)
    status, _, err = tools("export_hf", f"--checkpoint={tmp_path / 'none'}", f"--out={out}")
    assert status == 2 and "none is no directory; name a run's workdir" in err and err.count("\n") == 1
    status, _, err = tools("export_hf", f"--checkpoint={workdir}", f"--out={out}", "--step=4")
    assert status == 2 and "has no complete checkpoint of step 4; it has 3" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.typo=1", "typo"),
        ("more", "'more' is no flag"),
        ("--out=", "--out= is empty; name a new directory"),
    ],
)
def test_wrong_flags_of_an_import_are_an_error_of_one_line(tools, exported, tmp_path, monkeypatch, argument, message):
    arguments = [f"--model={exported}", f"--out={tmp_path / 'ours'}", argument]
    monkeypatch.setattr(sys, "argv", ["import_hf.py", *arguments])
    status, out, err = tools("import_hf", *arguments)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


@pytest.mark.parametrize("name", ["import_hf", "export_hf"])
def test_without_the_library_an_error_says_what_to_install(name, exported, tools, tmp_path, monkeypatch):
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "hybrid_attn.convert.hf")
    monkeypatch.delattr("hybrid_attn.convert.hf")
    status, _, err = tools(name, f"--{'model' if name == 'import_hf' else 'checkpoint'}={exported}", f"--out={tmp_path / 'x'}")
    assert status == 2 and err == "error: Hugging Face files need the library safetensors: pip install 'hybrid_attn[hf]'\n"


def run_tool(name, *args):
    command = [sys.executable, ROOT / "tools" / f"{name}.py", *args]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_tools_import_and_export_a_model_with_its_tokenizer(exported, tmp_path, one_device):
    edit(exported, eos_token_id=3, max_position_embeddings=500_000)
    (exported / "tokenizer.json").write_text("{}")
    done = run_tool("import_hf", f"--model={exported}", f"--out={tmp_path / 'ours'}", "--optimiser")
    assert done.returncode == 0 and "parameters of cohere2, with config.json, tokenizer.json" in done.stdout, done.stderr
    saved = config.build(checkpoint.read_config(tmp_path / "ours"))
    assert checkpoint.steps(tmp_path / "ours") == [0]
    assert saved.model == families.model_of(hf.read_config(exported))
    assert saved.data.tokenizer == str(tmp_path / "ours" / "companions" / "tokenizer.json")
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), flops.shapes(saved.model))
    expected = read(exported)[1]
    assert_same(checkpoint.read_params(tmp_path / "ours", bare), expected)

    checkpoints = checkpoint.Checkpoints(tmp_path / "ours", keep=1, every=1)
    state, start, _ = loop.first_state(saved, [], jax.sharding.get_mesh(), checkpoints)  # as training does
    checkpoints.close()
    assert start == 0
    assert_same(state.params, expected)

    done = run_tool("export_hf", f"--checkpoint={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}")
    assert done.returncode == 0 and "Cohere2ForCausalLM in float32" in done.stdout, done.stderr
    assert "INFO" not in done.stderr and "I1" not in done.stderr
    assert_same(read(tmp_path / "theirs")[1], expected)
    described = hf.read_config(tmp_path / "theirs")
    assert (described["eos_token_id"], described["max_position_embeddings"]) == (3, 500_000)
    assert (tmp_path / "theirs" / "tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "ours", "theirs"]


def test_a_failed_import_leaves_nothing_behind(exported, tmp_path):
    edit_tensors(exported, lambda arrays: arrays.pop("model.norm.weight"))
    done = run_tool("import_hf", f"--model={exported}", f"--out={tmp_path / 'new' / 'ours'}")
    assert done.returncode == 2 and "model.norm.weight: missing" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
