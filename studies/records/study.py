"""Records: who recalls most at 16 times the training length for a CPU-minute. Every other .py file of this folder is a row.

The page is docs/records.md, which says how to add a file.
"""

from pathlib import Path

from hybrid_attn import config, config_file
from hybrid_attn.studies import SHARE, Cell, Claim, Curves, Metric, Study, evaluated
from hybrid_attn.trees import check

FOLDER = Path(__file__).parent
BASELINE = "rnope_swa"
LONGEST = 64  # tokens of a training sequence
RULES = {  # values that every row has
    "stages[-1].seq_len": LONGEST,
    "data.sources.probe.task": "recall",
    "data.sources.probe.pairs": 4,
    "evals.names": ("recall",),
    "evals.lengths": (1.0, 2.0, 4.0, 8.0, 16.0),
    "evals.tokens": 65_536,
    "evals.every": None,
    "init_from.path": None,
}
FAR = evaluated("recall", "accuracy", {"source": "probe", "length": 16 * LONGEST}, bounds=SHARE)


def get_study() -> Study:
    files = sorted(path for path in FOLDER.glob("*.py") if path.name != "study.py")
    cells = {BASELINE: Cell("studies/layouts/config.py:rnope_swa"), **{path.stem: Cell(path.name) for path in files}}
    for path in files:
        longest = max(stage.seq_len for stage in config.build(config_file.load(str(path))).stages)
        check(longest <= LONGEST, f"{path} trains on sequences of {longest} tokens, and at most {LONGEST} are allowed")
    merit = "recall per CPU-minute"
    return Study(
        title="Records: recall at 16 times the training length",
        question="How little computation is enough to recall pairs at 1,024 tokens after training at 64?",
        cells=cells,
        changes=RULES,
        metrics={
            "recall at 1,024": FAR,
            merit: Metric(lambda run: FAR.read(run) / (run.cpu_seconds / 60)),
            "recall per TFLOP": Metric(lambda run: FAR.read(run) / (run.flops / 1e12)),
        },
        learned=("recall at 1,024", 0.95),
        claims=[Claim(f"{name} beats the baseline.", name, BASELINE, merit) for name in cells if name != BASELINE],
        plot=Curves({name: {merit: {merit: (name, merit)}} for name in cells}, "", merit, "linear"),
        seeds=3,
        page="../../docs/records.md",
        sorted_by=merit,
    )
