"""Studies: configs that are trained with several seeds and compared. `tools/study.py` runs them: docs/studies.md.

`study.py` has the parts of a study, `metrics.py` what is read from the workdir of a run. `runs.py`, `children.py` and
`child.py` train the runs. `results.py` keeps their numbers, `statistics.py` and `compare.py` compare them, `page.py` and
`plot.py` show them, and `program.py` puts these together.
"""

from hybrid_attn.studies.metrics import POSITIVE, SHARE, Metric, Trained, evaluated, evaluations, logged, stays_below
from hybrid_attn.studies.plot import Curves, over_cells, over_metrics
from hybrid_attn.studies.study import Cell, Claim, Reach, Study

__all__ = [
    "POSITIVE", "SHARE", "Cell", "Claim", "Curves", "Metric", "Reach", "Study", "Trained", "evaluated", "evaluations", "logged",
    "over_cells", "over_metrics", "stays_below",
]  # fmt: skip
