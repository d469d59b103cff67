"""A mesh is the first that fits, a cost that of the FLOPs, and the page has what the program prints."""

from pathlib import Path

import pytest
from absl.testing import flagsaver
from conftest import ONE_LAYER, tiny, tool

from hybrid_attn.programs import parse
from hybrid_attn.train.cost import flops_per_token


@pytest.fixture(scope="module")
def program():
    with tool("compare_meshes") as module:
        yield module


def shown(program, *arguments):
    with flagsaver.flagsaver():
        program.main(parse(["compare_meshes.py", *arguments])[:1])


def test_more_context_shards_are_taken_where_fewer_do_not_fit(program, monkeypatch):
    monkeypatch.setattr(program, "estimated_memory", lambda c, stage, mesh, _: 80 / mesh.shape["context"] + 10)
    assert program.cell(tiny(), 64, 8, 101).startswith("fsdp 8 x context 1:")
    assert program.cell(tiny(), 64, 8, 99).startswith("fsdp 4 x context 2:")
    assert program.cell(tiny(), 64, 8, 1) == "none fits"


def test_meshes_that_do_not_divide_are_left_out(program, monkeypatch):
    monkeypatch.setattr(program, "estimated_memory", lambda *arguments: 1.0)
    meshes = [(x.fsdp, x.context) for x in program.choices(tiny({"model.d_model": 24}), 12, 6)]
    assert meshes == [(6, 1), (3, 2)]  # 12 tokens are two slices for each of 2 shards; 6 is no multiple of 4
    assert [x.context for x in program.choices(tiny({"model.d_model": 24}), 6, 6)] == [1]


def test_an_error_that_no_mesh_cures_is_shown(program, monkeypatch):
    def fails(*_):
        raise ValueError("an error of the model")

    monkeypatch.setattr(program, "estimated_memory", fails)
    with pytest.raises(ValueError, match="an error of the model"):
        program.cell(tiny(), 64, 8, 1)


def test_an_estimate_has_the_shards_of_its_mesh(program):
    first, second = list(program.choices(tiny(ONE_LAYER), 64, 2))
    assert 0 < second.memory < first.memory


def test_a_row_of_costs_follows_from_the_flops_and_the_peak(program):
    with flagsaver.flagsaver():
        parse(["compare_meshes.py", "--config=configs/base.py", "--chip=v5e", "--mfu=0.5"])
        ((length, flops, tokens, hours),) = program.costs(tiny(), [64])
    of_token, speed = flops_per_token(program.with_mesh(tiny(), 64, 1, 1).at(0)), 0.5 * 197e12
    assert [length, flops, tokens] == ["64", f"{of_token / 1e9:.1f}", f"{speed / of_token:,.0f}"]
    assert hours == f"{1e9 * of_token / speed / 3600:,.0f}"


REFUSED = {
    "several stages": (["--config=configs/command_a.py:tiny"], "--config has 4 stages"),
    "chips": (["--config=configs/base.py", "--chips=16,x"], "--chips has 'x'; write numbers of chips, as 4096, 4K or 1M"),
    "a length": (["--config=configs/base.py", "--lengths=1G"], "--lengths has '1G'; write tokens, as 4096, 4K or 1M"),
    "a kernel": (["--config=configs/base.py", "--config.train.kernel=native"], "not on tpu"),
}


@pytest.mark.parametrize("arguments, said", REFUSED.values(), ids=REFUSED)
def test_a_wrong_flag_or_config_is_one_line(program, arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        shown(program, *arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


def test_a_length_may_be_in_k_or_m(program):
    assert program.lengths(["1M", "8K", "512"]) == [512, 8 * 1024, 1024**2]


@pytest.mark.slow  # traces a model of 8 B parameters for many meshes
def test_the_tables_of_the_page_are_the_output_of_the_program(program, capsys):
    shown(program, "--config=configs/hybrid_8k.py:8b")
    assert capsys.readouterr().out.strip() in (Path(__file__).parents[1] / "docs" / "meshes.md").read_text()
