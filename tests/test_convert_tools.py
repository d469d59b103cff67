"""tools/import_hf.py and tools/export_hf.py: a model and its tokenizer in both directions, and new directories."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl.testing import flagsaver
from conftest import random_params, tiny, tool
from converted import HYBRID, ROOT, assert_same, edit, edit_tensors, read, write
from evaluated import everything, store

from hybrid_attn import checkpoint, config, programs
from hybrid_attn.convert import families, hf
from hybrid_attn.model import abstract_params, flops
from hybrid_attn.train import loop


@pytest.fixture
def exported(tmp_path, one_device):
    """A directory of HYBRID as cohere2."""
    return write(tmp_path / "exported", HYBRID, random_params(HYBRID))


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


def test_output_that_cannot_be_moved_stays_in_its_temporary_directory_which_is_named(tmp_path):
    with pytest.raises(OSError, match=r"out could not be created .*; its content is in (\S+)") as error:
        with hf.new_directory(tmp_path / "out") as directory:
            (directory / "work").write_text("x")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "taken").write_text("x")
    kept = Path(str(error.value).rpartition(" ")[2])
    assert kept == directory and (kept / "work").read_text() == "x"


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


def save_run(workdir, seed, **data):
    """Writes a run of HYBRID like training does, with more `data` in its state, and returns its parameters."""
    params = random_params(HYBRID, seed)
    c = config.to_dict(tiny()) | {"model": config.to_dict(HYBRID)}
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=1, every=1)
    checkpoints.save(3, {"params": params}, {"stage_steps": [3], "stage": {"tokenizer": "bytes"}} | data, c, wait=True)
    checkpoints.close()
    return params


def test_a_workdir_of_any_name_is_exported_to_a_directory_of_any_name(tools, tmp_path, one_device):
    """Beside it is a run whose name would be the URL-decoded one."""
    save_run(tmp_path / "a b", seed=1)
    workdir, out = tmp_path / "a%20b", tmp_path / "out#1?%20"
    params = save_run(workdir, seed=2)
    for directory in (workdir, workdir / "checkpoints"):
        status, output, err = tools("export_hf", f"--checkpoint={directory}", f"--out={out}")
        assert status == 0 and output.startswith(f"{out}: Cohere2ForCausalLM"), err
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


def test_an_export_has_a_model_card_of_its_evaluation(tools, tmp_path, one_device):
    save_run(tmp_path / "run", seed=1, imported="cohere2 from /cache/models--owner--name/snapshots/0123")
    model = {"seq_len": 48, "layers": "LLGLL", "parameters": flops.parameters(HYBRID)}
    for step in (2, 3):
        store(tmp_path / f"evals/{step}", *everything(0.5), step=step, model=model)
    command = "export_hf", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"
    status, _, err = tools(*command, f"--evaluation={tmp_path}/evals/2")
    assert status == 2 and "is of step 2, and the export of step 3" in err and not (tmp_path / "out").exists()
    status, said, err = tools(*command, f"--evaluation={tmp_path}/evals/3")
    assert status == 0 and "README.md" in said, err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n# out\n" in card and "\nbase_model: owner/name\n" in card and "- initial parameters: owner/name\n" in card


def test_a_card_begins_with_an_import_a_checkpoint_or_random_parameters(tools, tmp_path):
    with tool("export_hf") as program:
        began_with, shown = program.began_with, program.without_folders
    assert began_with({"stage_steps": []}) is None
    assert shown(began_with({"imported": "llama from /models/Llama-3.1-8B"})) == "llama from Llama-3.1-8B"
    assert shown(began_with({"imported": "a slerp merge of 2 checkpoints"})) == "a slerp merge of 2 checkpoints"
    of_run = {"init_from": {"path": f"{tmp_path}/base/checkpoints", "step": 300}}
    assert shown(began_with(of_run)) == "the checkpoint of step 300 in base"
    for name, said in (("x/y", "--base_model is for the model card"), ("/x", "--base_model=/x is no id")):
        arguments = [f"--base_model={name}", *[f"--evaluation={tmp_path}"] * (name == "/x")]
        status, _, err = tools("export_hf", f"--checkpoint={tmp_path}", f"--out={tmp_path}/out", *arguments)
        assert status == 2 and said in err and err.count("\n") == 1


def test_an_export_has_the_chat_template_of_the_conversations(tools, tmp_path, one_device):
    template = "{{ messages[0]['content'] }}é\r\n"
    save_run(tmp_path / "run", 0, chat_template=template)
    for other in (None, "of the imported model"):
        if other is not None:
            companions = tmp_path / "run" / "checkpoints" / "companions"
            companions.mkdir()
            (companions / "chat_template.jinja").write_text(other)
        status, said, err = tools("export_hf", f"--checkpoint={tmp_path}/run", f"--out={tmp_path}/{other}")
        assert status == 0 and said.endswith("with config.json, chat_template.jinja\n"), err
        assert (tmp_path / f"{other}" / "chat_template.jinja").read_bytes().decode() == template


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
def test_without_the_library_an_error_names_the_package_to_install(name, exported, tools, tmp_path, monkeypatch):
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


def test_the_tools_import_and_export_a_model_with_its_tokenizer(exported, tools, tmp_path, one_device):
    edit(exported, eos_token_id=3, max_position_embeddings=500_000)
    (exported / "tokenizer.json").write_text("{}")
    done = run_tool("import_hf", f"--model={exported}", f"--out={tmp_path / 'ours'}", "--optimiser")
    assert done.returncode == 0 and "parameters of cohere2, with config.json, tokenizer.json" in done.stdout, done.stderr
    assert "INFO" not in done.stderr and "I1" not in done.stderr
    saved = config.build(checkpoint.read_config(tmp_path / "ours"))
    assert checkpoint.steps(tmp_path / "ours") == [0]
    assert saved.model == families.model_of(hf.read_config(exported))
    assert saved.data.tokenizer == str(tmp_path / "ours" / "companions" / "tokenizer.json")
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract_params(saved.model))
    expected = read(exported)[1]
    assert_same(checkpoint.read_params(tmp_path / "ours", bare), expected)

    checkpoints = checkpoint.Checkpoints(tmp_path / "ours", keep=1, every=1)
    state, start, _ = loop.first_state(saved, [], jax.sharding.get_mesh(), checkpoints)  # as training does
    checkpoints.close()
    assert start == 0
    assert_same(state.params, expected)

    status, said, error = tools("export_hf", f"--checkpoint={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}")
    assert status == 0 and "Cohere2ForCausalLM in float32" in said, error
    assert_same(read(tmp_path / "theirs")[1], expected)
    described = hf.read_config(tmp_path / "theirs")
    assert (described["eos_token_id"], described["max_position_embeddings"]) == (3, 500_000)
    assert (tmp_path / "theirs" / "tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "ours", "theirs"]


def test_a_failed_import_leaves_nothing_behind(exported, tools, tmp_path):
    edit_tensors(exported, lambda arrays: arrays.pop("model.norm.weight"))
    status, _, error = tools("import_hf", f"--model={exported}", f"--out={tmp_path / 'new' / 'ours'}")
    assert status == 2 and "model.norm.weight: missing" in error
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
