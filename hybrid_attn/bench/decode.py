"""Seconds of a new token after a prompt, here and in `transformers`."""

from hybrid_attn.bench import answers
from hybrid_attn.bench.measurement import Processes
from hybrid_attn.bench.part import Figure, Part, Run, ratios

TARGET = 3.0  # the time of `transformers` over ours, at all lengths
OPTIONS = answers.CHUNK | {"new": 32}  # tokens of an answer


def measure(processes: Processes, run: Run) -> list[dict]:
    return answers.measure(processes, run, "decode", run.options["new"], "token")


def table(records: list[dict]) -> str:
    return answers.table(records, "ms a token", 1e3, "one")


def figures(records: list[dict]) -> dict[str, Figure]:
    return {name: x._replace(target=TARGET) for name, x in ratios(records, "seconds").items()}


PART = Part("A new token beside transformers", "configs/bench.py", ("2K", "8K", "32K"), measure, table, figures, OPTIONS)
