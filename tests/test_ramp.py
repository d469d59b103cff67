"""Stages whose length is in tokens and whose batch grows: their steps, their batches, and runs that stop in the middle."""

import json
import re

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny
from trained import config_of, losses

from configs import base
from hybrid_attn import config
from hybrid_attn.data import documents, pipeline
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.model import flops
from hybrid_attn.parallel import fit
from hybrid_attn.train import loop
from hybrid_attn.train.steps import Progress, Timed

# Steps of 8 sequences up to 750 tokens, of 16 up to 1,500, then of 32: 192, 384 and 768 tokens.
RAMP = {"seq_len": 24, "batch": 32, "microbatches": 4, "mixture": {}, "batch_ramp": (8, 16), "batch_ramp_tokens": 1500}
SIZES = [8] * 4 + [16] * 2 + [32] * 2
LATER = {"steps": 3, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}


def stage_of(**changes):
    return tiny({"stages": [RAMP | changes]}).stages[0]


def simulated(stage, done):
    """The batch of each step until `done(steps, tokens)`: the size whose share of the ramp is not yet seen."""
    sizes, seen, number = [], 0, len(stage.batch_ramp)
    while not done(len(sizes), seen):
        waiting = [size for i, size in enumerate(stage.batch_ramp, 1) if seen * number < i * stage.batch_ramp_tokens]
        sizes.append(waiting[0] if waiting else stage.batch)
        seen += sizes[-1] * stage.seq_len
    return sizes


def test_each_step_has_the_size_whose_share_of_the_ramp_is_not_yet_seen():
    rng = np.random.default_rng(0)
    for _ in range(40):
        *ramp, batch = sorted(rng.choice(40, rng.integers(2, 6), replace=False) + 1)
        sizes = {"batch": int(batch), "microbatches": 1, "batch_ramp": [*map(int, ramp)], "seq_len": int(rng.integers(20, 60))}
        sizes["batch_ramp_tokens"], steps = int(rng.integers(1, 20_000)), int(rng.integers(1, 60))
        stage = stage_of(steps=steps, **sizes)
        expected = simulated(stage, lambda number, _, steps=steps: number == steps)
        assert [stage.batch_at(step) for step in range(steps)] == expected
        assert [stage.sequences(step) for step in range(steps + 1)] == np.cumsum([0, *expected]).tolist()
        tokens = int(rng.integers(1, 30_000))
        by_tokens = stage_of(steps=None, tokens=tokens, **sizes)
        assert by_tokens.steps == len(simulated(stage, lambda _, seen, tokens=tokens: seen >= tokens))


def test_a_stage_in_tokens_has_the_fewest_steps_that_see_them_and_is_saved_with_both():
    first, later = RAMP | {"steps": None, "tokens": 1537}, LATER | {"steps": None, "tokens": 2 * 8 * 48}
    c = tiny({"stages": [first, later]})
    assert [stage.steps for stage in c.stages] == [7, 2] and c.stage_at(7) == (1, 0)
    assert config.build(json.loads(json.dumps(config.to_dict(c)))) == c
    assert [stage.steps for stage in tiny({"stages": [first, later | {"batch": 4}]}).stages] == [7, 4]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 9, "tokens": 1537}, "steps=9 and tokens=1537 are both set, and these tokens take 7 steps; give one"),
        ({"steps": None}, "steps and tokens are both None; give the length of the stage"),
        ({"batch_ramp": ()}, "batch_ramp=() and batch_ramp_tokens=1500; give both"),
        ({"batch_ramp_tokens": None}, "batch_ramp=(8, 16) and batch_ramp_tokens=None; give both"),
        ({"batch_ramp": (16, 8)}, "batch_ramp=(16, 8) to batch=32 does not rise with every size"),
        ({"batch": 16}, "batch_ramp=(8, 16) to batch=16 does not rise with every size"),
        ({"batch_ramp": tuple(range(1, 10))}, "has 9 sizes, each compiled by itself; use at most 8"),
        ({"tokens": 10**18, "steps": None}, "tokens=1000000000000000000 take 1,302,083,333,333,"),
    ],
)
def test_lengths_and_ramps_that_do_not_fit_are_errors(changes, message):
    with pytest.raises(ValueError, match=r"stages\[0\]: .*" + re.escape(message)):
        tiny({"stages": [{"steps": 8} | RAMP | changes]})


