"""A checkpoint loads as it was saved, and whatever does not fit it is an error in one line."""

import json
import shutil

import jax
import pytest
from conftest import ONE_LAYER, assert_close, mesh_of, random_params, tiny
from test_tokenizer import byte_level

from hybrid_attn import checkpoint, config
from hybrid_attn.data import chat
from hybrid_attn.data.tokenizer import ByteTokenizer, load_tokenizer
from hybrid_attn.infer import loading


def save(directory, c, tokenizer_hash="bytes", steps=(3, 7), **records):
    """Checkpoints of `c` as training writes them; the parameters of step n have seed n."""
    stage = {"tokenizer": tokenizer_hash} if tokenizer_hash else {}
    with jax.set_mesh(mesh_of()):
        checkpoints = checkpoint.Checkpoints(directory, keep=5, every=1)
        for step in steps:
            state = {"params": random_params(c.model, step)}
            checkpoints.save(step, state, {"stage_steps": [step], "stage": stage, **records}, config.to_dict(c))
        checkpoints.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    save(workdir / "checkpoints", tiny())
    return workdir


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "copy")
    return tmp_path / "copy"


def test_a_workdir_or_its_checkpoints_give_the_newest_or_the_one_asked_for(run, one_device):
    for directory, step, seed in ((run, None, 7), (str(run / "checkpoints"), None, 7), (run, 3, 3)):
        c, params, tokenizer = loading.load(directory, step)
        assert c == config.build_checkpoint_config(config.to_dict(tiny())) and tokenizer.hash == "bytes"
        assert_close(params, random_params(c.model, seed), 0)
    assert loading.stop_tokens(run, tokenizer) == [257]


def test_layers_of_every_group_are_saved_and_loaded(tmp_path, one_device):
    c = tiny({"model.prefix": "G", "model.num_layers": 4})
    save(tmp_path, c)
    loaded = loading.load(tmp_path)
    assert set(loaded.params) == {"embed", "prefix", "periods", "tail", "final_norm"}
    assert_close(loaded.params, random_params(c.model, 7), 0)


def test_parameters_lie_on_the_mesh_in_force(run):
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2)) as _:
        loaded = loading.load(run)
        q = loaded.params["periods"]["L0"]["attention"]["q"]
        assert len(q.sharding.device_set) == 4 and q.addressable_shards[0].data.size == q.size // 4
        assert_close(loaded.params, random_params(loaded.config.model, 7), 0)
    with jax.set_mesh(mesh_of(tensor=4)), pytest.raises(ValueError, match="model.num_kv_heads 2 does not split over 4 tensor"):
        loading.load(run)


def test_the_chat_template_is_that_of_the_conversations_or_of_the_tokenizer(run, tmp_path):
    (tmp_path / "mine.jinja").write_text("mine")
    assert loading.chat_template(str(run / "checkpoints"), 3) == chat.load_template(None, "bytes")
    for name, recorded in (("trained", {"chat_template": "own"}), ("started", {"init_from": {"chat_template": "own"}})):
        save(tmp_path / name, tiny(ONE_LAYER), steps=(1,), **recorded)
        assert loading.chat_template(tmp_path / name, 1) == "own"
        assert loading.chat_template(tmp_path / name, 1, str(tmp_path / "mine.jinja")) == "mine"
    save(tmp_path / "wrong", tiny(ONE_LAYER), steps=(1,), chat_template=3)
    with pytest.raises(ValueError, match="chat_template=3 of a data state must be text"):
        loading.chat_template(tmp_path / "wrong", 1)


def saved_tokenizer(directory, **changes):
    directory.mkdir(parents=True, exist_ok=True)
    t = byte_level()
    t.add_tokens(list(changes.get("more", ())))
    t.save(str(directory / "tokenizer.json"))
    return load_tokenizer(str(directory / "tokenizer.json"))


def test_a_trained_tokenizer_is_identified_by_its_hash_and_loaded_from_beside_the_checkpoint(tmp_path, one_device):
    tokenizer = saved_tokenizer(tmp_path / "tokenizer")
    c = tiny({"data.tokenizer": str(tmp_path / "tokenizer" / "tokenizer.json")})
    save(tmp_path / "ckpt", c, tokenizer.hash)
    assert loading.load(tmp_path / "ckpt").tokenizer.hash == tokenizer.hash
    saved_tokenizer(tmp_path / "tokenizer", more=["another"])
    with pytest.raises(
        ValueError, match=f"of step 7 in .*ckpt was trained with a tokenizer of hash {tokenizer.hash[:12]}, and .* has"
    ):
        loading.load(tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "tokenizer")
    copy = tmp_path / "ckpt" / "companions" / "tokenizer.json"
    with pytest.raises(ValueError, match=f"there is no such file; put the tokenizer.json that it was trained with at {copy}"):
        loading.load(tmp_path / "ckpt")
    saved_tokenizer(tmp_path / "ckpt" / "companions")
    assert loading.load(tmp_path / "ckpt").tokenizer.hash == tokenizer.hash


