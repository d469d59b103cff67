"""Training steps of a model, and of the same with its windowed layer type in every layer, without the window."""

from hybrid_attn.bench import measurement, training
from hybrid_attn.bench.measurement import Processes
from hybrid_attn.bench.part import Figure, Part, Run, ratios


def measure(processes: Processes, run: Run) -> list[dict]:
    records = []
    for S in run.lengths:
        pair = {"ours": run.config, "full attention": measurement.full_attention(run.config)}
        pair = {name: training.ours(training.at_length(c, S, run.repeats)) for name, c in pair.items()}
        records += training.compare(processes, run, "layouts", pair, records)
    return records


def figures(records: list[dict]) -> dict[str, Figure]:
    """The time of full attention over ours, and the same over what the FLOPs predict."""
    made = ratios(records, "seconds")
    predicted = ratios(records, "computed_flops")
    more = {f"{name}, over the ratio of FLOPs": Figure(x.value / predicted[name].value, "times") for name, x in made.items()}
    return made | more


PART = Part("A step beside full attention", "configs/bench.py", ("8K", "32K", "64K"), measure, training.table, figures)
