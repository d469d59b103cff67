"""Seconds until a prompt is read, here and in `transformers`, which reads it in one piece."""

from hybrid_attn.bench import answers
from hybrid_attn.bench.measurement import Processes
from hybrid_attn.bench.part import Figure, Part, Run, ratios

NEW = 2  # tokens of an answer
TARGETS = {2048: 1.2, 8192: 2.0, 32_768: 4.0}  # the time of `transformers` over ours, by tokens


def measure(processes: Processes, run: Run) -> list[dict]:
    return answers.measure(processes, run, "prefill", NEW, "prefill")


def table(records: list[dict]) -> str:
    return answers.table(records, "s", 1.0, "prompt")


def figures(records: list[dict]) -> dict[str, Figure]:
    return ratios(records, "seconds", TARGETS)


PART = Part("Prefill beside transformers", "configs/bench.py", ("2K", "8K", "32K"), measure, table, figures, answers.CHUNK)
