"""Objectives by the names that a stage's `objective` may have."""

from hybrid_attn.config import StageConfig
from hybrid_attn.data.packed import ARRAYS
from hybrid_attn.train.objectives.next_token import NEXT_TOKEN
from hybrid_attn.train.objectives.objective import Objective
from hybrid_attn.trees import check, choice

OBJECTIVES: dict[str, Objective] = {"next_token": NEXT_TOKEN}


def objective_of(config: StageConfig) -> Objective:
    """The objective of a stage; ValueError for one that is not in `OBJECTIVES`, and where the data lacks its batch fields."""
    name = config.objective
    objective = choice(f"stages[{config.index}].objective", name, OBJECTIVES)
    missing = ", ".join(field for field in objective.fields if field not in ARRAYS)
    check(not missing, f"the objective {name!r} needs the batch fields {missing}, and the data makes {', '.join(ARRAYS)}")
    return objective
