"""The tables at the end of a training: one for each length, in columns, what is in all before its parts."""

import math
import sys

import pytest

from hybrid_attn.evals.evaluation import Baselines
from hybrid_attn.train import console

TOTAL = {"eval": "position", "source": "text", "length": 48, "tokens": 1234, "loss": 2.0, "stderr": 0.25, "bits_per_byte": 3.0}
RECORDS = [
    TOTAL | {"first": 0, "end": 16, "tokens": 200, "loss": 2.5},
    TOTAL,
    TOTAL | {"part": "recall", "loss": 1.0},
    {"eval": "recall", "source": "probe", "task": "recall of 4 pairs", "length": 48, "answers": 30, "accuracy": 0.5},
    {"eval": "needle", "needles": 1, "length": 96, "depth": 0.0, "answers": 2, "right": 1.0},
    {"eval": "needle", "needles": 1, "length": 96, "depth": 50.0, "answers": 2, "right": 2.0},
]
BIGRAM = [{"eval": "bigram", "source": "text", "length": 48, "bits_per_byte": 3.5}]


def test_a_length_has_a_table_whose_first_line_is_the_total_with_its_baselines_below_it():
    lines = console.evaluation_tables(RECORDS, Baselines(BIGRAM, 258), trained=48)
    assert lines[:9] == [
        "",
        "at 48 tokens (the length of training)",
        "                     of     score      ±  bits/byte        number",
        "loss (nats)          text   2.000  0.250      3.000  1,234 tokens",
        "  bigram model       text                     3.500",
        f"  chance             text   {math.log(258):.3f}             8.329",
        "  positions 0 to 15  text   2.500  0.250      3.000    200 tokens",
        "recall               probe  50.0%                      30 answers",
        "  chance             probe  25.0%",
    ]
    assert lines[9:] == [
        "",
        "at 96 tokens",
        "               of        score     number",
        "needles found  1 hidden  75.0%  4 answers",
    ]


@pytest.mark.parametrize("bits", [None, 3.0])
def test_a_loss_without_bytes_has_no_bits(bits):
    lines = console.evaluation_tables([TOTAL | {"bits_per_byte": bits}], Baselines([], 258), 1)
    assert ("bits/byte" in lines[2]) == (bits is not None)


def test_the_line_of_experts_has_the_metrics_that_a_step_has():
    values = {"loss": 2.0, "expert_load": 1.314, "router_entropy_bits": 1.5, "router_z": 0.5, "dropped_copies": 0.0}
    (_, line) = console.experts(values)
    assert "largest load 1.31 x mean, entropy of routers 1.50 bits, router z 0.5, 0 copies dropped: means" in line
    assert "entropy of attention gates 1.20 bits" in console.experts({"gate_entropy_bits": 1.2})[1]
    assert console.experts({"loss": 2.0}) == []


def test_the_ending_names_files_and_commands_that_a_shell_reads(tmp_path, monkeypatch):
    lines = console.ending("runs/my run", 300, tmp_path / "report.html", True, False)
    assert f"report       {tmp_path}/report.html" in lines
    assert "next         python tools/generate.py --checkpoint='runs/my run' --prompt='def main('" in lines
    assert any(line.endswith("--out='evals/my run' --trust_checkpoint_data") for line in lines)
    bare = console.ending("runs/x", 300, None, False, False)
    assert "report" not in bare[1] and "--trust" not in "".join(bare)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hybrid-train", "--config=mine.py"])
    installed = console.ending("runs/x", 300, None, False, False)
    assert "next         hybrid-generate --checkpoint=runs/x --prompt='def main('" in installed
    assert not [line for line in installed if "tools/" in line]
    assert "next         hybrid-chat --checkpoint=runs/x" in console.ending("runs/x", 300, None, False, True)
