"""Training steps of a model, and its steps that measure statistics (`train.statistics_every`)."""

from hybrid_attn.bench import training
from hybrid_attn.bench.measurement import Processes
from hybrid_attn.bench.part import Figure, Part, Run

EVERY = 10  # steps from one with statistics to the next
MEASURED = "with statistics"


def measure(processes: Processes, run: Run) -> list[dict]:
    records = []
    for S in run.lengths:
        c = training.at_length(run.config, S, run.repeats)
        pair = {"ours": training.ours(c), MEASURED: training.ours(c, True)}
        records += training.compare(processes, run, "statistics", pair, records)
    training.check_losses(records)
    return records


def figures(records: list[dict]) -> dict[str, Figure]:
    """The share of the time of steps that statistics cost, and of their time on all processors of a CPU."""
    by_name, made = {(r["tokens"], r["contender"]): r for r in records if "seconds" in r}, {}
    for (S, name), plain in by_name.items():
        if name == "ours" and (measured := by_name.get((S, MEASURED))):
            for key, of in {"seconds": "time", "cpu": "CPU time"}.items():
                cost = 100 * (measured[key] / plain[key] - 1) / EVERY
                made[f"cost of statistics at every {EVERY} steps in {of}, {S:,} tokens"] = Figure(cost, "percent")
    return made


PART = Part("Statistics of a step", "configs/bench.py", ("8K",), measure, training.table, figures)
