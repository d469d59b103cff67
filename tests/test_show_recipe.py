"""A recipe has the numbers and the cost of each stage, and its picture is written; a wrong flag writes nothing."""

import pytest
from absl.testing import flagsaver
from conftest import tiny, tool
from matplotlib.image import imread

from hybrid_attn import config
from hybrid_attn.model import flops
from hybrid_attn.parallel.mesh import abstract_mesh
from hybrid_attn.programs import parse

CONFIG = """
from hybrid_attn.configs import base


def get_config():
    c = base.get_config()
    c.model.update(pattern="LG", num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48)
    c.model.kinds.L.window = 16
    c.data.sources = {"web": base.source(paths=("a",)), "books": base.source(paths=("b",))}
    first, last = (c.stages[0].copy_and_resolve_references() for _ in range(2))
    first.update(steps=None, tokens=9000, seq_len=64, batch=32, batch_ramp=(8, 16), batch_ramp_tokens=4000)
    last.update(steps=10, seq_len=128, batch=16)
    first.mixture, last.mixture = {"web": 3.0, "books": 1.0}, {"books": 1.0}
    first.lr_schedule = base.lr_schedule(shape="constant", start=1e-3, warmup_tokens=1024)
    last.lr_schedule = base.lr_schedule(end=1e-4)
    c.stages = [first, last]
    return c
"""


@pytest.fixture(scope="module")
def program():
    with tool("show_recipe") as module:
        yield module


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(CONFIG)
    return f"--config={path}"


def shown(program, *arguments):
    with flagsaver.flagsaver():
        program.main(parse(["show_recipe.py", *arguments])[:1])


def test_each_stage_has_its_numbers_and_costs_and_the_picture_is_written(program, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "estimated_memory", lambda c, stage, mesh, _: (1 + stage.index) * mesh.shape["data"] * 1e9)
    shown(program, recipe, "--chip=v5p", "--chips=8", "--mfu=0.5", f"--out={tmp_path}/recipe.png")
    out = capsys.readouterr().out
    first, last = ([cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:3] in ("| 1", "| 2"))
    tokens = 64 * (4 * 8 + 2 * 16 + 3 * 32), 10 * 16 * 128  # 4 x 512 tokens reach 2,000, 2 x 1,024 reach 4,000
    assert first[1:7] == ["9", "64", "8 to 16 to 32", "10.2K", "0.0005 to 0.001 to 0.001", "books 0.25, web 0.75"]
    assert last[1:7] == ["10", "128", "16", "20.5K", "0.001 to 0.001 to 0.0001", "books"]
    with flagsaver.flagsaver():
        parse(["show_recipe.py", recipe])
        model = config.build(program.CONFIG.value.values).model
    costs = [n * flops.train_flops_per_token(model, length) for n, length in zip(tokens, (64, 128), strict=True)]
    assert [first[7], last[7]] == [f"{cost:.3g}" for cost in costs]
    assert [first[9], last[9]] == ["8.000 GB", "16.000 GB"]
    assert out.startswith(f"run          {sum(tokens):,} tokens in 19 steps; programs: 4\n")
    assert f"{sum(costs):.4g} FLOPs; time 0s on 8 x v5p at 50% of 4.59e+14 FLOP/s each" in out
    assert imread(tmp_path / "recipe.png").shape == (1500, 1350, 4)


def test_time_is_the_flops_over_the_share_of_the_peak_of_all_chips(program):
    stage = tiny().at(0)
    span = program.Span(stage, 0, 10**9, 8)
    with flagsaver.flagsaver():
        parse(["show_recipe.py", "--config=configs/base.py", "--mfu=0.25"])
        seconds = span.flops / (0.25 * 4 * 1e12)
        assert program.time_of([span], program.Chips("v5e", 4, "tpu", 1e12, None)) == program.duration(seconds)
        assert program.time_of([span], program.Chips("cpu", 4, "cpu", float("nan"), None)) == "unknown"


@pytest.mark.slow
def test_the_memory_has_the_shards_of_the_state_and_grows_with_the_batch_of_a_device(program):
    def estimate(batch, **sizes):
        c = tiny({"stages": [{"steps": 1, "seq_len": 48, "batch": batch, "microbatches": 1, "mixture": {}}]})
        return program.estimated_memory(c, c.at(0), abstract_mesh(**sizes), "cpu")

    one, two, split = estimate(4), estimate(8), estimate(16, fsdp=4)
    assert two > one > 16 * flops.parameters(tiny().model)  # bytes of a parameter, its two moments and its gradient
    assert split < one  # as many sequences on a device, and a quarter of most of the state


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--chips=6"], "stages[0]: batch 32 does not split over 6 slice * data * fsdp * expert shards; use 30 or 36"),
        (["--chips=16"], "batch_ramp has 8, which does not split over 16 slice * data * fsdp * expert shards; use 16"),
        (["--config.stages[0].trainable=nothing"], "stages[0].trainable names 'nothing', and this model has no such parameter"),
        (["--target=cpu:1", "--chips=2"], "--target=cpu:1 names chips; leave out --chip and --chips"),
        (["--out=recipe.jpg"], "--out=recipe.jpg must end in .png"),
        (["--out=missing/recipe.png"], "missing/recipe.png: its directory does not exist; make it first"),
    ],
)
def test_a_recipe_that_cannot_be_shown_is_an_error(program, recipe, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        shown(program, recipe, "--out=recipe.png", *arguments)
    error = capsys.readouterr().err
    assert (ended.value.code, len(error.splitlines())) == (2, 1) and message in error
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["recipe.py"]
