"""The recipes of configs/: Command A's cooldown, the extension of a checkpoint, adapters, and RoPE that is dropped late."""

import dataclasses
import os
import signal

import jax
import pytest
from conftest import mesh_of, tiny
from trained import losses

from configs import adapt, command_a, drope, extend
from hybrid_attn import checkpoint, config
from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.configs import base
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.train import loop
from hybrid_attn.train.schedule import schedule
from hybrid_attn.train.step import init_state
from hybrid_attn.train.steps import Loop

pytestmark = pytest.mark.usefixtures("known_peak_and_no_pictures")


def test_command_a_has_the_published_lengths_steps_and_rates():
    c = config.build(command_a.get_config())
    stages = [(8_192, 30_000), (32_768, 10_000), (131_072, 5_000), (262_144, 5_000)]
    assert [(stage.seq_len, stage.steps) for stage in c.stages] == stages
    rates = schedule(c.optim, c.pieces)
    assert [float(rates(step)) for step in (0, 49_999)] == pytest.approx([2.5e-4, 1e-6], rel=1e-5)
    assert float(rates(25_000)) == pytest.approx((2.5e-4 + 1e-6) / 2, rel=1e-4)
    assert len({stage.batch * stage.seq_len for stage in c.stages}) == 1
    assert {stage.model for stage in c.each_stage} == {c.model}
    fit.check(c, 1024)


def test_its_tiny_form_has_the_same_ratios_and_no_other_layers():
    full, tiny_form = (config.build(command_a.get_config(variant)) for variant in ("full", "tiny"))
    for key in ("seq_len", "steps"):
        ratios = {getattr(a, key) / getattr(b, key) for a, b in zip(full.stages, tiny_form.stages, strict=True)}
        assert len(ratios) == 1
    assert tiny_form.model.pattern == full.model.pattern and tiny_form.model.kinds["G"] == full.model.kinds["G"]
    fit.check(tiny_form, 1)


def test_drope_has_positions_in_its_first_part_alone_and_as_many_steps_as_its_twin():
    c = config.build(drope.get_config())
    assert [stage.model.kinds["R"].rope_theta for stage in c.each_stage] == [10_000.0, None]
    assert c.total_steps == base.get_config().stages[0].steps
    assert c.stages[1].steps == c.total_steps / 5


@pytest.fixture
def trained(corpus, tmp_path):
    """The workdir of a run of 300 steps with a local layer, a global one, and a global one with RoPE; nothing is trained."""
    changes = {"data.sources": {"text": base.source(paths=(corpus,))}, "model.pattern": "LGR", "model.num_layers": 3}
    values = config.to_dict(tiny(changes, R={"rope_theta": 1000.0}))
    values["stages"][0] |= {"steps": 300, "seq_len": 32, "batch": 16}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 1, 1)
    with jax.set_mesh(mesh_of()):
        state = jax.jit(init_state, static_argnums=0)(config.build(values))
    checkpoints.save(300, state, {"stage_steps": [300], "stage": {}}, values, wait=True)
    checkpoints.close()
    return tmp_path / "run"


def test_a_checkpoint_is_extended_with_its_own_layers_and_yarn_for_global_rope_alone(trained, tmp_path):
    c = config.build(extend.get_config(f"16x,{trained}"))
    assert [stage.seq_len for stage in c.stages] == [128, 512]
    assert [stage.batch for stage in c.stages] == [4, 1]
    saved = checkpoint.read_config(trained / "checkpoints")
    assert [stage.steps for stage in c.stages] == [30, 30]
    assert [x.lr_schedule.start for x in c.stages] == pytest.approx([saved["optim"]["lr"] / 10] * 2)
    for factor, stage in zip((4.0, 16.0), c.each_stage, strict=True):
        kinds = stage.model.kinds
        assert (kinds["L"], kinds["G"]) == (config.build(saved).model.kinds["L"], config.build(saved).model.kinds["G"])
        scaling = kinds["R"].rope_scaling
        assert (scaling.type, scaling.factor, scaling.original_len) == ("yarn", factor, 32)


def test_a_scaling_that_a_layer_has_already_grows():
    scaling = (
        tiny(R={"rope_theta": 100.0, "rope_scaling.type": "yarn", "rope_scaling.factor": 4.0}).model.kinds["R"].rope_scaling
    )
    assert extend.scaled(scaling, 4, 64) == {"factor": 16.0}


@pytest.mark.slow
def test_an_extension_of_a_checkpoint_trains(trained, tmp_path):
    values = config.to_dict(config.build(extend.get_config(f"4x,{trained}")))
    values["stages"][0] |= {"steps": 2, "batch": 8}
    assert loop.train(config.build(values | {"evals": values["evals"] | {"names": []}}), tmp_path / "longer")
    assert list(losses(tmp_path / "longer")) == [1, 2]


@pytest.mark.parametrize("type", [pytest.param(x, marks=[pytest.mark.slow] * (x == "molora")) for x in adapt.TARGETS])
def test_an_adapter_of_a_checkpoint_has_its_model_and_its_batches(type, trained):
    c, saved = (
        config.build(adapt.get_config(f"{type},{trained}")),
        config.build(checkpoint.read_config(trained / "checkpoints")),
    )
    assert dataclasses.replace(c.model, adapter=saved.model.adapter) == saved.model and c.data == saved.data
    assert (c.stages[0].seq_len, c.stages[0].batch) == (saved.stages[-1].seq_len, saved.stages[-1].batch)
    with jax.set_mesh(make_mesh(c.mesh)):
        state, record = loop.init_from.first_state(c, jax.sharding.get_mesh(), "0")
    assert record[checkpoint.IS_BASE] and record["new"]


@pytest.mark.parametrize("argument", ["lor,runs/a", "lora", ""])
def test_an_adapter_without_a_type_or_a_checkpoint_is_refused(argument):
    with pytest.raises(ValueError, match=r"write adapt.py:TYPE,CHECKPOINT with a TYPE of lora, molora, ia3, mov"):
        adapt.get_config(argument)


@pytest.mark.parametrize("argument", ["8x,runs/a", "4x", ""])
def test_an_extension_without_a_factor_or_a_checkpoint_is_refused(argument):
    with pytest.raises(ValueError, match=r"write extend.py:4x,CHECKPOINT or extend.py:16x,CHECKPOINT"):
        extend.get_config(argument)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_command_a_stopped_around_every_edge_has_the_losses_of_a_run_that_is_not(corpus, tmp_path, monkeypatch):
    values = config.to_dict(config.build(command_a.get_config("tiny")))
    values["model"] |= {"d_model": 32, "d_ff": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    values["model"]["kinds"]["L"]["window"] = 5
    for stage, length in zip(values["stages"], (16, 32, 64, 128), strict=True):
        stage |= {"steps": 3, "seq_len": length, "batch": 1024 // length}
    values["mesh"] |= {"data": 1, "fsdp": -1}
    values["data"]["sources"]["text"]["paths"] = [str(corpus)]
    values["train"]["log_every"], values["evals"]["names"] = 1, []
    c = config.build(values)
    assert loop.train(c, tmp_path / "straight")
    next_batch = Loop.next_batch
    for last in (2, 3, 4, 5, 6, 7, 8, 9, 10):

        def stopped_at_last(self, last=last):
            if self.step == last - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return next_batch(self)

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "next_batch", stopped_at_last)
            assert not loop.train(c, tmp_path / "stopped")
        assert checkpoint.steps(tmp_path / "stopped" / "checkpoints")[-1] == last
    assert loop.train(c, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "straight")) == 12