@pytest.mark.parametrize(
    "changes, shards, message",
    [
        ({"batch_ramp": (8, 18)}, 4, "has 18, which does not split over 4 {} shards of 3 microbatches each; use 16 or 24"),
        ({"batch_ramp": (6, 16)}, 4, "stages[0]: batch_ramp has 6, which does not split over 4 {} shards; use 4 or 8"),
        ({"batch_ramp": (3, 16)}, 8, "batch_ramp has 3, which does not split over 8 {} shards; use 8"),
    ],
)
def test_a_ramp_that_does_not_divide_over_the_mesh_is_refused_with_sizes_that_do(changes, shards, message):
    mesh = {"mesh.data": 2, "mesh.fsdp": shards // 2}
    with pytest.raises(ValueError, match=re.escape(message.format("slice * data * fsdp * expert"))):
        fit.check(tiny(mesh | {"stages": [{"steps": 8} | RAMP | changes]}), shards)
    fit.check(tiny(mesh | {"stages": [{"steps": 8} | RAMP]}), shards)


def test_no_sequence_is_left_out_or_seen_twice_at_a_ramp_and_any_step_can_be_the_first():
    c = tiny({"stages": [RAMP | {"steps": 8}, LATER], "data.sources": {"text": base.source()}})
    corpus = documents.in_memory([(np.arange(500) % 251).astype(np.uint16)] * 3, range(3))
    stages = pipeline.stage_sequences(c, {"text": corpus}, load_tokenizer("bytes"))
    read = [jax.tree.map(np.asarray, batch) for _, batch in pipeline.batches(c, stages, [mesh_of()] * 2, 0)]
    assert [batch["tokens"].shape for batch in read] == [(size, 24) for size in SIZES] + [(8, 48)] * 3
    expected = stages[0].read([(number, 0, 24) for number in range(sum(SIZES))])
    for name in ("tokens", "segments"):
        of_ramp = np.concatenate([batch[name] for batch in read[:8]])
        np.testing.assert_array_equal(of_ramp, np.stack([sequence[name] for sequence in expected]))
    for start in (3, 4, 5, 7, 8):
        resumed = pipeline.batches(c, stages, [mesh_of()] * 2, start)
        for (_, batch), straight in zip(resumed, read[start:], strict=True):
            np.testing.assert_array_equal(batch["tokens"], straight["tokens"])


def test_tokens_and_the_time_left_follow_the_ramp():
    c = tiny({"stages": [RAMP | {"steps": 8}, LATER]})
    progress = Progress(c, [(4, 5)], [1e9, 1e9])
    assert progress.tokens_seen(6) == 24 * (3 * 8 + 16) and c.stage_tokens(11) == [24 * sum(SIZES), 3 * 8 * 48]
    step = {"loss": 2.0, "bits_per_byte": 3.0, "grad_norm": 1.0, "lr": 1e-3}
    progress.steps += [Timed(step, 1.0, 0.0, False, 0, 8), Timed(step, 3.0, 0.0, False, 0, 16)]
    values = progress.line(5)
    per_token, of_last = (flops.train_flops_per_token(c.model, length) for length in (24, 48))
    assert (values["tokens_per_s"], values["batch"]) == (24 * 12 / 2.0, 16)
    assert values["mfu"] == pytest.approx(24 * 12 * per_token / 1e9 / 2.0)
    left = 24 * (16 + 2 * 32) * per_token + 3 * 8 * 48 * of_last
    assert values["seconds_left"] == pytest.approx(left / (24 * 12 * per_token / 2.0))


@pytest.mark.slow
@pytest.mark.usefixtures("known_peak_and_no_pictures")
def test_a_run_that_stops_in_the_middle_of_its_ramp_goes_on_as_the_straight_run(corpus, tmp_path, capsys):
    ramp = RAMP | {"steps": 5, "batch": 16, "microbatches": 2, "batch_ramp": (8,), "batch_ramp_tokens": 500}
    every = {"evals.names": (), "train.checkpoint_every": 1, "train.keep": 9}
    c, sizes = config_of(corpus, stages=[ramp], **every), [8, 8, 8, 16, 16]
    assert loop.train(c, tmp_path / "straight")
    out = capsys.readouterr().out
    assert "; 3 steps of 8 x 24, 2 steps of 16 x 24\n" in out and "step         192 tokens" in out
    lines = [json.loads(line) for line in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == sizes
    assert [line["tokens_seen"] for line in lines] == (24 * np.cumsum(sizes)).tolist()
    assert [line["mfu"] is None for line in lines] == [True, False, False, True, False]  # compiled in steps 1 and 4
    (tmp_path / "stopped/checkpoints").mkdir(parents=True)
    (tmp_path / "straight/checkpoints/2").rename(tmp_path / "stopped/checkpoints/2")
    with pytest.raises(ValueError, match="(?s)is in the middle of.*batch_ramp_tokens: 500 -> 400"):
        loop.train(config_of(corpus, stages=[ramp | {"batch_ramp_tokens": 400}], **every), tmp_path / "stopped")
    assert loop.train(c, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == {step: loss for step, loss in losses(tmp_path / "straight").items() if step > 2}