def test_an_imported_model_brings_its_tokenizer_and_its_eos_ids_wherever_it_is_moved(tmp_path, one_device):
    tokenizer = saved_tokenizer(tmp_path / "old" / "companions")
    save(tmp_path / "old", tiny({"data.tokenizer": str(tmp_path / "old" / "companions" / "tokenizer.json")}), None, steps=[0])
    (tmp_path / "old" / "companions" / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "old").rename(tmp_path / "new")
    loaded = loading.load(tmp_path / "new")
    assert loaded.tokenizer.hash == tokenizer.hash
    assert loading.stop_tokens(tmp_path / "new", loaded.tokenizer) == sorted({5, tokenizer.eos})
    (tmp_path / "new" / "companions" / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert loading.stop_tokens(tmp_path / "new", loaded.tokenizer) == sorted({5, 8, 9, tokenizer.eos})


@pytest.mark.parametrize("eos", ["</s>", "7", True, -1, 2**31, 1.5, [3, None], [[3]], {"id": 3}, float("nan")])
def test_an_eos_token_id_that_is_no_id_is_refused_with_its_file(copied, eos):
    (copied / "companions").mkdir()
    file = copied / "companions" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(
        ValueError, match="generation_config.json has eos_token_id=.*, which must be an id, a list of ids, or null"
    ):
        loading.stop_tokens(copied, ByteTokenizer())


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ('{"eos_token_id": null}', [257]),
        ("{}", [257]),
        ('{"eos_token_id": []}', [257]),
        ("[]", None),
        ("{", None),
        ("[" * 10**5, None),
    ],
)
def test_a_generation_config_may_have_no_eos_and_must_be_an_object(copied, text, ids):
    (copied / "companions").mkdir()
    (copied / "companions" / "generation_config.json").write_text(text)
    if ids:
        assert loading.stop_tokens(copied, ByteTokenizer()) == ids
    else:
        with pytest.raises(ValueError, match="generation_config.json (must hold an object|is not JSON|is nested too deeply)"):
            loading.stop_tokens(copied, ByteTokenizer())


def test_a_vocabulary_of_another_size_is_refused(tmp_path, one_device):
    save(tmp_path, tiny({"model.vocab_size": 1024}), None, steps=[0])  # imported without its tokenizer
    with pytest.raises(
        ValueError, match="of step 0 in .* has a vocabulary of 1024, and the tokenizer bytes has 258 ids; put the tokenizer"
    ):
        loading.load(tmp_path)


def test_directories_without_checkpoints_are_named_with_what_to_do(run, tmp_path, one_device):
    with pytest.raises(ValueError, match="nowhere is no directory; name a run's workdir, or the folder of its checkpoints"):
        loading.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no complete checkpoint; name a run's workdir"):
        loading.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="is a Hugging Face model; make a checkpoint of it: tools/import_hf.py --model=.* --out=DIR"
    ):
        loading.load(tmp_path)
    with pytest.raises(ValueError, match="checkpoints has no complete checkpoint of step 4; it has 3, 7"):
        loading.load(run, 4)


def test_a_checkpoint_without_a_config_and_one_that_changed_are_refused(copied, one_device):
    changed = max((copied / "3").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 255
    changed.write_bytes(bytes(content))
    with pytest.raises(
        ValueError, match="the checkpoint of step 3 in .*copy cannot be read: .*; use another --step, or copy it"
    ):
        loading.load(copied, 3)
    shutil.rmtree(copied / "7" / "config")
    with pytest.raises(ValueError, match="of step 7 in .*copy has no config that can be read: .*; use another --step, or copy"):
        loading.load(copied)


def save_values(directory, values, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(config, "to_dict", lambda c: values)
        save(directory, tiny(), steps=[1])


def test_groups_that_do_not_define_the_model_may_be_of_another_version(tmp_path, one_device, monkeypatch):
    values = config.to_dict(tiny())
    del values["evals"]["every"]
    del values["optim"]
    values["mesh"]["expert"] = 1
    save_values(tmp_path, values, monkeypatch)
    loaded = loading.load(tmp_path)
    assert loaded.config == config.build_checkpoint_config(config.to_dict(tiny()))
    assert_close(loaded.params, random_params(tiny().model, 1), 0)


@pytest.mark.parametrize(
    ("group", "added", "message"),
    [("model", "head_dims", "unknown key config.model.head_dims"), ("data", "eos", "config.data.eos")],
)
def test_an_unknown_key_in_a_group_that_defines_the_model_is_refused(tmp_path, one_device, monkeypatch, group, added, message):
    values = config.to_dict(tiny())
    values[group][added] = 1
    save_values(tmp_path, values, monkeypatch)
    with pytest.raises(ValueError, match=message):
        loading.load(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stage": [1]}, r"of step 1 in .* has stage=\[1\], which must be an object"),
        ({"stage": {"tokenizer": 7}}, "has stage.tokenizer=7, which must be a hash"),
        ({"stage_steps": 5}, "has stage_steps=5, which must be a list of numbers of steps"),
        ({"stage_steps": ["x"]}, "has stage_steps=.*x.*, which must be a list"),
    ],
)
def test_data_of_a_checkpoint_that_no_training_writes_is_refused(tmp_path, one_device, data, message):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, every=1)
    checkpoints.save(1, {"params": random_params(tiny().model)}, data, config.to_dict(tiny()))
    checkpoints.close()
    with pytest.raises(ValueError, match=message):
        loading.load(tmp_path)


def test_a_config_of_another_version_is_refused_with_the_key(tmp_path, one_device, monkeypatch):
    values = config.to_dict(tiny())
    del values["train"]["keep"]
    save_values(tmp_path, values, monkeypatch)
    with pytest.raises(
        ValueError, match="of step 1 in .* has a config that this version cannot read: config.train lacks keep.*; use the"
    ):
        loading.load(tmp_path)
