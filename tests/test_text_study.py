"""The study on text: its two sizes, the numbers that it reads from a run, and its figure."""

import dataclasses
import json
from pathlib import Path

import pytest

from hybrid_attn import config, config_file
from hybrid_attn.model import flops
from hybrid_attn.studies.metrics import Trained
from hybrid_attn.studies.results import Results
from hybrid_attn.train.cost import flops_per_token
from studies.text import config as text_config
from studies.text import parts

H100 = 989e12  # FLOP/s in bfloat16


def config_of(argument: str) -> config.Config:
    return config.build(config_file.load(f"{Path(text_config.__file__)}:{argument}"))


@pytest.mark.parametrize("size", ["", "-150m"])
def test_the_layouts_have_equal_sizes_and_tokens_and_the_same_sequences(size):
    rope, hybrid = (config_of(f"{name}{size}") for name in parts.LAYOUTS)
    assert (rope.model.layers[:4], hybrid.model.layers[:4]) == ("RRRR", "LLLG")
    norms = 2 * hybrid.model.head_dim * hybrid.model.num_layers // 4  # QK-norm of global layers
    assert flops.parameters(hybrid.model) - flops.parameters(rope.model) == norms
    alike = [[dataclasses.replace(x, override=None) for x in c.stages] for c in (rope, hybrid)]
    assert rope.data == hybrid.data and alike[0] == alike[1] and rope.evals == hybrid.evals
    assert {x.model.kinds["L"].window for x in map(hybrid.at, range(len(hybrid.stages)))} == ({4096} if size else {16, 512})
    assert rope.stages[-1].seq_len == parts.TRAINED
    assert tuple(round(x * parts.TRAINED) for x in rope.evals.lengths) == parts.LENGTHS


def test_the_large_size_takes_an_hour_of_one_gpu():
    for name in parts.LAYOUTS:
        c = config_of(f"{name}-150m")
        assert 145e6 < flops.parameters(c.model) < 155e6
        spent = sum(flops_per_token(c.at(i)) * x.steps * x.batch * x.seq_len for i, x in enumerate(c.stages))
        assert 0.8 < spent / (0.4 * H100) / 3600 < 1


@pytest.mark.parametrize("argument", ["nope", "rope-8b"])
def test_other_sizes_are_refused(argument):
    with pytest.raises(ValueError, match="write rope, hybrid, rope-150m or hybrid-150m"):
        text_config.get_config(argument)


def lines_of(letters: str) -> list[dict]:
    """What a run writes of its last step, with a number for each metric."""
    losses = [
        {"eval": "position", "source": "text", "length": parts.LONGEST, "first": x, "bits_per_byte": 2 - x / 2**15}
        for x in parts.FIRSTS
    ]
    recalled = [x | {"part": "recall", "bits_per_byte": 9.0} for x in losses]
    digits = [{"eval": "recall", "source": "needles", "length": x, "accuracy": 0.75} for x in parts.LENGTHS]
    grid = [
        {"eval": "needle", "length": x, "depth": float(depth), "needles": needles, "answers": 2 * needles, "right": depth == 50}
        for x in parts.LENGTHS
        for depth in parts.DEPTHS
        for needles in (1, 4)
    ]
    mass = [
        {
            "eval": "attention_mass",
            "source": "text",
            "length": x,
            "kind": letter,
            "needle": {"L": 0.0, "G": 0.2, "R": 0.1}[letter],
        }
        for x in parts.LENGTHS
        for letter in letters
    ]
    return [{"step": 8, **x} for x in (*losses, *recalled, *digits, *grid, *mass)]


def test_its_metrics_are_read_from_the_lines_of_a_run_and_drawn(tmp_path):
    study, lines = parts.study("", "A title"), []
    for cell, letters in (("rope", "R"), ("hybrid", "GL")):
        old = [{**lines_of(letters)[0], "step": 4}]
        (tmp_path / "evals.jsonl").write_text("".join(json.dumps(x) + "\n" for x in old + lines_of(letters)))
        run = Trained(tmp_path, 8, 1.0, 1.0, 1)
        values = {name: metric.read(run) for name, metric in study.metrics.items()}
        assert values[parts.LOSS[4096]] == 1.875 and values[parts.DIGITS[8192]] == 0.75
        assert (
            values[parts.RETRIEVED[8192]] == 0.1 and values[parts.GRID[8192, 50]] == 0.5 and values[parts.GRID[8192, 25]] == 0
        )
        assert values[parts.MASS[8192, "full attention"]] == (0.1 if cell == "rope" else 0.2)
        assert values[parts.MASS[8192, "window"]] == (None if cell == "rope" else 0)
        lines.append({"cell": cell, "seed": 0, "metrics": values})
    across, *grids = study.plot(Results(study, lines)).axes
    assert [line.get_ydata()[0] for line in across.lines[:2]] == [2 - 2**-7] * 2
    assert [x.get_text() for x in grids[0].texts] == [
        f"{50 if depth == 50 else 0}%" for depth in parts.DEPTHS for _ in range(3)
    ]
    (tmp_path / "evals.jsonl").write_text(json.dumps(lines_of("R")[0]) + "\n")
    with pytest.raises(ValueError, match="has no needles at 8,192 tokens"):
        study.metrics[parts.RETRIEVED[8192]].read(run)
