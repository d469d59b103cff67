"""Records: who recalls most at 16 times the training length for a CPU-minute. Every other .py file of this folder is a row.

The page is docs/records.md, which says how to add a file.
"""

from pathlib import Path

from hybrid_attn import config, config_file
from hybrid_attn.studies import POSITIVE, SHARE, Cell, Claim, Curves, Metric, Study, Trained, evaluated
from hybrid_attn.studies.results import Results
from hybrid_attn.studies.statistics import ordered
from hybrid_attn.trees import check, differences

FOLDER = Path(__file__).parent
BASELINE, BASE = "rnope_swa", "studies/layouts/config.py:rnope_swa"
SEEDS = 3
LONGEST = 64  # tokens of a training sequence
FAR = evaluated("recall", "accuracy", {"source": "probe", "length": 16 * LONGEST}, bounds=SHARE)
RECALL, MERIT = "recall at 1,024", "recall per CPU-minute"


def per_minute(run: Trained) -> float | None:
    return None if run.cpu_seconds is None else FAR.read(run) / (run.cpu_seconds / 60)


def fixed(c: config.Config) -> dict:
    """What every row has in common with the baseline."""
    values = config.to_dict(c)
    probe, others = values["data"]["sources"].get("probe"), {"stages[-1].seq_len": c.stages[-1].seq_len}
    return {"data": {"sources": {"probe": probe}}, "evals": values["evals"], "init_from": values["init_from"], **others}


def check_row(path: Path) -> None:
    """ValueError where a row has longer sequences, other held-out sequences, or more information than the rules allow."""
    check(path.stem != BASELINE, f"{path} has the name of the baseline; give it another one")
    c, baseline = (config.build(config_file.load(file)) for file in (str(path), BASE))
    longest = max(stage.seq_len for stage in c.stages)
    check(longest <= LONGEST, f"{path} trains on sequences of {longest} tokens, and at most {LONGEST} are allowed")
    texts = [name for name, source in c.data.sources.items() if source.task is None]
    check(not texts, f"{path} reads documents in data.sources.{', '.join(texts)}; give each source a task")
    check("probe" in c.weights(-1), f"{path} has no source probe in its last stage, whose sources are evaluated")
    lines = differences(fixed(baseline), fixed(c))
    check(not lines, f"{path} changes what all rows share (the baseline's -> its own): {'; '.join(lines)}")


def claims(results: Results) -> list[Claim]:
    """That the best row beats the others, each with all seeds, in which it learned the task."""
    rows = [row for row in ordered(results) if len(results.learned(row)) == len(results.of(row)) >= SEEDS]
    return [Claim(f"{rows[0]} beats {row}.", rows[0], row, MERIT) for row in rows[1:]]


def get_study() -> Study:
    files = sorted(path for path in FOLDER.glob("*.py") if path.name != "study.py")
    for path in files:
        check_row(path)
    cells = {BASELINE: Cell(BASE), **{path.stem: Cell(path.name) for path in files}}
    return Study(
        title="Records: recall at 16 times the training length",
        question="How little computation is enough to recall pairs at 1,024 tokens after training at 64?",
        cells=cells,
        metrics={
            RECALL: FAR,
            MERIT: Metric(per_minute, bounds=POSITIVE),
            "recall per TFLOP": Metric(lambda run: FAR.read(run) / (run.flops / 1e12), bounds=POSITIVE),
        },
        learned=(RECALL, 0.95),
        claims=claims,
        plot=Curves({name: {MERIT: {MERIT: (name, MERIT)}} for name in cells}, "", MERIT, "linear"),
        seeds=SEEDS,
        page="../../docs/records.md",
        sorted_by=MERIT,
        one_core=True,
    )
