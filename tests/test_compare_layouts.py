"""Costs of layouts are those of the models with their layers; a wrong layout is an error."""

import pytest
from conftest import tiny, tool

from hybrid_attn.model import flops


@pytest.fixture(scope="module")
def program():
    with tool("compare_layouts") as module:
        yield module


def test_a_layout_has_the_layer_types_of_the_config_and_its_own_window(program):
    model = tiny({"model.num_layers": 4}, L={"window": 7, "rope_theta": 50.0}, G={"qk_norm": "rms"}).model
    kinds = program.with_layout(model, "LRG/3").kinds
    assert [kinds[x].window for x in "LRG"] == [3, None, None]
    assert [kinds[x].rope_theta for x in "LRG"] == [50.0, 50.0, None]
    assert kinds["G"] == model.kinds["G"] and program.with_layout(model, "LG").kinds["L"] == model.kinds["L"]


def test_a_row_has_the_costs_of_its_layout_and_the_shares_of_the_first(program):
    model = tiny({"model.num_layers": 4}, L={"window": 7, "rope_theta": 50.0}, G={}).model
    full, local = (program.with_layout(model, x) for x in ("R", "LLLG"))
    rows = [line.split("|")[1:-1] for line in program.tables(model, ["R", "LLLG"], [1024]).splitlines() if "LLLG" in line]
    for row, cost in zip(rows, (flops.cache_bytes, flops.train_flops_per_token, flops.decode_flops), strict=True):
        assert row[1].strip() == "7" and f"({cost(local, 1024) / cost(full, 1024):.0%})" in row[2]


@pytest.mark.parametrize("layout", ["", "LLX", "LG/0", "LG/x"])
def test_a_wrong_layout_is_an_error_that_names_it(program, layout):
    with pytest.raises(ValueError, match=f"--layouts has {layout!r}; write patterns"):
        program.with_layout(tiny(L={"window": 7, "rope_theta": 50.0}, G={}).model, layout)
