"""Objectives by the names that a stage's `objective` may have."""

from hybrid_attn.data.packed import ARRAYS
from hybrid_attn.train.objectives.next_token import NEXT_TOKEN
from hybrid_attn.train.objectives.objective import Objective
from hybrid_attn.trees import check

OBJECTIVES: dict[str, Objective] = {"next_token": NEXT_TOKEN}


def check_fields(name: str) -> None:
    """ValueError where the data does not make a batch field that an objective needs."""
    missing = [field for field in OBJECTIVES[name].fields if field not in ARRAYS]
    fields = ", ".join(missing)
    check(not missing, f"the objective {name!r} needs the batch fields {fields}, and the data makes {', '.join(ARRAYS)}")
