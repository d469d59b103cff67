"""Trains the cells of a study with several seeds, evaluates them, and writes the table, the plot and the verdicts.

    python tools/study.py studies/layouts --seeds=3
    python tools/study.py studies/layouts --seeds=3 --out=runs/again       # trains all anew, and compares with what is recorded

Each run is one of launch/train.py, with its config, checkpoints and evaluations. Runs go side by side, each on its share of
the cores. The same command goes on after an interruption: finished runs are not repeated, others go on from their checkpoint.
How to write a study: docs/studies.md. Exit codes: 0 done; 1 a run failed; 2 a wrong flag, study or config; 130 Ctrl-C.
"""

from pathlib import Path

from absl import app, flags

from hybrid_attn import programs
from hybrid_attn.trees import check

SEEDS = flags.DEFINE_integer("seeds", None, "Number of seeds; by default the study's.", 1)
ONLY = flags.DEFINE_list("only", [], "Cells that are trained; the page has all.")
PROCESSES = flags.DEFINE_integer(
    "processes", None, "Runs side by side; by default one for each core, or one with an accelerator.", 1
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the workdirs of the runs, by default runs/studies/NAME, or OUT/workdirs."
)
OUT = flags.DEFINE_string("out", None, "Folder of results, plot and page, by default that of the study.")
TRAIN = Path(__file__).parents[1] / "launch" / "train.py"


def run(*arguments: str) -> int:
    """The exit code."""
    check(len(arguments) == 1, "name the folder of a study, such as studies/layouts")
    from hybrid_attn.studies import program  # imports jax; --help stays fast

    options = program.Options(SEEDS.value, ONLY.value, PROCESSES.value, WORKDIR.value, OUT.value, TRAIN)
    return program.run(arguments[0], options)


def main(argv):
    programs.run(run, argv, arguments=1)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
