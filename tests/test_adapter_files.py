"""An adapter in files: merged into the matrices of a Hugging Face model."""

import dataclasses

import pytest
from absl.testing import flagsaver
from conftest import random_params, tool
from converted import HYBRID, assert_same, read
from test_adapters import merged

from hybrid_attn import checkpoint, config, programs
from hybrid_attn.config import NO_ADAPTER
from hybrid_attn.convert import hf
from hybrid_attn.model import transforms

TARGETS = ("*/attention/q", "*/attention/o", "*/mlp/down")


def with_adapter(type="lora", targets=TARGETS):
    return dataclasses.replace(HYBRID, adapter=dataclasses.replace(NO_ADAPTER, type=type, targets=targets, rank=3, alpha=6.0))


def saved(folder, model, params):
    c = config.to_dict(dataclasses.replace(config.build(config.base.get_config()), model=model))
    checkpoints = checkpoint.Checkpoints(folder, keep=1, every=1)
    checkpoints.save(3, {"params": params}, {}, c)
    checkpoints.close()


def export(*arguments):
    with tool("export_hf") as module, flagsaver.flagsaver():
        module.main(programs.parse(["export_hf.py", *arguments]))


def test_an_export_has_the_adapter_merged(tmp_path, one_device):
    model = with_adapter()
    params = random_params(model)
    saved(tmp_path / "saved", model, params)
    export(f"--checkpoint={tmp_path / 'saved'}", f"--out={tmp_path / 'out'}")
    assert len(hf.flat(params)) - len(hf.flat(merged(model, params))) == 2 * 5 * len(TARGETS)
    assert_same(read(tmp_path / "out")[1], merged(model, params))


def test_an_adapter_that_depends_on_the_token_is_not_merged(tmp_path, one_device, monkeypatch, capsys):
    monkeypatch.setitem(transforms.TRANSFORMS, "routed", transforms.TRANSFORMS["lora"]._replace(merged=None))
    model = with_adapter("routed")
    saved(tmp_path / "saved", model, random_params(model))
    with pytest.raises(SystemExit) as end:
        export(f"--checkpoint={tmp_path / 'saved'}", f"--out={tmp_path / 'out'}")
    message = "model.adapter.type='routed' depends on the token, and no matrix has the same products; lora can be merged"
    assert end.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()
